"""Results, and errors in their places, as lines of a checkpoint, and as rows of a table.

    Entry --line_of()--> a line --parsed()--> its object --end_of()--> an equal result or error
    a file --lines_in()--> lines, and the Head of each
           --records_in()--> the last line of each key, as its object
    results --results_to_records()--> flat rows --> results_to_frame()

    {"key": ..., "fingerprint": ..., "spent": ..., "failure": null, <RunResult.to_dict()>}
    {"key": ..., "fingerprint": ..., "spent": ..., "failure": {"type", "message", ...}, ...}

All lines have the same keys, so that ``pandas.read_json(path, lines=True)`` reads them. Each event
is in a line once: ``tool_calls`` and ``raw_stdout_lines`` have its number instead. Knows what a
line holds; the file is the checkpoint's matter.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from . import errors
from .errors import OpenCodeConfigError, OpenCodeError
from .events import to_json
from .limits import Spent, tokens_of
from .reading import number_of, saved_usage, why_cut
from .result import RunResult
from .text import tools_used

_BEGINNING = b'{"key": "'  # of each line
# The beginning of a result's line, as line_of() writes it: the rest is read when it is asked for.
_HEAD = re.compile(
    rb'\{"key": "([^"\\]*)", "fingerprint": "\w+", '
    rb'"spent": \{"cost": ([\d.e-]+), "tokens": (\d+)\}, '
    rb'"settings": (\{[^{}]*\}), "own": \{[^{}]*\}, "files": (?:null|"\w+"), "failure": null, '
)
_SURROGATE = re.compile("[\ud800-\udfff]")
# Attributes of an error that are in the same line as the result's.
_OF_RESULT = (
    *("result", "events", "raw_stdout_lines", "stderr"),
    *("prompt", "index", "key", "metadata"),
)


class Entry(NamedTuple):
    """One finished job.

    Attributes:
        facts: What it asked, to compare with another job of the same key: its ``settings`` and
            ``own`` ones, and a hash of its ``files``.
        before: Spent on earlier tries at the job, whose lines are superseded.
    """

    key: str
    fingerprint: str
    end: RunResult | OpenCodeError
    facts: Mapping[str, Any]
    before: Spent = Spent()


def line_of(entry: Entry) -> bytes:
    """*entry* as a line with its newline."""
    result = result_of(entry.end)
    spent = entry.before + Spent.on(result)
    line = {
        "key": entry.key,
        "fingerprint": entry.fingerprint,
        "spent": {"cost": spent.cost, "tokens": spent.tokens},
        "settings": entry.facts["settings"],
        "own": entry.facts["own"],
        "files": entry.facts["files"],
        **{name: value for name, value in record_of(entry.end).items() if name != "key"},
        "parsed": result._json,
        "cost_before": entry.before.cost,
        "tokens_before": entry.before.tokens,
    }
    return dumped(_with_numbers(line)) + b"\n"


def _with_numbers(line: dict[str, Any]) -> dict[str, Any]:
    """*line* with the number of an event in the place of the event, or of its raw line."""
    events = line["events"]
    numbers = {id(event): number for number, event in enumerate(events)}
    calls = [numbers.get(id(call), call) for call in line["tool_calls"]]
    raw: list[Any] = line["raw_stdout_lines"]
    if raw:
        try:
            texts = {_raw(event): number for number, event in enumerate(events)}
        except RecursionError:  # nested deeper than JSON can be written
            return line
        raw = [texts.get(text, text) for text in raw]
    return {**line, "tool_calls": calls, "raw_stdout_lines": raw}


def _without_numbers(line: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`_with_numbers`, also where there is nothing to undo."""
    events: Any = line.get("events")
    calls, raw = line.get("tool_calls"), line.get("raw_stdout_lines")
    if calls:
        line["tool_calls"] = [events[c] if isinstance(c, int) else c for c in calls]
    if raw:
        line["raw_stdout_lines"] = [_raw(events[r]) if isinstance(r, int) else r for r in raw]
    return line


def _raw(event: Any) -> str:
    """*event* as OpenCode prints it."""
    return to_json(event, ensure_ascii=False, separators=(",", ":"), default=plain)


