"""Measured side by side, and told with the spread.

    contenders --interleave--> samples of each --compare--> Row --table--> Markdown

A ratio is taken within each round, of two that ran right after one another, so that a machine that
grows slower or faster meanwhile cancels out. What is shown is the median, and the least and most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Meaning = Literal["time", "speed", "difference"]


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values), len(values))

    def show(self, digits: int | None = None) -> str:
        show = _short if digits is None else lambda value: f"{value:.{digits}f}"
        return f"{show(self.median)} ({show(self.least)} to {show(self.most)})"


@dataclass(frozen=True)
class Aim:
    """A bound on what a row shows."""

    bound: float
    is_least: bool
    unit: str = ""

    def __str__(self) -> str:
        return f"{'at least' if self.is_least else 'at most'} {self.bound:g}{self.unit}"

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.is_least else value <= self.bound


def at_least(bound: float, unit: str = "") -> Aim:
    return Aim(bound, True, unit)


def at_most(bound: float, unit: str = "") -> Aim:
    return Aim(bound, False, unit)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        value: What the aim is about: a ratio, a difference, or our own figure.
    """

    benchmark: str
    what: str
    against: str = ""
    unit: str = ""
    ours: Spread | None = None
    theirs: Spread | None = None
    meaning: str = ""
    value: Spread | None = None
    aim: Aim | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the aim holds; how far off, where it does not."""
        if self.aim is None or self.value is None:
            return ""
        if self.aim.holds(self.value.median):
            return "yes"
        missed_by = abs(self.value.median - self.aim.bound)
        return f"**missed by {_short(missed_by)}{self.aim.unit}**"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def interleave(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Run each once in a round, another one first in each: none is always the one after X."""
    names = list(contenders)
    samples: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(contenders[name]())
    return samples


def compare(
    benchmark: str,
    what: str,
    against: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    unit: str,
    meaning: Meaning,
    aim: Aim | None = None,
    note: str = "",
) -> Row:
    """A row on two that were interleaved.

    Args:
        meaning: ``"time"`` for ours by theirs (less is better), ``"speed"`` for the inverse,
            ``"difference"`` for ours less theirs.
    """
    calculate: dict[str, Callable[[float, float], float]] = {
        "time": lambda our, their: our / their,
        "speed": lambda our, their: their / our,
        "difference": lambda our, their: our - their,
    }
    values = [calculate[meaning](*pair) for pair in zip(ours, theirs, strict=True)]
    return Row(
        benchmark,
        what,
        against,
        unit,
        Spread.of(ours),
        Spread.of(theirs),
        {"time": "of theirs", "speed": "times as fast", "difference": unit + " more"}[meaning],
        Spread.of(values),
        aim,
        note,
    )


HEAD = ("benchmark", "measured", "ours", "against", "theirs", "ratio", "aim", "holds", "note")


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [HEAD, ("---",) * len(HEAD), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rst_table(rows: Sequence[Row]) -> str:
    """The rows as reStructuredText, for the README."""
    lines = (", ".join(f'"{cell}"' for cell in line) for line in (HEAD, *map(_cells, rows)))
    head, *body = lines
    return "\n".join([".. csv-table::", f"   :header: {head}", "", *(f"   {x}" for x in body)])


def _cells(row: Row) -> tuple[str, ...]:
    value = "" if row.value is None or not row.against else row.value.show()
    return (
        row.benchmark,
        row.what,
        _with_unit(row.ours, row.unit),
        row.against,
        _with_unit(row.theirs, row.unit),
        f"{value} {row.meaning}" if value else "",
        "" if row.aim is None else str(row.aim),
        row.verdict,
        row.note,
    )


def _with_unit(spread: Spread | None, unit: str) -> str:
    return "" if spread is None else f"{spread.show()} {unit}"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
