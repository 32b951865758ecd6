"""A runner without processes, and what tests of batches do with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.scripted import ScriptedRunner


@pytest.fixture
def runner() -> Iterator[ScriptedRunner]:
    with ScriptedRunner(max_workers=2) as runner:
        yield runner


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a checkpoint may be."""
    return tmp_path / "batch.jsonl"


@contextmanager
def at_the_same_time(act: Callable[[], object]) -> Iterator[None]:
    """Do *act* in a thread during the block, which ends when both have."""
    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        thread.join(20)
    assert not thread.is_alive()


def once_begun(runner: ScriptedRunner, n: int, act: Callable[[], object]) -> Callable[[], None]:
    """What does *act* when *n* runs have begun."""

    def wait_and_act() -> None:
        runner.wait_for(n)
        act()

    return wait_and_act
