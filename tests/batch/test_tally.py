"""What a batch tells of itself: the report, and the bar where somebody looks."""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import pytest

from opencode_sync.batch import tally
from tests.batch.conftest import at_the_same_time
from tests.scripted import STEP_COST, ScriptedRunner

# --- the report ----------------------------------------------------------------------------------


def test_the_report_adds_up(runner: ScriptedRunner) -> None:
    batch = runner.map(["a", "fail", "mute", "refused d"], on_error="return")
    statuses = [getattr(end, "status", None) for end in batch]

    report = batch.report

    assert statuses == ["ok", None, "ok", "ok"]
    assert (report.done, report.failed, report.empty) == (3, 1, 1)
    assert (report.cached, report.not_run, report.running) == (0, 0, 0)
    assert report.total_cost == pytest.approx(4 * STEP_COST)
    assert (report.tokens.total, report.tokens.input, report.tokens.output) == (40, 28, 12)
    assert report.errors == {"OpenCodeProcessError (APIError 401)": 1}
    assert (report.rate_limits, report.lowest_workers) == (1, 1)
    assert {job.prompt for job in report.slowest} == {"a", "fail", "mute", "refused d"}
    assert report.busy_s > 0
    assert report.to_dict()["tokens"]["total"] == 40
    assert str(report).startswith("3 done, 1 failed, 1 with an empty answer\n$0.0400, 40 tokens")
    assert "1 x OpenCodeProcessError (APIError 401)" in str(report)


def test_the_report_can_be_had_half_way_and_before(runner: ScriptedRunner) -> None:
    with runner.map(["a", "hold b", "c"]) as batch:
        before = batch.report
        next(batch)
        runner.wait_for(3)
        half_way = batch.report

    assert (before.done, before.running, before.max_workers) == (0, 0, 2)
    assert half_way.done >= 1
    assert half_way.running >= 1


def test_tokens_without_a_price_are_warned_of_once_where_dollars_are_to_bind(
    runner: ScriptedRunner, caplog: pytest.LogCaptureFixture
) -> None:
    def warned(**limits: Any) -> list[str]:
        batch = runner.map(["free a", "b", "free c"], **limits)
        assert all(result.warnings == [] for result in batch)
        return list(batch.report.warnings)

    assert warned(max_total_tokens=1000) == []
    (warning,) = warned(max_total_cost=1.0)

    assert warning.startswith("20 tokens were counted at $0.00, so max_total_cost does not bind")
    assert [record.levelname for record in caplog.records if "$0.00" in record.message] == [
        "WARNING"
    ]


def test_a_report_keeps_a_bounded_number_of_jobs_and_the_beginnings_of_their_texts(
    monkeypatch: pytest.MonkeyPatch, runner: ScriptedRunner
) -> None:
    monkeypatch.setattr(tally, "MAX_ROWS", 2)
    batch = runner.map(["a", "fail b", "x" * 5_000], on_error="return", max_workers=1)
    list(batch)

    failed, long = pickle.loads(pickle.dumps(batch.report)).rows

    assert failed["failure"]["type"] == "OpenCodeProcessError"
    assert long["answer"] == "X" * 500 + "\n… 4,500 characters more"
    assert long["token_usage"]["total"] == 10


# --- the bar -------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A stderr that says that it is a terminal, or not."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


class LogFile(Screen):
    """A log, which can be waited for."""

    def __init__(self) -> None:
        super().__init__(is_terminal=False)
        self._has_grown = threading.Condition()

    def write(self, text: str) -> int:
        with self._has_grown:
            self._has_grown.notify_all()
            return super().write(text)

    def wait_for(self, text: str) -> None:
        with self._has_grown:
            assert self._has_grown.wait_for(lambda: text in self.getvalue(), 20)


def once_said(log_file: LogFile, text: str, act: Callable[[], object]) -> Callable[[], None]:
    def wait_and_act() -> None:
        log_file.wait_for(text)
        act()

    return wait_and_act


OFTEN: Any = {"progress_interval_s": 0.01}


def last_state(screen: Screen) -> str:
    return screen.getvalue().rstrip("\n").rpartition("\r")[2]


def test_the_bar_says_what_is_done_failed_and_spent(runner: ScriptedRunner) -> None:
    with redirect_stderr(Screen(is_terminal=True)) as terminal:
        list(runner.map(["a", "fail", "c"], progress=True, on_error="return"))

    assert "3/3" in last_state(terminal)
    assert "1 failed, $0.0300, 30 tokens" in last_state(terminal)
    assert terminal.getvalue().endswith("\n")


def test_without_a_length_it_counts(runner: ScriptedRunner) -> None:
    with redirect_stderr(Screen(is_terminal=True)) as terminal:
        list(runner.map(iter(["a", "b"]), progress=True))

    assert last_state(terminal).startswith("2job")


def test_elsewhere_a_bar_is_shown_only_if_asked_for(runner: ScriptedRunner) -> None:
    with redirect_stderr(Screen(is_terminal=False)) as log_file:
        list(runner.map(["a"], progress=True))
        silent = log_file.getvalue()
        list(runner.map(["a"], progress="always"))

    assert silent == ""
    assert "1/1" in last_state(log_file)


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(runner: ScriptedRunner) -> None:
    with redirect_stderr(LogFile()) as log_file:
        batch = runner.map(["a", "fail", "hold c"], progress=True, on_error="return", **OFTEN)
        ends = [next(batch), next(batch)]
        runner.wait_for(3)
        with at_the_same_time(once_said(log_file, "1 of 3 left", runner.release)):
            ends += batch

    first, *_, last = log_file.getvalue().splitlines()
    assert len(ends) == 3
    assert first.startswith("opencode-sync: ")
    assert last == "opencode-sync: 2 done, 1 failed, $0.0300, 30 tokens, 0 of 3 left"


def test_a_batch_of_unknown_length_does_not_say_what_is_left(runner: ScriptedRunner) -> None:
    with redirect_stderr(LogFile()) as log_file:
        batch = runner.map(iter(["a", "hold b"]), progress=True, **OFTEN)
        next(batch)
        runner.wait_for(2)
        with at_the_same_time(once_said(log_file, "1 done", runner.release)):
            list(batch)

    last = log_file.getvalue().splitlines()[-1]
    assert last == "opencode-sync: 2 done, 0 failed, $0.0200, 20 tokens"


def test_a_batch_that_is_left_leaves_the_bar_as_it_stands(runner: ScriptedRunner) -> None:
    with (
        redirect_stderr(Screen(is_terminal=True)) as terminal,
        runner.map(["a", "hold b"], progress=True) as batch,
    ):
        next(batch)

    assert "1/2" in last_state(terminal)
    assert terminal.getvalue().endswith("\n")


class Logger:
    """What a framework puts in the place of stderr: it can be written to, and no more."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


def closed_file() -> io.StringIO:
    file = io.StringIO()
    file.close()
    return file


class UnreadPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("progress", [True, "always"])
@pytest.mark.parametrize(
    "stderr",
    [None, closed_file(), Logger(), UnreadPipe()],
    ids=["none", "closed", "odd", "unread"],
)
def test_a_stderr_that_is_not_a_file_is_not_an_error(
    runner: ScriptedRunner, stderr: Any, progress: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with redirect_stderr(stderr):
        batch = runner.map(["a", "hold b"], progress=progress, progress_interval_s=1e-6)
        ends = [next(batch)]
        runner.wait_for(2)
        runner.release()
        ends += batch

    assert len(ends) == 2
    assert capsys.readouterr().out == ""
