"""Results and errors as lines of JSON, and back.

RunResult, OpenCodeError --> failure_of(), dumped() --> a line --> end_of() --> an equal one
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from . import errors
from .errors import OpenCodeError
from .result import RunResult

# Attributes of an error that its result, in the same line, has too.
_OF_RESULT = ("result", "events", "raw_stdout_lines", "stderr", "prompt", "index", "key")


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
    """JSON that every parser reads: no NaN, and no half of a surrogate pair."""
    try:
        text = json.dumps(line, ensure_ascii=False, allow_nan=False, default=_plain)
    except RecursionError:  # nested deeper than JSON can be written
        return dumped({**line, "events": [], "tool_calls": [], "parsed": None})
    except ValueError:
        return dumped(_finite(line))
    return text.encode("utf-8", "replace")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """What JSON knows nothing of: values that structured output was made into."""
    if callable(dump := getattr(value, "model_dump", None)):
        return dump(mode="json")
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
