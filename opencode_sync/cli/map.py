"""``opencode-sync map``: runs the jobs of a file and writes the results to another.

    FILE --read_table()--> Table --jobs_of()--> Job, ... --runner.map()--> OUT.jsonl, the checkpoint
                             |                                  |
                             +--> OUT.csv, with the answers <---+--> F.html

The whole FILE is read before anything is started. The checkpoint is all that is kept: the same
command, given again, continues a batch that was stopped. The progress bar and the report go to
stderr; stdout stays empty.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from ..api.client import OpenCodeClient
from ..api.runner import Runner
from ..batch.batch import BatchRun
from ..batch.table import FORMATS, STDIN, Roles, Table, jobs_of, read_table
from ..core.config import Job, RunConfig, checked_count
from ..core.errors import (
    OpenCodeBudgetError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeOutputError,
    OpenCodeProcessError,
    OpenCodeServerError,
    OpenCodeTimeoutError,
)
from ..core.limits import Retry
from ..core.records import replacing, results_to_records
from ..core.result import RunResult
from ..core.text import count, one_line, printable
from ..process.versions import check_program_version
from .run import (
    DONE,
    FAILED,
    INTERRUPTED,
    add_file_option,
    add_run_options,
    json_object,
    limits,
    needs_permission,
    run_config,
    tell,
)

_BUDGET_OPTIONS = {"max_total_cost": "--max-total-cost", "max_total_tokens": "--max-total-tokens"}
_SHOWN_FAILURES = 5
_LINE_CHARS = 300

# What the CSV has of each job, beside the columns of the input.
_RESULT_COLUMNS = ("status", "answer", "error", "total_cost", "tokens_total", "duration_s")

_PROGRESS: dict[str, bool | Literal["always"]] = {"auto": True, "always": "always", "never": False}
_ERRORS: dict[str, type[OpenCodeError]] = {
    "process": OpenCodeProcessError,
    "incomplete": OpenCodeIncompleteError,
    "timeout": OpenCodeTimeoutError,
    "output": OpenCodeOutputError,
    "server": OpenCodeServerError,
    "budget": OpenCodeBudgetError,
}

End = RunResult | OpenCodeError

_INPUT = """\
FILE, or stdin for -, holds a prompt per line, or is a table:
  .txt              a prompt per line, as they are
  .csv .tsv         a header and rows, with any separator and quoting
  .jsonl .ndjson    a JSON object per line, such as {"prompt": "x", "key": "1"}
  .json             an array of such objects, or of prompts
  .parquet          if pandas is installed
Without a suffix, the beginning of FILE tells; in doubt, nothing is run.
The prompt is the column "prompt", or see --prompt. The columns key, workspace,
timeout_s, max_cost, max_steps, max_tokens, model, agent, variant, title,
command, files, permission and thinking are settings of the row's job; others
are its metadata.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", help=argparse.SUPPRESS)
    parser.epilog = f"{_INPUT}\n{parser.epilog}"
    add = parser.add_argument
    add(
        "-o", "--output", metavar="OUT", required=True,
        help="results as JSON lines; run again, it continues",
    )  # fmt: skip
    add(
        "--prompt", metavar="TEXT", dest="template",
        help='makes the prompts, such as "Explain {file}: {error}"',
    )  # fmt: skip
    add("--prompt-column", metavar="NAME", help="the column of the prompts")
    add("--key-column", metavar="NAME", help="the column of the jobs' keys")
    add("--format", metavar="F", choices=FORMATS, help=f"of FILE: {', '.join(FORMATS)}")
    add("--csv", metavar="OUT.csv", help="write FILE's columns and the answers as a table")
    add("--limit", metavar="N", type=int, help="run only the first N jobs, to try ten first")
    add_run_options(parser)
    add_file_option(parser)
    add("--max-cost", metavar="USD", type=float, help="stop a job that has cost more")
    add("--max-tokens", metavar="N", type=int, help="stop a job that has used more")
    add("--schema", metavar="FILE", help="JSON Schema that each answer has to fit")
    add("--server", action="store_true", help="on one warm server, some 20 times faster")
    add("--workers", metavar="N", type=int, help="how many at a time (default: see doctor)")
    add(
        "--max-total-cost", metavar="USD", type=_total(float),
        help="stop when all jobs together have cost this",
    )  # fmt: skip
    add("--max-total-tokens", metavar="N", type=_total(int), help="the same, in tokens")
    add(
        "--on-error", metavar="HOW", choices=("return", "raise"), default="return",
        help="return: go on (the default); raise: stop at the first",
    )  # fmt: skip
    add("--retries", metavar="N", type=int, default=0, help="try a failed job again, N times")
    add("--retry-delay", metavar="S", type=float, default=Retry.delay_s, help="seconds before that")
    add("--retry-on", metavar="E,E", type=_errors, help=f"only after: {', '.join(_ERRORS)}")
    add(
        "--on-mismatch", metavar="HOW", choices=("raise", "rerun", "keep"), default="raise",
        help="a job that OUT has with another prompt or setting: raise: fail it (the default); "
        "rerun: run it again; keep: take what OUT has",
    )  # fmt: skip
    add(
        "--no-retry-failed", dest="retry_failed", action="store_false",
        help="do not run the jobs again that failed in OUT",
    )  # fmt: skip
    # The default by now.
    add("--retry-failed", action="store_true", default=True, help=argparse.SUPPRESS)
    add(
        "--progress", metavar="WHEN", choices=_PROGRESS, default="auto",
        help="auto: a bar, or a line now and then in a log; always: a bar; never",
    )  # fmt: skip
    add("--report", metavar="F.html", help="write a page for looking through the results")


