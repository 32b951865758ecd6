"""What a report keeps of its jobs; and the bar: on a terminal, in a notebook, nowhere else."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import redirect_stderr

import pytest

from opencode_sync.batch import tally
from tests.scripted import ScriptedRunner


class Screen(io.StringIO):
    """A stderr that says that it is a terminal, or not."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.fixture
def runner() -> Iterator[ScriptedRunner]:
    with ScriptedRunner(max_workers=2) as runner:
        yield runner


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


def test_it_is_silent_where_nobody_looks(runner: ScriptedRunner) -> None:
    with redirect_stderr(Screen(is_terminal=False)) as log_file:
        list(runner.map(["a"], progress=True))

    assert log_file.getvalue() == ""


def test_it_is_shown_anywhere_if_asked_for(runner: ScriptedRunner) -> None:
    with redirect_stderr(Screen(is_terminal=False)) as log_file:
        list(runner.map(["a"], progress="always"))

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
