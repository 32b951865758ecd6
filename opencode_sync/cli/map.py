"""``opencode-sync map``: runs the jobs of a file and writes the results to another.

    FILE --read_jobs()--> Job, ... --runner.map()--> OUT.jsonl, the checkpoint --> F.html

    FILE is one of: a prompt per line | a JSON object per line | a CSV table
         --> (line number, fields), ... --> checked Jobs

The whole FILE is read and checked before anything is started; an error names its line. The
checkpoint is all that is kept: the same command, given again, continues a batch that was stopped.
The progress bar and the report go to stderr; stdout stays empty.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from ..api.client import OpenCodeClient
from ..api.runner import Runner
from ..batch.batch import BatchRun
from ..core.config import Job, RunConfig, validate_config_for_run
from ..core.errors import OpenCodeBudgetError, OpenCodeConfigError, OpenCodeError
from ..core.limits import LIMITS_OF_A_JOB, Limits
from ..core.request import Request, StrPath, directory
from ..core.result import RunResult
from ..core.text import count, one_line, printable
from ..process.versions import check_program_version
from .options import (
    DONE,
    FAILED,
    INTERRUPTED,
    add_file_option,
    add_run_options,
    needs_permission,
    run_config,
    tell,
)

STDIN = "-"

_OF_A_JOB = ("prompt", "workspace", "key", *LIMITS_OF_A_JOB)
# Fields of RunConfig that may differ within a batch, also on one server.
_OF_ITS_RUN = ("model", "agent", "variant", "title", "command", "files", "permission", "thinking")
FIELDS = (*_OF_A_JOB, *_OF_ITS_RUN)

# The csv module's default, 131,072 characters, is less than a prompt may have.
_LONGEST_CELL = 2**31 - 1

Fields = Mapping[str, Any]


class _LineError(Exception):
    """A line is wrong; the message says which, and why."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"line {number}: {why}")


def read_jobs(source: str, workspace: StrPath, cfg: RunConfig) -> list[Job]:
    """Read the jobs in the file *source*; ``"-"`` is stdin.

    The suffix tells the format: ``.txt`` is a prompt per line, ``.jsonl`` (``.ndjson``, ``.json``)
    an object per line, ``.csv`` a table. Without one of these, and on stdin, the first line does:
    if it begins with a brace it is JSON, if it is the header of a table that has a column
    ``prompt`` it is CSV, else plain text. Blank lines are skipped. Paths are relative to the
    current directory.

    Args:
        workspace, cfg: For jobs that do not name their own.

    Raises:
        OpenCodeConfigError: Names the file, the line, and what is wrong with it.
    """
    name = "stdin" if source == STDIN else source
    try:
        text = _decoded(_read(source))
        rows = _format(source, text)(text)
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
        return data.decode("utf-8-sig")  # some editors, and Excel, write a byte order mark
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise _LineError(number, f"not UTF-8: {error.reason}") from None


# --- the three formats ---------------------------------------------------------------------------