def run(options: argparse.Namespace) -> int:
    """Run the jobs, and return the exit status.

    Raises:
        OpenCodeConfigError: Something was refused before the first job.
        OpenCodeError: The first failure, with ``--on-error raise``.
    """
    cfg = run_config(options)
    limit = checked_count("--limit", options.limit, 1)
    roles = Roles(options.template, options.prompt_column, options.key_column)
    table = read_table(options.source, roles, options.format)
    jobs = jobs_of(table, roles, cfg)
    if not jobs:
        raise OpenCodeConfigError(f"{table.name} holds no prompts")
    _tell_metadata(table, jobs)
    _check_outputs(options)
    # Not entered: a server starts with the first job that is not in OUT.
    with (
        closing(_runner(cfg, on_server=options.server)) as runner,
        closing(_Answers(table, jobs, options)) as answers,
        runner.map(
            jobs[:limit],
            options.workspace,
            **limits(options),
            **_totals(options),
            schema=options.schema and json_object("--schema", options.schema),
            max_workers=options.workers,
            ordered=False,
            on_error=options.on_error,
            progress=_PROGRESS[options.progress],
            checkpoint=options.output,
            retries=Retry(options.retries, options.retry_delay, options.retry_on),
            retry_failed=options.retry_failed,
            on_mismatch=options.on_mismatch,
            keep_raw=False,
        ) as batch,
    ):
        # Raises now, and not after hours, if one of them cannot be written.
        if options.csv:
            answers.write(options.csv)
        if options.report:
            _write_page(options)
        summary = _Summary(batch, table, options)
        failure: OpenCodeError | None = None
        try:
            with batch:
                for end in batch:
                    summary.note(end)
                    answers.note(end)
        except KeyboardInterrupt:
            summary.is_interrupted = True
        except OpenCodeError as error:
            if error.index is None and isinstance(error, OpenCodeConfigError):
                raise  # the batch was refused as a whole
            summary.note(error)
            answers.note(error)
            failure = error
        try:
            if options.csv:
                answers.write(options.csv)
            if options.report:
                batch.report.to_html(options.report, title=Path(options.output).name)
        finally:  # not before them: stderr may be a pipe that nobody reads any more
            summary.show()
    if failure is not None:
        raise failure
    return summary.status


def _total(kind: Callable[[str], float]) -> Callable[[str], float]:
    def total(text: str) -> float:
        return math.inf if text == "none" else kind(text)

    total.__name__ = kind.__name__  # for argparse's message
    return total


def _totals(options: argparse.Namespace) -> dict[str, Any]:
    """The limits of all jobs together, as arguments of ``map``.

    The limits of a job once were limits of all jobs together. Alone they still are that too, until
    who means each job has said so: or the same command might cost a thousand times as much.
    """
    totals = {}
    for name in ("max_cost", "max_tokens"):
        of_all = name.replace("max_", "max_total_")
        own, total = getattr(options, name), getattr(options, of_all)
        if own is not None and total is None:
            option, other = (f"--{each.replace('_', '-')}" for each in (name, of_all))
            tell(
                f"warning: {option} is a limit of each job now; it still is one of all together, "
                f"too, unless {other} is given, if only as 'none'"
            )
            total = own
        totals[of_all] = None if total == math.inf else total
    return totals


def _errors(text: str) -> tuple[type[OpenCodeError], ...]:
    try:
        return tuple(_ERRORS[name.strip()] for name in text.split(","))
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"{error} is not one of {', '.join(_ERRORS)}") from None


def _runner(cfg: RunConfig, *, on_server: bool) -> Runner:
    if on_server:
        from ..api.server import OpenCodeServer

        return OpenCodeServer(run_cfg=cfg)
    client = OpenCodeClient(run_cfg=cfg)
    # Checked here, or every job would fail, and be in the checkpoint as failed.
    check_program_version(client.resolved_binary())
    return client


