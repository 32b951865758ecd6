"""The tasks, done with opencode_sync."""

from __future__ import annotations

import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from opencode_sync import Job, OpenCodeClient, OpenCodeServer, OpenCodeTimeoutError, RunConfig
from tests.scripted import ScriptedRunner

from .answering import serve

_kept: list[Any] = []  # what a later task is about


def runs(
    binary: str,
    prompts: list[str],
    workspace: str,
    model: str,
    config: dict[str, Any],
    env: dict[str, str],
    at_once: int = 1,
    changes: dict[str, Any] | None = None,
) -> list[str]:
    cfg = RunConfig(model=model, config_overrides=config, extra_env=env, **(changes or {}))
    with OpenCodeClient(binary, run_cfg=cfg) as client:
        if len(prompts) == 1:
            return [client.run(prompts[0], workspace).final_text]
        return [result.final_text for result in client.map(prompts, workspace, max_workers=at_once)]


def time_out(binary: str, timeout_s: float) -> float:
    with OpenCodeClient(binary) as client:
        began = time.monotonic()
        try:
            client.run("a prompt", timeout_s=timeout_s)
        except OpenCodeTimeoutError:
            return time.monotonic() - began - timeout_s
    raise AssertionError("it was to time out")


def start_server(
    binary: str, model: str, config: dict[str, Any], env: dict[str, str], threads: int
) -> dict[str, str | None]:
    server = OpenCodeServer(
        binary,
        run_cfg=RunConfig(model=model, config_overrides=config, extra_env=env),
        max_workers=threads,
    )
    _kept.append(server.__enter__())
    return {"url": server.url, "password": server.password}


def stop_server() -> None:
    _kept.pop().close()


def turns(prompts: list[str], workspace: str, threads: int) -> list[str]:
    found = _kept[-1].map(prompts, workspace, max_workers=threads)
    return [result.final_text for result in found]


def batch(jobs: int, early: int) -> list[dict[str, float]]:
    """How far a batch is, and what it holds, after *early* of its jobs and after all of them."""
    marks = []
    with tempfile.TemporaryDirectory() as directory, _runner() as runner:
        drawn = (Job(f"prompt {number}", metadata={"row": number}) for number in range(jobs))
        began = time.perf_counter()
        results = runner.map(drawn, checkpoint=Path(directory) / "batch.jsonl")
        for done, _ in enumerate(results, 1):
            if done in (early, jobs):
                seconds = time.perf_counter() - began
                marks.append({"jobs": done, "seconds": seconds, "peak_mib": _peak_mib()})
    return marks


def resume(lines: int) -> dict[str, float]:
    """What it takes to go on with a batch of which *lines* jobs are done, one is not."""
    with tempfile.TemporaryDirectory() as directory, _runner() as runner:
        path = Path(directory) / "batch.jsonl"
        list(runner.map([Job("prompt", key="job 0")], checkpoint=path))
        written = path.read_text()
        line = written.splitlines(keepends=True)[-1]
        with path.open("a") as file:
            file.writelines(line.replace("job 0", f"job {n}") for n in range(1, lines))
        before, began = _peak_mib(), time.perf_counter()
        jobs = (Job("prompt", key=f"job {number}") for number in range(lines + 1))
        count = sum(1 for _ in runner.map(jobs, checkpoint=path))
        assert count == lines + 1
        return {"seconds": time.perf_counter() - began, "mib": _peak_mib() - before}


class _Nothing(list[object]):
    """Takes everything and keeps nothing: the runner's own record would be what grows."""

    def append(self, item: object) -> None:
        pass


def _runner() -> ScriptedRunner:
    runner = ScriptedRunner(max_workers=4)
    runner.begun = _Nothing()  # type: ignore[assignment]
    return runner


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(serve(runs, time_out, start_server, stop_server, turns, batch, resume))
