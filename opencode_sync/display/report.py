"""A batch as a page: one HTML file that requests nothing from the network.

    records --+--> rows --> figures, charts, the table's JSON --+--> report.html.j2 --> FILE
              +--> details, written to a temporary file --------+

    of a chart: spans --> Clock, without the hours in which nothing ran --> lanes_of(), a lane for
    each job --> timeline_of(), curves_of(): SVG paths, WIDTH units wide whatever the screen's width

A short row for each job is kept in memory, the rest is not. The page's content security policy
allows only its own script and style, by their hashes, and forbids every request. What jobs say is
in the page as JSON, and becomes text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import os
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from ..core.errors import OpenCodeConfigError, OpenCodeError
from ..core.events import to_json
from ..core.records import record_of, records_in, replacing
from ..core.result import RunResult
from ..core.text import money
from .jobs import STATUSES, Record, Row, detail_of, row_of

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["checkpoint_to_html", "results_to_html", "write_html"]

_ASSETS = Path(__file__).parent
_PAGE_CHARS = 80_000_000  # of all details; a browser loads that in a second or two
_MAX_KINDS = 12
WIDTH = 10_000  # units of all charts
IDLE_S = 120.0  # a pause of at least this length is left out
_POINTS = 400  # of a curve
_LANES_PX = 264  # the timeline's height, unless lanes would get too thin or too thick
_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)
_DAY_S = 86_400


def results_to_html(
    results: Iterable[RunResult | OpenCodeError],
    path: str | os.PathLike[str],
    *,
    title: str = "Batch",
) -> None:
    """Write the page of results, or of errors that stand in a result's place, to *path*.

    Raises:
        OpenCodeConfigError: Jinja2 is not installed, or *path* cannot be written.
    """
    write_html(map(record_of, results), path, title=title)


def checkpoint_to_html(
    checkpoint: str | os.PathLike[str], path: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Write the page of all jobs in a checkpoint's file to *path*; also while a batch writes it.

    Args:
        title: The page's heading; None for the checkpoint's name.

    Raises:
        OpenCodeConfigError: As above, or the checkpoint does not exist.
    """
    write_html(records_in(checkpoint), path, title=title or Path(checkpoint).name)


def write_html(
    records: Iterable[Record], path: str | os.PathLike[str], *, title: str = "Batch"
) -> None:
    """Write the page of *records* to *path*. An existing file is replaced when the page is whole.

    Args:
        records: One mapping for each job, in the shape of a checkpoint's lines: the keys of
            ``RunResult.to_dict()``, and ``failure``, None or ``{"type", "message", ...}``. They
            are drawn one by one and not kept.

    Raises:
        OpenCodeConfigError: Jinja2 is not installed, or *path* cannot be written.
    """
    template = _template()
    target = Path(os.path.realpath(Path(path).expanduser()))
    with tempfile.TemporaryFile("w+", prefix="opencode-sync-", encoding="ascii") as aside:
        rows = list(_drawn(records, aside))
        aside.seek(0)
        page = template.stream(page=_page(rows, title), details=map(str.rstrip, aside))
        page.enable_buffering(50)
        try:
            _write(target, page)
        except OSError as error:
            why = error.strerror or str(error)
            raise OpenCodeConfigError(f"report {str(target)!r}: {why}") from error


def _drawn(records: Iterable[Record], aside: TextIO) -> Iterator[Row]:
    """Yield the rows of *records*, and write the details to *aside*, a line each."""
    written = 0
    for place, record in enumerate(records):
        written += aside.write(script_json(detail_of(record, brief=written > _PAGE_CHARS)) + "\n")
        yield row_of(record, place)


def _write(target: Path, pieces: Iterable[str]) -> None:
    if target.exists() and not target.is_file():  # /dev/stdout, a pipe
        with open(target, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(pieces)
        return
    with replacing(target) as new:
        new.writelines(piece.encode("utf-8", "replace") for piece in pieces)


def _template() -> Template:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise OpenCodeConfigError(
            "a report page needs Jinja2: run 'pip install \"opencode-sync-sdk[report]\"'"
        ) from None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"money": money, "span": span, "short": short}
    for name, file in (("style", "report.css"), ("script", "report.js")):
        text = (_ASSETS / file).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        environment.globals[name] = text
        environment.globals[f"{name}_hash"] = f"sha256-{digest}"
    return environment.from_string((_ASSETS / "report.html.j2").read_text(encoding="utf-8"))


