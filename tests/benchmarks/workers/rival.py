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

from .answering import serve


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
    sys.exit(serve(runs, time_out, session))
