"""Events: plain dicts, typed by their ``type``, and how they are read and written.

    a line of output --iter_parse_lines()--> one event, or several with the text around them
    an event --------------dump_event()----> a line of JSON --> EventLog, a run's ``log_file``

Whatever a line holds, an event comes out and nothing of the line is lost: what is not a JSON object
becomes a ``diagnostic``. If a plugin printed text without a newline, its line holds the next event
too, and becomes several events. Types and keys that are not listed here pass through as they are,
since newer versions of OpenCode add both.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, Literal, NoReturn, TypedDict, Union

from .config import checked_path
from .errors import OpenCodeConfigError, OpenCodeError


class _Stamped(TypedDict, total=False):
    timestamp: int  # milliseconds since 1970
    sessionID: str


class CacheTokens(TypedDict, total=False):
    read: int
    write: int


class Tokens(TypedDict, total=False):
    total: int
    input: int
    output: int
    reasoning: int
    cache: CacheTokens


class _Part(TypedDict, total=False):
    id: str
    messageID: str
    sessionID: str
    type: str


class TextPart(_Part, total=False):
    text: str
    time: dict[str, int]


class ToolState(TypedDict, total=False):
    status: str  # "completed" or "error"
    input: dict[str, Any]
    output: str
    error: str
    title: str
    metadata: dict[str, Any]  # bash's exit code is metadata["exit"]
    time: dict[str, int]


class ToolPart(_Part, total=False):
    tool: str
    callID: str
    state: ToolState


class StepPart(_Part, total=False):
    snapshot: str
    reason: str  # "stop", "tool-calls", "length", ...
    cost: float  # US dollars
    tokens: Tokens


class ErrorData(TypedDict, total=False):
    message: str
    statusCode: int
    isRetryable: bool


class ErrorBody(TypedDict, total=False):
    name: str
    data: ErrorData


class StepStartEvent(_Stamped):
    type: Literal["step_start"]
    part: StepPart


class TextEvent(_Stamped):
    """A text part, once it is complete."""

    type: Literal["text"]
    part: TextPart


class ReasoningEvent(_Stamped):
    """A reasoning part, once it is complete; only with ``thinking=True``."""

    type: Literal["reasoning"]
    part: TextPart


class ToolUseEvent(_Stamped):
    """A tool call, once it has ended."""

    type: Literal["tool_use"]
    part: ToolPart


class StepFinishEvent(_Stamped):
    type: Literal["step_finish"]
    part: StepPart


class ErrorEvent(_Stamped):
    type: Literal["error"]
    error: ErrorBody


class DoneEvent(_Stamped, total=False):
    """The end of a run, from newer builds of OpenCode."""

    type: Literal["done"]
    reason: str
    rejected: Any


class TextDeltaEvent(_Stamped):
    """A piece of text as the model writes it (server only); the whole follows as ``text``."""

    type: Literal["text_delta"]
    partID: str
    delta: str


class ReasoningDeltaEvent(_Stamped):
    """A piece of reasoning as the model writes it (server only)."""

    type: Literal["reasoning_delta"]
    partID: str
    delta: str


class RetryEvent(_Stamped, total=False):
    """The provider refused a request, and OpenCode repeats it."""

    type: Literal["retry"]
    attempt: int
    message: str
    statusCode: int
    retry_after_s: float  # if the provider asks for a pause


class FallbackEvent(_Stamped, total=False):
    """A model is out; the events of the attempt with the next one follow.

    What came before belongs to attempts that were abandoned.
    """

    type: Literal["fallback"]
    model: str
    next_model: str | None  # None: there is none left, and the run ends with this error
    error: ErrorBody
    retry_after_s: float  # if the provider asks for a pause
    was_asked: bool  # False: a job of a batch passes it over, since it was out for another


class WarningEvent(_Stamped, total=False):
    """Something did not take effect as it was asked for; the run goes on."""

    type: Literal["warning"]
    message: str  # a full sentence


class SubAgentEvent(_Stamped, total=False):
    """A sub-agent begins to work, or continues; the events of its session follow.

    They are like those of the run, with ``childID`` as their ``sessionID``.
    """

    type: Literal["sub_agent"]
    childID: str  # the sub-agent's session
    parentID: str  # the session that called it: the run's, or another sub-agent's
    agent: str
    title: str


class CompactionEvent(_Stamped):
    """OpenCode has the conversation summarized: the texts of this message are not an answer."""

    type: Literal["compaction"]
    messageID: str


class PermissionEvent(_Stamped):
    """A tool waits for permission (server only)."""

    type: Literal["permission"]
    request: dict[str, Any]


class QuestionEvent(_Stamped):
    """The model asks the user (server only)."""

    type: Literal["question"]
    request: dict[str, Any]


class DiagnosticEvent(TypedDict, total=False):
    """A line that is not a JSON object, or the text beside events in one line."""

    type: Literal["diagnostic"]
    kind: Literal["empty_line", "non_object_json", "json_decode_error"]
    raw: str
    value: Any
    error: str


class OtherEvent(_Stamped, total=False):
    """What other versions of OpenCode print, and what this package adds.

    Types that are not listed pass through too. A type checker narrows by ``type`` only if each one
    is a literal, so compare those as a str: ``kind: str = event["type"]``.
    """

    type: Literal[
        "message",
        "assistant",
        "model",
        "tool",
        "tool_call",
        "tool_result",
        "step_tool",  # in RunResult.tool_calls: the tool of a step_finish
        "attempt",  # in a log file: a process was started
    ]
    part: Any
    content: Any
    payload: Any


Event = Union[  # noqa: UP007 - evaluated at run time, where Python 3.10's TypedDicts have no "|"
    StepStartEvent,
    TextEvent,
    ReasoningEvent,
    ToolUseEvent,
    StepFinishEvent,
    ErrorEvent,
    DoneEvent,
    TextDeltaEvent,
    ReasoningDeltaEvent,
    RetryEvent,
    FallbackEvent,
    WarningEvent,
    SubAgentEvent,
    CompactionEvent,
    PermissionEvent,
    QuestionEvent,
    DiagnosticEvent,
    OtherEvent,
]


# --- reading -------------------------------------------------------------------------------------


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


# Python's own reading of JSON takes NaN and Infinity for numbers.
_decoder = json.JSONDecoder(parse_constant=_no_constant)

# The beginning of an event that OpenCode prints (1.18.33): a plugin's text may hold other objects.
_BEGINNING = re.compile(r'\{"type":"\w+","timestamp":\d+,"sessionID":"')
_MOST_IN_A_LINE = 1_000  # beginnings that are tried; each takes time if its event is cut


def parse_event_line(line: str | bytes) -> Event:
    """The event of one line of output, with or without its newline.

    Undecodable bytes become U+FFFD. A line that is not a JSON object becomes
    ``{"type": "diagnostic", "kind": ...}`` with the text as ``raw`` or the value as ``value``. So
    does one that holds other text beside events, since one event cannot keep both:
    :func:`iter_parse_lines` gives each of them. Never raises for what a line holds.
    """
    if isinstance(line, bytes):
        line = line.decode("utf-8", "replace")
    try:
        value = _decoder.decode(line)
    except (ValueError, RecursionError) as error:
        raw = line.rstrip("\r\n")
        if not raw.strip():
            return {"type": "diagnostic", "kind": "empty_line", "raw": raw}
        return {"type": "diagnostic", "kind": "json_decode_error", "raw": raw, "error": str(error)}
    if isinstance(value, dict):
        return value  # type: ignore[return-value]  # any object passes, known or not
    return {"type": "diagnostic", "kind": "non_object_json", "value": value}


def iter_parse_lines(lines: Iterable[str | bytes]) -> Iterator[Event]:
    """The events of each line, lazily: one per line, unless it holds other text too."""
    for line in lines:
        event = parse_event_line(line)
        if event.get("kind") == "json_decode_error":
            yield from _taken_apart(event)
        else:
            yield event


def _taken_apart(diagnostic: Event) -> list[Event]:
    """The events in a line that is not JSON, and the text around them as diagnostics."""
    text = diagnostic.get("raw")
    if not isinstance(text, str):
        return [diagnostic]
    found: list[Any] = []
    end = 0
    for match in islice(_BEGINNING.finditer(text), _MOST_IN_A_LINE):
        begin = match.start()
        if begin < end:  # inside of the last one
            continue
        with suppress(ValueError, RecursionError):
            event, after = _decoder.raw_decode(text, begin)
            if end < begin:
                found.append({**diagnostic, "raw": text[end:begin]})
            found.append(event)
            end = after
    if end < len(text):
        found.append({**diagnostic, "raw": text[end:]})
    return found


def is_cut(event: Event) -> bool:
    """Whether *event* is for a line whose end is the beginning of an event."""
    raw = event.get("raw")
    if event.get("kind") != "json_decode_error" or not isinstance(raw, str):
        return False
    raw, beginning = raw.replace(" ", ""), '{"type":'
    return beginning in raw or any(raw.endswith(beginning[:n]) for n in range(1, len(beginning)))


# --- our own, and writing ------------------------------------------------------------------------


def warning_events(messages: Iterable[str]) -> list[Event]:
    """One ``warning`` event for each of *messages*, which are full sentences."""
    now = time.time_ns() // 1_000_000
    return [{"type": "warning", "timestamp": now, "message": message} for message in messages]


def error_event(error: Exception) -> Event:
    """*error*, one of ours, as an event like OpenCode's."""
    return {
        "type": "error",
        "error": {"name": type(error).__name__, "data": {"message": str(error)}},
    }


