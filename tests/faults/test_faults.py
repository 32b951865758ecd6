"""Everything that can go wrong in a run ends within its bound, by name, with what was got."""

from __future__ import annotations

import os
import re
import resource
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opencode_sync import (
    OpenCodeBinaryNotFoundError,
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    RunResult,
)
from tests.endings import sleeping
from tests.faults import standin_client

STOPPED_S = 6.0  # a stop takes 5 s at most
EASY_S = 40.0  # for what takes a second on an idle machine

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[OpenCodeClient]:
    with standin_client(tmp_path) as client:
        yield client


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    return workspace


def result_of(error: OpenCodeError) -> RunResult:
    assert error.result is not None
    return error.result


# --- output of every kind ------------------------------------------------------------------------


def test_a_flood_of_events_arrives_whole(client: OpenCodeClient, workspace: Path) -> None:
    started = time.monotonic()

    result = client.run("flood 100000", workspace)

    assert len(result.events) == 100_002
    assert time.monotonic() - started < EASY_S


def test_a_flood_that_never_ends_is_stopped_by_the_deadline(
    client: OpenCodeClient, workspace: Path
) -> None:
    started = time.monotonic()

    with pytest.raises(OpenCodeTimeoutError) as caught:
        client.run("endless_flood", workspace, timeout_s=0.5)

    assert result_of(caught.value).status == "timed_out"
    assert len(result_of(caught.value).events) > 100
    assert time.monotonic() - started < EASY_S


def test_a_cut_line_is_told_and_kept(client: OpenCodeClient, workspace: Path) -> None:
    with pytest.raises(OpenCodeIncompleteError, match="in the middle of its line 3") as caught:
        client.run("cut_line", workspace)

    result = result_of(caught.value)
    assert result.truncated
    assert result.final_text == "whole"
    assert result.raw_stdout_lines[-1].endswith('"part": {"type": "text", "text":')


def test_a_run_without_a_closing_step_is_incomplete(
    client: OpenCodeClient, workspace: Path
) -> None:
    with pytest.raises(OpenCodeIncompleteError, match="without a closing step") as caught:
        client.run("no_closing_step", workspace)

    assert result_of(caught.value).final_text == "that is all"
    assert result_of(caught.value).status == "incomplete"


def test_what_is_missing_is_told_where_nothing_is_kept_too(
    client: OpenCodeClient, workspace: Path
) -> None:
    with (
        client.stream("cut_line", workspace, keep_events=False, keep_raw=False) as stream,
        pytest.raises(OpenCodeIncompleteError, match="in the middle of its line 3"),
    ):
        stream.wait()


def test_garbage_and_nul_bytes_become_diagnostics(client: OpenCodeClient, workspace: Path) -> None:
    result = client.run("garbage", workspace)

    kinds = [event.get("kind") for event in result.events if event["type"] == "diagnostic"]
    assert kinds == [
        "json_decode_error",
        "non_object_json",
        "empty_line",
        "json_decode_error",
        "json_decode_error",
    ]
    assert result.raw_stdout_lines[1] == "\0\0 no json \0"
    assert result.answer == "after the garbage"


def test_invalid_utf_8_is_replaced(client: OpenCodeClient, workspace: Path) -> None:
    assert client.run("invalid_utf8", workspace).final_text == "a\ufffd\ufffdb"


def test_a_line_of_50_mb_arrives_whole(client: OpenCodeClient, workspace: Path) -> None:
    started = time.monotonic()

    result = client.run("long_line 50", workspace)

    assert len(result.final_text) == 50 << 20
    assert time.monotonic() - started < EASY_S


def test_of_50_mb_on_stderr_the_error_s_text_has_the_end(
    client: OpenCodeClient, workspace: Path
) -> None:
    with pytest.raises(OpenCodeProcessError, match="status 3") as caught:
        client.run("fail_with_long_stderr 50", workspace)

    assert str(caught.value).endswith("the last words")
    assert len(str(caught.value)) < 3_000
    assert len(caught.value.stderr) > 50 << 20


# --- a child that does not go on, or does not go -------------------------------------------------


def test_deafness_to_sigterm_is_ended_by_sigkill(client: OpenCodeClient, workspace: Path) -> None:
    with pytest.raises(OpenCodeTimeoutError) as caught:
        client.run("deaf", workspace, timeout_s=0.5)

    assert result_of(caught.value).final_text == "I do not hear you"
    assert result_of(caught.value).exit_code == -signal.SIGKILL
    assert result_of(caught.value).duration_s < 0.5 + STOPPED_S


@pytest.mark.parametrize("prompt, text", [("silent", ""), ("fall_silent", "so far")])
def test_silence_ends_with_the_idle_limit(
    client: OpenCodeClient, workspace: Path, prompt: str, text: str
) -> None:
    with pytest.raises(OpenCodeTimeoutError, match=r"0\.5 s \(idle_timeout_s\)") as caught:
        client.run(prompt, workspace, idle_timeout_s=0.5)

    assert caught.value.limit == "idle_timeout_s"
    assert result_of(caught.value).final_text == text
    assert result_of(caught.value).duration_s < 0.5 + STOPPED_S


@pytest.mark.parametrize("prompt", ["chatter", "log_chatter"])
def test_what_is_heard_of_is_not_idle(client: OpenCodeClient, workspace: Path, prompt: str) -> None:
    with pytest.raises(OpenCodeTimeoutError) as caught:
        client.run(prompt, workspace, timeout_s=2.5, idle_timeout_s=2)

    assert caught.value.limit == "timeout_s"


def test_a_limit_beyond_all_clocks_is_no_limit(client: OpenCodeClient, workspace: Path) -> None:
    assert client.run("well", workspace, timeout_s=1e300, idle_timeout_s=1e300).status == "ok"


