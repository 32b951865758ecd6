"""What is logged: starts, ends, limits, retries and stops; silent unless asked for."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opencode_sync import (
    OpenCodeCancelledError,
    OpenCodeClient,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
)
from tests.faults import standin_client, write_standin

ROOT = Path(__file__).parents[2]
WHO = r"run \d+ \(pid \d+\)"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[OpenCodeClient]:
    with standin_client(tmp_path) as client:
        yield client


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="opencode_sync")


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def test_a_run_s_start_and_end_are_told_with_number_pid_and_seconds(
    client: OpenCodeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client.run("well", tmp_path)

    started, ended = lines(caplog)
    assert re.fullmatch(rf"{WHO} started, attempt 1", started)
    assert re.fullmatch(rf"{WHO} ended after \d+\.\d s: ok", ended)
    assert started.split(")")[0] == ended.split(")")[0]


def test_a_limit_is_a_warning(
    client: OpenCodeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OpenCodeTimeoutError):
        client.run("silent", tmp_path, timeout_s=0.1)

    (warning,) = lines(caplog, logging.WARNING)
    assert re.fullmatch(rf"{WHO} ended after \d+\.\d s: timed_out \(timeout_s\)", warning)


def test_a_retry_is_a_warning_without_the_child_s_words(
    client: OpenCodeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OpenCodeProcessError):
        client.run("fail 1 database is locked: s3cret", tmp_path, max_retries=1, retry_delay_s=0)

    (warning,) = lines(caplog, logging.WARNING)
    assert re.fullmatch(rf"{WHO} failed to start \(exit status 1\), once more in 0\.0 s", warning)


def test_a_cancel_is_told_with_its_reason(
    client: OpenCodeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = client.stream("silent", tmp_path)

    stream.cancel("the user left")

    assert re.fullmatch(rf"{WHO} is stopped: the user left", lines(caplog)[1])
    assert lines(caplog)[2].endswith("cancelled")
    with pytest.raises(OpenCodeCancelledError):
        stream.wait()


def test_tools_that_were_left_behind_are_told(
    client: OpenCodeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client.run("leave_tools", tmp_path)

    assert any("left processes running" in line for line in lines(caplog))


def test_no_prompt_and_no_answer_is_logged_above_debug(
    client: OpenCodeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client.run("echo pineapple", tmp_path)
    with pytest.raises(OpenCodeProcessError):
        client.run("fail 1 pineapple", tmp_path)

    assert "pineapple" not in "".join(lines(caplog))


def test_nothing_is_printed_where_logging_was_not_asked_for(tmp_path: Path) -> None:
    program = """
import sys
from opencode_sync import OpenCodeClient, OpenCodeTimeoutError
with OpenCodeClient(sys.argv[1]) as client:
    try:
        client.run("silent", sys.argv[2], timeout_s=0.1)
    except OpenCodeTimeoutError:
        pass
"""

    done = subprocess.run(
        [sys.executable, "-c", program, write_standin(tmp_path), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )

    assert done.stdout == b""
    assert done.stderr == b""
