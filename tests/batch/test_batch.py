"""`map`: many jobs, drawn lazily, several at a time; with a runner that needs no process."""

from __future__ import annotations

import datetime
import itertools
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    Job,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    RunConfig,
    RunResult,
    results_to_records,
)
from opencode_sync.batch import dispatch
from tests.batch.conftest import at_the_same_time, once_begun
from tests.scripted import ScriptedRunner


class Unread:
    """A value of a library that raises what it likes."""

    def isoformat(self) -> str:
        raise RuntimeError("not connected")


def by_index(end: Any) -> int:
    return int(end.index)


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

    with runner.map(str(n) for n in drawn):
        assert next(drawn) == 0


def test_a_batch_that_nobody_iterates_warns(runner: ScriptedRunner) -> None:
    with pytest.warns(ResourceWarning, match="no job of this batch has run"):
        runner.map(["a"])

    assert runner.prompts == []


def test_at_most_twice_the_workers_are_drawn_ahead(runner: ScriptedRunner) -> None:
    drawn = itertools.count()

    batch = runner.map((f"hold {n}" for n in drawn), max_workers=3)
    with at_the_same_time(once_begun(runner, 3, batch.close)):
        assert list(batch) == []

    assert next(drawn) == 2 * 3
    assert runner.most == 3


def test_work_goes_on_while_the_consumer_is_busy(runner: ScriptedRunner) -> None:
    drawn = itertools.count()

    with runner.map((str(n) for n in drawn), buffersize=6) as batch:
        next(batch)

        # The first result may be there before all that the buffer holds was drawn.
        runner.wait_for(next(drawn))


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


def test_a_workspace_may_begin_with_the_home(
    runner: ScriptedRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "repo").mkdir()

    ends = list(runner.map(["a", Job("b", Path("~")), Job("c", "~/repo")], Path("~/repo")))

    assert [Path(end.workspace).name for end in ends] == ["repo", tmp_path.name, "repo"]


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
    def release_when_it_has_failed() -> None:
        while batch.report.failed == 0:
            runner.wait_for(2)
        runner.release()

    batch = runner.map(["hold first", "fail", *"cdef"], buffersize=6)

    with at_the_same_time(release_when_it_has_failed):
        next(batch)
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
    wrong: list[Any] = [Job("a", tmp_path / "missing"), "", 7, Job("a", timeout_s=0, key="k")]
    wrong += [Job(["a"]), Job("a", run_cfg={})]  # type: ignore[arg-type]

    *errors, broken, good = runner.map([*wrong, "broken", "b"], on_error="return")

    assert [type(error) for error in errors] == [OpenCodeConfigError] * len(wrong)
    assert [error.index for error in errors] == list(range(len(wrong)))
    assert (errors[3].key, errors[3].prompt) == ("k", "a")
    assert (type(broken), str(broken)) == (OpenCodeError, "ZeroDivisionError: broken script")
    assert isinstance(good, RunResult)


def test_a_fault_of_a_job_stands_in_its_place_and_the_others_run(
    runner: ScriptedRunner, path: Path
) -> None:
    nan: Any = float("nan")
    faults = [
        (nan, "the job is float: use a str or a Job"),
        (Job(nan), "the job's prompt is of type float: use a str"),
        (Job(b"a"), "the job's prompt is of type bytes: use a str"),  # type: ignore[arg-type]
        (" \n", "the prompt is blank"),
        (Job("a", key=nan), "the job's key is of type float: use a str"),
        (Job("a", key="\ud800"), "cannot be encoded as UTF-8"),
        (Job("twice", key="first"), "two jobs have the key 'first'"),
        (Job("edited", key="kept"), "it has this job with another prompt"),
        (Job("a", "/missing"), "does not exist"),
        (Job("a", nan), "workspace is nan: use the path of a directory"),
        (Job("a", timeout_s=nan), "timeout_s is nan"),
        (Job("a", metadata=object()), "the job's metadata cannot be JSON"),
        (Job("a", metadata=Unread()), "the job's metadata cannot be JSON: not connected"),
    ]
    list(runner.map([Job("was", key="kept")], checkpoint=path))
    jobs = [Job("a", key="first"), *(job for job, _ in faults), "z"]

    first, *ends, last = runner.map(jobs, checkpoint=path, on_error="return")

    assert isinstance(first, RunResult)
    assert isinstance(last, RunResult)
    for index, (end, (_, why)) in enumerate(zip(ends, faults, strict=True), 1):
        assert isinstance(end, OpenCodeConfigError)
        assert why in str(end)
        assert end.index == index
    assert len(path.read_text().splitlines()) == 3  # what was never begun is not in the checkpoint


