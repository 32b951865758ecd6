"""How much one warm server gets done, and whether it lasts.

    python -m tests.benchmarks.server_speed [latency] [length]

- latency: prompts per second with a model that takes half a second, 8 and 16 at once.
- length: 2,000 prompts through servers that are recycled at 700 MB: none lost, our memory flat,
  within an hour.

Ends with 1 where a figure misses what is asked of it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from opencode_sync.api.server import OpenCodeServer
from opencode_sync.testing import Reply, ScriptedModel

PROMPTS, WORKERS = 96, 8
LONG, LIMIT_MB, FLAT_MB = 2_000, 700, 30
LONGEST_S = 3_600.0  # it takes some 5 minutes, and 20 on a machine that is busy with other things


def rate(work: Callable[[], object], count: int = PROMPTS) -> float:
    started = time.monotonic()
    work()
    return count / (time.monotonic() - started)


def latency(workspace: Path) -> bool:
    best = 0.0
    with (
        ScriptedModel(lambda request: Reply("done", delay_s=0.5)) as model,
        OpenCodeServer(run_cfg=model.run_config()) as server,
    ):
        for workers in (8, 16):
            prompts = [f"prompt {number}" for number in range(PROMPTS)]
            list(server.map(prompts[:workers], workspace, max_workers=workers))
            best = rate(lambda: list(server.map(prompts, workspace, max_workers=workers)))  # noqa: B023
            print(f"{workers} at once, a model of 0.5 s: {best:.1f}/s")
    print("(asked: 10/s with 16)")
    return best >= 10


def length(workspace: Path) -> bool:
    process, pids, done = psutil.Process(), set(), 0
    end = time.monotonic() + LONGEST_S
    first = last = 0.0
    with (
        ScriptedModel("done") as model,
        OpenCodeServer(run_cfg=model.run_config(), max_memory_mb=LIMIT_MB) as server,
    ):
        prompts = (f"prompt {number}" for number in range(LONG))
        for result in server.map(prompts, workspace, max_workers=WORKERS):
            done += result.answer == "done"
            if time.monotonic() > end:
                break
            model._requests.clear()  # the model's own notes would grow
            if done % 200 == 0:
                last = process.memory_info().rss / 1e6
                first = first or last
                pids.add(server.pid)
                print(f"  {done} done, {last:.0f} MB, {len(pids)} servers so far")
    print(f"{done} of {LONG} done, {len(pids)} servers, {last - first:+.0f} MB (asked: {FLAT_MB})")
    return done == LONG and len(pids) > 1 and last - first < FLAT_MB


def main() -> int:
    parts = {"latency": latency, "length": length}
    chosen = sys.argv[1:] or list(parts)
    with tempfile.TemporaryDirectory() as workspace:
        passed = [parts[name](Path(workspace).resolve()) for name in chosen]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
