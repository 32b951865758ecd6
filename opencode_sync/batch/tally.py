"""What a batch has done so far: counted as it goes, shown as a report and as its progress.

    jobs that end --finish(), spend(), count()--> Tally --report()--> BatchReport: str, table, page
                                                                          |
                                                                          +--> Progress

A tally holds numbers, the few slowest jobs, and in short the last jobs that are in no checkpoint,
so its size does not grow with the batch. It is filled from any thread; the progress belongs to the
thread that iterates the batch.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import OpenCodeError, kind_of
from ..core.limits import Spent, tokens_of, unpriced, unpriced_tokens
from ..core.records import records_in, result_of
from ..core.result import RunResult, TokenUsage
from ..core.text import html_table, is_terminal
from .throttle import Throttle, never_raises

if TYPE_CHECKING:
    from tqdm import tqdm

_log = logging.getLogger("opencode_sync")

SLOWEST = 5
INTERVAL_S = 30.0  # between two lines of progress
MAX_ROWS = 10_000
_PROMPT_CHARS = 60  # of a slow job
_ROW_CHARS = 500  # of a text in a row: rows with two such texts take 20 MB in all
_ROW_ITEMS = 50  # of a list in a row
_MAX_KINDS = 100  # of errors told apart; a provider may put anything into a name

Row = Mapping[str, Any]
"""A job in short, in the shape of a checkpoint's line: what the report's page takes."""


@dataclass(frozen=True)
class SlowJob:
    """One of the jobs that took longest."""

    seconds: float
    index: int
    key: str | None
    prompt: str  # its beginning


@dataclass(frozen=True)
class BatchReport:
    """A batch at one moment, during it or after its end; ``str()`` of it is for people.

    Attributes:
        done: Jobs that ended well in this batch, so without those from the checkpoint.
        failed: Jobs that ended with an error.
        empty: How many of the jobs done gave no answer and called no tool.
        cached: Jobs whose result or error came from the checkpoint.
        retried: Jobs that were started again: after a start-up failure, a refusal for too many
            requests, with another model, or after a failure that *retries* allows or that the
            checkpoint has.
        not_run: Jobs that were drawn and not run to an end: the budget was spent, or the batch was
            left.
        running: Jobs under way.
        total_cost: US dollars spent by this batch, on failed jobs too; without what the checkpoint
            has spent before.
        tokens: Tokens, counted in the same way.
        wall_s: Seconds from the first job to now, or to the end.
        busy_s: Seconds that the jobs took, summed: more than *wall_s* where several run at once.
        rate_limits: How often a provider refused for too many requests.
        max_workers: How many jobs may be in flight without refusals.
        lowest_workers: The lowest number that refusals brought that down to.
        slowest: The jobs that took longest, slowest first.
        errors: How many errors there were, by kind.
        warnings: Full sentences, such as that a limit in dollars does not bind tokens at $0.00.
        rows: The last 10,000 jobs that are in no checkpoint, in short, for :meth:`to_html`.
        checkpoint: The batch's checkpoint, or None.
    """

    done: int = 0
    failed: int = 0
    empty: int = 0
    cached: int = 0
    retried: int = 0
    not_run: int = 0
    running: int = 0
    total_cost: float = 0.0
    tokens: TokenUsage = field(default_factory=TokenUsage)
    wall_s: float = 0.0
    busy_s: float = 0.0
    rate_limits: int = 0
    max_workers: int = 0
    lowest_workers: int = 0
    slowest: tuple[SlowJob, ...] = ()
    errors: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    rows: Sequence[Row] = field(default=(), repr=False, compare=False)
    checkpoint: Path | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, slowest jobs, errors and warnings as values that ``json`` takes."""
        data = asdict(replace(self, rows=(), checkpoint=None))
        del data["rows"], data["checkpoint"]
        return data

    def to_html(self, path: str | os.PathLike[str], *, title: str | None = None) -> None:
        """Write a page for looking through the jobs, one file that needs nothing else.

        With a checkpoint it has all jobs that are in it, with their tools and events, those of
        earlier batches too. Without one it has the last 10,000 jobs and the beginnings of their
        texts; ``results_to_html`` makes a page of results that you have kept.

        Args:
            title: The page's title; None for the checkpoint's name.

        Raises:
            OpenCodeConfigError: Jinja2 is not installed, or *path* cannot be written.
        """
        from ..display.report import write_html

        file = self.checkpoint
        saved = records_in(file) if file is not None and file.exists() else ()
        name = "Batch" if file is None else file.name
        write_html(chain(saved, list(self.rows)), path, title=title or name)

    def _repr_html_(self) -> str:
        """For notebooks: the same as a small table."""
        first, *rest = str(self).split("\n")
        return html_table([("batch", first), ("", "\n".join(rest))])

    def __str__(self) -> str:
        counts = [f"{self.done} done", f"{self.failed} failed"]
        for n, word in (
            (self.empty, "with an empty answer"),
            (self.cached, "from the checkpoint"),
            (self.retried, "retried"),
            (self.not_run, "not run"),
            (self.running, "running"),
        ):
            counts += [f"{n} {word}"] if n else []
        used = f"{self.tokens.total} tokens ({self.tokens.input} in, {self.tokens.output} out)"
        lines = [
            ", ".join(counts),
            f"${self.total_cost:.4f}, {used}",
            f"{self.wall_s:.1f} s, jobs {self.busy_s:.1f} s in all",
        ]
        if self.rate_limits:
            lines.append(
                f"refused {self.rate_limits} times for too many requests: "
                f"down to {self.lowest_workers} of {self.max_workers} at once"
            )
        lines += [f"{n} x {kind}" for kind, n in self.errors.items()]
        lines += [f"warning: {message}" for message in self.warnings]
        if self.slowest:
            lines.append("slowest:")
            lines += [
                f"  {job.seconds:.1f} s  {job.key or f'job {job.index}'}: {job.prompt}"
                for job in self.slowest
            ]
        return "\n".join(lines)


