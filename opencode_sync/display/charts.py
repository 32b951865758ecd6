"""The geometry of the charts on a report page: rows and numbers in, coordinates and paths out.

spans --> Clock: seconds since the first job, without the hours in which nothing ran
      --> lanes_of(): a lane for each job, as if it took the first free worker
bars ---> timeline_of(), curves_of(): SVG paths, WIDTH units wide whatever the screen's width
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .jobs import STATUSES, Row

WIDTH = 10_000  # units of all charts
IDLE_S = 120.0  # a pause of at least this length is left out
_POINTS = 400  # of a curve
_LANES_PX = 264  # the timeline's height, unless lanes would get too thin or too thick
_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)
_DAY_S = 86_400


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
