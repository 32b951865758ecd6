"""One `opencode run` as a source of events, on the stand-in."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeBinaryNotFoundError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    RunConfig,
    RunResult,
)
from opencode_sync.core.request import Request
from opencode_sync.process import run as _run
from opencode_sync.process import watchdog
from opencode_sync.process.child import LineSplitter
from opencode_sync.process.command import Command
from opencode_sync.process.run import ProcessRun
from tests.faults import write_standin
from tests.interrupting import interrupt_once

Start = Callable[..., ProcessRun]

LONG_S = 20.0


def process_run(
    argv: list[str],
    workspace: Path,
    *,
    env: Mapping[str, str] = os.environ,
    prompt: str = "x",
    keep_raw: bool = True,
    **settings: Any,
) -> ProcessRun:
    request = Request(prompt, workspace, RunConfig(**settings))
    return ProcessRun(Command(argv, dict(env), prompt, {}), request, keep_raw=keep_raw)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the stand-in with a prompt."""
    runs: list[ProcessRun] = []
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    binary = write_standin(tmp_path)

    def start(prompt: str, **options: Any) -> ProcessRun:
        argv = [binary, "run", "--format", "json"]
        runs.append(process_run(argv, workspace, prompt=prompt, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.stop()
        run.close()


def finish(run: ProcessRun) -> tuple[RunResult, Any]:
    result = RunResult()
    while (events := run.receive(LONG_S)) is not None:
        for event in events:
            result.append_event(event)
    return result, run.settle(result)


def receive_until(run: ProcessRun, kind: str, timeout: float = LONG_S) -> Any:
    while True:
        events = run.receive(timeout)
        assert events is not None
        for event in events:
            if event["type"] == kind:
                return event


def test_a_ctrl_c_while_a_block_is_read_loses_nothing_of_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start("echo all is well")
    interrupt_once(monkeypatch, LineSplitter, "feed")

    with pytest.raises(KeyboardInterrupt):
        while not run.receive(LONG_S):  # the end of stderr may come first
            pass

    assert finish(run)[0].answer == "all is well"


def test_raw_lines_need_not_be_kept(start: Start) -> None:
    result, _ = finish(start("well", keep_raw=False))

    assert result.raw_stdout_lines == []


def test_a_refusal_is_a_retry_event_and_no_part_of_stderr(start: Start) -> None:
    run = start("refused 429")

    event = receive_until(run, "retry")

    assert event["statusCode"] == 429
    assert event["message"] == "429 slow down (retry-after: 3600)"
    run.stop()
    result, _ = finish(run)
    assert result.stderr == ""


def test_log_lines_stay_where_they_were_asked_for(start: Start) -> None:
    run = start("refused 429", print_logs=True)
    receive_until(run, "retry")

    run.stop()

    result, _ = finish(run)
    assert "stream error" in result.stderr


def test_a_refusal_of_unknown_status_becomes_a_retry_once_nothing_follows(start: Start) -> None:
    event = receive_until(start("refused_without_status sleep"), "retry")

    assert event["message"] == "slow down"


def test_a_refusal_held_back_is_told_before_an_earlier_deadline(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_run, "PENDING_S", 600)
    run = start("refused_without_status sleep")
    while run._logs.pending is None:
        run.receive(LONG_S)

    event = receive_until(run, "retry", timeout=0.01)

    assert event["message"] == "slow down"


def test_an_incomplete_run_tells_what_it_said_on_stderr(start: Start) -> None:
    _, error = finish(start("complain_and_end_well"))

    assert isinstance(error, OpenCodeIncompleteError)
    assert str(error).splitlines() == [
        "opencode exited with status 0, but printed nothing",
        "Error: no such model",
    ]


@pytest.mark.parametrize(
    "words", ["database is locked", "SQLITE_BUSY: x", "Failed query: CREATE TABLE `x`"]
)
def test_a_lost_race_for_the_database_may_be_repeated(start: Start, words: str) -> None:
    run = start(f"fail 1 {words}")
    result, _ = finish(run)

    assert run.may_repeat(result)


def test_what_a_run_leaves_behind_can_be_kept_also_from_the_watchdog(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    spared: list[str] = []
    monkeypatch.setattr(watchdog, "spare", spared.append)
    run = start("leave_tools", keep_background=True)

    finish(run)

    assert spared == [run._token]
    assert run._process.stop()


# --- what cannot be started ----------------------------------------------------------------------


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        OpenCodeBinaryNotFoundError, match=r"'/nowhere' cannot be run: No such file"
    ):
        process_run(["/nowhere"], tmp_path)


def test_a_workspace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OpenCodeConfigError, match="has vanished"):
        process_run(["/bin/sh"], tmp_path / "gone")


@pytest.mark.parametrize(
    "error, kind, words",
    [
        pytest.param(
            PermissionError(errno.EACCES, "Permission denied", "/w"),
            OpenCodeConfigError,
            "workspace '/w' cannot be worked in: Permission denied",
            id="a workspace that is closed to us",
        ),
        pytest.param(
            PermissionError(errno.EACCES, "Permission denied", "/bin/x"),
            OpenCodeBinaryNotFoundError,
            "'/bin/x' cannot be run: Permission denied",
            id="a program that is closed to us",
        ),
        pytest.param(
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found"),
            OpenCodeError,
            "opencode cannot be started: No usable temporary directory found",
            id="no temporary directory",
        ),
        pytest.param(
            BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
            OpenCodeError,
            "opencode cannot be started: Resource temporarily unavailable",
            id="no process to be had",
        ),
    ],
)
def test_what_the_system_says_is_put_down_to_its_cause(
    error: OSError, kind: type[OpenCodeError], words: str
) -> None:
    found = _run.start_error(error, "/bin/x", "/w")

    assert type(found) is kind
    assert str(found) == words


def test_an_environment_that_is_too_large_is_told(tmp_path: Path) -> None:
    with pytest.raises(OpenCodeConfigError, match="environment is too large"):
        process_run(["/bin/sh"], tmp_path, env={"BIG": "x" * (4 << 20)})
