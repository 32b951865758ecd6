"""The tasks, done with opencode_sync."""

from __future__ import annotations

import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from opencode_sync import OpenCodeClient, OpenCodeServer, OpenCodeTimeoutError, RunConfig

from .answering import resident_kib, serve

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


def ends(binary: str, count: int, threads: int) -> int:
    with OpenCodeClient(binary) as client, ThreadPoolExecutor(threads) as pool:
        return sum(len(client.run("a prompt").events) for _ in range(1)) + sum(
            pool.map(lambda _: len(client.run("a prompt").events), range(count - 1))
        )


def flood(binary: str, how: str) -> int:
    with OpenCodeClient(binary) as client:
        if how == "run":
            return len(client.run("a prompt").events)
        with client.stream("a prompt", keep_events=False, keep_raw=False) as stream:
            return sum(1 for _ in stream)


def delays(binary: str, count: int) -> dict[str, list[float]]:
    first, last = [], []
    with OpenCodeClient(binary) as client:
        for _ in range(count):
            with client.stream("a prompt") as stream:
                seen = [(time.monotonic_ns() - event["written_ns"]) / 1e9 for event in stream]  # type: ignore[typeddict-item]
            first.append(seen[0])
            last.append(seen[-1])
    return {"first": first, "last": last}


def memory(binary: str, how: str) -> dict[str, float]:
    """What a flood takes while its result is held, in KiB."""
    with OpenCodeClient(binary) as client:
        before = resident_kib()["now"]
        with client.stream("a prompt", **_keeping(how)) as stream:
            if how == "stream":
                for _ in stream:
                    pass
            else:
                stream.wait()
        after = resident_kib()
    return {"held": after["now"] - before, "peak": after["most"] - before}


def _keeping(how: str) -> dict[str, bool]:
    return {
        "run": {},
        "run without raw lines": {"keep_raw": False},
        "stream": {"keep_events": False, "keep_raw": False},
    }[how]


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


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(serve(runs, ends, flood, delays, memory, time_out, start_server, stop_server, turns))
