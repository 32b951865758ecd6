"""A batch's jobs, read from text: a prompt per line, JSON lines, or CSV.

    bytes --> text --plain | JSON | CSV--> (line number, fields) --> Job, checked

All is read and checked before anything is started, so that a slip in the last line costs nothing:
it is told with its line. Knows the settings of a job; nothing of how jobs are run.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .core.config import Job, RunConfig, validate_config_for_run
from .core.errors import OpenCodeConfigError
from .core.request import LIMITS_OF_A_JOB, Limits, Request, StrPath, directory

STDIN = "-"

_OF_A_JOB = ("prompt", "workspace", "key", *LIMITS_OF_A_JOB)
# Fields of RunConfig that may differ within a batch, also on one server.
_OF_ITS_RUN = ("model", "agent", "variant", "title", "command", "files", "permission", "thinking")
FIELDS = (*_OF_A_JOB, *_OF_ITS_RUN)

# The module's own bound on a cell, 131,072 characters, is less than a prompt may have.
_LONGEST_CELL = 2**31 - 1

Fields = Mapping[str, Any]


class _LineError(Exception):
    """What is wrong with a line."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"line {number}: {why}")


def read_jobs(source: str, workspace: StrPath, cfg: RunConfig) -> list[Job]:
    """The jobs in the file *source*, or on stdin where it is ``"-"``.

    The ending says how it is written: ``.txt`` is a prompt per line, ``.jsonl`` (``.ndjson``,
    ``.json``) an object per line, ``.csv`` a table. What has another ending, and stdin, is looked
    at: a first line that begins with a brace makes it JSON, one that is the header of a table
    with ``prompt`` in it makes it CSV, any other plain text. Blank lines are skipped. Paths count
    from the current directory.

    Args:
        workspace, cfg: Of jobs that name none of their own.

    Raises:
        OpenCodeConfigError: Names the file, the line, and what is wrong with it.
    """
    name = "stdin" if source == STDIN else source
    try:
        text = _decoded(_read(source))
        rows = _form(source, text)(text)
        jobs = list(_checked(rows, directory(workspace), cfg))
    except OSError as error:
        raise OpenCodeConfigError(f"{name}: {error.strerror or error}") from None
    except _LineError as error:
        raise OpenCodeConfigError(f"{name}, {error}") from None
    if not jobs:
        raise OpenCodeConfigError(f"{name} holds no prompts")
    return jobs


def _read(source: str) -> bytes:
    if source == STDIN:
        return sys.stdin.buffer.read()
    with open(os.path.expanduser(source), "rb") as file:
        return file.read()


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")  # some editors, and Excel, begin with a mark
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise _LineError(number, f"no UTF-8: {error.reason}") from None


# --- the three ways to write jobs ----------------------------------------------------------------


def _form(source: str, text: str) -> Callable[[str], Iterator[tuple[int, Fields]]]:
    known = _FORMS.get(Path(source).suffix.lower())
    if known is not None:
        return known
    first = text.lstrip().partition("\n")[0]
    if first.startswith("{"):
        return _json_lines
    columns = {cell.strip(' "') for cell in first.strip().split(",")}
    return _table if "prompt" in columns and columns <= set(FIELDS) else _plain


def _plain(text: str) -> Iterator[tuple[int, Fields]]:
    for number, line in _lines(text):
        yield number, {"prompt": line}


def _json_lines(text: str) -> Iterator[tuple[int, Fields]]:
    for number, line in _lines(text):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise _LineError(number, f"no JSON: {error.msg}, column {error.colno}") from None
        except RecursionError:
            raise _LineError(number, "nested too deeply") from None
        if not isinstance(value, dict):
            raise _LineError(number, 'use a JSON object, such as {"prompt": "..."}')
        yield number, value


def _table(text: str) -> Iterator[tuple[int, Fields]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    longest = csv.field_size_limit(_LONGEST_CELL)
    columns: list[str] = []
    number = 1
    try:
        for cells in reader:
            begun_at, number = number, reader.line_num + 1
            if not any(map(str.strip, cells)):
                continue
            if not columns:
                columns = [cell.strip() for cell in cells]
                if "prompt" not in columns:
                    raise _LineError(begun_at, f"no column 'prompt' in {', '.join(columns)!r}")
                twice = [name for name in columns if name and columns.count(name) > 1]
                if twice:
                    raise _LineError(begun_at, f"two columns {twice[0]!r}")
                continue
            if len(cells) > len(columns):
                raise _LineError(begun_at, f"{len(cells)} cells, but {len(columns)} columns")
            # A row may be short: what is missing at its end is empty.
            named = zip(columns, cells, strict=False)
            yield begun_at, {name: _cell(name, cell) for name, cell in named}
    except csv.Error as error:
        raise _LineError(number, f"no CSV: {error}") from None
    finally:
        csv.field_size_limit(longest)


def _cell(name: str, text: str) -> Any:
    """The value of a cell; an empty one is left out."""
    if not text.strip():
        return "" if name == "prompt" else None
    if name not in LIMITS_OF_A_JOB:
        return text
    try:
        return int(text) if name in ("max_steps", "max_tokens") else float(text)
    except ValueError:
        return text  # refused with the others


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines(), which knows ends of lines that stand within prompts.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield number, line.removesuffix("\n")


_FORMS = {
    ".txt": _plain,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".csv": _table,
}


# --- jobs of their fields ------------------------------------------------------------------------


def _checked(rows: Iterator[tuple[int, Fields]], workspace: Path, cfg: RunConfig) -> Iterator[Job]:
    line_of: dict[str, int] = {}
    for number, fields in rows:
        try:
            job = _job(fields, workspace, cfg)
        except OpenCodeConfigError as error:
            raise _LineError(number, str(error)) from None
        if job.key is not None and line_of.setdefault(job.key, number) != number:
            raise _LineError(number, f"the key {job.key!r} stands in line {line_of[job.key]} too")
        yield job


def _job(fields: Fields, workspace: Path, cfg: RunConfig) -> Job:
    own = {name: value for name, value in fields.items() if value is not None}
    if unknown := [name for name in own if name not in FIELDS]:
        raise OpenCodeConfigError(f"unknown field {unknown[0]!r}: use {', '.join(FIELDS)}")
    if "prompt" not in own:
        raise OpenCodeConfigError("no field 'prompt'")
    key = own.get("key")
    if key is not None and (not isinstance(key, str) or not key.strip()):
        raise OpenCodeConfigError(f"key is {key!r}: use a text")
    where = directory(own["workspace"]) if "workspace" in own else workspace
    changes = {name: own[name] for name in _OF_ITS_RUN if name in own}
    if "files" in changes:
        changes["files"] = _from_here(changes["files"])
    run_cfg = cfg.replace(**changes) if changes else None
    if run_cfg is not None:
        validate_config_for_run(run_cfg)
    limits = {name: own[name] for name in LIMITS_OF_A_JOB if name in own}
    Limits(**limits)
    Request(own["prompt"], where, run_cfg or cfg)  # which refuses what cannot be run
    return Job(
        own["prompt"],
        str(where) if "workspace" in own else None,
        run_cfg,
        key=key,
        **limits,
    )


def _from_here(files: Any) -> Any:
    names = [files] if isinstance(files, str) else files
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise OpenCodeConfigError("files: use a path, or a list of paths")
    return tuple(os.path.abspath(os.path.expanduser(name)) for name in names)
