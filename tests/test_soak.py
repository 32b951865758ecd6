"""Hundreds of runs and turns, with everything that goes wrong: nothing is left."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import gc
import logging
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest

from opencode_sync import OpenCodeError, OpenCodeServer, RunStream
from opencode_sync.api.runner import Runner
from tests import leaks
from tests.faults import standin_client
from tests.standin import write_serving

RUNS = 250
TURNS = 60
THREADS = 8
MOST_BLOCKS = 8  # for each: an event that somebody holds on to takes 20
MOST_BYTES = 24 << 20  # that are free again and were not given back to the system
SEED = 20_26

PROMPTS = (
    *("well", "flood 1000", "echo a b c", "cut_line", "no_closing_step", "nothing", "garbage"),
    *("invalid_utf8", "silent", "fall_silent", "chatter", "refused 429", "die 9", "die 11"),
    *("fail 1 database is locked", "fail 3 no reason", "full_disk", "leave_tools", "with_tools"),
    "steps 3 0.1",
)
TURN_PROMPTS = (
    *("say a word", "say a b c", "say a b c d", "hold on", "tool it", "ask me", "gap then words"),
    *("break it", "die now"),
)


class Outcomes:
    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()

    def add(self, name: str) -> None:
        with self.lock:
            self.counts[name] += 1


def one_run(
    runner: Runner, workspace: Path, seed: int, prompts: Sequence[str], outcomes: Outcomes
) -> None:
    dice = random.Random(seed)
    ways = (wait_for_it, leave_it, cancel_it, lose_it)
    way = dice.choices(ways, weights=(5, 1, 2, 1))[0]
    limits: dict[str, Any] = {
        "timeout_s": dice.uniform(0.05, 0.5),
        "idle_timeout_s": dice.choice([None, 0.1]),
        "max_cost": dice.choice([None, 0.15]),
        "startup_retries": 1,
        "startup_retry_delay_s": 0.01,
    }
    try:
        outcomes.add(way(runner.stream(dice.choice(prompts), workspace, **limits), dice))
    except OpenCodeError as error:
        is_told = error.result is not None and error.result.status not in ("ok", "denied")
        outcomes.add(type(error).__name__ if is_told else f"untold {error!r}")


def wait_for_it(stream: RunStream, dice: random.Random) -> str:
    with stream:
        return stream.wait().status


def leave_it(stream: RunStream, dice: random.Random) -> str:
    with stream:
        for _, _ in zip(range(dice.randrange(3)), stream, strict=False):
            pass
    return "left"


def cancel_it(stream: RunStream, dice: random.Random) -> str:
    timer = threading.Timer(dice.uniform(0, 0.2), stream.cancel)
    timer.start()
    try:
        return stream.wait().status
    finally:
        timer.cancel()
        timer.join()


def lose_it(stream: RunStream, dice: random.Random) -> str:
    stream.itself = stream  # type: ignore[attr-defined]
    with contextlib.suppress(StopIteration):
        next(stream)
    return "lost"


# --- what is as before ----------------------------------------------------------------------------


@pytest.fixture
def temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Path:
    """A directory of our own for temporary files, in which nobody else makes any."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    # Nor are there log records: pytest keeps all of them until the test's end.
    caplog.set_level(logging.CRITICAL, logger="opencode_sync")
    return directory


def objects() -> collections.Counter[str]:
    """How many there are of each class of the package."""
    gc.collect()
    kinds = map(type, gc.get_objects())
    return collections.Counter(
        kind.__qualname__ for kind in kinds if str(kind.__module__).startswith("opencode_sync")
    )


def blocks() -> int:
    """How many small blocks of memory are in use."""
    gc.collect()
    return sys.getallocatedblocks()


def memory() -> int:
    return int(psutil.Process().memory_info().rss)


class Soak:
    """Does a number of things at once and in a row; then all has to be as before.

    What is kept until the interpreter ends is made before anything is looked at, by the first ones.
    """

    def __init__(self, temporary: Path, number: int, first: int | None = None) -> None:
        self.outcomes = Outcomes()
        self._temporary = temporary
        self._number, self.first = number, number // 10 if first is None else first

    def run(
        self,
        begin: Callable[[], AbstractContextManager[Runner]],
        one: Callable[[Runner, int], None],
    ) -> None:
        self._do(begin, one, range(self.first))
        before, kinds, used, size = leaks.footprint(), objects(), blocks(), memory()

        self._do(begin, one, range(self._number))

        assert not leaks.left_behind(before, leaks.SETTLE_S)
        assert [path for path in self._temporary.rglob("*") if path.is_file()] == []
        assert objects() - kinds == {}
        if "coverage" in sys.modules:
            return  # it notes each thread and line that is new, in memory of its own
        assert blocks() - used < MOST_BLOCKS * self._number
        assert memory() - size < MOST_BYTES

    def _do(
        self,
        begin: Callable[[], AbstractContextManager[Runner]],
        one: Callable[[Runner, int], None],
        seeds: range,
    ) -> None:
        with (
            begin() as runner,
            concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
        ):
            for future in [pool.submit(one, runner, SEED + seed) for seed in seeds]:
                future.result(120)


@pytest.mark.timeout(300)
def test_after_hundreds_of_runs_everything_is_as_it_was(tmp_path: Path, temporary: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    soak = Soak(temporary, RUNS)

    soak.run(
        lambda: standin_client(tmp_path),
        lambda runner, seed: one_run(runner, workspace, seed, PROMPTS, soak.outcomes),
    )

    told = soak.outcomes.counts
    assert told.total() == RUNS + soak.first
    assert not [name for name in told if name.startswith("untold")]
    assert len(told) >= 7, told


@pytest.mark.timeout(300)
def test_after_dozens_of_turns_everything_is_as_it_was(tmp_path: Path, temporary: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    program = write_serving(tmp_path / "opencode")
    soak = Soak(temporary, TURNS, first=30)

    soak.run(
        lambda: OpenCodeServer(program),
        lambda runner, seed: one_run(runner, workspace, seed, TURN_PROMPTS, soak.outcomes),
    )

    told = soak.outcomes.counts
    assert told.total() == TURNS + soak.first
    assert len(told) >= 6, told
