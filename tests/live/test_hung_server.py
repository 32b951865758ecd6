"""A server that hangs, stopped by a signal: whatever waits for it ends in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from opencode_sync import (
    OpenCodeCancelledError,
    OpenCodeServer,
    OpenCodeServerError,
    OpenCodeTimeoutError,
    RunConfig,
)
from opencode_sync.server import running
from opencode_sync.testing import Reply, ScriptedModel
from tests.live.warm import Script, config, shell

WITHIN_S = 60
LIMIT_S = 2.0
# Beyond the limit: what is promised, and what a machine with other work may add.
OVER_S = 2.0 + 3.0


@pytest.fixture
def server(opencode_binary: str, model: ScriptedModel) -> Iterator[OpenCodeServer]:
    with OpenCodeServer(opencode_binary, run_cfg=config(model)) as server:
        yield server


def pid_of(server: OpenCodeServer) -> int:
    assert server.pid is not None
    return server.pid


def stop(server: OpenCodeServer) -> int:
    pid = pid_of(server)
    os.kill(pid, signal.SIGSTOP)
    return pid


def took_s(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def timed_out_after_s(work: Callable[[], object], limit: str) -> float:
    started = time.monotonic()
    with pytest.raises(OpenCodeTimeoutError, match=limit):
        work()
    return time.monotonic() - started


def test_what_waits_for_a_server_that_hangs_ends_in_time_and_by_its_name(
    server: OpenCodeServer, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "ANSWER_S", WITHIN_S)  # or it is ended by what is tested below
    gate = threading.Event()
    script.to("Warm up", "Warm.")
    slow = script.to("Take your time", Reply(["Begun. ", gate, "Done."]))
    server.run("Warm up", tmp_path)
    streams = [server.stream(slow, tmp_path, timeout_s=30 * LIMIT_S) for _ in range(2)]
    for stream in streams:
        next(event for event in stream if event["type"] == "text_delta")
    with_limit = server.stream(slow, tmp_path, idle_timeout_s=LIMIT_S)
    next(event for event in with_limit if event["type"] == "text_delta")
    pid = stop(server)
    try:
        for limit in ("timeout_s", "idle_timeout_s"):
            started = time.monotonic()
            with pytest.raises(OpenCodeTimeoutError) as caught:
                server.run("Another", tmp_path, **{limit: LIMIT_S})
            assert time.monotonic() - started < LIMIT_S + OVER_S
            assert caught.value.limit == limit
            assert caught.value.result is not None
            assert caught.value.result.status == "timed_out"

        assert timed_out_after_s(with_limit.wait, "idle_timeout_s") < LIMIT_S + OVER_S

        future = server.submit("Another", tmp_path)
        assert took_s(future.cancel) < OVER_S
        with pytest.raises(OpenCodeCancelledError):
            future.result(OVER_S)

        assert took_s(streams[0].cancel) < OVER_S
        with pytest.raises(OpenCodeCancelledError):
            streams[0].wait()

        assert took_s(server.close) < OVER_S
        with pytest.raises(OpenCodeCancelledError):
            streams[1].wait()
        assert not psutil.pid_exists(pid)
    finally:
        gate.set()


def test_a_server_that_hangs_is_replaced_and_who_waits_for_it_is_told(
    server: OpenCodeServer, script: Script, tmp_path: Path
) -> None:
    script.to("Warm up", "Warm.")
    script.to("Go on", "Gone on.")
    slow = script.to("Take long", Reply.calls(shell("sleep 904")))
    first = server.run("Warm up", tmp_path)
    stream = server.stream(slow, tmp_path)
    next(event for event in stream if event["type"] == "step_start")
    pid = stop(server)

    # It was not sent to the one that hangs, so that the next one may take it.
    again = server.run("Go on", tmp_path, run_cfg=RunConfig(session_id=first.session_id))

    assert again.answer == "Gone on."
    with pytest.raises(OpenCodeServerError, match="did not answer for 10 s"):
        stream.wait()
    assert pid_of(server) != pid
    assert not psutil.pid_exists(pid)


def test_a_server_elsewhere_that_hangs_is_not_waited_for_longer_than_told(
    server: OpenCodeServer, script: Script, tmp_path: Path
) -> None:
    script.to("Warm up", "Warm.")
    with OpenCodeServer.connect(server.url, server.password) as there:
        there.run("Warm up", tmp_path)
        stop(server)

        ended_after_s = timed_out_after_s(
            lambda: there.run("x", tmp_path, timeout_s=LIMIT_S), "timeout_s"
        )

        assert ended_after_s < LIMIT_S + OVER_S
        assert took_s(there.close) < OVER_S
