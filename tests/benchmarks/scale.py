"""A batch of 100,000 jobs, and a checkpoint of 1,000,000 lines: flat memory, and an even rate."""

from __future__ import annotations

from .measuring import Row, at_least, at_most
from .setting import Setting

EARLY = 10_000  # jobs before the first look


def measure(setting: Setting) -> list[Row]:
    """Both with a runner that has no processes, so that what is measured is the batch alone.

    A checkpoint keeps each key in memory, which takes 0.2 KiB.
    """
    jobs, lines = setting.size(100_000, 20_000), setting.size(1_000_000, 50_000)
    early, late = setting.contender("ours").ask("batch", jobs=jobs, early=EARLY).answer
    resumed = setting.contender("ours").ask("resume", lines=lines).answer
    rate = (late["jobs"] - early["jobs"]) / (late["seconds"] - early["seconds"])
    evenness = rate / (early["jobs"] / early["seconds"])
    batch, checkpoint = f"{jobs:,} jobs with a checkpoint", f"a checkpoint of {lines:,} lines"
    since = f"after the first {EARLY:,}"
    return [
        Row("scale", f"{batch}: growth of the peak {since}", unit="MiB",
            ours=[late["peak_mib"] - early["peak_mib"]], aim=at_most(50, " MiB")),
        Row("scale", f"{batch}: rate {since}, by that up to there", ours=[evenness],
            aim=at_least(0.7), note=f"{rate:,.0f} jobs per s"),
        Row("scale", f"{checkpoint}: all read, and one job run", unit="s",
            ours=[resumed["seconds"]]),
        Row("scale", f"{checkpoint}: memory", unit="MiB", ours=[resumed["mib"]]),
    ]  # fmt: skip
