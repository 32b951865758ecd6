"""Where the records of a report page come from.

    a checkpoint's file --records_in()--+--> record
    results and errors --records_of()---+

A record is a line of a checkpoint as a mapping: what ``RunResult.to_dict()`` gives, and
``failure``, which is None or the error's ``{"type", "message", ...}``. They come one at a time, so
that a batch whose events fill gigabytes is read in a few megabytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .core.errors import OpenCodeConfigError, OpenCodeError
from .core.records import failure_of, judged
from .core.result import RunResult

Record = Mapping[str, Any]

_KEY = b'{"key": '  # how each line of a checkpoint begins


def records_of(ends: Iterable[RunResult | OpenCodeError]) -> Iterator[Record]:
    """Results, and errors that stand in a result's place, as records."""
    for end in ends:
        if isinstance(end, RunResult):
            yield {**end.to_dict(), "failure": None}
            continue
        result = end.result or RunResult(prompt=end.prompt or "", index=end.index, key=end.key)
        yield {**result.to_dict(), "failure": failure_of(end)}


def records_in(checkpoint: str | os.PathLike[str]) -> Iterator[Record]:
    """The jobs in a checkpoint's file, the last line of each key; may be done while it is written.

    Raises:
        OpenCodeConfigError: There is no such file, or it is no checkpoint.
    """
    path = Path(checkpoint).expanduser()
    try:
        with open(path, "rb") as file:
            for number, offset in sorted(_places(file)):
                file.seek(offset)
                record = _parsed(line := file.readline())
                if record is None and not line.endswith(b"\n"):
                    continue  # cut off, or being written
                if record is None:
                    raise OpenCodeConfigError(
                        f"{str(path)!r}: line {number} is no line of a checkpoint"
                    )
                yield record
    except OSError as error:
        raise OpenCodeConfigError(f"{str(path)!r}: {error.strerror or error}") from error


def _places(lines: Iterable[bytes]) -> Iterable[tuple[int, int]]:
    """Number and offset of the last line of each key."""
    places: dict[str, tuple[int, int]] = {}
    offset = 0
    for number, line in enumerate(lines, 1):
        places[_key_in(line) or f"line {number}"] = number, offset
        offset += len(line)
    return places.values()


def _key_in(line: bytes) -> str | None:
    """The key's JSON, without a look at the rest of a line that may be long."""
    if not line.startswith(_KEY) or not line.endswith(b"\n"):
        return None
    try:
        key, _ = json.JSONDecoder().raw_decode(line[len(_KEY) :].decode("utf-8", "replace"))
    except ValueError:
        return None
    return json.dumps(key)


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return judged(record) if isinstance(record, dict) and "failure" in record else None
