"""``opencode-sync map``: the jobs of a file become lines of another, and perhaps a page.

    FILE --_jobs--> Job, ... --map()--> OUT.jsonl, the checkpoint --report--> FILE.html

The checkpoint is all that is kept: given the same command again, a batch goes on where it was
stopped. The bar and the report go to stderr; stdout stays empty.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path

from ._cli_options import (
    DONE,
    FAILED,
    INTERRUPTED,
    add_file_option,
    add_run_options,
    run_config,
    tell,
)
from ._jobs import STDIN, read_jobs
from .batch import BatchRun
from .client import OpenCodeClient
from .core.config import Job, RunConfig
from .core.errors import OpenCodeBudgetError, OpenCodeConfigError, OpenCodeError
from .core.result import RunResult
from .core.text import count, one_line, printable
from .process.versions import check_program_version
from .runner import Runner

_OPTIONS = {"max_total_cost": "--max-cost", "max_total_tokens": "--max-tokens"}
_SHOWN_FAILURES = 5
_LINE_CHARS = 160

End = RunResult | OpenCodeError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", help=argparse.SUPPRESS)
    add = parser.add_argument
    add(
        "-o", "--output", metavar="OUT", required=True,
        help="results as JSON lines; if run again, it goes on",
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
    add("--retry-failed", action="store_true", help="run those again that failed in OUT")
    add("--report", metavar="F.html", help="write a page to look through the results")


def run(options: argparse.Namespace) -> int:
    """Run the jobs, and return the exit status.

    Raises:
        OpenCodeConfigError: Something was refused before the first job.
        OpenCodeError: The first failure, where that was asked for.
    """
    cfg = run_config(options)
    jobs = read_jobs(options.source, options.workspace, cfg)
    if options.report:
        _check_page(options)
        _write_page(options)  # what stands in its way is told now, and not after hours
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
        ending = _Ending(batch, jobs, options)
        failure: OpenCodeError | None = None
        try:
            with batch:
                for end in batch:
                    ending.note(end)
        except KeyboardInterrupt:
            ending.is_interrupted = True
        except OpenCodeError as error:
            if error.index is None and isinstance(error, OpenCodeConfigError):
                raise  # the batch was refused as a whole
            ending.note(error)
            failure = error
        ending.show()
    if options.report:
        _write_page(options)
    if failure is not None:
        raise failure
    return ending.status


def _runner(cfg: RunConfig, *, on_server: bool) -> Runner:
    if on_server:
        from .server import OpenCodeServer

        return OpenCodeServer(run_cfg=cfg)
    client = OpenCodeClient(run_cfg=cfg)
    # Refused here, or every job would fail, and stand in the checkpoint as failed.
    check_program_version(client.resolved_binary())
    return client


def _check_page(options: argparse.Namespace) -> None:
    """Refuse a page in the place of what it is made of."""
    page = os.path.realpath(os.path.expanduser(options.report))
    for what, path in (("OUT", options.output), ("FILE", options.source)):
        if path != STDIN and os.path.realpath(os.path.expanduser(path)) == page:
            raise OpenCodeConfigError(f"--report {options.report} is {what} too: name another file")


def _write_page(options: argparse.Namespace) -> None:
    from .display.report import checkpoint_to_html, write_html

    if Path(options.output).expanduser().exists():
        checkpoint_to_html(options.output, options.report)
    else:
        write_html((), options.report)


class _Ending:
    """What there is to say at the end of a batch, and its exit status."""

    def __init__(self, batch: BatchRun[End], jobs: list[Job], options: argparse.Namespace) -> None:
        self.is_interrupted = False
        self._batch = batch
        self._jobs = jobs
        self._options = options
        self._failed = self._refused = 0
        self._first: list[str] = []
        self._spent: str | None = None  # the option of the budget that is

    @property
    def status(self) -> int:
        if self.is_interrupted:
            return INTERRUPTED
        return FAILED if self._failed or self._refused or self._spent else DONE

    def note(self, end: End) -> None:
        """Take account of how a job ended."""
        if isinstance(end, OpenCodeBudgetError) and end.limit_name in _OPTIONS:
            self._spent = _OPTIONS[end.limit_name]
        elif isinstance(end, OpenCodeError):
            if end.index is None:
                return  # the batch's own
            self._failed += 1
            if len(self._first) < _SHOWN_FAILURES:
                reason = str(end).partition("\n")[0]
                # Not the error's own key: where the job has none, the checkpoint has given it one.
                name = self._jobs[end.index].key or f"job {end.index}"
                self._first.append("  " + one_line(f"{name}: {reason}", _LINE_CHARS))
        elif end.finish_reason == "tool-calls":
            # No error to OpenCode: it ended the run there, without an answer.
            self._refused += 1

    def show(self) -> None:
        """Print the report, what failed, and how to go on."""
        report, output = self._batch.report, self._options.output
        done = report.done + report.failed + report.cached
        print(printable(str(report)), file=sys.stderr)
        if self._first:
            more = self._failed - len(self._first)
            print("failed:", *self._first, sep="\n", file=sys.stderr)
            if more:
                print(f"  and {more:,} more", file=sys.stderr)
        if self._refused:
            tell(f"{count(self._refused, 'job')} ended where a tool was refused: see --permission")
        if self._failed:
            tell(f"{count(self._failed, 'job')} failed: to run them again, add --retry-failed")
        so_far = f"{done:,} of {count(len(self._jobs), 'job')} are in {output}"
        same = "command and input" if self._options.source == STDIN else "command"
        if self._spent:
            tell(f"{self._spent} is spent: {so_far}; the same {same} with more runs the others")
        if self.is_interrupted:
            tell(f"interrupted: {so_far}; the same {same} goes on with the others")
