"""What a batch starts, stops and repeats: within its budget, and while a provider refuses."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    Job,
    OpenCodeBudgetError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    Retry,
    RunConfig,
    RunResult,
    results_to_records,
)
from opencode_sync.batch import dispatch
from opencode_sync.batch.checkpoint import Checkpoint
from opencode_sync.batch.job import Outcome, Task
from opencode_sync.core.lifetime import CancelScope
from opencode_sync.core.request import Request
from tests.batch.conftest import at_the_same_time, once_begun
from tests.scripted import STEP_COST, STEP_TOKENS, ScriptedRunner

# --- budgets -------------------------------------------------------------------------------------


def test_no_job_is_started_once_the_budget_is_spent(runner: ScriptedRunner) -> None:
    batch = runner.map(map(str, itertools.count()), max_total_cost=5 * STEP_COST)
    results: list[RunResult] = []

    with pytest.raises(OpenCodeBudgetError, match=r"max_total_cost of \$0.05 is spent") as caught:
        results.extend(batch)

    assert len(results) == 5
    assert len(runner.begun) == 5
    assert caught.value.index == 5
    assert caught.value.spent == pytest.approx(5 * STEP_COST)


def test_failed_jobs_count_and_the_jobs_not_run_have_the_error_in_their_places(
    runner: ScriptedRunner,
) -> None:
    jobs = ["fail a", "b", "c", "d"]

    ends = list(runner.map(jobs, max_total_cost=2 * STEP_COST, on_error="return"))

    kinds = [OpenCodeProcessError, RunResult, OpenCodeBudgetError, OpenCodeBudgetError]
    assert [type(end) for end in ends] == kinds


def test_a_budget_of_nothing_starts_nothing(runner: ScriptedRunner) -> None:
    with pytest.raises(OpenCodeBudgetError):
        list(runner.map(["a"], max_total_cost=0))

    assert runner.begun == []


def test_what_is_under_way_is_stopped_once_the_budget_is_spent(runner: ScriptedRunner) -> None:
    jobs = [f"work {n}" for n in range(20)]

    with runner.map(jobs, max_workers=8, max_total_cost=5 * STEP_COST, on_error="return") as batch:
        ends = list(batch)

    stopped = [end for end in ends if end.result is not None]
    assert all(isinstance(end, OpenCodeBudgetError) for end in ends)
    assert {end.limit_name for end in ends} == {"max_total_cost"}
    assert "max_total_cost of $0.05 is spent" in str(stopped[0])
    assert str(stopped[0]).endswith("the job was stopped")
    assert stopped[0].result.status == "over_budget"
    assert len(runner.begun) <= 8
    assert batch.report.total_cost == pytest.approx(sum(end.result.total_cost for end in stopped))
    assert 5 * STEP_COST <= batch.report.total_cost + 1e-9 <= 8.5 * STEP_COST
    assert (batch.report.not_run, batch.report.failed) == (20, 0)


def test_a_budget_of_tokens_stops_what_is_under_way(runner: ScriptedRunner) -> None:
    jobs = ["free a", "work b", "work c", "d"]

    ends = list(runner.map(jobs, max_total_tokens=2 * STEP_TOKENS, on_error="return"))

    assert [type(end) for end in ends[1:]] == [OpenCodeBudgetError] * 3
    error = ends[-1]
    assert isinstance(error, OpenCodeBudgetError)
    assert (error.limit_name, error.limit) == ("max_total_tokens", 2 * STEP_TOKENS)
    assert error.spent is not None
    assert error.spent >= 2 * STEP_TOKENS


def test_without_order_too_a_job_that_is_stopped_for_the_budget_comes_before_those_not_run(
    runner: ScriptedRunner,
) -> None:
    jobs = ["hold a", "b", "c"]
    batch = runner.map(jobs, ordered=False, max_total_cost=STEP_COST, on_error="return")

    ends = list(batch)

    kinds = {
        end.prompt: (type(end), end.result is None)
        for end in ends
        if isinstance(end, OpenCodeError)
    }
    assert kinds == {"hold a": (OpenCodeBudgetError, False), "c": (OpenCodeBudgetError, True)}
    assert {end.prompt for end in ends if isinstance(end, RunResult)} == {"b"}
    assert ends[-1].prompt == "c"


def test_a_job_in_another_process_may_spend_what_remained_at_its_start(
    runner: ScriptedRunner,
) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        jobs = ["a", "spend 9", "c"]
        ends = list(
            runner.map(jobs, executor=executor, max_total_cost=3.5 * STEP_COST, on_error="return")
        )

    assert isinstance(ends[0], RunResult)
    stopped = ends[1]
    assert isinstance(stopped, OpenCodeBudgetError)
    assert stopped.result is not None
    assert (stopped.result.status, stopped.result.turns) == ("over_budget", 3)
    assert stopped.limit == pytest.approx(3.5 * STEP_COST)
    assert stopped.spent == pytest.approx(4 * STEP_COST)
    assert isinstance(ends[2], OpenCodeBudgetError)
    assert ends[2].result is None


def test_limits_of_a_job_go_before_those_of_the_batch(runner: ScriptedRunner) -> None:
    jobs = [Job("spend 3", max_steps=2), Job("spend 3 too", max_tokens=STEP_TOKENS), Job("spend 2")]

    ends = list(runner.map(jobs, max_steps=3, on_error="return"))

    assert [getattr(end, "limit_name", None) for end in ends] == ["max_steps", "max_tokens", None]


# --- budgets of batches that go on ---------------------------------------------------------------


def test_a_batch_that_goes_on_goes_on_with_its_budget(
    runner: ScriptedRunner, tmp_path: Path
) -> None:
    def go_on(steps: int) -> tuple[list[Any], str]:
        batch = runner.map(
            list("abcd"),
            checkpoint=tmp_path / "done.jsonl",
            max_total_cost=steps * STEP_COST,
            on_error="return",
        )
        return list(batch), str(batch.report)

    go_on(2)
    again, report = go_on(2)

    assert sorted(runner.prompts) == ["a", "b"]
    assert [type(end) for end in again] == [RunResult] * 2 + [OpenCodeBudgetError] * 2
    assert "$0.02 is spent ($0.02, $0.02 of it before, as the checkpoint says)" in str(again[2])
    assert report.startswith("0 done, 0 failed, 2 from the checkpoint, 2 not run")
    assert [end.answer for end in go_on(4)[0]] == ["A", "B", "C", "D"]
    assert sorted(runner.prompts) == ["a", "b", "c", "d"]


def test_what_failures_have_cost_counts_also_where_a_later_try_took_their_place(
    runner: ScriptedRunner, tmp_path: Path
) -> None:
    path = tmp_path / "done.jsonl"

    def go_on() -> list[Any]:
        limits: Any = {"max_total_cost": 2.5 * STEP_COST, "max_total_tokens": 1000}
        return list(runner.map(["fail a"], checkpoint=path, on_error="return", **limits))

    kinds = [type(go_on()[0]) for _ in range(4)]

    assert kinds == [OpenCodeProcessError] * 3 + [OpenCodeBudgetError]
    (line,) = map(json.loads, path.read_text().splitlines())
    assert line["total_cost"] == STEP_COST
    assert line["cost_before"] == pytest.approx(2 * STEP_COST)


def test_a_job_that_was_stopped_for_the_budget_is_run_again_with_a_larger_one(
    runner: ScriptedRunner, tmp_path: Path
) -> None:
    def go_on(steps: int) -> list[Any]:
        return list(
            runner.map(
                ["work a", "work b"],
                checkpoint=tmp_path / "done.jsonl",
                max_total_cost=steps * STEP_COST,
                retry_failed=False,  # which it is not
                on_error="return",
            )
        )

    first = go_on(1)
    with at_the_same_time(once_begun(runner, len(runner.begun) + 2, runner.release)):
        then = go_on(9)

    assert {type(end) for end in first} == {OpenCodeBudgetError}
    assert [end.answer for end in then] == ["WORK A", "WORK B"]


def test_what_a_cancelled_job_has_cost_counts_and_it_is_run_again(
    runner: ScriptedRunner, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"checkpoint": tmp_path / "done.jsonl", "on_error": "return"}
    with runner.map(["a", "work b"], **settings) as batch:
        next(batch)
        while not (batch._dispatch and batch._dispatch._work.spent().get(1)):
            time.sleep(0.005)

    settings |= {"max_total_cost": 2 * STEP_COST, "retry_failed": False}
    again = list(runner.map(["a", "work b"], **settings))

    assert isinstance(again[0], RunResult)
    assert isinstance(again[1], OpenCodeBudgetError)
    assert again[1].spent == pytest.approx(2 * STEP_COST)


# --- ends that go wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [OpenCodeError("the disk is full"), TypeError("half a bug")], ids=["disk", "ours"]
)
def test_jobs_that_could_not_be_saved_end_the_batch_and_have_cost_what_they_have(
    runner: ScriptedRunner, fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: Checkpoint, entries: Sequence[object]) -> None:
        raise fault

    monkeypatch.setattr(Checkpoint, "write", write)

    batch = runner.map(["a"], checkpoint=tmp_path / "birds.jsonl")
    with pytest.raises(OpenCodeError, match=str(fault)):
        list(batch)

    assert batch.report.total_cost == STEP_COST


class Stubborn(ScriptedRunner):
    """Answers, and then holds on to its run until it may end."""

    def __init__(self) -> None:
        super().__init__()
        self.has_answered, self.may_end = threading.Event(), threading.Event()

    def _open(self, request: Request, scope: CancelScope, keep_raw: bool) -> Any:
        source = super()._open(request, scope, keep_raw)
        receive = source.receive

        def held(timeout: float | None) -> Any:
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

    with Stubborn() as runner:
        batch = runner.map(["a"])
        with at_the_same_time(lambda: list(batch)):
            runner.has_answered.wait()
            batch.close()
            spent = batch.report.total_cost
            runner.may_end.set()

    assert spent == STEP_COST


# --- too many requests ---------------------------------------------------------------------------

ALLOWED, WORKERS = 3, 12


class Limited(ScriptedRunner):
    """Refuses a run with a 429 at once while as many as are allowed are under way."""

    def _open(self, request: Request, scope: CancelScope, keep_raw: bool) -> Any:
        if self._running >= ALLOWED:
            return super()._open(replace(request, prompt="turned away"), scope, keep_raw)
        source = super()._open(replace(request, prompt="hold on"), scope, keep_raw)
        threading.Timer(0.02, once_begun(self, ALLOWED + 1, source.answer)).start()
        return source


@pytest.mark.parametrize("adaptive", [True, False])
def test_jobs_that_failed_of_too_many_requests_are_run_again_fewer_at_a_time(
    monkeypatch: pytest.MonkeyPatch, adaptive: bool
) -> None:
    monkeypatch.setattr(dispatch, "REPEAT_S", 0.05)

    with Limited() as runner:
        jobs = map(str, range(30))
        batch = runner.map(jobs, max_workers=WORKERS, on_error="return", adaptive=adaptive)
        n_failed = sum(isinstance(end, OpenCodeProcessError) for end in batch)

    report = batch.report
    if adaptive:
        assert (n_failed, report.failed, report.retried) == (0, 0, len(runner.begun) - 30)
        assert len(runner.begun) < 60
        assert report.lowest_workers < WORKERS
    else:
        assert report.errors == {"OpenCodeProcessError (APIError 429)": n_failed}
        assert (len(runner.begun), report.lowest_workers) == (30, WORKERS)


class ByHand(Executor):
    """Carries out nothing: the test says what came of each task."""

    def __init__(self) -> None:
        self.given: queue.SimpleQueue[tuple[Future[Outcome], Task]] = queue.SimpleQueue()

    def submit(self, work: Any, task: Task) -> Future[Outcome]:  # type: ignore[override]
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()
        self.given.put((future, task))
        return future


def failure(status: int) -> Outcome:
    error: Any = {"name": "APIError", "data": {"message": "no", "statusCode": status}}
    result = RunResult()
    result.append_event({"type": "error", "error": error})
    return Outcome(OpenCodeProcessError(1, result=result))


def test_jobs_that_are_to_be_run_again_go_before_a_failure_after_them(
    runner: ScriptedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "REPEAT_S", 0.01)
    hands = ByHand()

    def act() -> None:
        tasks = [hands.given.get(timeout=10) for _ in range(3)]
        for index, status in [(0, 429), (2, 429), (1, 401)]:
            tasks[index][0].set_result(failure(status))
        future, task = hands.given.get(timeout=10)
        future.set_result(Outcome(RunResult(prompt=task.prompt)))

    batch = runner.map(["a", "b", "c"], executor=hands, max_workers=3)

    with at_the_same_time(act):
        assert next(batch).prompt == "a"
        with pytest.raises(OpenCodeProcessError):
            next(batch)


def test_a_refusal_brings_down_how_many_run_unless_that_is_switched_off(
    runner: ScriptedRunner,
) -> None:
    def lowest(**options: Any) -> tuple[int, int]:
        batch = runner.map(["refused 1", "b"], max_workers=4, **options)
        list(batch)
        return batch.report.rate_limits, batch.report.lowest_workers

    assert lowest()[0] == 1
    assert lowest()[1] < 4
    assert lowest(adaptive=False) == (1, 4)


# --- models that are out -------------------------------------------------------------------------

FALLBACK = RunConfig(model="out/one", fallback_models=("in/two",))


@pytest.mark.parametrize("is_remote", [False, True], ids=["threads", "processes"])
def test_a_model_that_is_out_for_one_job_is_passed_over_by_those_that_begin_later(
    runner: ScriptedRunner, is_remote: bool
) -> None:
    with ExitStack() as end:
        executor: Executor = ThreadPoolExecutor(1)
        if is_remote:
            executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        end.enter_context(executor)
        batch = runner.map(["a", "b", "c"], executor=executor, max_workers=1, run_cfg=FALLBACK)
        results = list(batch)

    assert [result.answer for result in results] == ["A", "B", "C"]
    assert {result.model for result in results} == {"in/two"}
    tried = [(each.model, each.was_asked) for result in results for each in result.tried]
    assert tried == [("out/one", True), ("out/one", False), ("out/one", False)]
    assert [result.attempts for result in results] == [2, 1, 1]
    assert batch.report.rate_limits == 1


def test_settings_that_no_run_can_have_are_one_jobs_fault_also_while_a_model_is_out(
    runner: ScriptedRunner,
) -> None:
    names: Any = [["in/two"], "in/three"]
    wrong: list[dict[str, Any]] = [{"config_overrides": {("a",): 1}}, {"fallback_models": names}]
    jobs = ["a", *(Job("b", run_cfg=FALLBACK.replace(**each)) for each in wrong), "c"]

    first, *refused, last = runner.map(jobs, max_workers=1, run_cfg=FALLBACK, on_error="return")

    assert [type(end) for end in refused] == [OpenCodeConfigError] * 2
    assert isinstance(first, RunResult)
    assert isinstance(last, RunResult)


def test_a_model_that_is_out_neither_pauses_nor_slows_a_batch_that_has_another(
    runner: ScriptedRunner,
) -> None:
    batch = runner.map([str(n) for n in range(8)], max_workers=2, run_cfg=FALLBACK)

    with batch:
        next(batch)
        assert batch._throttle.pause_s() == 0.0

        assert len(list(batch)) == 7
    assert batch.report.lowest_workers == 2


def test_where_all_models_are_out_for_long_a_job_fails_at_once(runner: ScriptedRunner) -> None:
    cfg = FALLBACK.replace(fallback_models=("out/two",))

    batch = runner.map(["a", "b"], max_workers=1, run_cfg=cfg, on_error="return")

    for end in batch:
        assert isinstance(end, OpenCodeProcessError)
        assert end.result is not None
        assert [each.model for each in end.result.tried] == ["out/one", "out/two"]
    assert [request.cfg.model for request in runner.begun] == ["out/one", "out/two", "out/two"]
    assert batch.report.rate_limits == 3  # one for each request


def test_a_checkpoint_keeps_who_answered_and_who_did_not(
    runner: ScriptedRunner, path: Path
) -> None:
    [result] = runner.map(["a"], run_cfg=FALLBACK, checkpoint=path)

    [again] = runner.map(["a"], run_cfg=FALLBACK, checkpoint=path)

    assert len(runner.begun) == 2
    assert (again.model, again.tried) == ("in/two", result.tried)
    assert results_to_records([again])[0]["tried"] == "out/one (APIError 429: slow down)"


# --- retries of failed jobs ----------------------------------------------------------------------

AT_ONCE = Retry(2, delay_s=0)


def test_a_failed_job_is_tried_again_and_each_try_is_paid(runner: ScriptedRunner) -> None:
    batch = runner.map(["flaky 2 a", "b"], retries=AT_ONCE)

    answers = [result.answer for result in batch]

    assert answers == ["FLAKY 2 A", "B"]
    assert sorted(runner.prompts) == ["b"] + ["flaky 2 a"] * 3
    assert (batch.report.done, batch.report.failed, batch.report.retried) == (2, 0, 2)
    assert batch.report.total_cost == pytest.approx(4 * STEP_COST)


def test_after_the_last_try_the_failure_stands(runner: ScriptedRunner) -> None:
    batch = runner.map(["flaky 9 a"], retries=AT_ONCE, on_error="return")

    (error,) = batch

    assert isinstance(error, OpenCodeProcessError)
    assert len(runner.begun) == 3
    assert (batch.report.failed, batch.report.retried) == (1, 2)
    assert batch.report.total_cost == pytest.approx(3 * STEP_COST)


def test_what_cannot_pass_is_tried_again_only_where_it_is_named(runner: ScriptedRunner) -> None:
    def begun(retry: Retry) -> int:
        before = len(runner.begun)
        list(runner.map(["fail", ""], retries=retry, on_error="return"))
        return len(runner.begun) - before

    assert begun(AT_ONCE) == 1
    assert begun(Retry(2, delay_s=0, on=OpenCodeTimeoutError)) == 1
    assert begun(Retry(2, delay_s=0, on=(OpenCodeTimeoutError, OpenCodeProcessError))) == 3


def test_others_go_on_while_a_job_rests_and_its_failure_stands_where_the_batch_ends(
    runner: ScriptedRunner,
) -> None:
    retry = Retry(1, delay_s=600)

    with runner.map(["flaky 1 a", "b", "c"], retries=retry, ordered=False) as batch:
        answers = {next(batch).answer, next(batch).answer}
        while batch.report.total_cost < 2.5 * STEP_COST:  # the failure is not counted yet
            runner.wait_for(3)

    assert answers == {"B", "C"}
    assert (batch.report.done, batch.report.failed, batch.report.retried) == (2, 1, 0)
    assert batch.report.total_cost == pytest.approx(3 * STEP_COST)


def test_a_batch_whose_budget_is_spent_tries_nothing_again(runner: ScriptedRunner) -> None:
    batch = runner.map(
        ["flaky 1 a"], retries=Retry(1, delay_s=600), max_total_cost=STEP_COST, on_error="return"
    )

    (error,) = batch

    assert isinstance(error, OpenCodeProcessError)


def test_a_checkpoint_has_one_line_for_all_tries_with_what_they_cost(
    runner: ScriptedRunner, tmp_path: Path
) -> None:
    path = tmp_path / "done.jsonl"

    list(runner.map(["flaky 2 a"], retries=AT_ONCE, checkpoint=path))

    (line,) = map(json.loads, path.read_text().splitlines())
    assert (line["failure"], line["answer"]) == (None, "FLAKY 2 A")
    assert line["cost_before"] == pytest.approx(2 * STEP_COST)


def test_a_job_that_rests_when_the_batch_ends_is_in_the_checkpoint_as_failed(
    runner: ScriptedRunner, tmp_path: Path
) -> None:
    path = tmp_path / "done.jsonl"
    resting: Any = {"retries": Retry(1, delay_s=600), "checkpoint": path, "on_error": "return"}
    with runner.map(["flaky 1 a", "b"], ordered=False, **resting) as batch:
        next(batch)
        while batch.report.total_cost < 1.5 * STEP_COST:
            runner.wait_for(2)

    (kept, _) = runner.map(
        ["flaky 1 a", "b"], checkpoint=path, retry_failed=False, on_error="return"
    )
    (again, _) = runner.map(["flaky 1 a", "b"], checkpoint=path)

    assert isinstance(kept, OpenCodeProcessError)
    assert again.answer == "FLAKY 1 A"
