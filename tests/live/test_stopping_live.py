"""Each way to end a run of the real opencode takes its tools along."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeCancelledError,
    OpenCodeClient,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    RunConfig,
    RunStream,
)
from opencode_sync.stream import Limits
from opencode_sync.testing import Reply, ScriptedModel, tool_call
from tests.endings import COMMAND, Tools, script

LONG_S = 60.0

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def tools(workspace: Path) -> Tools:
    return Tools(workspace)


@pytest.fixture
def run_cfg(scripted: Any) -> RunConfig:
    """Of a model that has the tools started."""
    model: ScriptedModel = scripted([tool_call("bash", command=COMMAND, description="Sleep")])
    return model.run_config()


@pytest.fixture
def stream(
    client: OpenCodeClient, workspace: Path, tools: Tools, run_cfg: RunConfig
) -> Iterator[RunStream]:
    """A run whose tools are at work."""
    with client.stream("Sleep", workspace, run_cfg=run_cfg) as stream:
        tools.wait_until_started()
        yield stream


# --- within the process: gone when control returns -----------------------------------------------


def test_after_timeout_s_no_tool_lives(stream: RunStream, tools: Tools) -> None:
    stream._meter.limits = Limits(timeout_s=0.5)  # of which more has passed

    with pytest.raises(OpenCodeTimeoutError, match="timeout_s"):
        stream.wait()

    assert not tools.living()


def test_after_close_no_tool_lives(stream: RunStream, tools: Tools) -> None:
    stream.close()

    assert not tools.living()


def test_after_cancel_no_tool_lives(stream: RunStream, tools: Tools) -> None:
    thread = threading.Thread(target=stream.cancel)
    thread.start()

    with pytest.raises(OpenCodeCancelledError):
        stream.wait()

    assert not tools.living()
    thread.join(LONG_S)


def test_after_break_no_tool_lives(
    client: OpenCodeClient, workspace: Path, tools: Tools, run_cfg: RunConfig
) -> None:
    for _ in client.stream("Sleep", workspace, run_cfg=run_cfg):
        tools.wait_until_started()
        break

    assert not tools.living()


def test_after_an_exception_of_the_consumer_no_tool_lives(
    client: OpenCodeClient, workspace: Path, tools: Tools, run_cfg: RunConfig
) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        client.stream("Sleep", workspace, run_cfg=run_cfg) as stream,
    ):
        for _ in stream:
            tools.wait_until_started()
            raise ZeroDivisionError

    assert not tools.living()


def test_after_garbage_collection_no_tool_lives(
    client: OpenCodeClient, workspace: Path, tools: Tools, run_cfg: RunConfig
) -> None:
    stream = client.stream("Sleep", workspace, run_cfg=run_cfg)
    stream.itself = stream  # type: ignore[attr-defined]
    tools.wait_until_started()
    del stream

    gc.collect()

    assert not tools.living()


# --- from outside of it --------------------------------------------------------------------------


def test_after_ctrl_c_no_tool_lives_when_the_script_goes_on(
    opencode_binary: str, workspace: Path, tools: Tools, run_cfg: RunConfig
) -> None:
    with script(opencode_binary, workspace, "Sleep", run_cfg) as started:
        tools.wait_until_started()
        started.wait_for_the_run()

        started.process.send_signal(signal.SIGINT)

        assert started.line() == b"interrupted\n"
        assert not tools.living()
        assert started.process.wait(LONG_S) == 130


def test_after_the_script_s_end_no_tool_lives(
    opencode_binary: str, workspace: Path, tools: Tools, run_cfg: RunConfig
) -> None:
    with script(opencode_binary, workspace, "Sleep", run_cfg) as started:
        tools.wait_until_started()

        started.exit()

        assert started.process.wait(LONG_S) == 0
        assert not tools.living()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_within_5_s_of_a_signal_that_ends_the_script_no_tool_lives(
    opencode_binary: str,
    workspace: Path,
    tools: Tools,
    run_cfg: RunConfig,
    number: signal.Signals,
) -> None:
    with script(opencode_binary, workspace, "Sleep", run_cfg) as started:
        tools.wait_until_started()
        started.wait_for_the_run()

        started.process.send_signal(number)

        assert started.process.wait(LONG_S) == -number
        tools.wait_until_gone()


# --- a provider that refuses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "pure, words",
    [(False, "429 slow down (retry-after: 3600)"), (True, "slow down")],
    ids=["with our plugin", "without plugins"],
)
def test_a_provider_that_says_429_is_told_of_within_seconds(
    client: OpenCodeClient, workspace: Path, scripted: Any, pure: bool, words: str
) -> None:
    model: ScriptedModel = scripted(Reply.failure(429, "slow down", retry_after_s=3600))
    # Where so many compete for a core that the start alone takes 10 s, more is allowed.
    idle_timeout_s = 10 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    started = time.monotonic()

    with pytest.raises(OpenCodeTimeoutError) as caught:
        client.run(
            "Hi", workspace, run_cfg=model.run_config(pure=pure), idle_timeout_s=idle_timeout_s
        )

    assert caught.value.limit == "idle_timeout_s"
    assert str(caught.value).endswith(f"the provider was being retried: {words}")
    assert time.monotonic() - started < 2 * idle_timeout_s
    assert caught.value.result is not None
    assert "retry" in [event["type"] for event in caught.value.result.events]


@pytest.mark.parametrize("pure", [False, True], ids=["with our plugin", "without plugins"])
def test_a_provider_that_says_401_is_not_retried(
    client: OpenCodeClient, workspace: Path, scripted: Any, pure: bool
) -> None:
    model: ScriptedModel = scripted(Reply.failure(401, "bad key"))

    with pytest.raises(OpenCodeProcessError, match="APIError 401: bad key") as caught:
        client.run("Hi", workspace, run_cfg=model.run_config(pure=pure), timeout_s=LONG_S)

    assert caught.value.result is not None
    assert [event["type"] for event in caught.value.result.events] == ["error"]
