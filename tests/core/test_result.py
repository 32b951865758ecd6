"""RunResult: events folded, its outcome, and its way to JSON and back."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest

from opencode_sync import (
    ErrorInfo,
    Event,
    RunResult,
    TokenUsage,
    aggregate_run_result,
    run_result_fuzzy_text,
)
from opencode_sync.core.result import Status, SubAgent

STEP: Event = {"type": "step_start", "sessionID": "ses_1", "part": {}}
REJECTION = "The user rejected permission to use this specific tool call."


def text(words: str) -> Event:
    return {"type": "text", "part": {"text": words}}


def delta(piece: str) -> Any:
    return {"type": "text", "delta": piece}


def finish(reason: str = "stop", **part: Any) -> Any:
    return {"type": "step_finish", "part": {"reason": reason, **part}}


def tool(name: str, **state: Any) -> Any:
    return {"type": "tool_use", "part": {"tool": name, "state": {"status": "completed", **state}}}


def rejected(name: str) -> Any:
    return tool(name, status="error", error=REJECTION)


def failure(message: str, name: str = "APIError") -> Event:
    return {"type": "error", "error": {"name": name, "data": {"message": message}}}


def result_of(*events: Event, exit_code: int | None = 0) -> RunResult:
    return aggregate_run_result(events=events, exit_code=exit_code)


def two_steps() -> RunResult:
    """A whole run: a tool in the first step, the answer in the second."""
    result = aggregate_run_result(
        events=[
            STEP,
            text("Let me look."),
            tool("bash", output="ok"),
            finish("tool-calls", cost=0.5, tokens={"input": 10, "output": 2}),
            STEP,
            text("The answer."),
            finish("stop", cost=0.25, tokens={"input": 20, "cache": {"read": 8}}),
        ],
        raw_stdout_lines=["{}", "{}"],
        exit_code=0,
        stderr="\x1b[91ma warning\x1b[0m",
    )
    result.prompt, result.workspace, result.index, result.key = "Look", "/repo", 3, "k"
    result.attempts, result.duration_s, result.parsed = 2, 1.5, {"n": 1}
    return result


LOOKING = [STEP, text("Let me look."), finish("tool-calls")]
ANSWERING = [STEP, text("Done."), finish()]


# --- texts ---------------------------------------------------------------------------------------


def test_deltas_are_joined_as_they_are() -> None:
    result = result_of(delta("Hel"), delta("lo"), text("whole"), delta("a"), delta(" b"))

    assert result.final_text == "Hello\n\nwhole\n\na b"


@pytest.mark.parametrize(
    "event",
    [
        {"type": "text", "part": {"text": "x", "synthetic": True}},
        {"type": "text", "part": {"text": "x", "ignored": True}},
        {"type": "reasoning", "part": {"text": "x"}},
        {"type": "text_delta", "partID": "p", "delta": "x"},  # its text follows
    ],
    ids=["synthetic", "ignored", "reasoning", "a server's delta"],
)
def test_what_is_not_an_answer_s_text_is_left_out(event: Any) -> None:
    assert result_of(event).final_text == ""


def test_a_last_step_without_text_has_no_answer() -> None:
    result = result_of(*LOOKING, STEP)

    assert (result.final_text, result.answer) == ("Let me look.", "")


SUMMARY: list[Any] = [
    {**event, "part": {**event["part"], "messageID": "msg_s"}}  # type: ignore[typeddict-item]
    for event in (STEP, text("## Summary"), finish())
]
COMPACTION: Event = {"type": "compaction", "messageID": "msg_s"}
CONTINUE: Any = {  # OpenCode's own prompt after a summary
    "type": "text",
    "part": {"text": "Go on.", "synthetic": True, "metadata": {"compaction_continue": True}},
}


def test_a_summary_and_what_opencode_says_by_itself_are_left_out() -> None:
    result = result_of(*LOOKING, *SUMMARY, CONTINUE, *ANSWERING)

    assert (result.final_text, result.answer) == ("Let me look.\n\nDone.", "Done.")
    assert (result.status, result.turns) == ("ok", 3)


def test_a_whole_answer_remains_the_answer_where_opencode_goes_on_by_itself() -> None:
    goes_on = [*SUMMARY, CONTINUE, *ANSWERING]

    result = result_of(STEP, text("42"), finish(), *goes_on, *goes_on)

    assert (result.status, result.answer) == ("ok", "42")
    assert result.final_text == "42\n\nDone.\n\nDone."


@pytest.mark.parametrize("place", range(5), ids=lambda n: f"after {n} events of it")
def test_a_summary_without_a_prompt_after_it_is_known_by_its_event(place: int) -> None:
    summary = [*SUMMARY, *ANSWERING]

    result = result_of(*LOOKING, *summary[:place], COMPACTION, *summary[place:])

    assert (result.status, result.final_text) == ("ok", "Let me look.\n\nDone.")


@pytest.mark.parametrize("place", range(4), ids=lambda n: f"after {n} events of it")
def test_a_run_that_ends_with_a_summary_has_no_whole_answer(place: int) -> None:
    result = result_of(*LOOKING, *SUMMARY[:place], COMPACTION, *SUMMARY[place:])

    assert (result.status, result.answer) == ("incomplete", "Let me look.")


def test_the_text_can_be_given_as_a_whole() -> None:
    result = RunResult([], "given")

    result.append_event(text("added"))

    assert result.answer == result.final_text == "given\n\nadded"


def test_the_text_can_be_replaced_as_a_whole() -> None:
    result = two_steps()

    result.final_text = "redacted"

    assert (result.final_text, result.answer) == ("redacted", "redacted")


# --- tools, usage, session -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tool_use", "tool_call", "tool_result", "tool"])
def test_tool_events_are_kept_whole(kind: str) -> None:
    event: Any = {"type": kind, "part": {"tool": "bash"}, "more": [1]}

    assert result_of(event).tool_calls == [event]


def test_the_tool_of_a_step_is_a_tool_call_too() -> None:
    event: Any = {"type": "step_finish", "tool": {"name": "x"}, "part": {"tool": "not this"}}

    assert result_of(event).tool_calls == [{"type": "step_tool", "payload": {"name": "x"}}]


def test_usage_and_cost_are_summed_over_the_steps() -> None:
    result = two_steps()

    assert (result.turns, result.total_cost) == (2, 0.75)
    assert result.token_usage == TokenUsage(input=30, output=2, cache_read=8)


@pytest.mark.parametrize("part", [{}, {"part": {}}, {"part": "odd"}], ids=repr)
def test_a_step_without_a_part_has_its_usage_on_the_event(part: Any) -> None:
    event: Any = {"type": "step_finish", "cost": 2, "tokens": {"total": 7}, **part}

    result = result_of(event)

    assert (result.turns, result.total_cost, result.token_usage.total) == (1, 2.0, 7)


def test_the_session_is_that_of_the_first_event_that_has_one() -> None:
    odd: Any = {"type": "text", "sessionID": 5}
    other: Event = {"type": "text", "sessionID": "ses_2", "part": {}}

    assert result_of(odd, STEP, other).session_id == "ses_1"


def test_an_event_of_an_empty_session_is_one_of_the_run_s() -> None:
    words: Event = {"type": "text", "sessionID": "", "part": {"text": "Hello"}}

    result = result_of({"type": "retry", "sessionID": ""}, STEP, words)

    assert (result.session_id, result.final_text) == ("ses_1", "Hello")


def test_refused_tools_are_named_in_order() -> None:
    result = result_of(rejected("edit"), tool("read"), rejected("bash"), rejected("edit"))

    assert result.denied_tools == ["edit", "bash", "edit"]


def test_warnings_of_any_session_are_kept_in_order_each_once() -> None:
    result = result_of(
        {"type": "warning", "message": "The MCP server 'f' did not start."},
        STEP,
        {"type": "warning", "sessionID": "ses_child", "message": "The variant was ignored."},
        {"type": "warning", "sessionID": "ses_1", "message": "The variant was ignored."},
    )

    assert result.warnings == ["The MCP server 'f' did not start.", "The variant was ignored."]
    assert (result.session_id, result.status) == ("ses_1", "incomplete")


def test_the_first_error_is_the_one_that_counts() -> None:
    result = result_of(failure("bad key"), failure("aborted"))

    assert result.error == ErrorInfo("APIError", "bad key")


# --- sub-agents ----------------------------------------------------------------------------------


def announced(child: str, parent: str = "ses_parent") -> Any:
    named = {"childID": child, "parentID": parent, "agent": "general", "title": f"to {child}"}
    return {"type": "sub_agent", "sessionID": "ses_parent", **named}


def spent(session: str, cost: float, tokens: int) -> Any:
    part = {"reason": "stop", "cost": cost, "tokens": {"input": tokens}}
    return {"type": "step_finish", "sessionID": session, "part": part}


def test_of_a_sub_agent_spending_and_tools_count_and_its_words_do_not() -> None:
    result = result_of(
        {"type": "step_start", "sessionID": "ses_parent", "part": {}},
        {"type": "text", "sessionID": "ses_child", "part": {"text": "To my parent."}},
        {"type": "tool_use", "sessionID": "ses_child", "part": {"tool": "bash"}},
        {"type": "error", "sessionID": "ses_child", "error": {"name": "X"}},
        spent("ses_child", 0.25, 10),
        {"type": "text", "sessionID": "ses_parent", "part": {"text": "To you."}},
        spent("ses_parent", 0.25, 10),
    )

    assert (result.session_id, result.final_text) == ("ses_parent", "To you.")
    assert (result.status, result.turns, len(result.tool_calls)) == ("ok", 1, 1)
    assert (result.total_cost, result.token_usage.input) == (0.5, 20)


def test_each_sub_agent_s_steps_are_summed_once_however_often_it_is_announced() -> None:
    result = result_of(
        announced("ses_a"),
        spent("ses_a", 0.25, 10),
        announced("ses_b", parent="ses_a"),
        spent("ses_b", 0.5, 20),
        announced("ses_a"),
        spent("ses_a", 0.25, 10),
        spent("ses_parent", 1.0, 40),
    )

    assert result.session_id == "ses_parent"
    assert result.sub_agents == [
        SubAgent("ses_a", "general", "to ses_a", "ses_parent", TokenUsage(input=20), 0.5),
        SubAgent("ses_b", "general", "to ses_b", "ses_a", TokenUsage(input=20), 0.5),
    ]
    assert (result.total_cost, result.token_usage.input, result.turns) == (2.0, 80, 1)


def test_a_sub_agent_that_nothing_announced_is_counted_without_a_name() -> None:
    result = result_of(spent("ses_parent", 1.0, 1), spent("ses_a", 0.5, 2))

    assert result.sub_agents == [SubAgent("ses_a", token_usage=TokenUsage(input=2), total_cost=0.5)]


def test_an_announcement_without_a_session_is_left_out() -> None:
    assert result_of(announced(""), announced(cast(Any, 7))).sub_agents == []


# --- how it ended --------------------------------------------------------------------------------

REFUSED = [STEP, rejected("bash")]
FILTERED = failure("x", "ContentFilterError")
WARNED: Event = {"type": "warning", "message": "Look."}


@pytest.mark.parametrize(
    "status, events, exit_code",
    [
        pytest.param("ok", ANSWERING, 0, id="finished"),
        pytest.param("ok", ANSWERING, None, id="finished on a server"),
        pytest.param("ok", [*ANSWERING, WARNED], 0, id="warned"),
        pytest.param("ok", [STEP, finish("length"), *ANSWERING], 0, id="cut, and went on"),
        pytest.param("error", [STEP, failure("bad key")], 0, id="error event"),
        pytest.param("error", ANSWERING, -9, id="exit status"),
        pytest.param("error", [*REFUSED, failure("bad key")], 0, id="error after a refusal"),
        # OpenCode 1.18.33 ends a run at a rejected permission, its step closed.
        pytest.param("denied", [*REFUSED, finish("tool-calls")], 0, id="refused, and ended"),
        pytest.param("denied", [*REFUSED, *ANSWERING], 0, id="refused, and went on"),
        pytest.param("incomplete", [*REFUSED, finish("length")], 0, id="refused, and cut"),
        pytest.param("incomplete", [STEP, finish("content-filter"), FILTERED], 1, id="filtered"),
        pytest.param("incomplete", [], 0, id="nothing"),
        pytest.param("incomplete", [STEP, text("Hi")], 0, id="in a step"),
        pytest.param("incomplete", LOOKING, 0, id="between steps"),
        pytest.param("incomplete", [*LOOKING, STEP], 0, id="in the second step"),
    ],
)
def test_the_status_tells_how_the_run_ended(
    status: Status, events: list[Event], exit_code: int | None
) -> None:
    assert result_of(*events, exit_code=exit_code).status == status


@pytest.mark.parametrize(
    "reason", ["length", "content-filter", "error", "other", "unknown", "weird", "", None]
)
def test_an_answer_that_ends_for_any_other_reason_than_its_end_is_incomplete(reason: Any) -> None:
    assert result_of(STEP, text("cut in the mid"), finish(reason)).status == "incomplete"


def test_output_that_was_cut_is_incomplete_whatever_came_before() -> None:
    result = result_of(STEP, finish())

    result.truncated = True

    assert result.status == "incomplete"


def test_a_run_that_was_stopped_says_so_whatever_it_came_to() -> None:
    result = result_of(STEP, failure("aborted"), exit_code=-15)

    result.mark_stopped("over_budget")

    assert result.status == "over_budget"


# --- JSON, copies, equality ----------------------------------------------------------------------


def stopped() -> RunResult:
    result = result_of(STEP, text("so far"), failure("x"), rejected("bash"), exit_code=-15)
    result.mark_stopped("timed_out")
    return result


RESULTS: dict[str, RunResult] = {
    "two steps": two_steps(),
    "went on after its answer": result_of(STEP, text("42"), finish(), *SUMMARY, CONTINUE, *LOOKING),
    "went on with the same words": result_of(
        STEP, text("Done."), finish(), *SUMMARY, CONTINUE, STEP, text("Still Done."), finish()
    ),
    "sub-agents and warnings": result_of(announced("ses_a"), spent("ses_a", 0.25, 10), WARNED),
    "empty": RunResult(),
    "stopped": stopped(),
    "no answer": result_of(STEP, text("ends in a blank line\n\n"), finish("tool-calls"), STEP),
    "only blank lines": result_of(text("\n\n"), STEP, text("\n\n")),
    "same text twice": result_of(text("a"), STEP, text("a")),
    "text in pieces": result_of(delta("a"), delta("b")),
    "text of no event": RunResult(final_text="given"),
    "incomplete": result_of(STEP, finish("length")),
    "denied": result_of(STEP, rejected("bash"), finish("tool-calls")),
}


def through_json(result: RunResult) -> RunResult:
    return RunResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS.keys())
def test_a_result_from_json_is_equal(result: RunResult) -> None:
    assert through_json(result) == result


@pytest.mark.parametrize(
    "copied",
    [lambda result: pickle.loads(pickle.dumps(result)), copy.deepcopy, dataclasses.replace],
    ids=["pickle", "deepcopy", "replace"],
)
def test_a_copy_is_equal(copied: Callable[[RunResult], RunResult]) -> None:
    for result in RESULTS.values():
        assert copied(result) == result


def test_a_result_from_json_goes_on_where_it_was() -> None:
    result = through_json(result_of(STEP, text("one"), finish("tool-calls"), STEP, text("two")))

    result.append_event(text("three"))
    result.append_event(finish("stop"))

    assert (result.final_text, result.answer) == ("one\n\ntwo\n\nthree", "two\n\nthree")
    assert result.status == "ok"


def test_the_dict_has_what_is_computed_too_and_is_a_copy() -> None:
    result = two_steps()

    data = result.to_dict()
    again = RunResult.from_dict(data)
    data["events"].clear()
    data["raw_stdout_lines"].clear()

    assert (data["status"], data["answer"]) == ("ok", "The answer.")
    assert data["final_text"] == "Let me look.\n\nThe answer."
    assert not [key for key in data if key.startswith("_")]
    assert result == again == two_steps()


def test_a_dict_of_another_version_is_read_as_far_as_it_goes() -> None:
    error = {"name": "X", "message": "m", "new": 1}

    result = RunResult.from_dict(
        {"final_text": "hello", "token_usage": {"input": 3, "new": 1}, "error": error, "new": 1}
    )

    assert (result.final_text, result.answer) == ("hello", "hello")
    assert result.token_usage == TokenUsage(input=3)
    assert result.error == ErrorInfo("X", "m")
    assert (result.events, result.sub_agents) == ([], [])


def test_the_repr_tells_the_outcome_and_shortens_the_text() -> None:
    result = result_of(STEP, text("x" * 200), rejected("bash"), finish("stop", cost=0.5))

    assert repr(result) == (
        f"RunResult(status='denied', final_text='{'x' * 80}...', denied_tools=['bash'], "
        "turns=1, total_cost=0.5, session_id='ses_1')"
    )


# --- text of whatever was got --------------------------------------------------------------------


ODD_EVENT: Any = {"type": "new", "output": "one"}
DIAGNOSTIC: Event = {"type": "diagnostic", "kind": "json_decode_error", "raw": "x"}


@pytest.mark.parametrize(
    "result, words",
    [
        (RunResult(final_text=" hello \n", raw_stdout_lines=["raw"]), "hello"),
        (RunResult(events=[text("not folded")], raw_stdout_lines=["raw"]), "not folded"),
        (result_of(tool("bash"), failure("x"), delta(" "), ODD_EVENT), "one"),
        (RunResult(events=[DIAGNOSTIC], raw_stdout_lines=["a", " ", " b\n"]), "a\nb"),
        (RunResult(), ""),
    ],
    ids=["final_text", "events", "keys", "raw lines", "nothing"],
)
def test_fuzzy_text_is_the_best_that_there_is(result: RunResult, words: str) -> None:
    assert run_result_fuzzy_text(result) == words
