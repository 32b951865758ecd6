"""Five hundred runs at once and in a row, with everything that goes wrong: nothing is left."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import random
import threading
from pathlib import Path

import pytest

from opencode_sync import OpenCodeClient, OpenCodeError, RunResult
from tests import leaks
from tests.faults import standin_client

RUNS = 500
THREADS = 8
SEED = 20_26

PROMPTS = (
    *("well", "flood 1000", "echo a b c", "cut_line", "no_closing_step", "nothing", "garbage"),
    *("invalid_utf8", "silent", "fall_silent", "chatter", "refused 429", "die 9", "die 11"),
    *("fail 1 database is locked", "fail 3 no reason", "full_disk", "leave_tools", "with_tools"),
    *("endless_flood", "steps 3 0.1"),
)


class Outcomes:
    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()

    def add(self, name: str) -> None:
        with self.lock:
            self.counts[name] += 1


def one_run(client: OpenCodeClient, workspace: Path, seed: int, outcomes: Outcomes) -> None:
    dice = random.Random(seed)
    ways = (wait_for_it, leave_it, cancel_it, lose_it)
    way = dice.choices(ways, weights=(5, 1, 2, 1))[0]
    limits = {
        "timeout_s": dice.uniform(0.05, 0.5),
        "idle_timeout_s": dice.choice([None, 0.1]),
        "max_cost": dice.choice([None, 0.15]),
        "max_retries": 1,
        "retry_delay_s": 0.01,
    }
    try:
        outcomes.add(way(client, workspace, dice, limits))
    except OpenCodeError as error:
        is_told = error.result is not None and error.result.status not in ("ok", "denied")
        outcomes.add(type(error).__name__ if is_told else f"untold {error!r}")


def wait_for_it(client: OpenCodeClient, workspace: Path, dice: random.Random, limits: dict) -> str:  # type: ignore[type-arg]
    result = client.run(dice.choice(PROMPTS), workspace, **limits)
    assert isinstance(result, RunResult)
    return result.status


def leave_it(client: OpenCodeClient, workspace: Path, dice: random.Random, limits: dict) -> str:  # type: ignore[type-arg]
    with client.stream(dice.choice(PROMPTS), workspace, **limits) as stream:
        for _, _ in zip(range(dice.randrange(3)), stream, strict=False):
            pass
    return "left"


def cancel_it(client: OpenCodeClient, workspace: Path, dice: random.Random, limits: dict) -> str:  # type: ignore[type-arg]
    stream = client.stream(dice.choice(PROMPTS), workspace, **limits)
    timer = threading.Timer(dice.uniform(0, 0.2), stream.cancel)
    timer.start()
    try:
        return stream.wait().status
    finally:
        timer.cancel()
        timer.join()


def lose_it(client: OpenCodeClient, workspace: Path, dice: random.Random, limits: dict) -> str:  # type: ignore[type-arg]
    stream = client.stream(dice.choice(PROMPTS), workspace, **limits)
    stream.itself = stream  # type: ignore[attr-defined]
    with contextlib.suppress(StopIteration):
        next(stream)
    return "lost"


@pytest.mark.timeout(240)
def test_after_five_hundred_runs_everything_is_as_it_was(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    outcomes = Outcomes()
    with standin_client(tmp_path) as client:
        client.run("well", workspace)  # starts what is kept until the interpreter ends
    before = leaks.footprint()

    with (
        standin_client(tmp_path) as client,
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
    ):
        futures = [
            pool.submit(one_run, client, workspace, SEED + number, outcomes)
            for number in range(RUNS)
        ]
        for future in futures:
            future.result(120)

    assert outcomes.counts.total() == RUNS
    assert not [name for name in outcomes.counts if name.startswith("untold")]
    assert len(outcomes.counts) >= 7, outcomes.counts
    assert not leaks.left_behind(before, leaks.SETTLE_S)