def _format(source: str, text: str) -> Callable[[str], Iterator[tuple[int, Fields]]]:
    if known := _FORMATS.get(Path(source).suffix.lower()):
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
            raise _LineError(number, f"not valid JSON: {error.msg}, column {error.colno}") from None
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
            # A row may be short: the missing cells are empty.
            named = zip(columns, cells, strict=False)
            yield begun_at, {name: _cell(name, cell) for name, cell in named}
    except csv.Error as error:
        raise _LineError(number, f"not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(longest)


def _cell(name: str, text: str) -> Any:
    """The value of a cell; None for an empty one, which is left out."""
    if not text.strip():
        return "" if name == "prompt" else None
    if name not in LIMITS_OF_A_JOB:
        return text
    try:
        return int(text) if name in ("max_steps", "max_tokens") else float(text)
    except ValueError:
        return text  # Limits refuses it


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines(), which also splits at characters that prompts contain, such as U+2028.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield number, line.removesuffix("\n")


_FORMATS = {
    ".txt": _plain,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".csv": _table,
}


# --- from fields to jobs -------------------------------------------------------------------------


def _checked(rows: Iterator[tuple[int, Fields]], workspace: Path, cfg: RunConfig) -> Iterator[Job]:
    line_of: dict[str, int] = {}
    for number, fields in rows:
        try:
            job = _job(fields, workspace, cfg)
        except OpenCodeConfigError as error:
            raise _LineError(number, str(error)) from None
        if job.key is not None and line_of.setdefault(job.key, number) != number:
            raise _LineError(number, f"the key {job.key!r} is also in line {line_of[job.key]}")
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
    Request(own["prompt"], where, run_cfg or cfg)  # raises for what cannot be run
    own_workspace = str(where) if "workspace" in own else None
    return Job(own["prompt"], own_workspace, run_cfg, key=key, **limits)


def _from_here(files: Any) -> Any:
    names = [files] if isinstance(files, str) else files
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise OpenCodeConfigError("files: use a path, or a list of paths")
    return tuple(os.path.abspath(os.path.expanduser(name)) for name in names)


# --- the command ---------------------------------------------------------------------------------

_BUDGET_OPTIONS = {"max_total_cost": "--max-cost", "max_total_tokens": "--max-tokens"}
_SHOWN_FAILURES = 5
_LINE_CHARS = 160

End = RunResult | OpenCodeError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", help=argparse.SUPPRESS)
    add = parser.add_argument
    add(
        "-o", "--output", metavar="OUT", required=True,
        help="results as JSON lines; run again, it continues",
    )  # fmt: skip
    add_run_options(parser)
    add_file_option(parser)
    add("--server", action="store_true", help="on one warm server, some 20 times faster")
    add("--workers", metavar="N", type=int, help="how many at a time (default: see doctor)")
    add("--max-cost", metavar="USD", type=float, help="stop when all together have cost this")
    add("--max-tokens", metavar="N", type=int, help="stop when all together have used this many")
    add(
        "--on-error", metavar="HOW", choices=("return", "raise"), default="return",
        help="return: go on (the default); raise: stop at the first",
    )  # fmt: skip
    add("--retry-failed", action="store_true", help="run the jobs again that failed in OUT")
    add("--report", metavar="F.html", help="write a page for looking through the results")


def run(options: argparse.Namespace) -> int:
    """Run the jobs, and return the exit status.

    Raises:
        OpenCodeConfigError: Something was refused before the first job.
        OpenCodeError: The first failure, with ``--on-error raise``.
    """
    cfg = run_config(options)
    jobs = read_jobs(options.source, options.workspace, cfg)
    if options.report:
        _check_page(options)
        _write_page(options)  # raises now, and not after hours, if it cannot be written
    # Not entered: a server starts with the first job that is not in OUT.
    with closing(_runner(cfg, on_server=options.server)) as runner:
        batch = runner.map(
            jobs,
            options.workspace,
            timeout_s=options.timeout,
            idle_timeout_s=options.idle_timeout,
            max_steps=options.max_steps,
            max_total_cost=options.max_cost,
            max_total_tokens=options.max_tokens,
            max_workers=options.workers,
            ordered=False,
            on_error=options.on_error,
            progress=True,
            checkpoint=options.output,
            retry_failed=options.retry_failed,
            keep_raw=False,
        )
        summary = _Summary(batch, jobs, options)
        failure: OpenCodeError | None = None
        try:
            with batch:
                for end in batch:
                    summary.note(end)
        except KeyboardInterrupt:
            summary.is_interrupted = True
        except OpenCodeError as error:
            if error.index is None and isinstance(error, OpenCodeConfigError):
                raise  # the batch was refused as a whole
            summary.note(error)
            failure = error
        summary.show()
    if options.report:
        _write_page(options)
    if failure is not None:
        raise failure
    return summary.status


def _runner(cfg: RunConfig, *, on_server: bool) -> Runner:
    if on_server:
        from ..api.server import OpenCodeServer

        return OpenCodeServer(run_cfg=cfg)
    client = OpenCodeClient(run_cfg=cfg)
    # Checked here, or every job would fail, and be in the checkpoint as failed.
    check_program_version(client.resolved_binary())
    return client


def _check_page(options: argparse.Namespace) -> None:
    """Refuse a page that would overwrite FILE or OUT."""
    page = os.path.realpath(os.path.expanduser(options.report))
    for what, path in (("OUT", options.output), ("FILE", options.source)):
        if path != STDIN and os.path.realpath(os.path.expanduser(path)) == page:
            raise OpenCodeConfigError(f"--report {options.report} is {what} too: name another file")


def _write_page(options: argparse.Namespace) -> None:
    from ..display.report import checkpoint_to_html, write_html

    if Path(options.output).expanduser().exists():
        checkpoint_to_html(options.output, options.report)
    else:
        write_html((), options.report)


class _Summary:
    """What is printed at the end of a batch, and its exit status."""

    def __init__(self, batch: BatchRun[End], jobs: list[Job], options: argparse.Namespace) -> None:
        self.is_interrupted = False
        self._batch = batch
        self._jobs = jobs
        self._options = options
        self._failed = self._refused = 0
        self._first: list[str] = []
        self._spent: str | None = None  # the option whose budget is

    @property
    def status(self) -> int:
        if self.is_interrupted:
            return INTERRUPTED
        return FAILED if self._failed or self._refused or self._spent else DONE

    def note(self, end: End) -> None:
        """Count how a job ended."""
        if isinstance(end, OpenCodeBudgetError) and end.limit_name in _BUDGET_OPTIONS:
            self._spent = _BUDGET_OPTIONS[end.limit_name]
        elif isinstance(end, OpenCodeError):
            if end.index is None:
                return  # the batch's own
            self._failed += 1
            if len(self._first) < _SHOWN_FAILURES:
                reason = str(end).partition("\n")[0]
                # Not the error's key: the checkpoint gives one to a job that has none.
                name = self._jobs[end.index].key or f"job {end.index}"
                self._first.append("  " + one_line(f"{name}: {reason}", _LINE_CHARS))
        elif needs_permission(end):
            self._refused += 1

    def show(self) -> None:
        """Print the report, the failures, and how to continue."""
        report, output = self._batch.report, self._options.output
        done = report.done + report.failed + report.cached
        print(printable(str(report)), file=sys.stderr)
        if self._first:
            more = self._failed - len(self._first)
            print("failed:", *self._first, sep="\n", file=sys.stderr)
            if more:
                print(f"  and {more:,} more", file=sys.stderr)
        if self._refused:
            tell(f"{count(self._refused, 'job')} ended when a tool was refused: see --permission")
        if self._failed:
            tell(f"{count(self._failed, 'job')} failed: to run them again, add --retry-failed")
        so_far = f"{done:,} of {count(len(self._jobs), 'job')} are in {output}"
        same = "command and input" if self._options.source == STDIN else "command"
        if self._spent:
            tell(f"{self._spent} is spent: {so_far}; the same {same} with more runs the rest")
        if self.is_interrupted:
            tell(f"interrupted: {so_far}; the same {same} runs the rest")
