"""What single events say, in all the shapes that they come in."""

from __future__ import annotations

import math
from typing import Any

import pytest

from opencode_sync import ErrorInfo, TokenUsage
from opencode_sync.core.reading import (
    denied_tool,
    error_info,
    number_of,
    strings_in,
    text_of,
    usage_of,
)

# What stands where something else is expected.
ODD = [None, True, 0, -1.5, math.nan, 10**400, "", "x", [], [1, [2]], {}, {"a": {"b": None}}]


# --- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event, text",
    [
        ({"type": "text", "part": {"text": "a"}, "text": "b"}, "a"),
        ({"type": "text", "part": {"text": ""}, "text": "b"}, ""),
        ({"type": "text", "part": {"text": 5}, "text": "b"}, "b"),
        ({"type": "text", "part": "odd", "text": "b"}, "b"),
        ({"type": "text", "content": "c", "text": "b", "delta": "d"}, "c"),
        ({"type": "text", "text": "b", "delta": "d"}, "b"),
        ({"type": "text", "content": ["c"], "delta": 1}, ""),
        ({"type": "text"}, ""),
        ({"type": "message", "content": "m"}, "m"),
        ({"type": "assistant", "content": [{"text": "a"}, {"content": "b"}, "c"]}, "abc"),
        ({"type": "model", "content": [{"text": "a", "content": "b"}]}, "a"),
        ({"type": "model", "content": [{"text": 1, "content": "b"}, {}, None, ["x"], 7]}, "b"),
        ({"type": "message", "content": {"text": "x"}}, ""),
        ({"type": "message", "text": "x"}, ""),
    ],
    ids=[
        "part",
        "empty part",
        "odd text of a part",
        "odd part",
        "content",
        "text",
        "nothing readable",
        "nothing",
        "message",
        "parts of a message",
        "text before content",
        "odd parts",
        "odd content",
        "message without content",
    ],
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
        ({"type": "message", "content": ["a", {"text": "b"}], "output": "o"}, ["ab"]),
        ({"type": "x", "content": [{"text": "a"}, "b"]}, ["ab"]),
        ({"type": "x", "value": "v", "result": "r", "output": "o", "delta": "d"}, [*"dorv"]),
        ({"type": "x", "content": "c", "text": "t", "message": "m"}, [*"ctm"]),
        ({"type": "x", "message": {"content": "c", "text": "t"}, "output": "o"}, [*"oct"]),
        ({"type": "x", "output": {"text": "deep"}, "value": 3, "text": " "}, []),
        ({"type": "diagnostic", "value": "v", "text": "t"}, []),
        ({}, []),
    ],
    ids=[
        "text",
        "blank text",
        "message",
        "parts",
        "any known key",
        "in this order",
        "inner message",
        "nothing readable",
        "diagnostic",
        "empty",
    ],
)
def test_readable_strings_are_found_in_events_of_any_shape(
    event: dict[str, Any], strings: list[str]
) -> None:
    assert strings_in(event) == strings


# --- usage ---------------------------------------------------------------------------------------


def test_usage_is_read_from_the_tokens_of_a_step() -> None:
    tokens = {
        "total": 15,
        "input": 1,
        "output": 2,
        "reasoning": 3,
        "cache": {"read": 4, "write": 5},
    }

    assert usage_of(tokens) == TokenUsage(15, 1, 2, 3, 4, 5)


def test_usages_add_up() -> None:
    assert TokenUsage(1, 2, 3, 4, 5, 6) + TokenUsage(10, cache_write=1) == TokenUsage(
        11, 2, 3, 4, 5, 7
    )


@pytest.mark.parametrize("tokens", ODD, ids=repr)
def test_odd_tokens_count_as_nothing(tokens: Any) -> None:
    assert usage_of(tokens) == TokenUsage()


