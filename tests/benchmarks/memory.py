"""What events take that are kept, and that a stream takes that keeps none."""

from __future__ import annotations

from . import standins
from .measuring import Row, Spread, at_most, compare, interleave
from .setting import Setting

FEW, MANY = 25_000, 100_000


def measure(setting: Setting) -> list[Row]:
    """MiB for 100,000 events kept; and the growth of a stream's peak."""
    few, many = (str(standins.flood(setting.root, count)) for count in (FEW, MANY))

    def once(name: str, how: str, binary: str, what: str) -> float:
        worker = setting.contender(name)  # a fresh process: memory that was freed is used again
        try:
            return float(worker.ask("memory", binary=binary, how=how).answer[what]) / 1024
        finally:
            setting.end_contenders()

    # With few, for the time of a rival's run grows with the square of the count.
    keeping = {"ours": ("ours", "run"), "ours, keep_raw=False": ("ours", "run without raw lines")}
    keeping |= {name: (name, "run") for name in setting.rivals}
    ways = {way: (*what, few, "held") for way, what in keeping.items()}
    ways["few"] = ("ours", "stream", few, "peak")
    ways["many"] = ("ours", "stream", many, "peak")
    found = interleave({way: (lambda way=way: once(*ways[way])) for way in ways}, 5)
    per_many = {way: [MANY / FEW * value for value in found[way]] for way in keeping}
    rows = []
    for way in ("ours", "ours, keep_raw=False"):
        for name in setting.rivals:
            row = compare(
                "memory",
                f"{MANY:,} events kept{way[4:]}",
                name,
                per_many[way],
                per_many[name],
                "MiB",
                "time",
                at_most(0.5),
                f"measured with {FEW:,}",
            )
            rows.append(row)
    grown = [late - early for late, early in zip(found["many"], found["few"], strict=True)]
    what = f"a stream that keeps nothing: growth of its peak from {FEW:,} to {MANY:,} events"
    value = Spread.of(grown)
    rows.append(Row("memory", what, unit="MiB", ours=value, value=value, aim=at_most(2, " MiB")))
    return rows