class Tally:
    """Counts what happens to a batch's jobs; from any thread."""

    def __init__(self, checkpoint: Path | None = None, cost_limit: str | None = None) -> None:
        """
        Args:
            checkpoint: The batch's checkpoint, which has the jobs that are said to be saved.
            cost_limit: Name of the batch's limit in dollars, to warn where it cannot bind; or None.
        """
        self._checkpoint = checkpoint
        self._cost_limit = cost_limit
        self._lock = threading.Lock()
        self._began: float | None = None
        self._ended: float | None = None
        self._counts: Counter[str] = Counter()
        self._total_cost = 0.0
        self._tokens = TokenUsage()
        self._busy_s = 0.0
        self._unpriced = 0  # tokens at $0.00
        self._has_warned = False
        self._errors: Counter[str] = Counter()
        self._slowest: list[tuple[float, int, SlowJob]] = []
        self._rows: deque[Row] = deque(maxlen=MAX_ROWS)

    @property
    def spent(self) -> Spent:
        """What finished jobs have spent."""
        with self._lock:
            return Spent(self._total_cost, tokens_of(self._tokens))

    @property
    def mean(self) -> Spent:
        """What a finished job has spent on average; nothing before the first."""
        finished = self._counts["done"] + self._counts["failed"]
        spent = self.spent
        return Spent(spent.cost / finished, spent.tokens // finished) if finished else Spent()

    @never_raises
    def begin(self) -> None:
        """Start the clock, with the first job."""
        self._began = self._began or time.monotonic()

    @never_raises
    def end(self) -> None:
        """Stop the clock."""
        self._ended = self._ended or time.monotonic()

    @never_raises
    def count(self, what: str, n: int = 1) -> None:
        """Add to one of the plain numbers: ``"cached"``, ``"retried"``, ``"not_run"``."""
        with self._lock:
            self._counts[what] += n

    @never_raises
    def spend(self, result: RunResult | None, busy_s: float = 0.0) -> None:
        """Add what a run spent that is not counted as done or failed, and the seconds it took."""
        with self._lock:
            self._spend(result)
            self._busy_s += busy_s

    @never_raises
    def cut_short(self, end: OpenCodeError, *, is_saved: bool) -> None:
        """Count a job that was stopped since the batch's budget is spent."""
        with self._lock:
            self._counts["not_run"] += 1
            self._spend(end.result)
        if not is_saved:
            self._rows.append(row_of(end))

    @never_raises
    def finish(
        self,
        end: RunResult | OpenCodeError,
        busy_s: float = 0.0,
        *,
        is_saved: bool = False,
        is_spent: bool = False,
    ) -> None:
        """Count a job that has ended after *busy_s* seconds.

        Args:
            is_spent: What it spent was added before, by :meth:`spend`.
        """
        with self._lock:
            if isinstance(end, OpenCodeError):
                self._counts["failed"] += 1
                info = result_of(end).error
                kind = kind_of(type(end).__name__, info and info.name, info and info.status_code)
                is_known = kind in self._errors or len(self._errors) < _MAX_KINDS
                self._errors[kind if is_known else "others"] += 1
            else:
                self._counts["done"] += 1
                self._counts["empty"] += not end.tool_calls and not end.answer.strip()
            if not is_spent:
                self._spend(end.result if isinstance(end, OpenCodeError) else end)
                self._busy_s += busy_s
            beginning = " ".join((end.prompt or "")[: 2 * _PROMPT_CHARS].split())[:_PROMPT_CHARS]
            index = end.index or 0
            job = SlowJob(busy_s, index, end.key, beginning)
            heapq.heappush(self._slowest, (busy_s, -index, job))
            if len(self._slowest) > SLOWEST:
                heapq.heappop(self._slowest)
        if not is_saved:
            self._rows.append(row_of(end))

    def report(self, running: int, throttle: Throttle) -> BatchReport:
        """The state of the batch, with *running* jobs in flight."""
        with self._lock:
            began, ended = self._began, self._ended or time.monotonic()
            return BatchReport(
                done=self._counts["done"],
                failed=self._counts["failed"],
                empty=self._counts["empty"],
                cached=self._counts["cached"],
                retried=self._counts["retried"],
                not_run=self._counts["not_run"],
                running=running,
                total_cost=self._total_cost,
                tokens=self._tokens,
                wall_s=0.0 if began is None else ended - began,
                busy_s=self._busy_s,
                rate_limits=throttle.refusals,
                max_workers=throttle.most,
                lowest_workers=throttle.lowest,
                slowest=tuple(job for *_, job in sorted(self._slowest, reverse=True)),
                errors=dict(self._errors.most_common()),
                warnings=self._warnings(),
                rows=self._rows,
                checkpoint=self._checkpoint,
            )

    def _warnings(self) -> tuple[str, ...]:
        if not self._unpriced or self._cost_limit is None:
            return ()
        return (unpriced(self._unpriced, self._cost_limit),)

    def _spend(self, result: RunResult | None) -> None:
        if result is None:
            return
        self._total_cost += result.total_cost
        self._tokens += result.token_usage
        self._unpriced += unpriced_tokens(result)
        if not self._has_warned and (warnings := self._warnings()):
            self._has_warned = True
            _log.warning("%s", *warnings)


# What a row has of a result as it is.
_PLAIN = (
    *("index", "key", "status", "total_cost", "duration_s", "started_at", "turns", "attempts"),
    *("session_id", "workspace", "finish_reason", "exit_code", "model"),
)


def row_of(end: RunResult | OpenCodeError) -> Row:
    """How a job ended, without its events, and with the beginnings of its texts."""
    error = end if isinstance(end, OpenCodeError) else None
    result = result_of(end)
    info = result.error
    tools = [event.get("part") for event in result.tool_calls[:_ROW_ITEMS]]
    return {
        **{name: getattr(result, name) for name in _PLAIN},
        "prompt": _beginning(result.prompt),
        "answer": _beginning(result.answer),
        "failure": None
        if error is None
        else {"type": type(error).__name__, "message": _beginning(str(error))},
        "error": None if info is None else {**asdict(info), "message": _beginning(info.message)},
        "metadata": _small(result.metadata),
        "token_usage": asdict(result.token_usage),
        "tool_calls": [
            {"part": {"tool": str(part.get("tool"))[:_ROW_CHARS]}}
            for part in tools
            if isinstance(part, Mapping)
        ],
        "denied_tools": list(result.denied_tools[:_ROW_ITEMS]),
        "warnings": [_beginning(warning) for warning in result.warnings[:_ROW_ITEMS]],
        "sub_agents": [asdict(each) for each in result.sub_agents[:_ROW_ITEMS]],
        "tried": [asdict(each) for each in result.tried],
        "left_out": "a batch without a checkpoint keeps only the beginnings of its texts",
    }


def _small(metadata: Any) -> Any:
    text = "" if metadata is None else json.dumps(metadata, ensure_ascii=False)
    return metadata if len(text) <= _ROW_CHARS else _beginning(text)


def _beginning(text: str) -> str:
    more = len(text) - _ROW_CHARS
    return f"{text[:_ROW_CHARS]}\n… {more:,} characters more" if more > 0 else text


class Progress:
    """What is done, failed, spent and left: a bar, or where nobody sees one a line now and then."""

    def __init__(
        self, total: int | None, *, always: bool = False, interval_s: float = INTERVAL_S
    ) -> None:
        """
        Args:
            total: How many jobs there are, or None where that is not known.
            always: Show the bar also where stderr is neither a terminal nor a notebook.
            interval_s: Seconds between two lines.
        """
        self._total = total
        self._interval_s = interval_s
        self._line_at = time.monotonic() + interval_s
        self._has_lines = False
        self._bar = _bar(total) if _shows_bar(always) else None

    def wait_s(self) -> float | None:
        """Seconds until the next line is due; None if it changes only with the numbers."""
        return None if self._bar is not None else max(0.0, self._line_at - time.monotonic())

    @property
    def is_due(self) -> bool:
        """Whether there is something to show: the bar always, a line once its time has come."""
        return not self.wait_s()

    def show(self, report: BatchReport) -> None:
        """Bring the bar up to date, or print a line."""
        finished = report.done + report.failed + report.cached
        parts = [f"{report.failed:,} failed"]
        parts += [f"{report.cached:,} cached"] if report.cached else []
        parts += [f"${report.total_cost:.4f}", f"{report.tokens.total:,} tokens"]
        parts += [f"{report.rate_limits:,} rate limits"] if report.rate_limits else []
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            if finished > self._bar.n:
                self._bar.update(finished - self._bar.n)
            return
        if self._total is not None:
            parts.append(f"{self._total - finished:,} of {self._total:,} left")
        line = f"opencode-sync: {report.done:,} done, {', '.join(parts)}"
        # An odd stderr, a closed one, or a pipe that nobody reads: not a reason to end the batch.
        with suppress(AttributeError, ValueError, OSError):
            if sys.stderr is not None:  # or print() would take stdout for it
                print(line, file=sys.stderr, flush=True)
        self._line_at = time.monotonic() + self._interval_s
        self._has_lines = True

    def close(self, report: BatchReport) -> None:
        """Show how it ended, unless it was too short for a line, and leave that as it is."""
        if self._bar is not None or self._has_lines:
            self.show(report)
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()


def _bar(total: int | None) -> tqdm[Any]:
    with warnings.catch_warnings():  # in a notebook without widgets, where it shows text instead
        warnings.filterwarnings("ignore", "IProgress not found")
        from tqdm.auto import tqdm

    # Its own check of the terminal would hide it in notebooks, hence disable=False.
    return tqdm(total=total, unit="job", dynamic_ncols=True, disable=False)


def _shows_bar(always: bool) -> bool:
    stream = sys.stderr
    if stream is None or getattr(stream, "closed", False):
        return False  # a service, or a program without a console
    # A notebook's stream says that it is not a terminal, but shows a bar.
    is_notebook = type(stream).__module__.partition(".")[0] == "ipykernel"
    return always or is_notebook or is_terminal(stream)