# --- what the template shows ---------------------------------------------------------------------


class Figure(NamedTuple):
    """A number at the top of the page."""

    label: str
    value: str
    note: str


class Chart(NamedTuple):
    """A sum over time; its ticks count from the bottom, 0 to 100."""

    name: str
    total: str
    curves: list[Curve]
    ticks: list[Tick]


def _page(rows: Sequence[Row], title: str) -> dict[str, Any]:
    """Everything that the template shows, except for the details."""
    timed = [(row, row.started_at, row.started_at + row.seconds) for row in rows if row.started_at]
    spans = [(begin, end) for _, begin, end in timed]
    clock = Clock(spans)
    lanes = lanes_of(spans)
    bars = [
        Bar(row, clock.at(begin), clock.at(begin) + row.seconds, lane)
        for (row, begin, _), lane in zip(timed, lanes, strict=True)
    ]
    statuses = Counter(row.status for row in rows)
    return {
        "title": title,
        "when": _when(spans),
        "figures": _figures(rows, clock.total_s, 1 + max(lanes, default=-1)),
        "statuses": [(status, statuses[status]) for status in STATUSES if statuses[status]],
        "kinds": _kinds(rows),
        "timeline": timeline_of(bars, clock.total_s) if bars else None,
        "breaks": clock.breaks if clock.total_s > 0 else [],
        "total_s": clock.total_s,
        "times": time_ticks(clock.total_s),
        "charts": _charts(bars, clock.total_s),
        "untimed": len(rows) - len(timed),
        "jobs": script_json(_jobs(rows, bars)),
        "width": WIDTH,
    }


def _jobs(rows: Sequence[Row], bars: Sequence[Bar]) -> list[dict[str, Any]]:
    """The table's rows, in the order of the details."""
    bar_of = {id(bar.row): bar for bar in bars}
    return [
        {
            "n": row.index,
            "key": row.key,
            "status": row.status,
            "kind": row.kind,
            "prompt": row.prompt,
            "gist": row.gist,
            "tools": row.tools,
            "cost": round(row.cost, 8),
            "tokens": row.tokens.total,
            "seconds": round(row.seconds, 3),
            **_place(bar_of.get(id(row))),
        }
        for row in rows
    ]


def _place(bar: Bar | None) -> dict[str, Any]:
    if bar is None:
        return {}
    return {"from": round(bar.begin, 3), "to": round(bar.end, 3), "lane": bar.lane}


def _figures(rows: Sequence[Row], total_s: float, lanes: int) -> list[Figure]:
    before = sum(row.cost_before for row in rows)
    cost = sum(row.cost for row in rows) + before
    tokens = sum(row.tokens.total + row.tokens_before for row in rows)
    out = sum(row.tokens.output + row.tokens.reasoning for row in rows)
    busy_s = sum(row.seconds for row in rows)
    bad = sum(row.status != "ok" for row in rows)
    empty = sum(row.is_empty for row in rows)
    well = f"{len(rows) - bad:,} ok" + (f", {empty:,} of them empty" if empty else "")
    took = sorted(row.seconds for row in rows if row.seconds) or [0.0]
    p95 = quantiles(took, n=20)[-1] if len(took) > 1 else took[0]
    each = f"{money(cost / len(rows) if rows else 0.0)} a job"
    if before:
        each += f"; {money(before)} of it on earlier tries"
    if unpriced := sum(row.tokens.total > 0 and not row.cost for row in rows):
        each += f"; {unpriced:,} used tokens at $0.00"
    return [
        Figure("Jobs", f"{len(rows):,}", well),
        Figure("Not ok", f"{bad:,}", f"{100 * bad / max(1, len(rows)):.1f} %"),
        Figure("Cost", money(cost), each),
        Figure("Tokens", short(tokens), f"{short(out)} of them out"),
        Figure(
            "Time at work" if lanes else "Time of the jobs",
            span(total_s if lanes else busy_s),
            f"{lanes} at once, at most" if lanes else "summed",
        ),
        Figure("Median job", span(median(took)), f"95 % within {span(p95)}"),
    ]


