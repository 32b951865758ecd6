"""`map`: many jobs, drawn lazily, several at a time; with a runner that needs no process."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from opencode_sync import (
    Job,
    OpenCodeBudgetError,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    RunConfig,
    RunResult,
)
from opencode_sync.batch.job import Listener, Outcome, Task, Work
from tests.scripted import STEP_COST, STEP_TOKENS, ScriptedRunner

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runner() -> Iterator[ScriptedRunner]:
    with ScriptedRunner(max_workers=2) as runner:
        yield runner


def after(runner: ScriptedRunner, n: int, act: Callable[[], None]) -> None:
    runner.wait_for(n)
    act()


# --- in and out ----------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_input(runner: ScriptedRunner) -> None:
    results = list(runner.map(["a", "b", "c", "d", "e"]))

    assert [result.answer for result in results] == ["A", "B", "C", "D", "E"]
    assert [(result.index, result.prompt) for result in results] == list(enumerate("abcde"))


def test_without_order_they_come_as_they_finish(runner: ScriptedRunner) -> None:
    with runner.map(["hold first", "b", "c"], ordered=False) as batch:
        early = {next(batch).answer, next(batch).answer}
        runner.release()
        last = next(batch)

    assert early == {"B", "C"}
    assert (last.index, last.answer) == (0, "wait\n\nHOLD FIRST")


def test_an_endless_input_is_drawn_as_room_comes(runner: ScriptedRunner) -> None:
    drawn = itertools.count()

    with runner.map((str(n) for n in drawn), buffersize=5) as batch:
        taken = [next(batch).answer for _ in range(20)]

    assert taken == [str(n) for n in range(20)]
    assert next(drawn) <= 20 + 5


def test_nothing_is_drawn_before_the_first_result_is_asked_for(runner: ScriptedRunner) -> None:
    drawn = itertools.count()

    runner.map(str(n) for n in drawn)

    assert next(drawn) == 0


def test_at_most_twice_the_workers_are_drawn_ahead(runner: ScriptedRunner) -> None:
    drawn = itertools.count()

    with runner.map((f"hold {n}" for n in drawn), max_workers=3) as batch:
        waiter = threading.Thread(target=next, args=(batch, None))
        waiter.start()
        runner.wait_for(3)
        batch.close()
        waiter.join(10)

    assert next(drawn) == 2 * 3
    assert runner.most == 3


def test_work_goes_on_while_the_consumer_is_busy(runner: ScriptedRunner) -> None:
    drawn: list[str] = []

    def jobs() -> Iterator[str]:
        for n in range(10):
            drawn.append(str(n))
            yield drawn[-1]

    with runner.map(jobs(), buffersize=6) as batch:
        next(batch)

        # The first result may be there before all that the buffer holds was drawn.
        assert len(drawn) > 1
        runner.wait_for(len(drawn))


def test_an_empty_input_gives_nothing(runner: ScriptedRunner) -> None:
    batch = runner.map([])

    assert list(batch) == []
    assert str(batch.report).startswith("0 done, 0 failed")


def test_a_generator_that_raises_does_so_in_its_place(runner: ScriptedRunner) -> None:
    def jobs() -> Iterator[str]:
        yield from "ab"
        raise LookupError("no more rows")

    batch = runner.map(jobs())

    assert [next(batch).answer, next(batch).answer] == ["A", "B"]
    with pytest.raises(LookupError, match="no more rows"):
        next(batch)


def test_a_job_has_its_own_workspace_settings_timeout_and_key(
    runner: ScriptedRunner, tmp_path: Path
) -> None:
    cfg = RunConfig(model="a/b")
    jobs: list[str | Job] = [
        "plain",
        Job("own", tmp_path, cfg, key="k"),
        Job("hold late", timeout_s=0.1),
    ]

    plain, own, late = runner.map(jobs, on_error="return")

    assert isinstance(own, RunResult)
    assert (own.workspace, own.key) == (str(tmp_path.resolve()), "k")
    assert {request.prompt: request.cfg for request in runner.begun}["own"] == cfg
    assert isinstance(plain, RunResult)
    assert plain.workspace == os.getcwd()
    assert isinstance(late, OpenCodeTimeoutError)


@pytest.mark.parametrize("jobs", ["one prompt", Job("one"), b"x", 3, {"a": 1}], ids=repr)
def test_what_is_no_list_of_jobs_is_refused(runner: ScriptedRunner, jobs: object) -> None:
    with pytest.raises(OpenCodeConfigError, match="use an iterable of prompts"):
        runner.map(jobs)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "options",
    [
        {"max_workers": 0},
        {"buffersize": 0},
        {"max_workers": True},
        {"max_total_cost": -1},
        {"max_total_cost": float("nan")},
        {"max_total_tokens": 1.5},
        {"max_steps": 0},
        {"on_error": "ignore"},
        {"progress": "yes"},
        {"executor": "dask"},
        {"timeout_s": 0},
        {"run_cfg": {"model": "a/b"}},
        {"run_cfg": RunConfig(permission="ask")},
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_refused_at_once(
    runner: ScriptedRunner, options: dict[str, object]
) -> None:
    with pytest.raises(OpenCodeConfigError):
        runner.map(["a"], **options)  # type: ignore[call-overload]


def test_small_results_are_to_be_had(runner: ScriptedRunner) -> None:
    (result,) = runner.map(["a"], keep_events=False)

    assert (result.events, result.answer, result.turns) == ([], "A", 1)


# --- errors --------------------------------------------------------------------------------------


def test_an_error_is_raised_in_its_place_and_ends_the_batch(runner: ScriptedRunner) -> None:
    batch = runner.map(itertools.chain("ab", ["fail"], map(str, itertools.count())))

    assert [next(batch).answer, next(batch).answer] == ["A", "B"]
    with pytest.raises(OpenCodeProcessError, match="bad key") as caught:
        next(batch)
    assert (caught.value.index, caught.value.prompt) == (2, "fail")
    assert list(batch) == []


def test_after_a_failure_nothing_that_comes_after_it_is_started(runner: ScriptedRunner) -> None:
    jobs = ["hold first", "fail", *"cdef"]

    with runner.map(jobs, buffersize=6) as batch:
        waiter = threading.Thread(target=next, args=(batch, None))
        waiter.start()
        while batch.report.failed == 0:
            runner.wait_for(2)
        runner.release()
        waiter.join(10)
        with pytest.raises(OpenCodeProcessError):
            next(batch)

    assert sorted(runner.prompts) == ["fail", "hold first"]


def test_errors_stand_in_the_places_of_their_results(runner: ScriptedRunner) -> None:
    good, bad, other = runner.map(["a", Job("fail", key="k"), "c"], on_error="return")

    assert isinstance(good, RunResult)
    assert isinstance(other, RunResult)
    assert isinstance(bad, OpenCodeProcessError)
    assert (bad.index, bad.key, bad.prompt) == (1, "k", "fail")
    assert bad.result is not None
    assert (bad.result.answer, bad.result.index, bad.result.key) == ("FAIL", 1, "k")


def test_a_job_that_cannot_be_begun_is_an_error_of_its_own(
    runner: ScriptedRunner, tmp_path: Path
) -> None:
    jobs = [Job("a", tmp_path / "missing"), "", 7, "broken", "b"]

    *errors, good = runner.map(jobs, on_error="return")  # type: ignore[call-overload]

    assert [type(error) for error in errors] == [OpenCodeConfigError] * 3 + [OpenCodeError]
    assert [error.index for error in errors] == [0, 1, 2, 3]
    assert str(errors[3]) == "ZeroDivisionError: broken script"
    assert isinstance(good, RunResult)


# --- the end -------------------------------------------------------------------------------------


def test_leaving_the_loop_ends_what_runs(runner: ScriptedRunner) -> None:
    for result in runner.map(itertools.chain("a", map("hold {}".format, itertools.count()))):
        assert result.answer == "A"
        break

    begun = runner.prompts
    assert next(runner.map(["b"])).answer == "B"
    assert len(runner.prompts) == len(begun) + 1


def test_leaving_the_block_ends_what_runs(runner: ScriptedRunner) -> None:
    with runner.map(["a", "hold b", "hold c"]) as batch:
        next(batch)
        runner.wait_for(3)

    assert list(batch) == []
    assert (batch.report.done, batch.report.failed, batch.report.not_run) == (1, 0, 2)


def test_a_batch_that_nobody_holds_any_more_is_ended(runner: ScriptedRunner) -> None:
    batch = runner.map(["a", "hold b"])
    next(batch)
    seen = weakref.ref(batch)

    del batch

    assert seen() is None


def test_closing_the_batch_from_another_thread_just_ends_the_loop(runner: ScriptedRunner) -> None:
    batch = runner.map(["hold a"])
    closer = threading.Thread(target=after, args=(runner, 1, batch.close))
    closer.start()

    assert list(batch) == []
    closer.join(10)


def test_closing_the_runner_cancels_its_batches(runner: ScriptedRunner) -> None:
    batch = runner.map(["hold a"])
    closer = threading.Thread(target=after, args=(runner, 1, runner.close))
    closer.start()

    with pytest.raises(OpenCodeCancelledError, match="the runner was closed"):
        next(batch)
    closer.join(10)


def test_ctrl_c_ends_what_runs(runner: ScriptedRunner) -> None:
    batch = runner.map(["hold a", "hold b"])
    killer = threading.Thread(
        target=after, args=(runner, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    )
    killer.start()

    with pytest.raises(KeyboardInterrupt):
        next(batch)
    killer.join(10)
    assert list(batch) == []


def test_one_thread_iterates_at_a_time(runner: ScriptedRunner) -> None:
    with runner.map(["hold a"]) as batch:
        waiter = threading.Thread(target=next, args=(batch, None))
        waiter.start()
        runner.wait_for(1)

        with pytest.raises(OpenCodeConfigError, match="is being iterated already"):
            next(batch)

        runner.release()
        waiter.join(10)


def test_a_closed_runner_maps_no_more(runner: ScriptedRunner) -> None:
    runner.close()

    with pytest.raises(OpenCodeConfigError, match="is closed"):
        runner.map(["a"])


def test_a_batch_that_is_lost_in_the_middle_of_its_own_write_is_ended(
    runner: ScriptedRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "batch.jsonl"
    held = [runner.map(["a", "hold b"], checkpoint=path)]
    next(held[0])
    runner.wait_for(2)
    (dispatching,) = [t for t in threading.enumerate() if t.name == "opencode-batch"]
    monkeypatch.setattr("os.fsync", lambda descriptor: held.clear())

    runner.release()
    dispatching.join(10)
    for thread in [t for t in threading.enumerate() if t.name == "opencode-batch-close"]:
        thread.join(10)

    assert len(list(runner.map(["a"], checkpoint=path))) == 1


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


def test_the_budget_error_stands_in_the_places_of_the_jobs_not_run(runner: ScriptedRunner) -> None:
    ends = list(runner.map(list("abcdef"), max_total_cost=2 * STEP_COST, on_error="return"))
    assert [type(end) for end in ends] == [RunResult] * 2 + [OpenCodeBudgetError] * 4


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


def test_tokens_without_a_price_are_warned_of_once_where_dollars_are_to_bind(
    runner: ScriptedRunner, caplog: pytest.LogCaptureFixture
) -> None:
    batch = runner.map(["free a", "b", "free c"], max_total_cost=1.0)

    results = list(batch)

    (warning,) = batch.report.warnings
    assert warning.startswith("20 tokens were counted at $0.00, so max_total_cost does not bind")
    assert f"warning: {warning}" in str(batch.report)
    assert [record.levelname for record in caplog.records if "$0.00" in record.message] == [
        "WARNING"
    ]
    assert all(result.warnings == [] for result in results)


def test_without_a_limit_of_dollars_nobody_is_warned_of_a_free_model(
    runner: ScriptedRunner,
) -> None:
    batch = runner.map(["free a"], max_total_tokens=1000)

    list(batch)

    assert batch.report.warnings == ()


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
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("retry_failed", [True, False])
def test_a_job_that_was_stopped_for_the_budget_is_run_again_with_a_larger_one(
    runner: ScriptedRunner, tmp_path: Path, retry_failed: bool
) -> None:
    path = tmp_path / "done.jsonl"
    jobs = ["work a", "work b"]
    budget = {"checkpoint": path, "retry_failed": retry_failed, "on_error": "return"}

    first: Any = list(runner.map(jobs, max_total_cost=STEP_COST, **budget))  # type: ignore[call-overload]
    n_begun = len(runner.begun)
    release = threading.Thread(target=after, args=(runner, n_begun + 2, runner.release))
    release.start()
    then: Any = list(runner.map(jobs, max_total_cost=9 * STEP_COST, **budget))  # type: ignore[call-overload]
    release.join(10)

    assert {type(end) for end in first} == {OpenCodeBudgetError}
    assert [end.answer for end in then] == ["WORK A", "WORK B"]


def test_what_a_cancelled_job_has_cost_counts_and_it_is_run_again(
    runner: ScriptedRunner, tmp_path: Path
) -> None:
    path = tmp_path / "done.jsonl"
    with runner.map(["a", "work b"], checkpoint=path) as batch:
        next(batch)
        runner.wait_for(2)
        for _ in range(2000):
            if batch._dispatch is not None and batch._dispatch._work.spent().get(1):
                break
            time.sleep(0.005)

    again = list(
        runner.map(
            ["a", "work b"],
            checkpoint=path,
            max_total_cost=2 * STEP_COST,
            retry_failed=False,
            on_error="return",
        )
    )

    assert isinstance(again[0], RunResult)
    assert isinstance(again[1], OpenCodeBudgetError)
    assert again[1].spent == pytest.approx(2 * STEP_COST)


def test_failed_jobs_count_for_the_budget(runner: ScriptedRunner) -> None:
    jobs = ["fail 1", "fail 2", "c"]

    ends = list(runner.map(jobs, max_total_cost=2 * STEP_COST, on_error="return"))

    assert isinstance(ends[2], OpenCodeBudgetError)


# --- the report ----------------------------------------------------------------------------------


def test_the_report_adds_up(runner: ScriptedRunner) -> None:
    batch = runner.map(["a", "fail", "c", "refused d"], on_error="return")
    list(batch)

    report = batch.report

    assert (report.done, report.failed, report.cached, report.not_run) == (3, 1, 0, 0)
    assert report.total_cost == pytest.approx(4 * STEP_COST)
    assert (report.tokens.total, report.tokens.input, report.tokens.output) == (40, 28, 12)
    assert report.errors == {"OpenCodeProcessError (APIError 401)": 1}
    assert (report.rate_limits, report.lowest_workers) == (1, 1)
    assert {job.prompt for job in report.slowest} == {"a", "fail", "c", "refused d"}
    assert report.busy_s > 0
    assert report.to_dict()["tokens"]["total"] == 40
    assert "3 done, 1 failed" in str(report)
    assert "1 x OpenCodeProcessError (APIError 401)" in str(report)


def test_a_job_without_an_answer_is_counted_and_named(runner: ScriptedRunner) -> None:
    with runner.map(["a", "mute", "b"]) as batch:
        statuses = [result.status for result in batch]

    assert statuses == ["ok", "ok", "ok"]
    assert (batch.report.done, batch.report.empty) == (3, 1)
    assert str(batch.report).startswith("3 done, 0 failed, 1 with an empty answer\n")


def test_the_report_can_be_had_half_way_and_before(runner: ScriptedRunner) -> None:
    with runner.map(["a", "hold b", "c"]) as batch:
        before = batch.report
        next(batch)
        runner.wait_for(3)
        half_way = batch.report

    assert (before.done, before.running, before.max_workers) == (0, 0, 2)
    assert half_way.done >= 1
    assert half_way.running >= 1


# --- executors -----------------------------------------------------------------------------------


# Newer Pythons warn of fork in a process that has threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(params=["threads", "fork", "spawn"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "threads":
        pool: Executor = ThreadPoolExecutor(2)
    else:
        pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(request.param))
    with pool:
        yield pool


def test_jobs_run_on_an_executor_of_the_users_own(
    runner: ScriptedRunner, executor: Executor
) -> None:
    good, bad = runner.map(["a", Job("fail", key="k")], executor=executor, on_error="return")

    assert isinstance(good, RunResult)
    assert (good.answer, good.index) == ("A", 0)
    assert isinstance(bad, OpenCodeProcessError)
    assert (bad.index, bad.key, bad.prompt) == (1, "k", "fail")
    assert bad.result is not None
    assert bad.result.answer == "FAIL"
    assert executor.submit(int, "3").result() == 3


def test_leaving_a_batch_ends_what_runs_on_an_executor(
    runner: ScriptedRunner, executor: Executor
) -> None:
    with runner.map(["a", "hold b", "hold c"], executor=executor) as batch:
        next(batch)

    assert executor.submit(int, "3").result(timeout=10) == 3


def test_a_refusal_is_heard_of_from_an_executor(runner: ScriptedRunner, executor: Executor) -> None:
    batch = runner.map(["refused a", "b"], executor=executor)
    list(batch)

    assert (batch.report.rate_limits, batch.report.lowest_workers) == (1, 1)


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_a_pool_that_loses_a_worker_loses_no_finished_result(
    runner: ScriptedRunner, tmp_path: Path, on_error: Any
) -> None:
    path = tmp_path / "batch.jsonl"
    given: list[object] = []

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        batch = runner.map(
            ["a", "b", "die", "c"], executor=pool, checkpoint=path, on_error=on_error
        )
        with pytest.raises(OpenCodeError, match=r"worker was lost|takes no more jobs"):
            given.extend(batch)

    assert [end.answer for end in given if isinstance(end, RunResult)] == ["A", "B"]
    assert len(path.read_text().splitlines()) == 2


SCRIPT = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from tests.scripted import ScriptedRunner

class Telling(ScriptedRunner):
    def __reduce__(self):
        return Telling, ()

    def _open(self, request, cancelled, keep_raw):
        print(request.prompt, flush=True)
        return super()._open(request, cancelled, keep_raw)

    def _ended(self):
        print("ended", flush=True)

pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
for result in Telling().map(["hold"], executor=pool):
    pass
"""


