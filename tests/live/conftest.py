"""The real opencode in front of a scripted model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import OpenCodeClient
from opencode_sync.testing import Answer, ChatRequest, ScriptedModel

MakeModel = Callable[..., ScriptedModel]


@pytest.fixture
def scripted() -> Iterator[MakeModel]:
    """Starts scripted models, and closes them after the test."""
    with ExitStack() as models:

        def start(
            replies: Answer | Iterable[Answer] | Callable[[ChatRequest], Answer], **settings: Any
        ) -> ScriptedModel:
            return models.enter_context(ScriptedModel(replies, **settings))

        yield start


@pytest.fixture
def client(opencode_binary: str) -> Iterator[OpenCodeClient]:
    """A client of the real binary, with the default settings."""
    with OpenCodeClient(opencode_binary) as client:
        yield client


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """An empty directory to work in."""
    path = tmp_path / "workspace"
    path.mkdir()
    return path