def _kinds(rows: Sequence[Row]) -> list[tuple[str, int, float]]:
    """The most frequent kinds of errors: name, count, percent of the first one's count."""
    kinds = Counter(row.kind for row in rows if row.kind).most_common(_MAX_KINDS)
    return [(kind, n, 100 * n / kinds[0][1]) for kind, n in kinds]


def _charts(bars: Sequence[Bar], total_s: float) -> list[Chart]:
    if not bars:
        return []
    charts = []
    costs = [(bar.end, [bar.row.cost]) for bar in bars]
    tokens = [(bar.end, _split(bar.row)) for bar in bars]
    for name, names, moments, shown in (
        ("Cost", ["cost"], costs, _dollars),
        ("Tokens", ["out", "in", "from cache"], tokens, short),
    ):
        curves, top = curves_of(names, moments, total_s)
        ticks = [Tick(100 * value / top, shown(value)) for value in value_ticks(top)]
        total = money(top) if name == "Cost" else short(top)
        # The top of the stack first: the template draws the lower ones over it.
        charts.append(Chart(name, total, curves[::-1], ticks))
    return charts


def _split(row: Row) -> list[float]:
    """Tokens out, in and from the cache; together the total."""
    usage = row.tokens
    out, cached = usage.output + usage.reasoning, usage.cache_read
    return [out, max(0, usage.total - out - cached), cached]


def _when(spans: Sequence[tuple[float, float]]) -> str:
    if not spans:
        return ""
    try:
        first, last = (
            datetime.fromtimestamp(instant, timezone.utc)
            for instant in (min(begin for begin, _ in spans), max(end for _, end in spans))
        )
    except (OverflowError, ValueError, OSError):  # beyond the calendar
        return ""
    until = f"{last:%H:%M}" if first.date() == last.date() else f"{last.day} {last:%B %Y, %H:%M}"
    return f"{first.day} {first:%B %Y, %H:%M} to {until} UTC"


def short(number: float) -> str:
    """``"980"``, ``"12.3 k"``, ``"4.5 M"``."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.1f}".removesuffix(".0") + unit
    return f"{number:.0f}"


def _dollars(value: float) -> str:
    return f"${value:.4f}".rstrip("0").rstrip(".") if value < 1 else f"${value:,.2f}"


def script_json(value: Any) -> str:
    """JSON for a script element: no text in it can end the element or open one.

    It is ASCII, so U+2028 and lone surrogates are escaped too.
    """
    text = to_json(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- the geometry of the charts -------------------------------------------------------------------


@dataclass(frozen=True)
class Break:
    """A pause that is left out: where on the clock, and how long it was."""

    at: float
    skipped_s: float


class Clock:
    """Converts Unix time to seconds since the first job, without long pauses.

    Args:
        spans: Begin and end of each job.

    Attributes:
        total_s: Where the last job ends.
        breaks: The pauses that are left out.
    """

    def __init__(self, spans: Iterable[tuple[float, float]]) -> None:
        self._begins: list[float] = []
        self._shifts: list[float] = []
        self.breaks: list[Break] = []
        end = shift = 0.0
        for begin, until in sorted(spans):
            if not self._begins or begin - end >= IDLE_S:
                skipped = begin - end
                if self._begins:
                    self.breaks.append(Break(end - shift, skipped))
                shift += skipped
                self._begins.append(begin)
                self._shifts.append(shift)
                end = begin
            end = max(end, until)
        self.total_s = end - shift

    def at(self, instant: float) -> float:
        """Seconds on this clock; *instant* must be in one of the spans."""
        return instant - self._shifts[max(0, bisect_right(self._begins, instant) - 1)]


def lanes_of(spans: Sequence[tuple[float, float]]) -> list[int]:
    """A lane for each span, counted from 0, so that the spans of a lane do not overlap."""
    lanes = [0] * len(spans)
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    for place in sorted(range(len(spans)), key=spans.__getitem__):
        begin, end = spans[place]
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lanes[place] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (end, lanes[place]))
    return lanes


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, at 0 to 100 percent, with its label."""

    percent: float
    label: str