def test_a_task_that_is_pickled_only_after_the_stop_is_not_wanted_any_more() -> None:
    work = Work(ScriptedRunner(), Listener())
    work.stop("the batch was closed")

    remote = pickle.loads(pickle.dumps(work))

    assert not os.path.exists(remote.liveness.path)
    assert isinstance(remote(Task(0, "a", ".")).end, OpenCodeCancelledError)


def test_when_the_batch_is_killed_its_runs_in_worker_processes_are_ended() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "hold\n"
        (worker,) = psutil.Process(child.pid).children()
        child.kill()

        assert child.stdout.readline() == "ended\n"
        worker.kill()  # a forked worker never notices that its pool is dead (CPython 3.11)


def test_the_consumer_enters_no_lock_that_a_ctrl_c_could_leave_locked(
    runner: ScriptedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Entering a Condition is a Python function: a signal comes after its lock was taken, and before
    # the block whose end would give it back.
    entered: list[tuple[threading.Condition, int]] = []
    enter = threading.Condition.__enter__

    def note(condition: threading.Condition) -> bool:
        entered.append((condition, threading.get_ident()))
        return enter(condition)

    monkeypatch.setattr(threading.Condition, "__enter__", note)
    batch = runner.map(["a", "b", "c"])

    assert len(list(batch)) == 3
    assert batch._dispatch is not None
    here = (batch._dispatch._changed, threading.get_ident())
    assert here not in entered


def test_an_executor_that_was_shut_down_is_an_error(runner: ScriptedRunner) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()

    with pytest.raises(OpenCodeError, match="the executor takes no more jobs"):
        list(runner.map(["a"], executor=pool))


# --- too many requests ---------------------------------------------------------------------------


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


def test_jobs_that_are_to_be_run_again_have_their_turn_before_a_failure_after_them(
    runner: ScriptedRunner,
) -> None:
    hands = ByHand()

    def act() -> None:
        tasks = [hands.given.get(timeout=10) for _ in range(3)]
        for index, status in [(0, 429), (2, 429), (1, 401)]:
            tasks[index][0].set_result(failure(status))
        future, task = hands.given.get(timeout=10)
        future.set_result(Outcome(RunResult(prompt=task.prompt)))

    actor = threading.Thread(target=act)
    actor.start()
    batch = runner.map(["a", "b", "c"], executor=hands, max_workers=3)
    closer = threading.Timer(20, batch.cancel)
    closer.start()

    assert next(batch).prompt == "a"
    with pytest.raises(OpenCodeProcessError):
        next(batch)
    closer.cancel()
    closer.join()
    actor.join()


def test_a_refusal_brings_down_how_many_run_and_successes_bring_it_up(
    runner: ScriptedRunner,
) -> None:
    jobs = ["refused 1", *(str(n) for n in range(40))]

    batch = runner.map(jobs, max_workers=4)
    results = list(batch)

    assert len(results) == 41
    assert batch.report.rate_limits == 1
    assert batch.report.lowest_workers < 4


def test_refusals_change_nothing_where_that_is_switched_off(runner: ScriptedRunner) -> None:
    batch = runner.map(["refused 1", "b"], max_workers=4, adaptive=False)
    list(batch)

    assert (batch.report.rate_limits, batch.report.lowest_workers) == (1, 4)
