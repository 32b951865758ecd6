"""What a batch has spent is counted, however a job ends: in the report, budget and checkpoint."""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeBudgetError,
    OpenCodeCancelledError,
    OpenCodeError,
    OpenCodeOutputError,
    RunResult,
)
from opencode_sync.batch import dispatch, job
from opencode_sync.batch.checkpoint import Checkpoint
from opencode_sync.core.events import Event
from tests.api.test_repair import COST, GOOD, Answering, Bird, _Source


@dataclass
class Crashing:
    """A user's class whose checks have a fault."""

    legs: int

    def __post_init__(self) -> None:
        _ = {4: "a dog"}[self.legs]


@dataclass
class Exiting:
    """One that ends the program, as a callback may."""

    legs: int

    def __post_init__(self) -> None:
        sys.exit("no such bird")


@dataclass
class Locked:
    """One whose values cannot be pickled."""

    legs: int

    def __post_init__(self) -> None:
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    "schema, kind",
    [(Crashing, OpenCodeOutputError), (Exiting, OpenCodeCancelledError)],
    ids=["raises KeyError", "exits"],
)
def test_a_job_that_ends_in_the_users_code_has_cost_what_it_has(schema: Any, kind: Any) -> None:
    with Answering() as runner:
        batch = runner.map([GOOD, GOOD], schema=schema, max_repairs=0, on_error="return")
        ends = list(batch)

    assert [type(end) for end in ends] == [kind, kind]
    assert [end.result.total_cost for end in ends if isinstance(end, OpenCodeError)] == [COST] * 2
    assert batch.report.total_cost == 2 * COST
    assert batch.report.tokens.total == 0


def test_a_job_that_ends_by_a_fault_of_ours_has_cost_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fault(event: Event) -> bool:
        return bool(event["type"] == "step_finish" and 1 / 0)

    monkeypatch.setattr(job, "_is_refusal", fault)

    with Answering() as runner:
        batch = runner.map([GOOD], on_error="return")
        (error,) = batch

    assert isinstance(error, OpenCodeError)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert error.result is not None
    assert error.result.total_cost == batch.report.total_cost == COST


def test_jobs_that_end_in_the_users_code_use_up_the_budget() -> None:
    with Answering() as runner:
        batch = runner.map(
            [GOOD] * 6,
            schema=Exiting,
            on_error="return",
            max_workers=1,
            max_total_cost=1.5 * COST,
        )
        ends = list(batch)

    assert len(runner.requests) == 2
    assert [type(end) for end in ends[2:]] == [OpenCodeBudgetError] * 4


def test_a_checkpoint_has_what_a_failed_job_cost(tmp_path: Path) -> None:
    checkpoint = tmp_path / "birds.jsonl"

    with Answering() as runner:
        list(
            runner.map(
                [GOOD], schema=Crashing, max_repairs=0, checkpoint=checkpoint, on_error="return"
            )
        )

    lines = checkpoint.read_text().splitlines()
    assert [json.loads(line)["total_cost"] for line in lines] == [COST]


@pytest.mark.parametrize(
    "fault", [OpenCodeError("the disk is full"), TypeError("half a bug")], ids=["disk", "ours"]
)
def test_jobs_that_could_not_be_saved_have_cost_what_they_have(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: Checkpoint, entries: Sequence[object]) -> None:
        raise fault

    monkeypatch.setattr(Checkpoint, "write", write)

    with Answering() as runner:
        batch = runner.map([GOOD], schema=Bird, checkpoint=tmp_path / "birds.jsonl")
        with pytest.raises(OpenCodeError, match=str(fault)):
            list(batch)

    assert batch.report.total_cost == COST


def test_a_value_that_cannot_leave_its_worker_process_is_an_error_with_its_cost() -> None:
    context = multiprocessing.get_context("spawn")

    with Answering() as runner, ProcessPoolExecutor(1, mp_context=context) as pool:
        batch = runner.map([GOOD], schema=Locked, executor=pool, on_error="return")
        (error,) = batch

    assert isinstance(error, OpenCodeOutputError)
    assert "cannot pickle" in str(error)
    assert error.result is not None
    assert (error.result.status, error.result.answer) == ("error", GOOD)
    assert error.result.total_cost == batch.report.total_cost == COST


class Stubborn(Answering):
    """Answers, and then holds on to its run until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.has_answered, self.may_end = threading.Event(), threading.Event()

    def _open(self, request: Any, cancelled: Any, keep_raw: bool) -> _Source:
        source = super()._open(request, cancelled, keep_raw)
        receive = source.receive

        def held(timeout: float | None) -> Sequence[Event] | None:
            events = receive(timeout)
            if events is None:
                self.has_answered.set()
                self.may_end.wait()
            return events

        source.receive = held  # type: ignore[method-assign]
        return source


def test_a_job_that_does_not_end_in_time_has_cost_what_it_has_by_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "STOP_S", 0.05)
    monkeypatch.setattr("opencode_sync.core.stream.LOCK_S", 0.05)
    runner = Stubborn()
    batch = runner.map([GOOD])
    consumer = threading.Thread(target=lambda: list(batch))
    consumer.start()
    runner.has_answered.wait()

    batch.close()

    assert batch.report.total_cost == COST
    runner.may_end.set()
    consumer.join()
    runner.close()


def test_a_result_that_can_be_pickled_comes_back_as_it_is() -> None:
    context = multiprocessing.get_context("spawn")

    with Answering() as runner, ProcessPoolExecutor(1, mp_context=context) as pool:
        (result,) = runner.map([GOOD], schema=Bird, executor=pool)

    assert isinstance(result, RunResult)
    assert (result.parsed, result.total_cost) == (Bird(2), COST)
