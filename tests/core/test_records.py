"""Results as rows."""

from __future__ import annotations

import sys

import pytest

from opencode_sync.core.errors import OpenCodeConfigError, OpenCodeTimeoutError
from opencode_sync.core.records import results_to_frame, results_to_records
from opencode_sync.core.result import ErrorInfo, RunResult, SubAgent, TokenUsage


def test_a_result_is_one_flat_row() -> None:
    result = RunResult(
        prompt="p", index=2, key="k", total_cost=0.5, token_usage=TokenUsage(total=7)
    )
    result.append_event({"type": "text", "part": {"text": "Yes."}})
    result.append_event({"type": "tool_use", "part": {"tool": "bash"}})

    (row,) = results_to_records([result])

    assert (row["index"], row["key"], row["prompt"], row["answer"]) == (2, "k", "p", "Yes.")
    assert (row["tools"], row["total_cost"], row["tokens_total"]) == ("bash", 0.5, 7)
    assert not any(isinstance(value, (dict, list)) for value in row.values())


def test_a_failed_result_has_its_reason() -> None:
    (row,) = results_to_records([RunResult(error=ErrorInfo("APIError", "no", 401))])

    assert (row["status"], row["error"]) == ("error", "APIError 401: no")


def test_warnings_are_one_text_in_a_row() -> None:
    (row,) = results_to_records([RunResult(warnings=["One.", "Two."])])

    assert row["warnings"] == "One.; Two."


def test_sub_agents_are_a_number_in_a_row() -> None:
    (row,) = results_to_records([RunResult(sub_agents=[SubAgent("ses_a"), SubAgent("ses_b")])])

    assert row["sub_agents"] == 2


def test_an_error_has_a_row_with_what_had_been_got() -> None:
    error = OpenCodeTimeoutError("too long\nby far", result=RunResult(prompt="p", total_cost=0.5))

    (row,) = results_to_records([error])

    assert row["error"] == "OpenCodeTimeoutError: too long"
    assert (row["prompt"], row["total_cost"]) == ("p", 0.5)


def test_a_job_that_was_refused_has_a_row_too() -> None:
    error = OpenCodeConfigError("blank")
    error.index, error.prompt = 4, " "

    (row,) = results_to_records([error])

    assert (row["index"], row["prompt"], row["status"]) == (4, " ", "error")


def test_a_frame_begins_with_what_came_of_each_job_and_has_none_for_what_is_missing() -> None:
    pytest.importorskip("pandas")
    refused = OpenCodeConfigError("blank")
    refused.index, refused.metadata = 1, {"row": 7}

    frame = results_to_frame([RunResult(key="k", index=0, total_cost=0.5), refused])

    first, second = (list(row.values())[:5] for row in frame.to_dict("records"))
    assert list(frame.columns)[:5] == ["key", "status", "answer", "total_cost", "metadata"]
    assert first == ["k", "incomplete", "", 0.5, None]
    assert second == [None, "error", None, 0.0, {"row": 7}]
    assert list(results_to_frame([]).columns) == list(frame.columns)


def test_half_a_surrogate_pair_may_stand_in_a_frame() -> None:
    pytest.importorskip("pandas")

    frame = results_to_frame([RunResult(prompt="a\ud83d"), RunResult(prompt="b")])

    assert list(frame["prompt"]) == ["a\ud83d", "b"]


def test_a_missing_pandas_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)

    with pytest.raises(ImportError, match="pip install pandas"):
        results_to_frame([])
