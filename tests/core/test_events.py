"""Lines become events, and events a result, whatever they hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from opencode_sync import RunResult, iter_parse_lines, parse_event_line, run_result_fuzzy_text
from opencode_sync.core.events import dump_event, is_cut
from opencode_sync.core.reading import called_session, void_call

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["stop", "tool-calls", "invalid", "error", "completed", 10**400, -1])
)
# The keys that folding looks at, so that it meets odd values behind each of them.
KEYS = st.sampled_from(
    [
        *("type", "part", "text", "delta", "content", "sessionID", "tool", "state", "status"),
        *("messageID", "childID", "metadata", "compaction_continue", "synthetic", "payload"),
        *("input", "error", "data", "name", "message", "statusCode", "tokens", "cost", "cache"),
        *("read", "write", "total", "output", "reasoning", "reason"),
    ]
) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=20,
)
TYPES = st.sampled_from(
    [
        *("text", "message", "assistant", "model", "step_start", "step_finish", "error", "retry"),
        *("compaction", "warning", "sub_agent"),
        *("tool_use", "tool_call", "tool_result", "tool", "reasoning", "diagnostic", "new_type"),
    ]
)
EVENTS = st.builds(
    lambda fields, kind: {**fields, "type": kind},
    st.dictionaries(KEYS, VALUES, max_size=8),
    TYPES | VALUES,
)


def printed(**event: Any) -> str:
    """*event* as OpenCode prints it."""
    stamped = {"type": "text", "timestamp": 1, "sessionID": "ses_1", **event}
    return json.dumps(stamped, separators=(",", ":"))


# A machine that has more to do is no fault, and much of the time goes into making examples.
steady = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
LINES = (
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | EVENTS.map(lambda event: json.dumps(event).encode())
    | VALUES.map(lambda value: json.dumps(value).encode())
    | st.tuples(EVENTS, st.integers(0, 200)).map(lambda e: json.dumps(e[0]).encode()[: e[1]])
    | st.tuples(st.text(max_size=20), EVENTS).map(lambda e: f"{e[0]}{printed(**e[1])}".encode())
)


# --- a line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, expected",
    [
        (b'{"type": "text"}\n', {"type": "text"}),
        ('{"type": "text"}', {"type": "text"}),
        (b'{"a": "\xff"}', {"a": "\ufffd"}),
        (b"\n", {"type": "diagnostic", "kind": "empty_line", "raw": ""}),
        (b"  \r\n", {"type": "diagnostic", "kind": "empty_line", "raw": "  "}),
        (b"[1]\n", {"type": "diagnostic", "kind": "non_object_json", "value": [1]}),
    ],
    ids=["an object", "a str", "undecodable", "an empty line", "blanks", "another value"],
)
def test_a_line_becomes_an_event(line: str | bytes, expected: dict[str, Any]) -> None:
    assert parse_event_line(line) == expected


def test_what_is_not_json_is_kept_with_the_reason() -> None:
    event: dict[str, Any] = {**parse_event_line(b'{"type": "te')}

    reason = event.pop("error")

    assert event == {"type": "diagnostic", "kind": "json_decode_error", "raw": '{"type": "te'}
    assert "Unterminated string" in reason


def test_lines_are_parsed_lazily() -> None:
    def lines() -> Any:
        yield "1"
        raise AssertionError("the second line was asked for")

    assert next(iter_parse_lines(lines()))["type"] == "diagnostic"


def in_short(line: str | bytes) -> list[Any]:
    """The types of the events in *line*, and of diagnostics the text."""
    return [event.get("raw", event["type"]) for event in iter_parse_lines([line])]


@pytest.mark.parametrize(
    "noise",
    ["loaded ", 'log {"a": 1} [', '{"type":', '{"type":"text"}', '{{"x":"\\', '"', "1, ", "ü 🙂"],
)
def test_an_event_is_taken_out_of_a_line_with_other_text(noise: str) -> None:
    text, step = printed(part={"text": 'a {"type":"x"} }'}), printed(type="step_finish")

    assert in_short(noise + text + "\n") == [noise, "text"]
    assert in_short(noise + text + noise + step) == [noise, "text", noise, "step_finish"]
    assert in_short((noise + text + noise).encode()) == [noise, "text", noise]


def test_events_that_share_a_line_are_several() -> None:
    assert in_short(printed() + printed(type="error")) == ["text", "error"]


def test_an_object_in_other_text_is_no_event() -> None:
    line = 'sent {"type":"text","part":{"text":"x"}} to {"type":"text","sessionID":"ses_1"}'

    assert in_short(line) == [line]
    assert parse_event_line(line)["type"] == "diagnostic"


@pytest.mark.parametrize(
    "end, cut",
    [
        (printed()[:-1], True),
        (f"noise {printed()[:20]}", True),
        (f"{printed()}noise{printed()[:5]}", True),
        (f"{printed()}{{", True),
        (printed(), False),
        (f"noise {printed()}", False),
        (f"{printed()} noise }}", False),
        ("noise", False),
        ("[1, 2]", False),
        ("", False),
    ],
)
def test_an_event_that_is_cut_is_told_from_other_text(end: str, cut: bool) -> None:
    *_, last = iter_parse_lines([end])

    assert is_cut(last) == cut


def test_much_text_that_looks_like_events_is_read_in_no_time() -> None:
    beginning = printed()[:-1]
    lines = [beginning * 50_000, f'{beginning},"part":[' * 20_000]

    for line in lines:
        assert in_short(line) == [line]


@steady
@given(LINES)
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"1" * 5_000)
@example(b'"\\ud800"')
@example(b"\xef\xbb\xbf{}")
@example(b"NaN")
def test_no_line_raises_and_nothing_of_it_is_lost(line: bytes) -> None:
    event = parse_event_line(line)

    text = line.decode("utf-8", "replace")
    assert isinstance(event, dict)
    if event.get("kind") in ("empty_line", "json_decode_error") and "raw" in event:
        assert event["raw"] == text.rstrip("\r\n")
    elif event.get("kind") == "non_object_json" and "value" in event:
        assert repr(event["value"]) == repr(json.loads(text))  # nan is not equal to itself
    else:
        assert repr(event) == repr(json.loads(text))


@steady
@given(LINES)
def test_an_event_survives_the_log_file(line: bytes) -> None:
    event = parse_event_line(line)

    written = dump_event(event)

    assert written.endswith(b"\n")
    assert written.count(b"\n") == 1
    assert repr(json.loads(written)) == repr(event)


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_too_large_for_python_is_null_in_the_log_file(number: str) -> None:
    event = parse_event_line(f'{{"type": "x", "n": [{number}, 1], "\\ud800": {number}}}')

    assert json.loads(dump_event(event), parse_constant=pytest.fail) == {
        "type": "x",
        "n": [None, 1],
        "\ud800": None,
    }


# --- a result ------------------------------------------------------------------------------------


@steady
@given(st.lists(EVENTS, max_size=10))
def test_no_event_raises_and_none_is_lost(events: list[Any]) -> None:
    result = RunResult()

    for event in events:
        result.append_event(event)

    assert all(kept is given for kept, given in zip(result.events, events, strict=True))
    assert isinstance(result.final_text, str)
    assert isinstance(result.answer, str)
    assert result.total_cost >= 0
    assert result.turns <= sum(event["type"] == "step_finish" for event in events)
    assert isinstance(run_result_fuzzy_text(result), str)
    assert repr(result)
    for event in events:
        for read in (called_session, void_call):
            read(event)


@steady
@given(st.lists(LINES, max_size=10))
def test_a_result_comes_back_from_its_dict(lines: list[bytes]) -> None:
    result = RunResult()
    for line in lines:
        result.append_event(parse_event_line(line))

    copy = RunResult.from_dict(json.loads(json.dumps(result.to_dict())))

    assert repr(copy.to_dict()) == repr(result.to_dict())
