"""However a run ends before its time, nothing that it started keeps running; with both runners."""

from __future__ import annotations

import gc
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from opencode_sync import (
    OpenCodeCancelledError,
    OpenCodeConfigError,
    RunConfig,
)
from opencode_sync.api.runner import Runner
from opencode_sync.testing import Reply
from tests.live.warm import WITHIN_S, MakeRunner, Script, Tools

_ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def workspace(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for each runner: tools write their ids there."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture
def tools(workspace: Path, request: pytest.FixtureRequest) -> Tools:
    return Tools(workspace / f"{request.node.originalname}.pids")


@pytest.fixture
def sleeping(script: Script, tools: Tools) -> str:
    """A prompt that has tools started."""
    return script.to("Sleep well", Reply("Good night.", tool_calls=[tools.call]), "Awake.")


def test_after_close_no_tool_lives_and_the_session_goes_on(
    runner: Runner, cfg: RunConfig, workspace: Path, sleeping: str, tools: Tools
) -> None:
    stream = runner.stream(sleeping, workspace)
    tools.wait_until_started()

    stream.close()

    assert tools.living() == []
    assert list(stream) == []
    assert (stream.result.status, stream.result.final_text) == ("cancelled", "Good night.")
    going_on = cfg.replace(session_id=stream.session_id)
    assert runner.run("Good morning", workspace, run_cfg=going_on).answer == "re Good morning"


@pytest.mark.only("server")
def test_after_cancel_in_another_thread_no_tool_lives(
    runner: Runner, workspace: Path, sleeping: str, tools: Tools
) -> None:
    stream = runner.stream(sleeping, workspace)

    def cancel() -> None:
        tools.wait_until_started()
        stream.cancel("no more of it")

    with ThreadPoolExecutor(1) as threads:
        cancelling = threads.submit(cancel)
        with pytest.raises(OpenCodeCancelledError, match="no more of it") as caught:
            stream.wait()
        left = tools.living()
        cancelling.result(WITHIN_S)

    assert left == []
    assert caught.value.result is stream.result
    assert (stream.result.status, stream.result.final_text) == ("cancelled", "Good night.")


@pytest.mark.only("server")
def test_after_garbage_collection_no_tool_lives(
    runner: Runner, workspace: Path, sleeping: str, tools: Tools
) -> None:
    stream = runner.stream(sleeping, workspace)
    stream.itself = stream  # type: ignore[attr-defined]
    tools.wait_until_started()
    del stream

    gc.collect()

    assert tools.living() == []


@pytest.mark.only("process")
def test_after_a_future_is_cancelled_no_tool_lives(
    make: MakeRunner, workspace: Path, sleeping: str, tools: Tools
) -> None:
    future = make().submit(sleeping, workspace)
    tools.wait_until_started()

    assert future.cancel()

    assert future.cancelled()
    assert tools.living() == []


@pytest.mark.only("process")
def test_closing_the_runner_ends_its_runs_and_it_takes_no_more(
    make: MakeRunner, workspace: Path, sleeping: str, tools: Tools
) -> None:
    runner = make()
    stream = runner.stream(sleeping, workspace)
    tools.wait_until_started()

    runner.close()

    assert tools.living() == []
    with pytest.raises(OpenCodeCancelledError, match="closed"):
        stream.wait()
    with pytest.raises(OpenCodeConfigError, match="closed"):
        runner.run("Hi", workspace)
    with pytest.raises(OpenCodeConfigError, match="closed"):
        runner.stream("Hi", workspace)


_LEAVE = """
import pickle, sys

runner, prompt, workspace = pickle.load(sys.stdin.buffer)
stream = runner.stream(prompt, workspace)
print("waiting", flush=True)
sys.stdin.read()
"""
_WAIT = """
import pickle, sys

runner, prompt, workspace = pickle.load(sys.stdin.buffer)
with runner.stream(prompt, workspace) as stream:
    try:
        print("waiting", flush=True)
        stream.wait()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.stdin.read()
        runner.close()
"""


@pytest.fixture
def program(
    make: MakeRunner, workspace: Path, sleeping: str, tools: Tools, request: pytest.FixtureRequest
) -> Iterator[subprocess.Popen[bytes]]:
    """A script that waits for a run whose tools are at work."""
    code = getattr(request, "param", _WAIT)
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as program:
        assert program.stdin
        assert program.stdout
        try:
            program.stdin.write(pickle.dumps((make(), sleeping, workspace)))
            program.stdin.flush()
            assert program.stdout.readline() == b"waiting\n"
            tools.wait_until_started()
            yield program
        finally:
            program.kill()


@pytest.mark.only("process")
def test_after_ctrl_c_no_tool_lives_when_the_script_goes_on(
    program: subprocess.Popen[bytes], tools: Tools
) -> None:
    assert program.stdout

    program.send_signal(signal.SIGINT)

    assert program.stdout.readline() == b"interrupted\n"
    assert tools.living() == []


def test_within_5_s_of_a_kill_of_the_script_no_tool_lives(
    program: subprocess.Popen[bytes], tools: Tools
) -> None:
    program.kill()

    assert program.wait(WITHIN_S) == -signal.SIGKILL
    tools.wait_until_gone()


@pytest.mark.only("process")
@pytest.mark.parametrize("program", [_LEAVE], ids=["leave"], indirect=True)
def test_after_the_script_s_end_no_tool_lives(
    program: subprocess.Popen[bytes], tools: Tools
) -> None:
    assert program.stdin

    program.stdin.close()

    assert program.wait(WITHIN_S) == 0
    assert tools.living() == []
