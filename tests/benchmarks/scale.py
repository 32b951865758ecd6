"""Does a batch stay flat? And what would a million prompts take?

    python -m tests.benchmarks.scale

Part one runs 20,000 jobs of the fastest stand-in, with a checkpoint, and prints memory and speed at
2,000 and at 20,000. Part two is arithmetic on figures that were measured with opencode 1.18.33 on
2 cores (FIGURES): what 1,000,000 prompts over 100 machines take and cost, and what is in the way.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.scripted import ScriptedRunner

JOBS, EARLY = 20_000, 2_000
ALLOWED_MIB = 30
ALLOWED_SLOWDOWN = 0.7  # of jobs per second, late against early; below, something grows


@dataclass(frozen=True)
class Mark:
    """A batch at one moment."""

    jobs: int
    seconds: float
    high_water_mib: float


def measure(n: int = JOBS, early: int = EARLY) -> tuple[Mark, Mark]:
    """A batch of *n* jobs, looked at after *early* of them and at its end."""
    marks = []
    with tempfile.TemporaryDirectory() as directory, ScriptedRunner(max_workers=4) as runner:
        runner.begun = _Nothing()  # type: ignore[assignment]
        jobs = (f"prompt {number}" for number in range(n))
        began = time.perf_counter()
        for result in runner.map(jobs, checkpoint=Path(directory) / "batch.jsonl"):
            done = (result.index or 0) + 1
            if done in (early, n):
                marks.append(Mark(done, time.perf_counter() - began, _high_water_mib()))
    first, last = marks
    return first, last


class _Nothing(list[object]):
    """Takes everything and keeps nothing: the stand-in's own record would be what grows."""

    def append(self, item: object) -> None:
        pass


def _high_water_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def speeds(first: Mark, last: Mark) -> tuple[float, float]:
    """Jobs per second up to the first mark, and after it."""
    late = (last.jobs - first.jobs) / (last.seconds - first.seconds)
    return first.jobs / first.seconds, late


# --- a million prompts ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What was measured of one machine of 2 cores, and what is assumed of the model."""

    cores: int = 2
    memory_gib: float = 8.0
    start_cpu_s: float = 3.1  # of a core, for one `opencode run`, measured
    run_gib: float = 0.55  # measured
    warm_cpu_s: float = (
        0.15  # of a core, for one prompt on a server: 13.7 per s, 16 at once, measured
    )
    warm_most: int = 16  # sessions at a time on one server; more were not tried
    model_s: float = 30.0  # assumed: a task of a few steps
    dollars: float = 0.02  # assumed: 5,000 tokens in, 500 out, at 3 and 10 dollars a million
    record_kib: float = 20.0  # of a checkpoint, per job


FIGURES = Figures()


@dataclass(frozen=True)
class Forecast:
    """How one way of running them would go."""

    name: str
    at_once: int
    per_s: float
    hours: float
    bottleneck: str


def forecast(prompts: int, machines: int, figures: Figures = FIGURES) -> list[Forecast]:
    """A process per run, and a warm server on each machine."""
    f = figures
    by_memory = int((f.memory_gib - 1.0) / f.run_gib)
    by_default = min(by_memory, 2 * f.cores)
    ways = [
        ("a process per run, default workers", by_default, f.start_cpu_s),
        ("a process per run, workers by memory", by_memory, f.start_cpu_s),
        ("a warm server each", f.warm_most, f.warm_cpu_s),
    ]
    return [_forecast(name, n, cpu_s, prompts, machines, f) for name, n, cpu_s in ways]


def _forecast(
    name: str, workers: int, cpu_s: float, prompts: int, machines: int, f: Figures
) -> Forecast:
    by_model = workers / (f.model_s + cpu_s)
    by_cpu = f.cores / cpu_s
    per_s = machines * min(by_model, by_cpu)
    bottleneck = "the model's time" if by_model <= by_cpu else "CPU for start-ups"
    return Forecast(name, machines * workers, per_s, prompts / per_s / 3600, bottleneck)


def main() -> int:
    """Print both; returns 1 if the batch does not stay flat."""
    first, last = measure()
    early, late = speeds(first, last)
    growth = last.high_water_mib - first.high_water_mib
    for mark in (first, last):
        print(
            f"{mark.jobs:>7,} jobs  {mark.seconds:6.1f} s  {mark.high_water_mib:6.1f} MiB at most"
        )
    print(f"jobs per second: {early:,.0f} up to {first.jobs:,}, {late:,.0f} after it")
    print(f"memory grew by {growth:.1f} MiB (allowed: {ALLOWED_MIB})")

    prompts, machines = 1_000_000, 100
    f = FIGURES
    print(
        f"\n{prompts:,} prompts over {machines} machines of {f.cores} cores, {f.memory_gib:g} GiB,"
    )
    print(f"with a model that takes {f.model_s:g} s and ${f.dollars:g} for each:")
    for way in forecast(prompts, machines):
        print(
            f"  {way.name:<38} {way.at_once:>6,} at once {way.per_s:>7.1f} per s "
            f"{way.hours:>6.1f} h  limit: {way.bottleneck}"
        )
    print(f"  the model: ${prompts * f.dollars:,.0f}, whichever way")
    print(f"  the checkpoint: {prompts * f.record_kib / 2**20:.1f} GiB")
    print(f"  one batch gives out {late:,.0f} jobs per s at most: no limit here")
    return int(growth > ALLOWED_MIB or late < ALLOWED_SLOWDOWN * early)


if __name__ == "__main__":
    sys.exit(main())