@dataclass(frozen=True)
class Bar:
    """A job in the timeline."""

    row: Row
    begin: float
    end: float
    lane: int


@dataclass(frozen=True)
class Timeline:
    """The bars as one path for each status; a lane is *lane_px* pixels high, with 1 for the gap."""

    lanes: int
    lane_px: int
    paths: dict[str, str]
    is_dense: bool

    @property
    def height(self) -> int:
        return self.lanes * self.lane_px


def timeline_of(bars: Sequence[Bar], total_s: float) -> Timeline:
    lanes = 1 + max((bar.lane for bar in bars), default=0)
    lane_px = min(22, max(3, _LANES_PX // lanes))
    scale = WIDTH / total_s if total_s else 0.0
    paths: dict[str, list[str]] = defaultdict(list)
    for bar in bars:
        x = round(bar.begin * scale)
        # Wide enough to be visible, however short the job is.
        width = max(12, round(bar.end * scale) - x)
        y, height = bar.lane * lane_px, lane_px - 1
        paths[bar.row.status].append(f"M{min(x, WIDTH - width)} {y}h{width}v{height}h-{width}z")
    return Timeline(
        lanes,
        lane_px,
        # In this order, so that failures are drawn over successes.
        {status: "".join(paths[status]) for status in STATUSES if status in paths},
        is_dense=len(bars) > 150 * lanes,
    )


@dataclass(frozen=True)
class Curve:
    """A growing sum: its line and the area under it, in a box WIDTH wide and 100 high."""

    name: str
    area: str
    line: str


def curves_of(
    names: Sequence[str], moments: Iterable[tuple[float, Sequence[float]]], total_s: float
) -> tuple[list[Curve], float]:
    """Draw a curve for each name, stacked in that order; also returns the sum of all.

    Args:
        moments: Instants, and how much each name grows at that instant.
    """
    ordered = sorted(moments, key=lambda moment: moment[0])
    sums = list(accumulate((gains for _, gains in ordered), _added, initial=[0.0] * len(names)))
    stacked = [list(accumulate(values)) for values in sums]
    top = stacked[-1][-1] if names else 0.0
    scale = WIDTH / total_s if total_s else 0.0
    xs = [0, *(min(WIDTH, round(at * scale)) for at, _ in ordered)]
    shown = sorted({round(n * (len(xs) - 1) / _POINTS) for n in range(_POINTS + 1)})
    curves = []
    for number, name in enumerate(names):
        ys = [100 - 100 * values[number] / top if top else 100.0 for values in stacked]
        steps = "".join(f"H{xs[n]}V{ys[n]:.2f}" for n in shown)
        line = f"M0 100{steps}H{WIDTH}"
        curves.append(Curve(name, f"{line}V100z", line))
    return curves, top


def _added(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(left, right, strict=True)]


def time_ticks(total_s: float, most: int = 6) -> list[Tick]:
    """Round times from 0 up to *total_s*, about *most* of them."""
    if total_s <= 0:
        return []
    days = max(1, round(total_s / _DAY_S / most))
    step = next((s for s in _STEPS_S if total_s / s <= most), days * _DAY_S)
    if total_s < 1:
        step = 1
    return [Tick(100 * n * step / total_s, span(n * step)) for n in range(int(total_s / step) + 1)]


def value_ticks(top: float, most: int = 3) -> list[float]:
    """One to *most* round values up to *top*."""
    if top <= 0:
        return []
    size = 10.0 ** (len(f"{int(top)}") - 1)
    while size > top:
        size /= 10
    steps = (size / 10 * factor for factor in (1, 2, 2.5, 5, 10, 20, 50, 100))
    step = next(step for step in steps if top / step < most + 1)
    return [step * n for n in range(1, int(top / step) + 1)]


def span(seconds: float) -> str:
    """``"4.1 s"``, ``"3 min 20 s"``, ``"2 h 5 min"``, ``"3 d 4 h"``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds % 1 and seconds < 20 else f"{seconds:.0f} s"
    for size, name, small, unit in (
        (_DAY_S, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= size - small / 2:
            whole = round(seconds / small)
            rest = whole % (size // small)
            return f"{whole * small // size} {name}" + (f" {rest} {unit}" if rest else "")
    raise AssertionError
