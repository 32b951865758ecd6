"""Lines of stderr that mean something; real ones, of OpenCode 1.18.33."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencode_sync.process.stderr import (
    LogReader,
    is_retried,
    log_fields,
    no_space,
    split_told,
)

REFUSED = (
    'timestamp=2026-11-23T11:24:33.362Z level=ERROR run=8dcf033d message="stream error" '
    "providerID=scripted modelID=scripted session.id=ses_1 small=false agent=build mode=primary "
    'error.error="AI_APICallError: slow down"'
)
GIVEN_UP = (
    "timestamp=2026-11-23T11:25:52.929Z level=ERROR run=d053a192 message=process "
    'session.id=ses_1 messageID=msg_1 error="bad key" stack="AI_APICallError: bad key\\n    at"'
)
STATUS_429 = 'opencode-sync: {"status":429,"retry_after":"3600"}'
STATUS_401 = 'opencode-sync: {"status":401,"retry_after":null}'


@pytest.fixture
def reader() -> LogReader:
    return LogReader()


def test_the_fields_of_a_log_line_are_read_with_their_quotes_undone() -> None:
    fields = log_fields('timestamp=1 level=ERROR message="say \\"hi\\"" error.name=A empty=')

    assert fields == {
        "level": "ERROR",
        "message": 'say "hi"',
        "error.name": "A",
        "empty": "",
    }


def test_a_refusal_becomes_a_retry_event_with_its_status(reader: LogReader) -> None:
    reader.read_told(STATUS_429)

    is_log, events = reader.read(REFUSED)

    assert is_log
    (event,) = events
    assert event["type"] == "retry"
    assert event["sessionID"] == "ses_1"
    assert event["statusCode"] == 429  # type: ignore[typeddict-item]
    assert event["message"] == "429 slow down (retry-after: 3600)"  # type: ignore[typeddict-item]
    assert event["retry_after_s"] == 3600  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    "fields, why",
    [
        ('message="server unavailable" key=docs type=local status=failed', "failed"),
        (
            'message="server unavailable" key=docs type=remote status=needs_auth',
            "needs auth; run 'opencode mcp auth docs'",
        ),
        ('message="MCP connection closed" server=docs', "failed: it ended"),
    ],
    ids=["does not start", "wants a login", "ends later"],
)
def test_an_mcp_server_that_does_not_work_is_a_warning(
    reader: LogReader, fields: str, why: str
) -> None:
    is_log, (event,) = reader.read(f"timestamp=2026-11-26T16:21:11.122Z level=WARN run=1 {fields}")

    assert (is_log, event["type"]) == (True, "warning")
    assert event["message"] == (  # type: ignore[typeddict-item]
        f"The model was without the tools of the MCP server 'docs' ({why})."
    )


def test_a_refusal_that_is_not_retried_is_no_event(reader: LogReader) -> None:
    reader.read_told(STATUS_401)

    assert reader.read(REFUSED) == (True, [])
    assert reader.take_pending() == []


def test_a_refusal_of_unknown_status_is_held_back_until_nothing_follows(
    reader: LogReader,
) -> None:
    assert reader.read(REFUSED) == (True, [])

    (event,) = reader.take_pending()

    assert event["message"] == "slow down"  # type: ignore[typeddict-item]
    assert "statusCode" not in event


def test_a_refusal_of_unknown_status_that_is_the_last_is_no_event(reader: LogReader) -> None:
    reader.read(REFUSED)

    assert reader.read(GIVEN_UP) == (True, [])
    assert reader.take_pending() == []


def test_a_refusal_that_was_held_back_is_told_with_the_next_one(reader: LogReader) -> None:
    reader.read(REFUSED)

    _, events = reader.read(REFUSED)

    assert [event["type"] for event in events] == ["retry"]
    assert reader.pending is not None


def test_a_status_belongs_to_one_refusal_alone(reader: LogReader) -> None:
    reader.read_told(STATUS_429)
    reader.read(REFUSED)

    reader.read(REFUSED)

    assert reader.pending is not None
    assert "statusCode" not in reader.pending


def test_a_refusal_of_a_title_is_nobody_s_business(reader: LogReader) -> None:
    reader.read_told(STATUS_429)

    assert reader.read(REFUSED.replace("small=false", "small=true")) == (True, [])
    assert reader.pending is None


def test_opencode_asks_again_where_the_provider_may_recover() -> None:
    assert all(map(is_retried, [408, 409, 429, 500, 503, 529]))
    assert not any(map(is_retried, [400, 401, 402, 403, 404, 413]))


def test_what_is_warned_of_explains_a_failure_that_nothing_else_does(reader: LogReader) -> None:
    reader.read(
        'timestamp=1 level=WARN run=1 message="failed to decode image" error="ImageDecodeError: no"'
    )

    assert reader.explanation == "failed to decode image: ImageDecodeError: no"


@pytest.mark.parametrize(
    "why",
    [
        'agent "nobody" not found',
        'agent "helper" is a subagent, not a primary agent',
        "failed to list agents from http://127.0.0.1:4096",
    ],
)
def test_another_agent_is_noticed_whatever_the_reason(reader: LogReader, why: str) -> None:
    is_log, _ = reader.read(f"\x1b[93m\x1b[1m! \x1b[0m {why}. Falling back to default agent")

    assert not is_log
    assert reader.other_agent == why


def test_the_preloaded_file_tells_which_model_answers_and_that_is_no_event(
    reader: LogReader,
) -> None:
    events = reader.read_told('opencode-sync: {"model":"a/one"}')

    assert (events, reader.model) == ([], "a/one")


def test_a_broken_word_of_the_preloaded_file_is_no_status(reader: LogReader) -> None:
    reader.read_told('opencode-sync: {"status":')
    reader.read_told("opencode-sync: [1]")

    reader.read(REFUSED)

    assert reader.pending is not None


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("timestamp=1 level=ERROR" + ' a="b' * 2_000_000, id="open quotes"),
        pytest.param("\x1b[" * 5_000_000, id="escapes"),
    ],
)
def test_a_line_of_10_mb_takes_no_time(reader: LogReader, line: str) -> None:
    started = time.monotonic()

    reader.read(line)

    assert time.monotonic() - started < 5


@given(st.one_of(st.text(), st.text().map("timestamp=1 level=ERROR ".__add__), st.just(REFUSED)))
def test_no_line_raises(line: str) -> None:
    LogReader().read(line)


def test_an_event_of_the_preloaded_file_is_whole_however_long_it_is(reader: LogReader) -> None:
    event = {"type": "text", "sessionID": "ses_child", "part": {"text": "x" * 200_000}}

    assert reader.read_told(f"opencode-sync: {json.dumps(event)}") == [event]


@pytest.mark.parametrize(
    "line, before, told",
    [
        (STATUS_429, "", STATUS_429),
        ("opencode-sync: [1]", "", "opencode-sync: [1]"),
        (f"working ... {STATUS_429}", "working ... ", STATUS_429),
        ("run opencode-sync: it helps", "run opencode-sync: it helps", None),
        (f"timestamp=1 level=ERROR {STATUS_429}", f"timestamp=1 level=ERROR {STATUS_429}", None),
    ],
    ids=["at once", "at once, and odd", "after text", "text", "quoted in the log"],
)
def test_what_the_preloaded_file_tells_is_found_behind_text_without_a_newline(
    line: str, before: str, told: str | None
) -> None:
    assert split_told(line) == (before, told)


# --- space ---------------------------------------------------------------------------------------


def test_a_lack_of_space_is_told_where_python_finds_no_temporary_directory_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    monkeypatch.setattr("opencode_sync.process.stderr.NEEDED_BYTES", 10**18)

    assert f"left in {str(tmp_path)!r}" in str(no_space({"HOME": str(tmp_path)}))