def dump_event(event: Event) -> bytes:
    """*event* as one line of JSON with its newline, readable by every JSON parser."""
    try:
        return to_json(event, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which JSON can carry and UTF-8 can not
        return to_json(event).encode() + b"\n"


def to_json(value: Any, **options: Any) -> str:
    """*value* as JSON that every parser reads; *options* as for ``json.dumps``.

    A number that is not finite becomes null: Python reads 1e999 as one, and writes "Infinity".
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        plain = json.loads(json.dumps(value, **options), parse_constant=lambda name: None)
        return json.dumps(plain, **options)


class EventLog:
    """A run's log file: each event is in the file before the stream gives it out.

    ::

        {"type": "attempt", ...}       before each attempt
        {"type": "step_start", ...}    and so on, as they come

    The file is truncated when it is opened, and written without a buffer: nothing is lost if this
    process is killed. Runs may share a file, since each appends whole lines.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Raises:
            OpenCodeConfigError: If it cannot be opened.
        """
        absolute = checked_path("log_file", path)
        try:
            self._file = open(absolute, "wb", buffering=0, opener=_appending)
        except OSError as error:
            raise OpenCodeConfigError(f"log_file {os.fspath(path)!r}: {error.strerror}") from error

    def mark_attempt(self) -> None:
        self.write([{"type": "attempt", "timestamp": time.time_ns() // 1_000_000}])

    def write(self, events: Iterable[Event]) -> None:
        """
        Raises:
            OpenCodeError: If the system does not take them, such as for a full disk; the file is
                closed then, and further events are dropped.
        """
        if self._file.closed:
            return
        data = memoryview(b"".join(map(dump_event, events)))
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self.close()
            raise OpenCodeError(
                f"log_file {os.fspath(self._file.name)!r}: {error.strerror}; the run was stopped"
            ) from error

    def close(self) -> None:
        self._file.close()


def _appending(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_APPEND, 0o666)  # the mode that open() uses
