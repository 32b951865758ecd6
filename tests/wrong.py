"""Where things are used wrongly: a client of the stand-in, in a current directory of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from opencode_sync import OpenCodeClient
from tests.faults import standin_client


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory."""
    path = tmp_path / "workspace"
    path.mkdir()
    (tmp_path / "script.py").write_text("print('no line of a checkpoint')\n")
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def client(tmp_path: Path) -> Iterator[OpenCodeClient]:
    """A client of the stand-in, whose prompts say what it does."""
    with standin_client(tmp_path) as client:
        yield client
