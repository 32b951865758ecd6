"""The tasks, done with py-opencode-wrapper as its README says; imports nothing else of ours."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from typing import Any

from opencode_wrapper import (  # type: ignore[import-not-found]
    AsyncOpenCodeClient,
    OpenCodeTimeoutError,
    RunConfig,
)

from .answering import resident_kib, serve


def runs(
    binary: str,
    prompts: list[str],
    workspace: str,
    model: str,
    config: dict[str, Any],
    env: dict[str, str],
    at_once: int = 1,
) -> list[str]:
    cfg = RunConfig(model=model, config_overrides=config, extra_env=env)

    async def all_of_them() -> list[str]:
        client = AsyncOpenCodeClient(binary)
        found = await asyncio.gather(
            *[client.async_run(prompt, workspace, run_cfg=cfg) for prompt in prompts]
        )
        return [result.final_text for result in found]

    return asyncio.run(all_of_them())


def ends(binary: str, count: int, threads: int, startup_delay_s: float = 0.3) -> int:
    """With *threads* at a time, which its README leaves to a semaphore of one's own."""

    async def all_of_them() -> int:
        client = AsyncOpenCodeClient(binary, startup_delay_s=startup_delay_s)
        slots = asyncio.Semaphore(threads)

        async def one() -> int:
            async with slots:
                return len((await client.async_run("a prompt", ".")).events)

        return sum(await asyncio.gather(*[one() for _ in range(count)]))

    return asyncio.run(all_of_them())


def flood(binary: str, how: str) -> int:
    async def run() -> int:
        return len((await AsyncOpenCodeClient(binary).async_run("a prompt", ".")).events)

    async def stream() -> int:
        count = 0
        async for _ in AsyncOpenCodeClient(binary).async_stream("a prompt", "."):
            count += 1
        return count

    return asyncio.run(run() if how == "run" else stream())


def delays(binary: str, count: int) -> dict[str, list[float]]:
    async def one(client: Any) -> list[float]:
        return [
            (time.monotonic_ns() - event["written_ns"]) / 1e9
            async for event in client.async_stream("a prompt", ".")
        ]

    async def all_of_them() -> list[list[float]]:
        client = AsyncOpenCodeClient(binary)
        return [await one(client) for _ in range(count)]

    seen = asyncio.run(all_of_them())
    return {"first": [times[0] for times in seen], "last": [times[-1] for times in seen]}


def memory(binary: str, how: str) -> dict[str, float]:
    """What a flood takes while its result is held, in KiB."""

    async def held() -> dict[str, float]:
        client = AsyncOpenCodeClient(binary)
        before = resident_kib()["now"]
        if how == "run":
            result = await client.async_run("a prompt", ".")
        else:
            async for _ in client.async_stream("a prompt", "."):
                pass
        after = resident_kib()
        del result
        return {"held": after["now"] - before, "peak": after["most"] - before}

    return asyncio.run(held())


def time_out(binary: str, timeout_s: float) -> float:
    began = time.monotonic()
    try:
        client = AsyncOpenCodeClient(binary)
        asyncio.run(client.async_run("a prompt", ".", timeout_s=timeout_s))
    except OpenCodeTimeoutError:
        return time.monotonic() - began - timeout_s
    raise AssertionError("it was to time out")


def session(
    binary: str,
    prompts: list[str],
    workspace: str,
    model: str,
    config: dict[str, Any],
    env: dict[str, str],
) -> dict[str, Any]:
    """One conversation, prompt after prompt: the only warm way that it has."""
    from opencode_wrapper import OpenCodeSession

    cfg = RunConfig(model=model, config_overrides=config, extra_env=env)

    async def talk() -> dict[str, Any]:
        async with OpenCodeSession(AsyncOpenCodeClient(binary), workspace, run_cfg=cfg) as chat:
            await chat.send("warm up")
            began = time.perf_counter()
            answers = [(await chat.send(prompt)).final_text for prompt in prompts]
            return {"answers": answers, "seconds": time.perf_counter() - began}

    return asyncio.run(talk())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(serve(runs, ends, flood, delays, memory, time_out, session))
