"""Our own cost per run: a stand-in that ends at once, against subprocess.run."""

from __future__ import annotations

from statistics import median

from . import standins
from .measuring import Row, at_most, compare, interleave
from .setting import Answer, Setting

RUNS = {1: (60, 25), 16: (240, 80)}  # threads -> runs in a round, full and quick


def measure(setting: Setting) -> list[Row]:
    """Milliseconds per run, each way."""
    binary = str(standins.ends_at_once(setting.root))
    workers = setting.contenders("ours", "bare", *setting.rivals)

    def once(name: str, count: int, threads: int) -> Answer:
        done = workers[name].ask("ends", binary=binary, count=count, threads=threads)
        assert done.answer == 3 * count, done
        return done

    rows = []
    for threads, counts in RUNS.items():
        # A rival sleeps for 0.3 s at each start, one after the other.
        n = {"ours": setting.rounds(*counts), "bare": setting.rounds(*counts)}
        n |= dict.fromkeys(setting.rivals, 2) if threads == 1 else {}
        ways = {name: (lambda name=name: once(name, n[name], threads)) for name in n}  # noqa: B023
        found = interleave(ways, setting.rounds(5, 3))
        wall = {way: [1000 * one.wall_s / n[way] for one in found[way]] for way in ways}
        cpu = {way: median(1000 * one.cpu_s / n[way] for one in found[way]) for way in ways}
        what = f"a run that ends at once, {threads} at a time"
        for name in ways:
            if name == "ours":
                continue
            is_bare = name == "bare"
            row = compare(
                "overhead",
                what,
                "subprocess.run" if is_bare else name,
                wall["ours"],
                wall[name],
                "ms",
                "difference" if is_bare else "speed",
                at_most(8, " ms") if is_bare else None,
                f"CPU {cpu['ours']:.1f} ms, theirs {cpu[name]:.1f} ms",
            )
            rows.append(row)
    return rows
