"""What a batch tells of itself: the report, and the bar where somebody looks."""

from __future__ import annotations

import io
import pickle
from contextlib import redirect_stderr
from typing import Any

import pytest

from opencode_sync.batch import tally
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


def test_elsewhere_it_is_shown_only_if_asked_for(runner: ScriptedRunner) -> None:
    with redirect_stderr(Screen(is_terminal=False)) as log_file:
        list(runner.map(["a"], progress=True))
        silent = log_file.getvalue()
        list(runner.map(["a"], progress="always"))

    assert silent == ""
    assert "1/1" in last_state(log_file)


def test_a_batch_that_is_left_leaves_the_bar_as_it_stands(runner: ScriptedRunner) -> None:
    with (
        redirect_stderr(Screen(is_terminal=True)) as terminal,
        runner.map(["a", "hold b"], progress=True) as batch,
    ):
        next(batch)

    assert "1/2" in last_state(terminal)
    assert terminal.getvalue().endswith("\n")


def test_no_stderr_at_all_is_no_error(runner: ScriptedRunner) -> None:
    with redirect_stderr(None):
        results = list(runner.map(["a"], progress=True))

    assert len(results) == 1