def record_of(end: RunResult | OpenCodeError) -> dict[str, Any]:
    """A result, or an error in its place, as :func:`line_of` and the report page write it."""
    if isinstance(end, RunResult):
        return {"failure": None, **end.to_dict()}
    return {"failure": failure_of(end), **result_of(end).to_dict()}


def result_of(end: RunResult | OpenCodeError) -> RunResult:
    """The result, or an error's, or for an error without one an empty result."""
    if isinstance(end, RunResult):
        return end
    return end.result or RunResult(
        prompt=end.prompt or "", index=end.index, key=end.key, metadata=end.metadata
    )


class Head(NamedTuple):
    """What an index needs of a line.

    Attributes:
        spent: On all tries at the job.
        settings: Those of the batch as JSON; a str where an earlier version wrote the line.
    """

    key: str
    spent: Spent
    settings: bytes
    is_failure: bool = False
    is_unfinished: bool = False


class Line(NamedTuple):
    """A line of a checkpoint; *head* is None if it is blank or damaged."""

    number: int
    offset: int
    data: bytes
    head: Head | None


def lines_in(file: Iterable[bytes]) -> Iterator[Line]:
    """Read the lines of a checkpoint's *file*; offsets count from its current position.

    Ends before a last line that was cut off, or is being written.

    Raises:
        ValueError: The file is not a checkpoint; at the end, if none of its lines is one of a
            checkpoint's.
    """
    offset = n_ours = n_damaged = 0
    for number, data in enumerate(file, 1):
        head = head_of(data)
        if head is not None:
            n_ours += 1
        elif not data.endswith(b"\n") and _may_be_torn(data):
            break
        elif data.strip():
            n_damaged += 1
        yield Line(number, offset, data, head)
        offset += len(data)
    if n_damaged and not n_ours:
        raise ValueError("not a checkpoint: none of its lines is a whole line of one")