def _tell_metadata(table: Table, jobs: Sequence[Job]) -> None:
    """Name the columns that are neither prompts nor settings: one of them may be a typing error."""
    named = {name for job in jobs for name in job.metadata or ()}
    if columns := [column for column in table.columns if column in named]:
        tell(one_line(f"{table.name}: metadata, not settings: {', '.join(columns)}", _LINE_CHARS))


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse to write two files of one name, or to overwrite FILE or the schema."""
    taken = {} if options.source == STDIN else {_real(options.source): "FILE"}
    if options.schema:
        taken.setdefault(_real(options.schema), "--schema")
    named = [("OUT", options.output), ("--csv", options.csv), ("--report", options.report)]
    for what, path in named:
        if path and (other := taken.setdefault(_real(path), what)) != what:
            said = path if what == "OUT" else f"{what} {path}"
            raise OpenCodeConfigError(f"{said} is {other} too: name another file")


def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _write_page(options: argparse.Namespace) -> None:
    from ..display.report import checkpoint_to_html, write_html

    if Path(options.output).expanduser().exists():
        checkpoint_to_html(options.output, options.report)
    else:
        write_html((), options.report)


class _Summary:
    """What is printed at the end of a batch, and its exit status."""

    def __init__(self, batch: BatchRun[End], table: Table, options: argparse.Namespace) -> None:
        self.is_interrupted = False
        self._batch = batch
        self._rows = table.rows
        self._options = options
        self._failed = self._invalid = self._refused = 0
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
            self._invalid += isinstance(end, OpenCodeConfigError)
            if len(self._first) < _SHOWN_FAILURES:
                reason = str(end).partition("\n")[0]
                name = end.key or f"job {end.index}"
                place = self._rows[end.index].place
                self._first.append("  " + one_line(f"{name} ({place}): {reason}", _LINE_CHARS))
        elif needs_permission(end):
            self._refused += 1

    def show(self) -> None:
        """Print the report, the failures, and how to continue."""
        report, output = self._batch.report, self._options.output
        done = report.done + report.failed + report.cached
        same = "command and input" if self._options.source == STDIN else "command"
        print(printable(str(report)), file=sys.stderr)
        if self._first:
            more = self._failed - len(self._first)
            print("failed:", *self._first, sep="\n", file=sys.stderr)
            if more:
                print(f"  and {more:,} more", file=sys.stderr)
        if self._refused:
            tell(f"{count(self._refused, 'job')} ended when a tool was refused: see --permission")
        if failed := self._failed - self._invalid:
            without = "" if self._options.retry_failed else " without --no-retry-failed"
            tell(f"{count(failed, 'job')} failed: the same {same}{without} runs them again")
        if self._invalid:
            tell(
                f"{count(self._invalid, 'job')} did not begin: the reasons above say what to change"
            )
        so_far = f"{done:,} of {count(len(self._rows), 'job')} are in {output}"
        if self._spent:
            tell(f"{self._spent} is spent: {so_far}; the same {same} with more runs the rest")
        if self._options.limit is not None and self._options.limit < len(self._rows):
            tell(f"--limit: {so_far}; the same {same} without it runs the rest")
        if self.is_interrupted:
            tell(f"interrupted: {so_far}; the same {same} runs the rest")


class _Answers:
    """The table of ``--csv``: the columns of the input, and what came of each job.

    What came is kept in a temporary file, since the jobs end in any order, and may be many.
    """

    def __init__(self, table: Table, jobs: Sequence[Job], options: argparse.Namespace) -> None:
        self._table = table
        self._prompts = [job.prompt for job in jobs] if options.template else None
        self._names = [*_RESULT_COLUMNS, *(["parsed"] if options.schema else [])]
        self._aside = tempfile.TemporaryFile(prefix="opencode-sync-")
        self._offsets: dict[int, int] = {}

    def note(self, end: End) -> None:
        """Keep how a job ended."""
        if end.index is not None:
            (record,) = results_to_records([end])
            line = json.dumps([_cell(record[name]) for name in self._names])
            self._offsets[end.index] = self._aside.seek(0, os.SEEK_END)
            self._aside.write(line.encode() + b"\n")

    def close(self) -> None:
        self._aside.close()

    def write(self, path: str) -> None:
        """Write the table to *path*, in the order of the input; jobs that have not ended too.

        Raises:
            OpenCodeConfigError: *path* cannot be written.
        """
        try:
            with replacing(Path(_real(path))) as file:
                encoding = "utf-8-sig" if self._table.has_mark else "utf-8"
                text = io.TextIOWrapper(file, encoding, "replace", newline="")
                as_needed, quoted = (
                    csv.writer(
                        text, delimiter=self._table.separator, lineterminator="\n", quoting=quoting
                    )
                    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
                )
                for line in self._lines():
                    # Before Python 3.13, the csv module does not quote a lone carriage return.
                    has_return = any("\r" in cell for cell in line if isinstance(cell, str))
                    (quoted if has_return else as_needed).writerow(line)
                text.flush()
                text.detach()
        except OSError as error:
            raise OpenCodeConfigError(f"--csv {path}: {error.strerror or error}") from error

    def _lines(self) -> Iterator[list[Any]]:
        columns = self._table.columns
        ours = [*([] if self._prompts is None else ["prompt"]), *self._names]
        yield [*columns, *(f"result_{name}" if name in columns else name for name in ours)]
        for index, row in enumerate(self._table.rows):
            prompt = [] if self._prompts is None else [self._prompts[index]]
            yield [*(_cell(row.cells.get(name)) for name in columns), *prompt, *self._end(index)]

    def _end(self, index: int) -> list[Any]:
        if index not in self._offsets:
            return [None] * len(self._names)
        self._aside.seek(self._offsets[index])
        end: list[Any] = json.loads(self._aside.readline())
        return end


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value