def test_a_fault_is_raised_when_its_turn_comes(runner: ScriptedRunner) -> None:
    wrong: list[Any] = ["a", "b", float("nan"), "d"]
    batch = runner.map(wrong)

    assert [next(batch).answer, next(batch).answer] == ["A", "B"]
    with pytest.raises(OpenCodeConfigError, match="the job is float") as caught:
        next(batch)
    assert caught.value.index == 2


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "as they come"])
def test_where_nothing_can_be_started_a_batch_that_is_continued_ends_with_the_reason(
    runner: ScriptedRunner, path: Path, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(cfg: RunConfig) -> None:
        raise OpenCodeError("the server does not start")

    list(runner.map(["saved"], checkpoint=path))
    monkeypatch.setattr(runner, "prepare", cannot)
    batch = runner.map(["new", "newer", "saved"], checkpoint=path, ordered=ordered)

    with pytest.raises(OpenCodeError, match="the server does not start"):
        list(batch)

    assert [result.prompt for result in batch.results] == ["saved"]
    assert runner.prompts == ["saved"]


def test_what_counts_and_shows_ends_no_batch(
    runner: ScriptedRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr("opencode_sync.batch.tally.row_of", broken)
    monkeypatch.setattr("opencode_sync.batch.throttle.Throttle._cut", broken)
    monkeypatch.setattr("opencode_sync.batch.tally.Progress.show", broken)

    results = list(runner.map(["a", "refused b", "c"], progress="always"))

    assert [result.answer for result in results] == ["A", "REFUSED B", "C"]
    assert "broken" in caplog.text


# --- metadata ------------------------------------------------------------------------------------


def test_metadata_comes_back_with_the_result_and_the_error_also_from_the_checkpoint(
    runner: ScriptedRunner, path: Path
) -> None:
    jobs = [
        Job("a", metadata={"row": 3}),
        Job("fail", metadata=["x", None]),
        Job("", metadata="text"),
        "plain",
    ]
    options: Any = {"checkpoint": path, "on_error": "return", "retry_failed": False}

    first = list(runner.map(jobs, **options))
    again = list(runner.map(jobs, **options))
    changed = list(runner.map([Job("a", metadata={"row": 4}), "fail"], **options))

    expected = [{"row": 3}, ["x", None], "text", None]
    assert [end.metadata for end in first] == [end.metadata for end in again] == expected
    assert isinstance(again[1], OpenCodeError)
    assert again[1].result is not None
    assert again[1].result.metadata == ["x", None]
    assert [end.metadata for end in changed] == [{"row": 4}, ["x", None]]
    assert len(runner.begun) == 3  # the blank prompt was refused before
    assert [row["metadata"] for row in results_to_records(again)] == expected


def test_a_row_without_a_checkpoint_keeps_metadata_if_it_is_short(runner: ScriptedRunner) -> None:
    jobs = [Job("a", metadata={"row": 3}), Job("b", metadata=["x" * 100_000])]
    batch = runner.map(jobs, max_workers=1)
    list(batch)

    short, long = (row["metadata"] for row in batch.report.rows)
    assert short == {"row": 3}
    assert 400 < len(long) < 600


def test_metadata_is_what_json_gives_back(runner: ScriptedRunner) -> None:
    when = datetime.date(2026, 5, 4)
    metadata = {1: (2, float("nan")), "at": when, "path": Path("a/b"), "sum": Decimal("1.5")}

    (result,) = runner.map([Job("a", metadata=metadata)])

    assert result.metadata == {"1": [2, None], "at": "2026-05-04", "path": "a/b", "sum": "1.5"}


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

    with at_the_same_time(once_begun(runner, 1, batch.close)):
        assert list(batch) == []


def test_closing_the_runner_cancels_its_batches(runner: ScriptedRunner) -> None:
    batch = runner.map(["hold a"])

    with (
        at_the_same_time(once_begun(runner, 1, runner.close)),
        pytest.raises(OpenCodeCancelledError, match="the runner was closed"),
    ):
        next(batch)

    with pytest.raises(OpenCodeConfigError, match="is closed"):
        runner.map(["a"])


def test_ctrl_c_ends_what_runs(runner: ScriptedRunner) -> None:
    batch = runner.map(["hold a", "hold b"])
    press = once_begun(runner, 2, lambda: os.kill(os.getpid(), signal.SIGINT))

    with at_the_same_time(press), pytest.raises(KeyboardInterrupt):
        next(batch)

    assert list(batch) == []


@pytest.mark.parametrize("is_saved", [False, True], ids=["memory", "checkpoint"])
def test_what_has_finished_is_to_be_had_after_a_ctrl_c_though_the_first_job_hung(
    runner: ScriptedRunner, tmp_path: Path, is_saved: bool
) -> None:
    path = tmp_path / "done.jsonl" if is_saved else None
    batch = runner.map(["hold first", "b", Job("c", metadata=7), "d"], checkpoint=path)

    def press_when_three_are_done() -> None:
        while batch.report.done < 3:
            runner.wait_for(2)
        os.kill(os.getpid(), signal.SIGINT)

    with at_the_same_time(press_when_three_are_done), pytest.raises(KeyboardInterrupt):
        next(batch)

    assert [(result.index, result.prompt) for result in batch.results] == list(enumerate("bcd", 1))
    assert [getattr(result, "answer", None) for result in batch.results] == ["B", "C", "D"]
    assert [result.metadata for result in batch.results] == [None, 7, None]


@pytest.mark.parametrize("is_saved", [False, True], ids=["memory", "checkpoint"])
def test_results_are_in_the_order_of_the_input_whether_given_or_not(
    runner: ScriptedRunner, tmp_path: Path, is_saved: bool
) -> None:
    path = tmp_path / "done.jsonl" if is_saved else None
    jobs: list[Any] = ["hold a", Job("fail", key="k"), "", "d"]

    with runner.map(jobs, checkpoint=path, ordered=False, on_error="return") as batch:
        half_way = [next(batch), next(batch), next(batch)]
        seen = [end.index for end in batch.results]
        runner.release()
        half_way += batch

    results = batch.results
    assert seen == [1, 2, 3]
    assert [end.index for end in results] == [0, 1, 2, 3]
    assert [str(end) for end in results] == [str(end) for end in sorted(half_way, key=by_index)]
    assert [end.key for end in results] == [None, "k", None, None]
    assert isinstance(results[1], OpenCodeProcessError)


def test_results_from_a_checkpoint_have_what_the_jobs_say_now(
    runner: ScriptedRunner, tmp_path: Path
) -> None:
    path = tmp_path / "done.jsonl"
    list(runner.map([Job("a", metadata=1), Job("b", metadata=2)], checkpoint=path))
    batch = runner.map(["c", Job("b", metadata=3), "a"], checkpoint=path)

    given = list(batch)

    assert [result.metadata for result in given] == [None, 3, 1]
    assert [result.to_dict() for result in batch.results if isinstance(result, RunResult)] == [
        result.to_dict() for result in given
    ]


def test_without_a_checkpoint_a_bounded_number_of_results_is_kept(
    runner: ScriptedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "MAX_TAKEN", 2)
    batch = runner.map(list("abcd"))

    list(batch)

    assert [result.prompt for result in batch.results] == ["c", "d"]


def test_a_batch_gives_a_frame_of_its_results(runner: ScriptedRunner) -> None:
    pytest.importorskip("pandas")
    batch = runner.map(["a", "fail"], on_error="return")
    list(batch)

    frame = batch.to_frame()

    assert list(frame["answer"]) == ["A", "FAIL"]
    assert list(frame["status"]) == ["ok", "error"]


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
