"""200,000 events through run and stream, against a loop over a pipe."""

from __future__ import annotations

from . import standins
from .measuring import Row, at_least, compare, interleave
from .setting import Setting

LOOP = "for line in pipe: json.loads(line)"


def measure(setting: Setting) -> list[Row]:
    """Microseconds per event, each way."""
    count = setting.rounds(200_000, 50_000)
    few = count // 5
    workers = setting.contenders("ours", "bare", *setting.rivals)
    binaries = {n: str(standins.flood(setting.root, n)) for n in (count, few)}

    def once(name: str, how: str) -> float:
        # A rival's time grows with the square of the count: all of it would take minutes.
        n = few if name in setting.rivals and how == "run" else count
        done = workers[name].ask("flood", binary=binaries[n], how=how)
        assert done.answer == n + 2, done
        return 1e6 * done.wall_s / n

    ways = {"bare": ("bare", "loop")}
    for name in ("ours", *setting.rivals):
        ways |= {f"{name}, {how}": (name, how) for how in ("run", "stream")}
    measured = {way: (lambda way=way: once(*ways[way])) for way in ways}
    found = interleave(measured, setting.rounds(5, 3))
    rows = []
    for how in ("run", "stream"):
        ours = found[f"ours, {how}"]
        for name in ("bare", *setting.rivals):
            theirs = found["bare" if name == "bare" else f"{name}, {how}"]
            is_cut = name != "bare" and how == "run"
            row = compare(
                "flood",
                f"{count:,} events, {how}",
                LOOP if name == "bare" else name,
                ours,
                theirs,
                "µs each",
                "speed",
                at_least(0.75 if name == "bare" else 2.5),
                f"theirs with {few:,}: its time grows with the square" if is_cut else "",
            )
            rows.append(row)
    return rows
