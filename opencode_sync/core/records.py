"""Results, and errors in their places, as lines of a checkpoint, and as rows of a table.

    Entry --line_of()--> a line --lines_in()--> its object --end_of()--> an equal result or error
    results --results_to_records()--> flat rows --> results_to_frame()

    {"key": ..., "fingerprint": ..., "settings": ..., "failure": null, <RunResult.to_dict()>}
    {"key": ..., "fingerprint": ..., "settings": ..., "failure": {"type", "message", ...}, ...}

All lines have the same keys, so that ``pandas.read_json(path, lines=True)`` reads them. Knows what
a line holds; the file is the checkpoint's matter.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from . import errors
from .errors import OpenCodeError
from .events import to_json
from .limits import Spent, tokens_of
from .reading import number_of, saved_usage, why_cut
from .result import RunResult
from .text import tools_used

_BEGINNING = b'{"key": "'  # of each line
# Attributes of an error that are in the same line as the result's.
_OF_RESULT = (
    *("result", "events", "raw_stdout_lines", "stderr"),
    *("prompt", "index", "key", "metadata"),
)


class Entry(NamedTuple):
    """One finished job."""

    key: str
    fingerprint: str
    end: RunResult | OpenCodeError
    before: Spent = Spent()  # on earlier tries at the job, whose lines are superseded


def line_of(entry: Entry, settings: str) -> bytes:
    """*entry* as a line with its newline.

    Args:
        settings: Fingerprint of what all jobs of the batch have in common.
    """
    line = {
        "key": entry.key,
        "fingerprint": entry.fingerprint,
        "settings": settings,
        **{name: value for name, value in record_of(entry.end).items() if name != "key"},
        "parsed": result_of(entry.end)._json,
        "cost_before": entry.before.cost,
        "tokens_before": entry.before.tokens,
    }
    return dumped(line) + b"\n"


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


class Line(NamedTuple):
    """A line of a checkpoint: where it is, and the object that it holds."""

    number: int
    offset: int
    data: bytes
    entry: dict[str, Any]


def lines_in(file: Iterable[bytes]) -> Iterator[Line]:
    """Read the lines of a checkpoint's *file*; offsets count from its current position.

    Ends before a last line that was cut off, or is being written.

    Raises:
        ValueError: A line is damaged, or the file is not a checkpoint.
    """
    offset = 0
    for number, data in enumerate(file, 1):
        entry = parsed(data)
        if entry is None and not data.endswith(b"\n") and _may_be_torn(data):
            return
        if entry is None:
            raise ValueError(f"line {number} is damaged, or not a line of a checkpoint")
        yield Line(number, offset, data, entry)
        offset += len(data)


def parsed(line: bytes) -> dict[str, Any] | None:
    """The line's object, or None if it is not a line of a checkpoint."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or "failure" not in entry:
        return None
    is_ours = all(isinstance(entry.get(name), str) for name in ("key", "fingerprint", "settings"))
    is_ours = is_ours and isinstance(entry["failure"], (dict, type(None)))
    return _judged(entry) if is_ours else None


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
        return dumped({**line, "events": [], "tool_calls": [], "parsed": None})
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
        mode: Its permissions, within the umask.
    """
    new = target.with_name(f"{target.name}.new")
    # A file of a killed process, or a link that somebody put there to have a file of ours
    # overwritten: neither is opened.
    with suppress(FileNotFoundError):
        os.unlink(new)
    file = open(new, "xb", opener=lambda path, flags: os.open(path, flags | _NO_LINK, mode))
    try:
        with file:
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

    All rows have the same keys: those of RunResult that are plain values, ``error`` as one str or
    None, ``tools``, ``denied_tools``, ``warnings`` and ``tried`` as one str each, and the tokens as
    ``tokens_input`` and so on.
    """
    return [_record(result) for result in results]


def results_to_frame(results: Iterable[RunResult | OpenCodeError]) -> Any:
    """The same as a ``pandas.DataFrame``; with all columns even if there are no results.

    Raises:
        ImportError: If pandas is not installed; this package does not depend on it.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError("results_to_frame needs pandas: run 'pip install pandas'") from error
    columns = list(_record(RunResult()))
    return pandas.DataFrame.from_records(results_to_records(results), columns=columns)


def _record(end: RunResult | OpenCodeError) -> dict[str, Any]:
    result = result_of(end)
    if isinstance(end, RunResult):
        status, reason = end.status, None if end.error is None else str(end.error)
    else:
        status = "error" if end.result is None else end.result.status
        reason = f"{type(end).__name__}: {end}".partition("\n")[0]
    return {
        "index": result.index,
        "key": result.key,
        "metadata": result.metadata,
        "status": status,
        "error": reason,
        "prompt": result.prompt,
        "answer": result.answer,
        "model": result.model,
        "tried": "; ".join(map(str, result.tried)),
        "tools": ", ".join(tools_used(result)),
        "denied_tools": ", ".join(result.denied_tools),
        "warnings": "; ".join(result.warnings),
        "total_cost": result.total_cost,
        **{f"tokens_{name}": value for name, value in asdict(result.token_usage).items()},
        "sub_agents": len(result.sub_agents),
        "turns": result.turns,
        "duration_s": result.duration_s,
        "attempts": result.attempts,
        "finish_reason": result.finish_reason,
        "workspace": result.workspace,
        "session_id": result.session_id,
        "parsed": result.parsed,
    }
