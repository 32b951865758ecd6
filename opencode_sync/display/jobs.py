"""The jobs on a report page: a short row for each, and what the row unfolds to.

    a checkpoint, or results --> record --+-- row_of() ----> Row, for the table and the charts
                                          +-- detail_of() -> values for JSON

A record is a line of a checkpoint as a mapping: ``RunResult.to_dict()`` and ``failure``, which is
None or the error's ``{"type", "message", ...}``. Records come one at a time, so that a batch whose
events fill gigabytes is read in a few megabytes. A value that is missing or of another type counts
as empty. A long text is cut, with a note on how much is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..core.errors import kind_of
from ..core.events import to_json
from ..core.reading import TokenUsage, mapping, number_of, part_of, saved_tried, saved_usage
from ..core.records import own_key, plain
from ..core.text import money, one_line, printable

Record = Mapping[str, Any]


STATUSES = ("ok", "error", "denied", "incomplete", "timed_out", "cancelled", "over_budget")
_STATUS_OF = {  # by the error that a job ended with
    "OpenCodeIncompleteError": "incomplete",
    "OpenCodeTimeoutError": "timed_out",
    "OpenCodeCancelledError": "cancelled",
    "OpenCodeBudgetError": "over_budget",
}
# How much of a job is on the page: characters of a text, items of a list.
_ROW_CHARS = 200
_WARNING_CHARS = 2_000
_PROMPT_CHARS = 20_000
_ANSWER_CHARS = 50_000
_TOOL_CHARS = 4_000
_EVENT_CHARS = 2_000  # the job's texts and tools are on the page at length
_MAX_TOOLS = 100
_MAX_EVENTS = 200
_MAX_ITEMS = 50


@dataclass(frozen=True)
class Row:
    """One job in short.

    Attributes:
        kind: The kind of its error, as the batch's report counts it, or None.
        gist: The beginning of the answer or of the error's message.
        is_empty: Whether it is ok without an answer and without a tool call.
        tools: The name of the tool for each call, in order.
        seconds: How long it took.
        started_at: Unix time in seconds, or None if unknown.
        cost_before, tokens_before: Spent on earlier tries at the job.
    """

    index: int
    key: str | None
    status: str
    kind: str | None
    prompt: str
    gist: str
    is_empty: bool
    tools: tuple[str, ...]
    cost: float
    tokens: TokenUsage
    seconds: float
    started_at: float | None
    cost_before: float = 0.0
    tokens_before: int = 0


# --- the row -------------------------------------------------------------------------------------


def row_of(record: Record, place: int) -> Row:
    """Make the row of *record*; *place* is its index if it has none."""
    failure, error = mapping(record.get("failure")), mapping(record.get("error"))
    index = record.get("index")
    key = own_key(record)
    status, tools = _status(record, failure), _tool_parts(record)
    answer = _text(record, "answer")
    kind = kind_of(str(failure.get("type")), error.get("name"), error.get("status_code"))
    gist = _message(record) if failure or error else answer
    return Row(
        index=index if isinstance(index, int) else place,
        key=None if key is None else one_line(key[: 2 * _ROW_CHARS], _ROW_CHARS),
        status=status,
        kind=one_line(kind[:_ROW_CHARS], 100) if failure else None,
        prompt=_beginning(_text(record, "prompt")),
        gist=_beginning(gist or _text(record, "final_text")),
        is_empty=status == "ok" and not tools and not answer.strip(),
        tools=tuple(one_line(str(part.get("tool"))[:100], 40) for part in tools),
        cost=number_of(record.get("total_cost")),
        tokens=saved_usage(record.get("token_usage")),
        seconds=number_of(record.get("duration_s")),
        started_at=_started_at(record),
        cost_before=number_of(record.get("cost_before")),
        tokens_before=int(number_of(record.get("tokens_before"))),
    )


def _status(record: Record, failure: Record) -> str:
    if failure:
        return _STATUS_OF.get(str(failure.get("type")), "error")
    status = record.get("status")
    return status if status in STATUSES else "error"


def _message(record: Record) -> str:
    failure = mapping(record.get("failure"))
    return _text(failure or mapping(record.get("error")), "message")


def _beginning(text: str) -> str:
    return one_line(text[: 4 * _ROW_CHARS], _ROW_CHARS)


def _started_at(record: Record) -> float | None:
    if started := number_of(record.get("started_at")):
        return started
    # In a checkpoint of an earlier version. The first event comes after the process has started.
    stamps = (number_of(event.get("timestamp")) for event in _mappings(record, "events"))
    first = next(filter(None, stamps), None)
    return None if first is None else first / 1000


def _tool_parts(record: Record) -> list[Record]:
    parts = [part_of(event) for event in _mappings(record, "tool_calls")]
    return [part for part in parts if part.get("tool")]


# --- what it unfolds to --------------------------------------------------------------------------


def detail_of(record: Record, *, brief: bool = False) -> dict[str, Any]:
    """What the row of *record* unfolds to, as values for JSON.

    Args:
        brief: Leave out tools and events, because the page would become too large.
    """
    answer, text = _text(record, "answer"), _text(record, "final_text")
    parsed, metadata = record.get("parsed"), record.get("metadata")
    message = _message(record)
    stderr = _text(record, "stderr")[-_TOOL_CHARS:] if message else ""
    left_out = _text(record, "left_out") or ("the page would become too large" if brief else "")
    most = _TOOL_CHARS if left_out else _ANSWER_CHARS
    detail: dict[str, Any] = {
        "prompt": _cut(_text(record, "prompt"), min(most, _PROMPT_CHARS)),
        "before": _cut(text.removesuffix(answer).rstrip(), most),
        "answer": _cut(answer, most),
        "error": _cut(message, _TOOL_CHARS),
        "stderr": "" if (stderr := printable(stderr).strip()) in printable(message) else stderr,
        "parsed": None if parsed is None else _cut(_pretty(parsed), most),
        "metadata": None if metadata is None else _cut(_pretty(metadata), most),
        "denied": [one_line(str(name), 40) for name in _items(record, "denied_tools")[:_MAX_ITEMS]],
        "warnings": [
            one_line(str(text)[:_WARNING_CHARS], _WARNING_CHARS)
            for text in _items(record, "warnings")[:_MAX_ITEMS]
        ],
        "facts": _facts(record),
        "left_out": left_out,
    }
    if not left_out:
        tools, events = _tool_parts(record), _mappings(record, "events")
        started = _started_at(record)
        detail["tools"] = [_tool(part) for part in tools[:_MAX_TOOLS]]
        detail["events"] = [_event(event, started) for event in events[:_MAX_EVENTS]]
        detail["more_tools"] = max(0, len(tools) - _MAX_TOOLS)
        detail["more_events"] = max(0, len(events) - _MAX_EVENTS)
    return {name: value for name, value in detail.items() if value}


def _facts(record: Record) -> list[tuple[str, str]]:
    usage = saved_usage(record.get("token_usage"))
    shown = [f"{value:,} {f.name}" for f in fields(usage)[1:] if (value := getattr(usage, f.name))]
    facts = {
        "Workspace": record.get("workspace"),
        "Session": record.get("session_id"),
        "Model": record.get("model"),
        "Did not answer": "; ".join(
            str(saved_tried(each)) for each in _mappings(record, "tried")[:_MAX_ITEMS]
        ),
        "Steps": record.get("turns"),
        "Attempts": record.get("attempts"),
        "Finish": record.get("finish_reason"),
        "Exit status": record.get("exit_code"),
        "Tokens": ", ".join(shown).replace("_", " "),
        "Sub-agents": "; ".join(map(_sub_agent, _mappings(record, "sub_agents")[:_MAX_ITEMS])),
    }
    return [(name, one_line(str(value)[:500], 300)) for name, value in facts.items() if value]


def _sub_agent(used: Record) -> str:
    usage = saved_usage(used.get("token_usage"))
    tokens = sum(getattr(usage, f.name) for f in fields(usage)[1:])
    name = f"{_text(used, 'agent')[:100]} {_text(used, 'title')[:100]}".strip()
    return f"{name} ({tokens:,} tokens, {money(number_of(used.get('total_cost')))})"


def _tool(part: Record) -> dict[str, Any]:
    state = mapping(part.get("state"))
    time, metadata = mapping(state.get("time")), mapping(state.get("metadata"))
    begin, end = number_of(time.get("start")), number_of(time.get("end"))
    asked = state.get("input")
    command = asked.get("command") if isinstance(asked, Mapping) and len(asked) <= 2 else None
    output = state.get("error") or state.get("output")
    exit_status = metadata.get("exit")
    return {
        "name": one_line(str(part.get("tool"))[:100], 40),
        "title": _beginning(_text(state, "title")),
        "failed": state.get("status") == "error" or bool(exit_status),
        "exit": exit_status if isinstance(exit_status, int) else None,
        "seconds": (end - begin) / 1000 if 0 < begin <= end else None,
        "input": _cut(command if isinstance(command, str) else _pretty(asked), _TOOL_CHARS),
        "output": _cut(output if isinstance(output, str) else _pretty(output), _TOOL_CHARS),
    }


def _event(event: Record, started: float | None) -> dict[str, Any]:
    stamp = number_of(event.get("timestamp"))
    at = stamp / 1000 - started if stamp and started is not None else None
    return {
        "type": one_line(str(event.get("type"))[:100], 40),
        "at": at if at is None else round(at, 2),
        "json": _cut(_pretty(event), _EVENT_CHARS),
    }


def _pretty(value: Any) -> str:
    if value is None:
        return ""
    try:
        return to_json(value, ensure_ascii=False, indent=2, default=plain)
    except (ValueError, RecursionError):
        return repr(type(value))


def _cut(text: str, most: int) -> str:
    more = len(text) - most
    shown = printable(text[:most])
    return f"{shown}\n… {more:,} characters more" if more > 0 else shown


# --- values of unknown type ----------------------------------------------------------------------


def _items(source: Record, name: str) -> list[Any]:
    value = source.get(name)
    return list(value) if isinstance(value, (list, tuple)) else []


def _mappings(source: Record, name: str) -> list[Record]:
    return [item for item in _items(source, name) if isinstance(item, Mapping)]


def _text(source: Record, name: str) -> str:
    value = source.get(name)
    return value if isinstance(value, str) else ""
