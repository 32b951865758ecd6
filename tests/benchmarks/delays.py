"""How soon an event is seen after it was written, against a loop over a pipe."""

from __future__ import annotations

from statistics import median

from . import standins
from .measuring import Row, at_most, compare, interleave
from .setting import Setting


def measure(setting: Setting) -> list[Row]:
    binary = str(standins.stamped(setting.root))
    count = setting.rounds(20, 6)
    workers = setting.contenders("ours", "bare", *setting.rivals)

    def once(name: str) -> dict[str, float]:
        n = count if name in ("ours", "bare") else max(2, count // 4)
        seen = workers[name].ask("delays", binary=binary, count=n).answer
        return {which: 1000 * median(times) for which, times in seen.items()}

    measured = {name: (lambda name=name: once(name)) for name in workers}
    found = interleave(measured, setting.rounds(5, 3))
    rows = []
    for which in ("first", "last"):
        times = {name: [sample[which] for sample in samples] for name, samples in found.items()}
        what = f"{which} event seen after it was written"
        rows.append(
            compare(
                "delays",
                what,
                "the bare loop",
                times["ours"],
                times["bare"],
                "ms",
                "difference",
                at_most(5, " ms"),
            )
        )
        for name in setting.rivals:
            rows.append(
                compare("delays", what, name, times["ours"], times[name], "ms", "difference")
            )
    return rows