@pytest.mark.parametrize(
    "number", [signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGSEGV], ids=lambda n: n.name
)
def test_an_end_by_a_signal_is_named(client: OpenCodeClient, workspace: Path, number: int) -> None:
    with pytest.raises(OpenCodeProcessError, match=signal.Signals(number).name) as caught:
        client.run(f"die {number}", workspace, timeout_s=EASY_S)

    assert caught.value.exit_code == -number
    assert result_of(caught.value).final_text == "last words"


# --- start-ups -----------------------------------------------------------------------------------


def test_a_start_up_that_crashes_twice_succeeds_at_the_third_attempt(
    client: OpenCodeClient, workspace: Path
) -> None:
    result = client.run("locked 2", workspace, startup_retry_delay_s=0.01)

    assert result.status == "ok"
    assert result.attempts == 3
    assert result.exit_code == 0


@pytest.mark.parametrize("is_kept", [True, False], ids=["events kept", "nothing kept"])
def test_a_crash_after_the_first_event_is_not_repeated(
    client: OpenCodeClient, workspace: Path, is_kept: bool
) -> None:
    keeping = {"keep_events": is_kept, "keep_raw": is_kept}

    with (
        client.stream(
            "locked_after_an_event", workspace, startup_retry_delay_s=0.01, **keeping
        ) as stream,
        pytest.raises(OpenCodeProcessError, match="database is locked"),
    ):
        stream.wait()

    assert stream.result.attempts == 1
    assert (workspace / "starts").read_text() == "x"


def test_a_crash_for_another_reason_is_not_repeated(
    client: OpenCodeClient, workspace: Path
) -> None:
    with pytest.raises(OpenCodeProcessError, match="out of cheese") as caught:
        client.run("fail 4 out of cheese", workspace)

    assert caught.value.exit_code == 4
    assert result_of(caught.value).attempts == 1


# --- a machine that is at its end ----------------------------------------------------------------


def test_a_disk_that_fills_up_under_the_child_leaves_what_was_written(
    client: OpenCodeClient, workspace: Path
) -> None:
    with pytest.raises(OpenCodeProcessError) as caught:
        client.run("full_disk", workspace)

    result = result_of(caught.value)
    assert result.events[0]["type"] == "step_start"
    assert result.truncated


@pytest.mark.parametrize("prompt", ["fail_silently 1", "nothing", "full_disk"])
def test_what_fails_where_no_space_is_left_says_so(
    client: OpenCodeClient, workspace: Path, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    monkeypatch.setattr("opencode_sync.process.stderr.NEEDED_BYTES", 10**18)
    where = re.escape(repr(tempfile.gettempdir()))

    with pytest.raises(OpenCodeError, match=rf"only \d+\.\d MB are left in {where}"):
        client.run(prompt, workspace)


def test_what_fails_for_a_known_reason_says_nothing_of_space(
    client: OpenCodeClient, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opencode_sync.process.stderr.NEEDED_BYTES", 10**18)

    with pytest.raises(OpenCodeProcessError) as caught:
        client.run("refused_for nothing", workspace)

    assert "MB are left" not in str(caught.value)


def test_a_full_disk_before_the_start_is_told(client: OpenCodeClient, workspace: Path) -> None:
    client.run("well", workspace)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OpenCodeError, match="cannot be started: File too large"):
            client.run("well", workspace)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_log_file_on_a_full_disk_stops_the_run(client: OpenCodeClient, workspace: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")

    with pytest.raises(OpenCodeError, match=r"log_file '/dev/full': No space left") as caught:
        client.run("fall_silent", workspace, log_file="/dev/full")

    assert caught.value.__cause__ is not None


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_no_file_descriptor_left_is_told(client: OpenCodeClient, workspace: Path) -> None:
    client.run("well", workspace)

    with no_descriptor_left(), pytest.raises(OpenCodeError, match="Too many open files"):
        client.run("well", workspace)

    assert client.run("well", workspace).status == "ok"


def test_a_run_under_way_ends_well_with_no_file_descriptor_left(
    client: OpenCodeClient, workspace: Path
) -> None:
    stream = client.stream("leave_tools", workspace, timeout_s=EASY_S)

    with no_descriptor_left():
        result = stream.wait()

    assert result.status == "ok"


# --- what the run stands on ----------------------------------------------------------------------


def test_a_workspace_that_vanishes_under_the_run_is_no_fault_of_ours(
    client: OpenCodeClient, workspace: Path
) -> None:
    assert client.run("remove_workspace", workspace).final_text == "gone"


def test_a_workspace_that_has_vanished_is_refused(client: OpenCodeClient, workspace: Path) -> None:
    workspace.rmdir()

    with pytest.raises(OpenCodeConfigError, match="does not exist"):
        client.run("well", workspace)


def test_a_binary_that_the_system_cannot_run_is_named(workspace: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("just words")
    text.chmod(0o755)

    with OpenCodeClient(text) as client, pytest.raises(OpenCodeBinaryNotFoundError, match="format"):
        client.run("well", workspace)


# --- tools ---------------------------------------------------------------------------------------


def test_tools_that_outlive_the_run_are_stopped_with_its_end(
    client: OpenCodeClient, workspace: Path
) -> None:
    client.run("leave_tools", workspace)

    assert not sleeping(904)


def test_a_tool_that_holds_the_output_open_holds_up_nothing(
    client: OpenCodeClient, workspace: Path
) -> None:
    result = client.run("leave_tool_with_our_stdout", workspace, timeout_s=EASY_S)

    assert result.raw_stdout_lines[-1] != "too late"
    assert not sleeping(905)
