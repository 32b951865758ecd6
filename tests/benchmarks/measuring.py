"""Measured side by side, and told with the spread.

    contenders --interleave--> samples of each --compare--> Row --table--> reStructuredText

A ratio is taken within each round, of two that ran right after one another, so that a machine that
grows slower or faster meanwhile cancels out. What is shown is the median, and the least and most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Aim:
    """A bound on what a row shows."""

    bound: float
    is_least: bool
    unit: str = ""

    def __str__(self) -> str:
        return f"{'at least' if self.is_least else 'at most'} {self.bound:g}{self.unit}"

    def judge(self, value: float) -> str:
        """``"yes"``, or how far off *value* is."""
        if value >= self.bound if self.is_least else value <= self.bound:
            return "yes"
        return f"**missed by {_short(abs(value - self.bound))}{self.unit}**"


def at_least(bound: float, unit: str = "") -> Aim:
    return Aim(bound, True, unit)


def at_most(bound: float, unit: str = "") -> Aim:
    return Aim(bound, False, unit)


@dataclass(frozen=True)
class Row:
    """One line of the table; the samples of a column are shown as their median and spread.

    Attributes:
        ratios: Ours to theirs; the aim is about these, or about *ours* where there are none.
    """

    benchmark: str
    what: str
    against: str = ""
    unit: str = ""
    ours: Sequence[float] = ()
    theirs: Sequence[float] = ()
    ratios: Sequence[float] = ()
    meaning: str = ""
    aim: Aim | None = None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        judged = self.ratios or self.ours
        return (
            self.benchmark,
            self.what,
            _show(self.ours, self.unit),
            self.against,
            _show(self.theirs, self.unit),
            _show(self.ratios, self.meaning),
            str(self.aim or ""),
            self.aim.judge(median(judged)) if self.aim and judged else "",
            self.note,
        )


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
    meaning: Literal["of theirs", "times as fast"],
    aim: Aim | None = None,
    note: str = "",
) -> Row:
    """A row on two that were interleaved."""
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    if meaning == "times as fast":
        ratios = [1 / ratio for ratio in ratios]
    return Row(benchmark, what, against, unit, ours, theirs, ratios, meaning, aim, note)


def table(rows: Sequence[Row]) -> str:
    """The rows as reStructuredText, as the README has them."""
    head = ("benchmark", "measured", "ours", "against", "theirs", "ratio", "aim", "holds", "note")
    lines = [
        ", ".join(f'"{cell}"' for cell in cells) for cells in (head, *(r.cells() for r in rows))
    ]
    return "\n   ".join([".. csv-table::", f":header: {lines[0]}\n", *lines[1:]])


def _show(values: Sequence[float], unit: str) -> str:
    if not values:
        return ""
    spread = f" ({_short(min(values))} to {_short(max(values))})" if len(values) > 1 else ""
    return f"{_short(median(values))}{spread} {unit}".rstrip()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
