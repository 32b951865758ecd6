"""A client: what it is made of, what it refuses, and each way for a run of its to end."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import math
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from opencode_sync import (
    OpenCodeBinaryNotFoundError,
    OpenCodeCancelledError,
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeServer,
    RunConfig,
    RunStream,
)
from tests.endings import Tools
from tests.faults import standin_client

NO_BINARY = "/none/opencode"
LONG_S = 30.0


@pytest.fixture
def client(tmp_path: Path) -> Iterator[OpenCodeClient]:
    """A client of the stand-in, whose prompts say what it does."""
    with standin_client(tmp_path) as client:
        yield client


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    return workspace


@pytest.fixture
def tools(workspace: Path) -> Tools:
    return Tools(workspace)


# --- what it is made of --------------------------------------------------------------------------


def test_making_a_client_needs_no_binary_and_makes_nothing(tmp_path: Path) -> None:
    with OpenCodeClient(NO_BINARY, data_dir=tmp_path / "kept"):
        made = list(tmp_path.iterdir())

    assert made == []


PATH, COUNT = "use the path of a directory", "use 1 or more, or None"
SETTINGS: list[tuple[type[OpenCodeClient | OpenCodeServer], dict[str, Any], str]] = [
    (OpenCodeClient, {"startup_concurrency": -1}, "is -1: use 0 or more, or None"),
    (OpenCodeClient, {"startup_concurrency": 1.5}, "is 1.5: use 0 or more, or None"),
    (OpenCodeClient, {"startup_delay_s": -0.1}, "is -0.1: use a number of 0 or more"),
    (OpenCodeClient, {"startup_delay_s": math.nan}, "is nan: use a number of 0 or more"),
    (OpenCodeClient, {"max_workers": 0}, f"is 0: {COUNT}"),
    (OpenCodeClient, {"max_workers": True}, f"is True: {COUNT}"),
    (OpenCodeClient, {"max_workers": "4"}, f"is '4': {COUNT}"),
    (OpenCodeClient, {"max_workers": 10**400}, f"is larger than {sys.maxsize}: use a smaller"),
    (OpenCodeClient, {"data_dir": ""}, f"is '': {PATH}"),
    (OpenCodeClient, {"data_dir": 5}, f"is 5: {PATH}"),
    (OpenCodeClient, {"data_dir": b"kept"}, f"is b'kept': {PATH}"),
    (OpenCodeClient, {"data_dir": "a\0b"}, f"is 'a\\x00b': {PATH}"),
    (OpenCodeClient, {"data_dir": "~nobody-of-that-name/a"}, "there is no such home: use an abs"),
    (OpenCodeClient, {"run_cfg": {"model": "a/b"}}, "is dict: use a RunConfig"),
    (OpenCodeClient, {"binary": b"opencode"}, "is b'opencode': use a path, or a name on PATH"),
    (OpenCodeClient, {"isolate_db": "no"}, "is 'no': use True or False"),
    (OpenCodeClient, {"watchdog": "no"}, "is 'no': use True or False"),
    (OpenCodeServer, {"run_cfg": {"model": "a/b"}}, "is dict: use a RunConfig"),
    (OpenCodeServer, {"binary": 3}, "is 3: use a path, or a name on PATH"),
    (OpenCodeServer, {"data_dir": "~nobody-of-that-name/a"}, "there is no such home: use an abs"),
    (OpenCodeServer, {"max_workers": 0}, f"is 0: {COUNT}"),
    (OpenCodeServer, {"startup_timeout_s": math.nan}, "is nan: use a number above 0"),
    (OpenCodeServer, {"watchdog": None}, "is None: use True or False"),
    (OpenCodeServer, {"max_memory_mb": "2 GB"}, f"is '2 GB': {COUNT}"),
]


@pytest.mark.parametrize("kind, settings, message", SETTINGS, ids=repr)
def test_a_setting_that_makes_no_sense_is_refused_by_name(
    kind: type[OpenCodeClient | OpenCodeServer], settings: dict[str, Any], message: str
) -> None:
    (name,) = settings

    with pytest.raises(OpenCodeConfigError) as raised:
        kind(**settings)

    assert str(raised.value).startswith(name)
    assert message in str(raised.value)


def test_the_binary_is_looked_for_once(tmp_path: Path) -> None:
    program = tmp_path / "oc"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with OpenCodeClient(program) as client:
        first = client.resolved_binary()

        program.unlink()

        assert client.resolved_binary() == first == str(program)


def test_a_binary_that_was_missing_is_looked_for_again(tmp_path: Path) -> None:
    program = tmp_path / "oc"
    with OpenCodeClient(program) as client:
        with pytest.raises(OpenCodeBinaryNotFoundError):
            client.resolved_binary()

        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)

        assert client.resolved_binary() == str(program)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda client: pickle.loads(pickle.dumps(client))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_of_a_client_has_its_settings_and_a_life_of_its_own(
    tmp_path: Path, copied: Any
) -> None:
    cfg = RunConfig(model="a/b", permission={"bash": "deny"})
    client = OpenCodeClient(
        NO_BINARY, 2, 0.5, False, data_dir=tmp_path, run_cfg=cfg, max_workers=3, watchdog=False
    )

    with copied(client) as twin:
        client.close()

        assert twin.__getstate__() == client.__getstate__()
        with pytest.raises(OpenCodeBinaryNotFoundError):
            twin.run("Explain")


def test_the_repr_tells_binary_and_state() -> None:
    client = OpenCodeClient(NO_BINARY)
    before = repr(client)

    client.close()
    client.close()

    assert before == "<OpenCodeClient binary='/none/opencode', 0 running>"
    assert repr(client) == "<OpenCodeClient binary='/none/opencode', closed>"


def test_a_closed_server_is_not_started_by_a_question() -> None:
    server = OpenCodeServer(NO_BINARY)
    server.close()

    with pytest.raises(OpenCodeConfigError, match="OpenCodeServer is closed: make a new one"):
        server.url  # noqa: B018 - asking for it starts one


# --- what it refuses -----------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "run_cfg of a type": ({"run_cfg": {"model": "a/b"}}, "run_cfg is dict: use a RunConfig"),
    "class as run_cfg": ({"run_cfg": RunConfig}, "run_cfg is type: use a RunConfig"),
    "ask": ({"run_cfg": RunConfig(permission={"edit": {"*.py": "ask"}})}, "permission 'edit.*.py'"),
    "no session yet": (
        {"run_cfg": RunConfig(fork=True, continue_session=True)},
        "fork=True, but there is no session yet",
    ),
    "session of somebody else": (
        {"run_cfg": RunConfig(session_id="ses_1")},
        "session 'ses_1' is unknown here",
    ),
    "huge variable": (
        {"run_cfg": RunConfig(extra_env={"A": "x" * 200_000})},
        "make title, extra_env, config_overrides or",
    ),
    "lone surrogate in a variable": (
        {"run_cfg": RunConfig(extra_env={"A": "\ud800"})},
        "it cannot be encoded",
    ),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_run_is_refused(
    client: OpenCodeClient, workspace: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OpenCodeConfigError) as raised:
        client.run("well", workspace, **options)

    assert message in str(raised.value)
    assert raised.value.result is None


def test_the_settings_of_a_run_stand_in_place_of_the_clients() -> None:
    with OpenCodeClient(NO_BINARY, run_cfg=RunConfig(model="gpt")) as client:
        with pytest.raises(OpenCodeConfigError, match="model 'gpt' names no provider"):
            client.run("Explain")
        with pytest.raises(OpenCodeBinaryNotFoundError, match="no file '/none/opencode'"):
            client.run("Explain", run_cfg=RunConfig())


def test_settings_that_are_changed_inside_are_checked_once_more(client: OpenCodeClient) -> None:
    given: dict[str, Any] = {"bash": "deny"}
    cfg = RunConfig(permission=given)

    given["bash"] = "ask"  # the caller's own, which was copied
    client.run("well", run_cfg=cfg)
    cfg.permission["bash"] = "ask"  # type: ignore[index]

    with pytest.raises(OpenCodeConfigError, match="permission 'bash' is 'ask'"):
        client.run("well", run_cfg=cfg)


# --- one client, many threads --------------------------------------------------------------------


def test_closing_the_client_in_a_run_s_start_leaves_nothing(
    tmp_path: Path, workspace: Path
) -> None:
    outcomes = []

    def run(client: OpenCodeClient) -> None:
        try:
            outcomes.append(client.run("fall_silent", workspace, timeout_s=LONG_S))
        except (OpenCodeCancelledError, OpenCodeConfigError) as error:
            outcomes.append(error)

    for _ in range(20):
        client = standin_client(tmp_path)
        running = threading.Thread(target=run, args=[client])
        running.start()
        client.close()
        running.join(LONG_S)

    assert len(outcomes) == 20
    assert all(isinstance(outcome, Exception) for outcome in outcomes)


def test_closing_the_client_ends_a_start_that_says_nothing(tmp_path: Path, workspace: Path) -> None:
    client = standin_client(tmp_path, isolate_db=False, startup_delay_s=3600)
    errors = []

    def run() -> None:
        with pytest.raises(OpenCodeCancelledError) as caught:
            client.run("silent", workspace)
        errors.append(caught.value)

    running = threading.Thread(target=run, daemon=True)
    before = {*psutil.Process().children()}
    running.start()
    deadline = time.monotonic() + LONG_S
    while not {*psutil.Process().children()} - before:
        assert time.monotonic() < deadline
    client.close()
    running.join(LONG_S)

    assert [str(error) for error in errors] == ["the runner was closed"]


def test_a_shared_data_directory_has_the_user_s_credentials_too(
    tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = tmp_path / "user" / "opencode"
    user.mkdir(parents=True)
    (user / "auth.json").write_text("{}")
    monkeypatch.setenv("XDG_DATA_HOME", str(user.parent))

    with standin_client(tmp_path, isolate_db=False, data_dir=tmp_path / "shared") as client:
        client.run("well", workspace)

    assert (tmp_path / "shared" / "opencode" / "auth.json").readlink() == user / "auth.json"


def test_finalisers_that_run_in_the_midst_of_other_runs_deadlock_nothing(
    client: OpenCodeClient, workspace: Path
) -> None:
    def lose_one_and_run_another() -> None:
        stream = client.stream("fall_silent", workspace)
        stream.itself = stream  # type: ignore[attr-defined]
        next(stream)
        del stream
        client.run("flood 1000", workspace)

    thresholds = gc.get_threshold()
    gc.set_threshold(1)  # nearly every allocation collects, in whichever thread makes it
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(lose_one_and_run_another) for _ in range(12)]
            for future in futures:
                future.result(60)
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()

    assert "0 running" in repr(client)


# --- forks ---------------------------------------------------------------------------------------


def test_a_forked_child_can_use_the_client_while_the_parent_does(
    client: OpenCodeClient, workspace: Path, tools: Tools
) -> None:
    stream = client.stream("with_tools", workspace)
    tools.wait_until_started()

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if client.run("echo child", workspace).answer == "child" else 2
            client.close()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)

    assert status == 0
    assert len(tools.living()) == 3
    stream.close()
    assert client.run("well", workspace).status == "ok"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_closing_the_client_in_a_forked_child_ends_what_the_child_has_begun(
    client: OpenCodeClient, workspace: Path
) -> None:
    with client.stream("with_tools", workspace) as ours:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                stream = client.stream("with_tools", workspace)
                counted = "1 running" in repr(client)
                client.close()
                status = 0 if counted and stream.result.status == "cancelled" else 2
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)

        assert status == 0
        assert not ours.wait_ended(0)


# --- each way to end -----------------------------------------------------------------------------

End = Callable[[RunStream], None]


def leave_the_loop(stream: RunStream) -> None:
    with stream:
        for _ in stream:
            break


def raise_in_the_loop(stream: RunStream) -> None:
    with pytest.raises(ZeroDivisionError), stream:
        for _ in stream:
            raise ZeroDivisionError


def cancel_from_another_thread(stream: RunStream) -> None:
    thread = threading.Thread(target=stream.cancel)
    thread.start()
    with pytest.raises(OpenCodeCancelledError):
        stream.wait()
    thread.join(LONG_S)


def interrupt(stream: RunStream) -> None:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            stream.wait()
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "end",
    [RunStream.close, leave_the_loop, raise_in_the_loop, cancel_from_another_thread, interrupt],
    ids=lambda end: end.__name__.replace("_", " "),
)
def test_when_control_returns_the_tools_are_gone(
    client: OpenCodeClient, workspace: Path, tools: Tools, end: End
) -> None:
    stream = client.stream("with_tools", workspace)
    tools.wait_until_started()

    end(stream)

    assert not tools.living()
