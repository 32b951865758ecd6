"""`submit`: a Future of a run, whose cancel() also ends one that is under way."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, as_completed, wait
from pathlib import Path

import pytest

from opencode_sync import (
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
)
from tests.scripted import ScriptedRunner

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runner() -> Iterator[ScriptedRunner]:
    with ScriptedRunner(max_workers=2) as runner:
        yield runner


def test_a_future_has_the_result(runner: ScriptedRunner) -> None:
    future = runner.submit("hello")

    assert future.result(timeout=10).answer == "HELLO"
    assert future.exception() is None
    assert (future.done(), future.cancelled()) == (True, False)


def test_a_future_raises_what_the_run_ended_with(runner: ScriptedRunner) -> None:
    future = runner.submit("fail")

    with pytest.raises(OpenCodeProcessError, match="bad key") as caught:
        future.result(timeout=10)
    assert future.exception() is caught.value
    assert not future.cancelled()


def test_limits_hold_for_a_submitted_run(runner: ScriptedRunner) -> None:
    future = runner.submit("hold", timeout_s=0.05)

    assert isinstance(future.exception(timeout=10), OpenCodeTimeoutError)


def test_a_setting_that_makes_no_sense_is_refused_at_once(runner: ScriptedRunner) -> None:
    with pytest.raises(OpenCodeConfigError):
        runner.submit("a", timeout_s=-1)


def test_a_prompt_that_is_refused_is_the_futures_error(runner: ScriptedRunner) -> None:
    assert isinstance(runner.submit("").exception(timeout=10), OpenCodeConfigError)


def test_no_more_than_max_workers_run_at_a_time(runner: ScriptedRunner) -> None:
    futures = [runner.submit(str(n)) for n in range(20)]

    done, not_done = wait(futures, timeout=10)

    assert (len(done), not_done) == (20, set())
    assert runner.most <= 2


def test_as_completed_gives_them_as_they_end(runner: ScriptedRunner) -> None:
    late, early = runner.submit("hold"), runner.submit("early")

    ended = as_completed([late, early], timeout=10)

    assert next(ended) is early
    runner.wait_for(2)
    runner.release()
    assert next(ended) is late


def test_cancel_ends_a_run_that_is_under_way(runner: ScriptedRunner) -> None:
    future = runner.submit("hold")
    runner.wait_for(1)

    assert future.cancel()

    assert (future.cancelled(), future.done(), future.running()) == (True, True, False)
    with pytest.raises(OpenCodeCancelledError, match="the future was cancelled") as caught:
        future.result()
    assert caught.value.result is not None
    assert caught.value.result.final_text == "wait"
    with pytest.raises(CancelledError):
        future.exception()


def test_cancel_keeps_a_waiting_run_from_beginning(runner: ScriptedRunner) -> None:
    futures = [runner.submit(f"hold {n}") for n in range(3)]
    runner.wait_for(2)

    assert futures[2].cancel()

    with pytest.raises(OpenCodeCancelledError, match="before it began"):
        futures[2].result()
    runner.release()
    assert wait(futures, timeout=10).not_done == set()
    assert len(runner.begun) == 2


def test_cancel_is_too_late_for_a_run_that_has_ended(runner: ScriptedRunner) -> None:
    future = runner.submit("hello")
    future.result(timeout=10)

    assert not future.cancel()
    assert not future.cancelled()


def test_who_waits_hears_of_a_cancellation(runner: ScriptedRunner) -> None:
    future = runner.submit("hold")
    heard = threading.Event()
    future.add_done_callback(lambda _: heard.set())
    runner.wait_for(1)
    canceller = threading.Thread(target=future.cancel)
    canceller.start()

    done = wait([future], timeout=10).done

    assert done == {future}
    assert heard.wait(10)
    canceller.join(10)


def test_closing_the_runner_cancels_what_runs_and_what_waits(runner: ScriptedRunner) -> None:
    futures = [runner.submit(f"hold {n}") for n in range(5)]
    runner.wait_for(2)

    runner.close()

    assert [future.cancelled() for future in futures] == [True] * 5
    with pytest.raises(OpenCodeConfigError, match="is closed"):
        runner.submit("late")


def test_a_callback_may_close_the_runner(runner: ScriptedRunner) -> None:
    closed = threading.Event()

    def close(_: object) -> None:
        runner.close()
        closed.set()

    runner.submit("hello").add_done_callback(close)

    assert closed.wait(10)


def test_asyncio_can_wait_for_one(runner: ScriptedRunner) -> None:
    async def answer() -> str:
        return (await asyncio.wrap_future(runner.submit("hello"))).answer

    assert asyncio.run(answer()) == "HELLO"


# --- the interpreter's exit ----------------------------------------------------------------------

PRELUDE = """
import itertools, sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from tests.scripted import ScriptedRunner

runner = ScriptedRunner(max_workers=2)
jobs = itertools.chain("a", map("hold {}".format, itertools.count()))
"""


@pytest.mark.parametrize(
    "script, status",
    [
        (
            "futures = [runner.submit(f'hold {n}') for n in range(9)]; runner.wait_for(2)",
            0,
        ),
        ("future = runner.submit('hold'); raise SystemExit(3)", 3),
        ("future = runner.submit('hold'); runner.wait_for(1); 1 / 0", 1),
        ("batch = runner.map(jobs); next(batch); runner.wait_for(3)", 0),
        ("for result in runner.map(jobs): 1 / 0", 1),
        (
            (
                "batch = runner.map(jobs, executor=ThreadPoolExecutor(2))\n"
                "next(batch); runner.wait_for(3)"
            ),
            0,
        ),
        (
            ("batch = runner.map(jobs, executor=ProcessPoolExecutor(2))\nnext(batch)"),
            0,
        ),
    ],
    ids=[
        "submits",
        "submits and exits",
        "submits and fails",
        "maps",
        "maps and fails",
        "maps on its own threads",
        "maps on processes",
    ],
)
def test_a_script_that_leaves_runs_behind_ends_all_the_same(script: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        cwd=ROOT,
        capture_output=True,
        timeout=20,
    )

    assert done.returncode == status, done.stderr.decode()
    assert b"hold" not in done.stdout
    assert done.stderr == b"" or status == 1
