"""What single events say, in all the shapes that they come in."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import pytest

from opencode_sync import ErrorInfo, TokenUsage
from opencode_sync.core.reading import (
    asked_to_wait_s,
    denied_tool,
    error_info,
    number_of,
    saved_tried,
    saved_usage,
    strings_in,
    text_of,
    usage_of,
    warnings_of,
)

# --- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event, text",
    [
        ({"type": "text", "part": {"text": "a"}, "text": "b"}, "a"),
        ({"type": "text", "part": {"text": ""}, "text": "b"}, ""),
        ({"type": "text", "part": {"text": 5}, "text": "b"}, "b"),
        ({"type": "text", "content": "c", "text": "b", "delta": "d"}, "c"),
        ({"type": "text", "text": "b", "delta": "d"}, "b"),
        ({"type": "text", "content": ["c"], "delta": 1}, ""),
        ({"type": "message", "content": "m"}, "m"),
        ({"type": "assistant", "content": [{"text": "a"}, {"content": "b"}, "c"]}, "abc"),
        ({"type": "model", "content": [{"text": 1, "content": "b"}, {}, None, ["x"], 7]}, "b"),
        ({"type": "message", "content": {"text": "x"}, "text": "x"}, ""),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_text_of_an_event_stands_in_one_of_several_places(
    event: dict[str, Any], text: str
) -> None:
    assert text_of(event) == (text, False)


def test_a_delta_is_a_piece_of_a_text() -> None:
    assert text_of({"type": "text", "delta": "d"}) == ("d", True)


@pytest.mark.parametrize(
    "event, strings",
    [
        ({"type": "text", "part": {"text": " a "}, "output": "o"}, ["a"]),
        ({"type": "text", "part": {"text": " "}, "output": "o"}, ["o"]),
        ({"type": "x", "content": [{"text": "a"}, "b"], "output": "o"}, ["ab", "o"]),
        ({"type": "x", "value": "v", "result": "r", "output": "o", "delta": "d"}, [*"dorv"]),
        ({"type": "x", "message": {"content": "c", "text": "t"}, "output": "o"}, [*"oct"]),
        ({"type": "x", "output": {"text": "deep"}, "value": 3, "text": " "}, []),
        ({"type": "diagnostic", "value": "v", "text": "t"}, []),
    ],
    ids=["text", "blank text", "parts", "any known key", "inner message", "nothing", "diagnostic"],
)
def test_readable_strings_are_found_in_events_of_any_shape(
    event: dict[str, Any], strings: list[str]
) -> None:
    assert strings_in(event) == strings


# --- usage ---------------------------------------------------------------------------------------


def test_usage_is_read_from_a_step_and_from_a_saved_result() -> None:
    cache = {"read": 4, "write": 5}
    tokens = {"total": 15, "input": 1, "output": 2, "reasoning": 3, "cache": cache}

    usage = usage_of(tokens)

    assert usage == TokenUsage(15, 1, 2, 3, 4, 5)
    assert saved_usage(vars(usage)) == usage
    assert usage_of(None) == usage_of({"total": "x", "cache": []}) == TokenUsage()
    assert saved_usage(None) == saved_usage({"total": -1, "new": 1}) == TokenUsage()


@pytest.mark.parametrize("odd", [None, {}, {"error": 3, "total_cost": "x", "retry_after_s": []}])
def test_what_was_saved_of_a_model_that_was_left_may_be_odd(odd: object) -> None:
    tried = saved_tried(odd)

    assert (tried.total_cost, tried.error.status_code, tried.was_asked) == (0.0, None, True)


def test_usages_add_up() -> None:
    total = TokenUsage(1, 2, 3, 4, 5, 6) + TokenUsage(10, cache_write=1)

    assert total == TokenUsage(11, 2, 3, 4, 5, 7)


@pytest.mark.parametrize(
    "value, number",
    [
        *((number, float(number)) for number in (3, 0.25)),
        *((odd, 0.0) for odd in (-1, True, "3", math.nan, math.inf, 10**400)),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_only_finite_numbers_from_zero_up_are_counted(value: Any, number: float) -> None:
    assert number_of(value) == number


# --- refusals ------------------------------------------------------------------------------------


def tool_event(tool: object, **state: object) -> dict[str, Any]:
    return {"type": "tool_use", "part": {"tool": tool, "state": state}}


def failed(tool: object, error: str) -> dict[str, Any]:
    return tool_event(tool, status="error", error=error)


def invalid(tool: str, **asked: str) -> dict[str, Any]:
    return tool_event("invalid", status="completed", input={"tool": tool, **asked})


# As OpenCode 1.18.33 says it.
REJECTED = "The user rejected permission to use this specific tool call."
RULE = "The user has specified a rule which prevents you from using this tool"
UNAVAILABLE = "Model tried to call unavailable tool 'bash'. Available tools: glob, invalid, read."
NOTHING_OFFERED = "Model tried to call unavailable tool 'invalid'. Available tools: read."
MALFORMED = (
    'Invalid input for tool write: JSON parsing failed: Text: {"filePath": "x", .\n'
    "Error message: JSON Parse error: Property name must be a string literal"
)


@pytest.mark.parametrize(
    "event, tool",
    [
        pytest.param(failed("bash", REJECTED), "bash", id="rejected"),
        pytest.param(failed("edit", RULE), "edit", id="denied by a rule"),
        pytest.param(invalid("bash"), "bash", id="denied as a whole"),
        pytest.param(invalid("bash", error=UNAVAILABLE), "bash", id="not offered"),
        pytest.param(failed("bash", NOTHING_OFFERED), "bash", id="all but another one denied"),
        pytest.param(failed("read", NOTHING_OFFERED), None, id="the one offered, ill-formed"),
        pytest.param(invalid("write", error=MALFORMED), None, id="arguments that are not JSON"),
        pytest.param(invalid("made_up"), None, id="made up by the model"),
        pytest.param(failed("bash", "command not found"), None, id="failed"),
        pytest.param(tool_event("read", status="completed", output=REJECTED), None, id="in output"),
        pytest.param(failed(None, REJECTED), None, id="no name"),
        pytest.param({"type": "tool_use", "part": {"tool": "bash"}}, None, id="no state"),
    ],
)
def test_a_refused_tool_is_told_from_one_that_failed(
    event: dict[str, Any], tool: str | None
) -> None:
    assert denied_tool(event) == tool


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, info",
    [
        (
            {"name": "APIError", "data": {"message": "bad key", "statusCode": 401}},
            ErrorInfo("APIError", "bad key", 401),
        ),
        ({"name": "X", "data": {"message": "\x1b[91mno\x1b[0m"}}, ErrorInfo("X", "no")),
        ({"name": "X", "message": "flat", "statusCode": 500}, ErrorInfo("X", "flat", 500)),
        ({"data": {"message": 5, "statusCode": True}}, ErrorInfo("UnknownError", "5")),
        ({"_tag": "BadRequest"}, ErrorInfo("BadRequest", "")),
        ("just words", ErrorInfo("UnknownError", "just words")),
        (None, ErrorInfo("UnknownError", "")),
    ],
    ids=["whole", "coloured", "flat", "odd values", "a tag", "words", "nothing"],
)
def test_an_error_is_told_by_name_words_and_http_status(error: Any, info: ErrorInfo) -> None:
    assert error_info(error) == info


def test_an_error_reads_as_a_line() -> None:
    assert str(ErrorInfo("APIError", "bad key", 401)) == "APIError 401: bad key"
    assert str(ErrorInfo("APIError", "bad key")) == "APIError: bad key"
    assert str(ErrorInfo("MessageAbortedError", "")) == "MessageAbortedError"


# --- what a provider asks for ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "retry_after, retry_after_ms, seconds",
    [
        ("3600", None, 3600),
        ("1", "250", 0.25),
        ("0", None, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", None, 0),
        ("12", "soon", 12),
        *[(odd, None, None) for odd in (None, "", "soon", "-1", "nan", "1e400", 12 * [1], {})],
    ],
)
def test_how_long_a_provider_wants_to_be_left_alone_is_read(
    retry_after: Any, retry_after_ms: Any, seconds: float | None
) -> None:
    assert asked_to_wait_s(retry_after, retry_after_ms) == seconds


def test_a_date_is_so_many_seconds_away() -> None:
    date = format_datetime(datetime.now(timezone.utc) + timedelta(hours=1), usegmt=True)

    wait_s = asked_to_wait_s(date)

    assert wait_s is not None
    assert 3500 < wait_s <= 3600


# --- MCP servers ---------------------------------------------------------------------------------


def test_each_server_that_is_wanted_and_does_not_work_is_told() -> None:
    states = {
        "works": {"status": "connected"},
        "off": {"status": "disabled"},
        "broken": {"status": "failed", "error": "Connection closed"},
        "locked": {"status": "needs_auth"},
        "odd": None,
    }

    broken, locked = warnings_of(states)

    assert broken == (
        "The model was without the tools of the MCP server 'broken' (failed: Connection closed)."
    )
    assert locked.endswith("'locked' (needs auth; run 'opencode mcp auth locked').")


@pytest.mark.parametrize("answer", [None, "no", {}])
def test_an_answer_of_another_shape_tells_nothing(answer: Any) -> None:
    assert warnings_of(answer) == []
