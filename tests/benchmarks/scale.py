"""Does a batch stay flat? And what would a million prompts take?

    python -m tests.benchmarks.scale

Part one runs 20,000 jobs of the fastest stand-in, with a checkpoint, and prints memory and speed at
2,000 and at 20,000. Part two plays through 1,000,000 prompts over 100 machines, with the speed of
part one and with figures that were measured with opencode 1.18.33 on 2 cores (FIGURES): what they
take and cost, and what is in the way.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from pathlib import Path

from tests.scripted import ScriptedRunner

JOBS, EARLY = 20_000, 2_000
ALLOWED_MIB = 30
ALLOWED_SLOWDOWN = 0.7  # of jobs per second, late against early; below, something grows
PROMPTS, MACHINES = 1_000_000, 100


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
    model_s: float = 30.0  # assumed: a task of a few steps, on average
    dollars: float = 0.02  # assumed: 5,000 tokens in, 500 out, at 3 and 10 dollars a million
    machine_dollars: float = 0.08  # assumed: for an hour of one
    record_kib: float = 20.0  # of a checkpoint, per job


FIGURES = Figures()


@dataclass(frozen=True)
class Way:
    """One way of running them on a machine."""

    name: str
    workers: int
    cpu_s: float  # of a core, for one prompt


@dataclass(frozen=True)
class Outcome:
    """How it went.

    Attributes:
        shares: What the workers' time went into, largest first, in sum 1.
    """

    way: Way
    at_once: int
    hours: float
    per_s: float
    shares: dict[str, float]


def ways(f: Figures = FIGURES) -> list[Way]:
    """A process per run, with more or fewer of them, and a warm server on each machine."""
    by_memory = int((f.memory_gib - 1.0) / f.run_gib)
    return [
        Way("a process per run, default workers", min(by_memory, 2 * f.cores), f.start_cpu_s),
        Way("a process per run, workers by memory", by_memory, f.start_cpu_s),
        Way("a warm server each", f.warm_most, f.warm_cpu_s),
    ]


def simulate(
    way: Way, batch_s: float, prompts: int = PROMPTS, machines: int = MACHINES, f: Figures = FIGURES
) -> Outcome:
    """Play *prompts* through.

    One batch hands them out and takes them in, *batch_s* for each. A worker that is free gets the
    next one, waits for a core of its machine, and then for the model, whose times are exponentially
    distributed: most are short, a few long.
    """
    dice = random.Random(1)
    free = [(0.0, machine) for machine in range(machines) for _ in range(way.workers)]
    heapify(free)
    cores = [[0.0] * f.cores for _ in range(machines)]
    batch_free = end = 0.0
    spent: Counter[str] = Counter()
    for _ in range(prompts):
        ready, machine = heappop(free)
        begun = batch_free = max(ready, batch_free) + batch_s
        ended = max(begun, heappop(cores[machine])) + way.cpu_s
        heappush(cores[machine], ended)
        model_s = dice.expovariate(1 / f.model_s)
        heappush(free, (ended + model_s, machine))
        end = max(end, ended + model_s)
        spent["the batch"] += begun - ready  # type: ignore[assignment]
        spent["the processor"] += ended - begun  # type: ignore[assignment]
        spent["the model"] += model_s  # type: ignore[assignment]
    shares = {name: seconds / spent.total() for name, seconds in spent.most_common()}
    return Outcome(way, machines * way.workers, end / 3600, prompts / end, shares)


def told(first: Mark, last: Mark, prompts: int = PROMPTS) -> list[str]:
    """The simulation in lines, from what was measured of a batch."""
    _, late = speeds(first, last)
    per_job_mib = (last.high_water_mib - first.high_water_mib) / (last.jobs - first.jobs)
    f = FIGURES
    lines = [
        f"{prompts:,} prompts over {MACHINES} machines of {f.cores} cores, {f.memory_gib:g} GiB,",
        f"with a model that takes {f.model_s:g} s and ${f.dollars:g} for each:",
    ]
    for way in ways():
        outcome = simulate(way, 1 / late, prompts)
        shares = ", ".join(f"{name} {share:.0%}" for name, share in outcome.shares.items())
        dollars = outcome.hours * MACHINES * f.machine_dollars
        lines.append(
            f"  {way.name}: {outcome.hours:.1f} h, {outcome.per_s:.1f} per s, "
            f"{outcome.at_once:,} at once"
        )
        lines.append(f"    machines: ${dollars:,.0f}; time: {shares}")
    return [
        *lines,
        f"  the model: ${prompts * f.dollars:,.0f}, whichever way",
        f"  the checkpoint: {prompts * f.record_kib / 2**20:.1f} GiB on disk",
        f"  the batch: {per_job_mib * prompts:,.0f} MiB, and {late:,.0f} jobs per s at most",
    ]


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

    print("\n" + "\n".join(told(first, last)))
    return int(growth > ALLOWED_MIB or late < ALLOWED_SLOWDOWN * early)


if __name__ == "__main__":
    sys.exit(main())
