"""What events take that are kept, and that a stream takes that keeps none."""

from __future__ import annotations

from . import standins
from .measuring import Row, Spread, at_most, compare, interleave
from .setting import Setting

MANY = 100_000
# A stream reads some megabytes ahead; beyond that it is to stay flat.
STREAMED = {"full": (200_000, 800_000), "quick": (100_000, 300_000)}


def measure(setting: Setting) -> list[Row]:
    """MiB for 100,000 events kept; and the growth of a stream's peak."""
    # For the time of a rival's run grows with the square of the count.
    few_events = setting.rounds(25_000, 10_000)
    few = str(standins.flood(setting.root, few_events))
    short, long = STREAMED["quick" if setting.is_quick else "full"]
    # Text stays in any case: of it final_text is made.
    short_flood, long_flood = (
        str(standins.flood(setting.root, n, "reasoning")) for n in (short, long)
    )

    def once(name: str, how: str, binary: str, what: str) -> float:
        worker = setting.contender(name)  # a fresh process: memory that was freed is used again
        try:
            return float(worker.ask("memory", binary=binary, how=how).answer[what]) / 1024
        finally:
            setting.end_contenders()

    keeping = {"ours": ("ours", "run"), "ours, keep_raw=False": ("ours", "run without raw lines")}
    keeping |= {name: (name, "run") for name in setting.rivals}
    ways = {way: (*what, few, "held") for way, what in keeping.items()}
    ways["short"] = ("ours", "stream", short_flood, "peak")
    ways["long"] = ("ours", "stream", long_flood, "peak")
    measured = {way: (lambda way=way: once(*ways[way])) for way in ways}
    found = interleave(measured, setting.rounds(5, 3))
    per_many = {way: [MANY / few_events * value for value in found[way]] for way in keeping}
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
                f"measured with {few_events:,}",
            )
            rows.append(row)
    pairs = zip(found["long"], found["short"], strict=True)
    value = Spread.of([after - before for after, before in pairs])
    what = f"growth of a stream's peak, nothing kept, {short:,} to {long:,} events without text"
    rows.append(Row("memory", what, unit="MiB", ours=value, value=value, aim=at_most(2, " MiB")))
    return rows