def records_in(checkpoint: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Read the jobs in a checkpoint's file, the last line of each key; also while it is written.

    Damaged lines are left out.

    Raises:
        OpenCodeConfigError: The file cannot be read, or is not a checkpoint.
    """
    path = Path(checkpoint).expanduser()
    try:
        with open(path, "rb") as file:
            last = {line.head.key: line.offset for line in lines_in(file) if line.head is not None}
            for offset in sorted(last.values()):
                file.seek(offset)
                if (entry := parsed(file.readline())) is not None:
                    yield entry
    except OSError as error:
        raise OpenCodeConfigError(f"{str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise OpenCodeConfigError(f"{str(path)!r}: {error}") from None


def head_of(line: bytes) -> Head | None:
    """The head of *line*, or None if that is not a line of a checkpoint."""
    found = _HEAD.match(line)
    if found is not None and line.rstrip().endswith(b"}"):
        key, cost, tokens, settings = found.groups()
        return Head(key.decode("utf-8", "replace"), Spent(float(cost), int(tokens)), settings)
    entry = parsed(line)
    if entry is None:
        return None
    failure = entry["failure"]
    settings = json.dumps(entry["settings"]).encode()
    is_failure = failure is not None
    return Head(entry["key"], spent_in(entry), settings, is_failure, is_unfinished(failure))


def parsed(line: bytes) -> dict[str, Any] | None:
    """The line's object, or None if it is not a line of a checkpoint."""
    try:
        entry = json.loads(line)
        is_ours = (
            isinstance(entry, dict)
            and isinstance(entry.get("key"), str)
            and isinstance(entry.get("fingerprint"), str)
            and isinstance(entry.get("settings"), (dict, str))
            and isinstance(entry["failure"], (dict, type(None)))
        )
        return _judged(_without_numbers(entry)) if is_ours else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _judged(entry: dict[str, Any]) -> dict[str, Any]:
    """*entry*, or a failure if an earlier version took its cut answer for a whole one."""
    reason = entry.get("finish_reason")
    cut = why_cut(reason) if isinstance(reason, str) and entry.get("failure") is None else None
    if cut is None or entry.get("status") not in ("ok", "denied"):
        return entry
    failure = {"type": "OpenCodeIncompleteError", "message": cut}
    return {**entry, "status": "incomplete", "failure": failure}


def own_key(entry: Mapping[str, Any]) -> str | None:
    """The key that the user gave to a line's job; None for one that was made of its fingerprint."""
    key = entry.get("key")
    if not isinstance(key, str) or key.partition("#")[0] == entry.get("fingerprint"):
        return None
    return key


def _may_be_torn(line: bytes) -> bool:
    """Whether *line* may be the beginning of a line of a checkpoint."""
    # After a power cut, a file system may show zeros for data that had not arrived.
    begins = line.startswith(_BEGINNING) or _BEGINNING.startswith(line)
    return begins or not line.strip(b"\0")


def spent_in(entry: Mapping[str, Any]) -> Spent:
    """What a line's job has cost, earlier tries included."""
    own = tokens_of(saved_usage(entry.get("token_usage")))
    cost = number_of(entry.get("total_cost")) + number_of(entry.get("cost_before"))
    return Spent(cost, own + int(number_of(entry.get("tokens_before"))))


def respent(line: bytes, spent: Spent) -> bytes:
    """*line* with *spent* as what all tries at its job have cost."""
    entry = json.loads(line)
    own = spent_in({**entry, "cost_before": 0.0, "tokens_before": 0})
    entry["cost_before"], entry["tokens_before"] = spent.cost - own.cost, spent.tokens - own.tokens
    if "spent" in entry:
        entry["spent"] = {"cost": spent.cost, "tokens": spent.tokens}
    return dumped(entry) + b"\n"


def is_unfinished(failure: Mapping[str, Any] | None) -> bool:
    """Whether a job was stopped from outside, and so is always run again.

    Args:
        failure: The ``failure`` of a line.
    """
    if failure is None:
        return False
    is_of_batch = str(failure.get("limit_name")).startswith("max_total_")
    return failure.get("type") == "OpenCodeCancelledError" or is_of_batch


def failure_of(error: OpenCodeError) -> dict[str, Any]:
    facts = {name: value for name, value in vars(error).items() if name not in _OF_RESULT}
    return {"type": type(error).__name__, "message": str(error), **facts}


def end_of(entry: Mapping[str, Any]) -> RunResult | OpenCodeError:
    result = RunResult.from_dict(entry)
    if entry["failure"] is None:
        return result
    facts = dict(entry["failure"])
    message = facts.pop("message", "")
    kind = getattr(errors, str(facts.pop("type", "")), None)
    if not (isinstance(kind, type) and issubclass(kind, OpenCodeError)):
        kind = OpenCodeError  # of a later version
    error = kind.__new__(kind, message)
    OpenCodeError.__init__(error, message, result=result if result.attempts else None)
    if isinstance(error, errors.OpenCodeProcessError):
        error.stderr, error.events = result.stderr, list(result.events)
        error.raw_stdout_lines = list(result.raw_stdout_lines)
    vars(error).update(facts)
    return error


def dumped(line: Mapping[str, Any]) -> bytes:
    """*line* as JSON that every parser reads: without NaN and lone surrogates."""
    try:
        text = to_json(line, ensure_ascii=False, default=plain)
    except RecursionError:  # nested deeper than JSON can be written
        raw = [text for text in line.get("raw_stdout_lines", ()) if isinstance(text, str)]
        less = {"events": [], "tool_calls": [], "raw_stdout_lines": raw, "parsed": None}
        return dumped({**line, **less})
    return text.encode("utf-8", "replace")


def plain(value: Any) -> Any:
    """A value of structured output that JSON has no type for, as one that it has."""
    if callable(dump := getattr(value, "model_dump", None)):
        return dump(mode="json")
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def jsonable(value: Any) -> Any:
    """*value* as it comes back from JSON: dicts, lists, texts and plain numbers.

    numpy's and pandas' values become plain ones, a date its text, and what is missing None.

    Raises:
        ValueError: JSON cannot hold it.
    """
    if value is None or isinstance(value, str):
        return value
    try:
        return json.loads(to_json(value, default=_of_json))
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _of_json(value: Any) -> Any:
    """A value that ``json`` does not know, as one that it does; without an import of its type."""
    kind = type(value).__name__
    if kind in ("NAType", "NaTType"):
        return None
    if callable(isoformat := getattr(value, "isoformat", None)):
        return isoformat()
    if kind in ("Decimal", "UUID", "datetime64") or isinstance(value, os.PathLike):
        return str(value)
    if callable(tolist := getattr(value, "tolist", None)):  # numpy's scalars and arrays
        return tolist()
    raise TypeError(f"JSON has nothing for {kind}")


@contextmanager
def replacing(target: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Write a new file, which replaces *target* when the block ends.

    Until then it is ``NAME.new`` beside it; if the block fails, it is removed.

    Args:
        mode: Its permissions, within the umask; those of *target* if that exists.
    """
    new = target.with_name(f"{target.name}.new")
    # A file of a killed process, or a link that somebody put there to have a file of ours
    # overwritten: neither is opened.
    with suppress(FileNotFoundError):
        os.unlink(new)
    file = open(new, "xb", opener=lambda path, flags: os.open(path, flags | _NO_LINK, mode))
    try:
        with file:
            with suppress(FileNotFoundError):
                shutil.copymode(target, new)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise


_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # besides O_EXCL, which implies it on most systems


def results_to_records(results: Iterable[RunResult | OpenCodeError]) -> list[dict[str, Any]]:
    """One flat row for each result, or each error in a result's place.

    All rows have the same keys: ``key``, ``status``, ``answer``, ``total_cost`` and ``metadata``
    first; then what else RunResult has as plain values, ``error`` as one str or None, ``tools``,
    ``denied_tools``, ``warnings`` and ``tried`` as one str each, and the tokens as ``tokens_input``
    and so on. What is not there is None, such as the answer of a job that was refused.
    """
    return [_record(result) for result in results]


def results_to_frame(results: Iterable[RunResult | OpenCodeError]) -> Any:
    """The same as a ``pandas.DataFrame``; with all columns even if there are no results.

    What is not there is None here too, and not NaN.

    Raises:
        ImportError: If pandas is not installed; this package does not depend on it.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError("results_to_frame needs pandas: run 'pip install pandas'") from error
    rows = results_to_records(results)
    columns = {name: [row[name] for row in rows] for name in _record(RunResult())}
    # Of a column that is not of objects, pandas would make NaN where something is missing, and its
    # texts may not hold half a surrogate pair.
    kinds = {
        name: object if any(map(_needs_object, values)) else None
        for name, values in columns.items()
    }
    return pandas.DataFrame(
        {name: pandas.Series(values, dtype=kinds[name]) for name, values in columns.items()}
    )


def _needs_object(value: Any) -> bool:
    return value is None or (isinstance(value, str) and _SURROGATE.search(value) is not None)


def _record(end: RunResult | OpenCodeError) -> dict[str, Any]:
    result = result_of(end)
    if isinstance(end, RunResult):
        status, reason = end.status, None if end.error is None else str(end.error)
    else:
        status = "error" if end.result is None else end.result.status
        reason = f"{type(end).__name__}: {end}".partition("\n")[0]
    has_run = isinstance(end, RunResult) or end.result is not None
    return {
        "key": result.key,
        "status": status,
        "answer": result.answer if has_run else None,
        "total_cost": result.total_cost,
        "metadata": result.metadata,
        "index": result.index,
        "error": reason,
        "prompt": result.prompt,
        "model": result.model,
        "tried": "; ".join(map(str, result.tried)),
        "tools": ", ".join(tools_used(result)),
        "denied_tools": ", ".join(result.denied_tools),
        "warnings": "; ".join(result.warnings),
        **{f"tokens_{name}": value for name, value in asdict(result.token_usage).items()},
        "sub_agents": len(result.sub_agents),
        "turns": result.turns,
        "duration_s": result.duration_s,
        "attempts": result.attempts,
        "finish_reason": result.finish_reason,
        "workspace": result.workspace or None,
        "session_id": result.session_id,
        "parsed": result.parsed,
    }
