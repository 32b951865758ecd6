"""A batch as a page: one HTML file that requests nothing from the network.

    records --+--> rows --> figures, charts, the table's JSON --+--> report.html.j2 --> FILE
              +--> details, written to a temporary file --------+

A short row for each job is kept in memory, the rest is not. The page's content security policy
allows only its own script and style, by their hashes, and forbids every request. What jobs say is
in the page as JSON, and becomes text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from ..core.errors import OpenCodeConfigError, OpenCodeError
from ..core.events import to_json
from ..core.records import record_of, replacing
from ..core.result import RunResult
from ..core.text import money
from .charts import (
    WIDTH,
    Bar,
    Clock,
    Curve,
    Tick,
    curves_of,
    lanes_of,
    span,
    time_ticks,
    timeline_of,
    value_ticks,
)
from .jobs import STATUSES, Record, Row, detail_of, records_in, row_of

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["checkpoint_to_html", "results_to_html", "write_html"]

_ASSETS = Path(__file__).parent
_PAGE_CHARS = 80_000_000  # of all details; a browser loads that in a second or two
_MAX_KINDS = 12


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