@pytest.mark.parametrize(
    "value, number",
    [
        (3, 3.0),
        (0.25, 0.25),
        (-1, 0.0),
        (True, 0.0),
        ("3", 0.0),
        (None, 0.0),
        ([], 0.0),
        (math.nan, 0.0),
        (math.inf, 0.0),
        (10**400, 0.0),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_only_finite_numbers_from_zero_up_are_counted(value: Any, number: float) -> None:
    assert number_of(value) == number


# --- refusals ------------------------------------------------------------------------------------


def tool_event(tool: object, **state: object) -> dict[str, Any]:
    return {"type": "tool_use", "part": {"tool": tool, "state": state}}


# As OpenCode 1.18.33 says it.
UNAVAILABLE = {
    "tool": "bash",
    "error": "Model tried to call unavailable tool 'bash'. Available tools: glob, invalid, read.",
}
NOTHING_OFFERED = "Model tried to call unavailable tool 'invalid'. Available tools: read."
MALFORMED = {
    "tool": "write",
    "error": 'Invalid input for tool write: JSON parsing failed: Text: {"filePath": "x", .\n'
    "Error message: JSON Parse error: Property name must be a string literal",
}


@pytest.mark.parametrize(
    "event, tool",
    [
        (
            tool_event(
                "bash",
                status="error",
                error="The user rejected permission to use this specific tool call.",
            ),
            "bash",
        ),
        (
            tool_event(
                "edit",
                status="error",
                error="The user has specified a rule which prevents you from using this tool",
            ),
            "edit",
        ),
        (tool_event("invalid", status="completed", input={"tool": "bash"}), "bash"),
        (tool_event("invalid", status="completed", input=UNAVAILABLE), "bash"),
        (tool_event("invalid", status="completed", input=MALFORMED), None),
        (tool_event("bash", status="error", error=NOTHING_OFFERED), "bash"),
        (tool_event("read", status="error", error=NOTHING_OFFERED), None),
        (tool_event("invalid", status="completed", input={"tool": "made_up"}), None),
        (tool_event("bash", status="error", error="command not found"), None),
        (tool_event("read", status="completed", output="rejected permission"), None),
        (tool_event(None, status="error", error="rejected permission"), None),
        (tool_event("bash"), None),
        ({"type": "tool_use", "part": {"tool": "bash"}}, None),
        ({"type": "tool_use"}, None),
    ],
    ids=[
        "rejected",
        "denied by a rule",
        "denied as a whole",
        "denied as a whole, with OpenCode's words",
        "arguments that are not JSON",
        "all but one denied",
        "all but one denied, and arguments of that one that are not JSON",
        "made up by the model",
        "failed",
        "in the output",
        "no name",
        "no status",
        "no state",
        "no part",
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
        (
            {"name": "UnknownError", "data": {"message": "\x1b[91mno\x1b[0m"}},
            ErrorInfo("UnknownError", "no"),
        ),
        ({"name": "X", "message": "flat", "statusCode": 500}, ErrorInfo("X", "flat", 500)),
        ({"data": {"message": 5, "statusCode": "401"}}, ErrorInfo("UnknownError", "5")),
        ({"name": "X", "data": {"statusCode": True}}, ErrorInfo("X", "")),
        ({"_tag": "BadRequest"}, ErrorInfo("BadRequest", "")),
        ("just words", ErrorInfo("UnknownError", "just words")),
        (None, ErrorInfo("UnknownError", "")),
    ],
    ids=["whole", "coloured", "flat", "odd values", "odd status", "a tag", "words", "nothing"],
)
def test_an_error_is_told_by_name_words_and_http_status(error: Any, info: ErrorInfo) -> None:
    assert error_info(error) == info


@pytest.mark.parametrize(
    "info, text",
    [
        (ErrorInfo("APIError", "bad key", 401), "APIError 401: bad key"),
        (ErrorInfo("APIError", "bad key"), "APIError: bad key"),
        (ErrorInfo("MessageAbortedError", ""), "MessageAbortedError"),
    ],
    ids=["status", "no status", "no words"],
)
def test_an_error_reads_as_a_line(info: ErrorInfo, text: str) -> None:
    assert str(info) == text


# --- odd values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ODD, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize(
    "key", ["part", "content", "text", "delta", "message", "type", "state", "error", "data"]
)
def test_nothing_in_an_event_raises(key: str, odd: Any) -> None:
    for event in (
        {"type": "text", key: odd},
        {"type": "message", key: odd},
        {"type": "text", "part": {"tool": "bash", "text": odd, key: odd}},
        {"type": "tool_use", "part": {"tool": "invalid", "state": {"status": odd, key: odd}}},
        {"type": "tool_use", "part": {"tool": "invalid", "state": {"input": {"tool": odd}}}},
    ):
        text_of(event)
        strings_in(event)
        denied_tool(event)
    error_info({key: odd, "name": odd})
    usage_of({"total": odd, "cache": odd})
    usage_of({"total": odd, "cache": {"read": odd}})
