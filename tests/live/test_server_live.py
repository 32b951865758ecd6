"""The warm server with the real opencode: one for all tests, and one to be killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from opencode_sync import (
    OpenCodeClient,
    OpenCodeServerError,
    RunConfig,
)
from opencode_sync.api.server import OpenCodeServer
from opencode_sync.core.events import Event
from opencode_sync.testing import Reply, ScriptedModel
from tests.live.warm import Script, Tools, config, conversation, shell

WITHIN_S = 60


def until_text(stream: Iterator[Event], kind: str = "text_delta") -> Event:
    return next(event for event in stream if event["type"] == kind)


# --- events --------------------------------------------------------------------------------------


def test_a_turn_s_events_are_those_that_opencode_run_prints(
    server: OpenCodeServer,
    workspace: Path,
    script: Script,
    model: ScriptedModel,
    opencode_binary: str,
) -> None:
    looking = Reply("Let me look.", tool_calls=[shell("echo found; exit 3")], reasoning="Hm.")
    prompt = script.to("Compare", looking, "Found.")

    with OpenCodeClient(opencode_binary) as client:
        printed = client.run(prompt, workspace, run_cfg=config(model, thinking=True))
    told = server.run(prompt, workspace, run_cfg=RunConfig(thinking=True))

    deltas = ("text_delta", "reasoning_delta")
    events = [event for event in told.events if event["type"] not in deltas]
    assert sorted(map(shape, events)) == sorted(map(shape, printed.events))
    assert told.final_text == printed.final_text
    assert told.token_usage == printed.token_usage
    assert told.total_cost == pytest.approx(printed.total_cost)
    assert [event["type"] for event in told.events if event["type"] in deltas] == [
        "reasoning_delta",
        "text_delta",
        "text_delta",
    ]


def shape(event: Event) -> str:
    """What of *event* is the same in each run: all but ids and times."""
    part = {key: value for key, value in event["part"].items() if key not in ("id", "messageID")}
    part.pop("sessionID", None)
    part.pop("callID", None)
    part.pop("snapshot", None)
    part["time"] = sorted(part.pop("time", ()))
    if "state" in part:
        part["state"] = {**part["state"], "time": sorted(part["state"]["time"])}
    return json.dumps([sorted(event), event["type"], part], sort_keys=True)


def test_a_delta_comes_before_the_model_has_finished(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    released = threading.Event()
    prompt = script.to("Slowly", Reply(["first ", released, "second"]))

    with server.stream(prompt, workspace) as stream:
        first = until_text(stream)
        was_released = released.is_set()
        released.set()
        rest = [event["type"] for event in stream]

    assert first["delta"] == "first "
    assert not was_released
    assert rest == ["text_delta", "text", "step_finish"]
    assert stream.result.final_text == "first second"


# --- directories ---------------------------------------------------------------------------------


def test_directories_are_served_side_by_side(
    server: OpenCodeServer, script: Script, tmp_path: Path
) -> None:
    script.to("Where?", shell("pwd"), "There.")
    directories = [tmp_path / str(number) for number in range(3)]
    for directory in directories:
        directory.mkdir()

    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(lambda path: server.run("Where?", path), directories))

    outputs = [result.tool_calls[0]["part"]["state"]["output"] for result in results]
    assert outputs == [f"{directory}\n" for directory in directories]


# --- secrets -------------------------------------------------------------------------------------


def test_no_tool_can_read_the_password(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    look = "env; for p in /proc/[0-9]*; do tr '\\0' '\\n' < $p/environ; done 2>/dev/null"
    prompt = script.to("Look for it", shell(f"({look}) > seen.txt; echo looked"), "Looked.")

    server.run(prompt, workspace)

    seen = (workspace / "seen.txt").read_text(errors="replace")
    assert "OPENCODE_SYNC_RUN=" in seen
    assert server.password is not None
    assert server.password not in seen
    for wrong in (None, "*" * len(server.password)):  # it still asks for it
        with pytest.raises(OpenCodeServerError, match="401 wrong or missing password"):
            OpenCodeServer.connect(server.url, wrong).sessions()


def test_the_password_of_a_server_that_nobody_has_asked_yet_cannot_be_read(
    opencode_binary: str, model: ScriptedModel
) -> None:
    with OpenCodeServer(opencode_binary, run_cfg=config(model)) as idle:
        assert idle.password is not None
        assert idle.pid is not None
        told = subprocess.run(
            ["ps", "eww", "-o", "args", "-p", str(idle.pid)], capture_output=True, text=True
        )

        assert "OPENCODE_SERVER_PASSWORD=***" in told.stdout
        assert idle.password not in told.stdout
        assert idle.sessions() == []  # it asks for the same one still
        for wrong in (None, "", "*" * len(idle.password)):
            with (
                pytest.raises(OpenCodeServerError, match="401"),
                OpenCodeServer.connect(idle.url, wrong),
            ):
                pass


# --- broken connections --------------------------------------------------------------------------


def connections_to(port: int) -> set[int]:
    """The descriptors of what this process has open to a server."""
    found = psutil.Process().net_connections("tcp")
    return {each.fd for each in found if each.raddr and each.raddr.port == port}


def test_an_event_stream_that_is_cut_in_mid_turn_leaves_the_result_whole(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    released = threading.Event()
    steps = (
        Reply("Before.", tool_calls=[shell("echo one")]),
        Reply(["Mid", released, "dle."], tool_calls=[shell("echo two")]),
        Reply("After."),
    )
    prompt = script.to("Cut me", *steps)
    port = int(server.url.rpartition(":")[2])

    shared = connections_to(port)
    with (
        OpenCodeServer.connect(server.url, server.password) as there,
        there.stream(prompt, workspace) as stream,
    ):
        for event in stream:
            if event.get("delta") == "Mid":
                for descriptor in connections_to(port) - shared:
                    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as ours:
                        ours.shutdown(socket.SHUT_RDWR)
                released.set()

    types = [event["type"] for event in stream.result.events if event["type"] != "text_delta"]
    assert types.count("step_start") == types.count("step_finish") == types.count("text") == 3
    assert [call["part"]["state"]["output"] for call in stream.result.tool_calls] == [
        "one\n",
        "two\n",
    ]
    assert stream.result.final_text == "Before.\n\nMiddle.\n\nAfter."
    assert stream.result.status == "ok"


# --- npm -----------------------------------------------------------------------------------------


def test_a_registry_that_never_answers_holds_a_first_start_for_seconds_alone(
    opencode_binary: str, model: ScriptedModel, script: Script, tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"
    (workspace / ".opencode").mkdir(parents=True)
    prompt = script.to("Show npm's", shell("env | grep ^npm_config_fetch"), "Shown.")
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel takes connections
        registry = f"http://127.0.0.1:{listener.getsockname()[1]}"
        env = {name: str(tmp_path / name) for name in ("HOME", "XDG_CONFIG_HOME")}
        cfg = config(model, inherit_user_config=True)
        cfg = cfg.replace(extra_env={**env, "npm_config_registry": registry})
        with OpenCodeServer(opencode_binary, run_cfg=cfg) as server:
            result = server.run(prompt, workspace, timeout_s=40)

    (seen,) = (call["part"]["state"]["output"] for call in result.tool_calls)
    assert sorted(seen.split()) == [
        "npm_config_fetch_retries=2",
        "npm_config_fetch_timeout=300000",
    ]


# --- the server's death --------------------------------------------------------------------------


def test_a_killed_server_fails_its_runs_and_is_started_again(
    opencode_binary: str, model: ScriptedModel, script: Script, tmp_path: Path
) -> None:
    script.to("Remember me", "I do.")
    script.to("Do you?", "Yes.")
    tools = Tools(tmp_path / "left.pids")
    leaving = script.to("Leave something", Reply("Leaving.", tool_calls=[tools.call]), "Left.")
    waiting = script.to("Wait", Reply.hang("Waiting."))

    with OpenCodeServer(opencode_binary, run_cfg=config(model)) as server:
        first = server.run("Remember me", tmp_path)
        streams = [server.stream(prompt, tmp_path) for prompt in (leaving, waiting)]
        for stream in streams:
            until_text(stream)
        tools.wait_until_started()
        assert server.pid is not None

        os.kill(server.pid, signal.SIGKILL)
        started = time.monotonic()
        for stream in streams:
            with pytest.raises(OpenCodeServerError, match="signal 9") as caught:
                stream.wait()
            assert caught.value.result is stream.result
        took_s = time.monotonic() - started
        tools.wait_until_gone()
        again = server.run("Do you?", tmp_path, run_cfg=RunConfig(session_id=first.session_id))

    assert took_s < 10  # and not for as long as a limit
    assert again.answer == "Yes."
    assert conversation(script.requests[-1]) == ["Remember me", "I do.", "Do you?"]
