"""The warm server's verbs, with a stand-in for ``opencode serve``."""

from __future__ import annotations

import gc
import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import psutil
import pytest

from opencode_sync import (
    TESTED_VERSION,
    OpenCodeCancelledError,
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeProcessError,
    OpenCodeServerError,
    OpenCodeTimeoutError,
    RunConfig,
)
from opencode_sync.api.server import OpenCodeServer
from opencode_sync.core.request import Request
from opencode_sync.process import tree
from opencode_sync.process.data_dirs import UNPACKED
from opencode_sync.server.pool import Attacher, ServerPool
from opencode_sync.server.running import RunningServer
from tests.standin import write_serving
from tests.webserver import Answer, WebServer

WITHIN_S = 30


@pytest.fixture
def binary(tmp_path: Path) -> str:
    """A program that takes the place of opencode."""
    return str(write_serving(tmp_path / "opencode"))


@pytest.fixture
def serve(binary: str) -> Iterator[Callable[..., OpenCodeServer]]:
    made: list[OpenCodeServer] = []

    def serve(**settings: Any) -> OpenCodeServer:
        made.append(OpenCodeServer(binary, **settings))
        return made[-1]

    yield serve
    for server in made:
        server.close()


Serve = Callable[..., OpenCodeServer]


@pytest.fixture
def server(serve: Serve) -> OpenCodeServer:
    return serve()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    path = tmp_path / "workspace"
    path.mkdir()
    return path


def types(events: Any) -> list[str]:
    return [event["type"] for event in events]


# --- runs ----------------------------------------------------------------------------------------


def test_a_stream_gives_the_events_of_a_run_and_deltas_and_a_result(
    server: OpenCodeServer, workspace: Path
) -> None:
    with server.stream("say hello there", workspace) as stream:
        events = list(stream)

    result = stream.result
    assert types(events) == ["step_start", "text_delta", "text", "step_finish"]
    assert {event["sessionID"] for event in events} == {result.session_id}
    assert (result.status, result.final_text, result.finish_reason) == ("ok", "hello there", "stop")
    assert (result.total_cost, result.token_usage.output, result.turns) == (0.5, 20, 1)
    assert (result.attempts, result.exit_code, result.prompt) == (1, None, "say hello there")
    assert result.duration_s > 0


def test_an_error_of_the_turn_is_raised_with_its_words_and_the_result(
    server: OpenCodeServer, workspace: Path
) -> None:
    with pytest.raises(OpenCodeProcessError, match="ProviderError: broken") as caught:
        server.run("break", workspace)

    assert caught.value.result is not None
    assert caught.value.result.status == "error"
    assert types(caught.value.result.events) == ["step_start", "error"]


# --- sessions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["id", "being the latest"])
def test_a_session_is_continued(
    server: OpenCodeServer, workspace: Path, tmp_path: Path, by: str
) -> None:
    first = server.run("say one", workspace)
    server.run("say elsewhere", tmp_path)
    cfg = RunConfig(session_id=first.session_id) if by == "id" else RunConfig(continue_session=True)

    second = server.run("say two", workspace, run_cfg=cfg)

    assert second.session_id == first.session_id
    assert second.final_text == "two"


def test_a_fork_is_a_session_of_its_own(server: OpenCodeServer, workspace: Path) -> None:
    first = server.run("say one", workspace)
    cfg = RunConfig(session_id=first.session_id, fork=True)

    fork = server.run("say two", workspace, run_cfg=cfg)

    assert fork.session_id != first.session_id
    assert fork.final_text == "two"


@pytest.mark.parametrize("session_id", ["ses_unknown", "another form"])
def test_an_unknown_session_is_refused_by_name(
    server: OpenCodeServer, workspace: Path, session_id: str
) -> None:
    with pytest.raises(OpenCodeConfigError, match=f"session '{session_id}' is unknown"):
        server.run("say hello", workspace, run_cfg=RunConfig(session_id=session_id))


def test_a_session_of_another_directory_is_refused(
    server: OpenCodeServer, workspace: Path, tmp_path: Path
) -> None:
    session_id = server.run("say one", workspace).session_id

    with pytest.raises(OpenCodeConfigError, match="pass that workspace"):
        server.run("say two", tmp_path, run_cfg=RunConfig(session_id=session_id))


def test_a_session_takes_one_run_at_a_time(server: OpenCodeServer, workspace: Path) -> None:
    with server.stream("hold", workspace) as stream:
        next(stream)
        cfg = RunConfig(session_id=stream.session_id)

        with pytest.raises(OpenCodeConfigError, match="has a run under way"):
            server.run("say two", workspace, run_cfg=cfg)


# --- settings ------------------------------------------------------------------------------------


def test_a_setting_of_the_whole_server_is_refused_on_a_run(
    server: OpenCodeServer, workspace: Path
) -> None:
    with pytest.raises(OpenCodeConfigError, match="lean is the same for all"):
        server.run("say hello", workspace, run_cfg=RunConfig(lean=True))


@pytest.mark.parametrize(
    "env, words",
    [
        ({"OPENCODE_PURE": "1"}, r"OPENCODE_PURE leaves out all plugins.*unset"),
        ({"BUN_INSPECT_PRELOAD": ""}, "BUN_INSPECT_PRELOAD is set"),
        (None, "pure=True"),
    ],
    ids=["by a variable", "by another file", "by a setting"],
)
def test_a_server_without_our_plugin_is_refused(
    serve: Serve, env: dict[str, str] | None, words: str
) -> None:
    with pytest.raises(OpenCodeConfigError, match=words):
        serve(run_cfg=RunConfig(extra_env=env, pure=env is None)).run("say hello")


# --- stopping ------------------------------------------------------------------------------------


def tools_of(session_id: str | None) -> list[psutil.Process]:
    assert session_id is not None
    return tree.find(session_id)


def stop_by_closing(server: OpenCodeServer, workspace: Path) -> str | None:
    with server.stream("tool", workspace) as stream:
        next(event for event in stream if event["type"] == "text_delta")
        assert tools_of(stream.session_id)
    return stream.session_id


def stop_by_cancelling(server: OpenCodeServer, workspace: Path) -> str | None:
    stream = server.stream("tool", workspace)
    next(event for event in stream if event["type"] == "text_delta")
    threading.Timer(0.05, stream.cancel).start()
    with pytest.raises(OpenCodeCancelledError):
        stream.wait()
    return stream.session_id


def stop_by_closing_the_server(server: OpenCodeServer, workspace: Path) -> str | None:
    stream = server.stream("tool", workspace)
    next(event for event in stream if event["type"] == "text_delta")
    server.close()
    with pytest.raises(OpenCodeCancelledError):
        stream.wait()
    return stream.session_id


@pytest.mark.parametrize(
    "stop",
    [stop_by_closing, stop_by_cancelling, stop_by_closing_the_server],
    ids=lambda stop: stop.__name__.removeprefix("stop_by_"),
)
def test_a_run_that_is_stopped_leaves_no_tool(
    server: OpenCodeServer, workspace: Path, stop: Callable[..., str | None]
) -> None:
    session_id = stop(server, workspace)

    assert tools_of(session_id) == []


def test_a_run_that_is_stopped_leaves_the_others_alone(
    server: OpenCodeServer, workspace: Path
) -> None:
    other = server.stream("tool", workspace)
    next(event for event in other if event["type"] == "text_delta")

    stop_by_closing(server, workspace)

    assert len(tools_of(other.session_id)) == 1
    other.close()


def test_a_session_takes_the_next_prompt_after_a_stop(
    server: OpenCodeServer, workspace: Path
) -> None:
    session_id = stop_by_closing(server, workspace)

    result = server.run("say on", workspace, run_cfg=RunConfig(session_id=session_id))

    assert result.final_text == "on"


# --- the server's life ---------------------------------------------------------------------------


def test_a_block_has_one_server_for_all_runs_which_says_where_it_is_and_ends_with_it(
    serve: Serve, workspace: Path
) -> None:
    with serve() as server:
        pid, password = server.pid, server.password
        results = server.map([f"say {number}" for number in range(8)], workspace)
        assert [result.answer for result in results] == [str(number) for number in range(8)]
        assert server.pid == pid
        assert server.url.startswith("http://127.0.0.1:")
        assert server.version == TESTED_VERSION
        assert password is not None
        assert len(password) > 30
        assert password not in repr(server)
        assert password not in " ".join(psutil.Process(pid).cmdline())

    assert pid is not None
    assert not psutil.pid_exists(pid)
    with pytest.raises(OpenCodeConfigError, match="closed"):
        server.run("say hello")


def test_a_killed_server_fails_its_runs_at_once_with_what_they_had(
    server: OpenCodeServer, workspace: Path
) -> None:
    streams = [server.stream("tool", workspace) for _ in range(4)]
    for stream in streams:
        next(event for event in stream if event["type"] == "text_delta")
    assert server.pid is not None

    os.kill(server.pid, signal.SIGKILL)

    for stream in streams:
        with pytest.raises(OpenCodeServerError, match=r"signal 9 \(SIGKILL\)") as caught:
            stream.wait()
        assert caught.value.result is stream.result
        assert types(stream.result.events) == ["step_start", "text_delta"]
        assert tools_of(stream.session_id) == []


def test_after_its_death_the_next_run_starts_it_again_and_sessions_go_on(
    serve: Serve, workspace: Path, tmp_path: Path
) -> None:
    server = serve(data_dir=tmp_path / "kept")
    first, pid = server.run("say one", workspace), server.pid
    library = tmp_path / "kept" / "0" / UNPACKED / ".1-0.so"
    library.touch()
    with pytest.raises(OpenCodeServerError, match="exited with status 3"):
        server.run("die", workspace)

    second = server.run("say two", workspace, run_cfg=RunConfig(session_id=first.session_id))

    assert second.final_text == "two"
    assert server.pid != pid
    assert not library.exists()  # what the first one has unpacked


def test_a_prompt_that_may_have_been_taken_is_not_sent_to_the_next_server(
    serve: Serve, workspace: Path, tmp_path: Path
) -> None:
    server = serve(data_dir=tmp_path / "kept")

    with pytest.raises(OpenCodeServerError):
        server.run("vanish", workspace)

    [noted] = (tmp_path / "kept").rglob("vanished")
    assert len(noted.read_text().splitlines()) == 1


def test_a_server_that_grew_too_large_is_replaced_and_ends_with_its_last_run(
    serve: Serve, workspace: Path
) -> None:
    server = serve()
    stream = server.stream("hold", workspace)
    next(stream)
    cfg = RunConfig(session_id=stream.session_id)
    old = server.pid
    assert old is not None
    server._servers._max_memory_mb = 1

    # Too large from the start, and used all the same.
    assert [server.run(f"say {number}", workspace).answer for number in range(2)] == ["0", "1"]
    # The sessions are those of all servers.
    with pytest.raises(OpenCodeConfigError, match="has a run under way"):
        server.run("say hello", workspace, run_cfg=cfg)
    assert psutil.pid_exists(old)
    stream.close()
    assert not psutil.pid_exists(old)
    assert server.run("say hello", workspace, run_cfg=cfg).answer == "hello"


def test_a_data_directory_keeps_sessions_for_a_later_server(
    serve: Serve, workspace: Path, tmp_path: Path
) -> None:
    with serve(data_dir=tmp_path / "data") as before:
        session_id = before.run("say one", workspace).session_id

    after = serve(data_dir=tmp_path / "data")
    result = after.run("say two", workspace, run_cfg=RunConfig(session_id=session_id))

    assert result.session_id == session_id


@pytest.mark.parametrize(
    "start, words",
    [
        ("crash", "exited with status 1 before it listened: something is wrong"),
        ("silent", r"did not listen within 0.5 s \(startup_timeout_s\)"),
    ],
)
def test_a_server_that_does_not_start_is_an_error_with_its_words(
    serve: Serve, start: str, words: str
) -> None:
    cfg = RunConfig(extra_env={"SERVING_START": start})
    timeout_s = 0.5 if start == "silent" else WITHIN_S
    server = serve(run_cfg=cfg, startup_timeout_s=timeout_s)

    with pytest.raises(OpenCodeServerError, match=words):
        server.run("say hello")


@pytest.mark.skipif(sys.platform != "linux", reason="the environment is read in /proc")
def test_a_server_whose_environment_tells_the_password_is_refused(serve: Serve) -> None:
    server = serve(run_cfg=RunConfig(extra_env={"SERVING_START": "open"}))

    with pytest.raises(OpenCodeServerError, match="password is in its environment"):
        server.run("say hello")


def test_a_server_that_does_not_start_is_not_tried_again(tmp_path: Path) -> None:
    starts: list[str] = []

    class Failing(Attacher):
        def start(self, scope: Any, at_work: Any) -> RunningServer:
            starts.append(self.url)
            raise OpenCodeServerError("it does not start")

    starter = Failing("http://127.0.0.1:1")

    with pytest.raises(OpenCodeServerError, match="it does not start"):
        ServerPool(starter).begin(Request("say hello", tmp_path, RunConfig()))

    assert starts == ["http://127.0.0.1:1"]


def test_a_run_can_be_cancelled_while_the_server_starts_and_the_next_one_uses_that_server(
    serve: Serve, workspace: Path
) -> None:
    server = serve(run_cfg=RunConfig(extra_env={"SERVING_START": "slow"}))
    future = server.submit("say hello", workspace)
    threading.Timer(0.1, future.cancel).start()

    with pytest.raises(CancelledError):
        future.result(WITHIN_S)

    assert server.run("say hello", workspace).status == "ok"


def test_closing_does_not_wait_for_a_server_that_does_not_start(
    serve: Serve, workspace: Path, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    os.mkfifo(told)
    cfg = RunConfig(extra_env={"SERVING_START": "silent", "SERVING_TELLS": str(told)})
    server = serve(run_cfg=cfg, startup_timeout_s=10_000)
    future = server.submit("say hello", workspace)
    assert told.read_text() == "started"

    server.close()

    with pytest.raises(OpenCodeCancelledError, match="closed"):
        future.result(WITHIN_S)


def test_a_server_that_nobody_holds_any_more_ends(serve: Serve, binary: str) -> None:
    server = OpenCodeServer(binary)
    pid = server.pid
    assert pid is not None

    del server
    gc.collect()

    assert not psutil.pid_exists(pid)


ENDS = {"returns": "", "is killed": "os.kill(os.getpid(), 9)"}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_program_that_ends_takes_its_server_along(binary: str, workspace: Path, end: str) -> None:
    program = f"""
import os, sys
from opencode_sync.api.server import OpenCodeServer
server = OpenCodeServer({binary!r})
stream = server.stream("tool", {str(workspace)!r})
next(event for event in stream if event["type"] == "text_delta")
print(server.pid, stream.session_id, flush=True)
{end}
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=WITHIN_S
    )
    pid, session_id = run.stdout.split()

    deadline = time.monotonic() + 5
    while (psutil.pid_exists(int(pid)) or tools_of(session_id)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(int(pid))
    assert tools_of(session_id) == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12's own
def test_a_forked_child_starts_a_server_of_its_own(server: OpenCodeServer, workspace: Path) -> None:
    server.run("say hello", workspace)

    child = os.fork()
    if child == 0:
        status = 1
        try:
            with server:
                answer = server.run("say from the child", workspace).answer
            status = 0 if answer == "from the child" else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert server.run("say on", workspace).answer == "on"


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12's own
def test_a_child_that_was_forked_says_nothing_of_the_parent_s_server(
    server: OpenCodeServer, workspace: Path
) -> None:
    server.run("say hello", workspace)
    told, tells = os.pipe()

    child = os.fork()
    if child == 0:
        try:
            os.write(tells, repr(server).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(tells)

    with open(told) as words:
        assert "not started" in words.read()


# --- where it hangs; see live/test_hung_server.py too ---------------------------------------------


SLACK_S = 2.0 + 3.0  # what is promised beyond a limit, and what a busy machine may add


def test_a_start_that_hangs_is_left_at_the_limit(serve: Serve, workspace: Path) -> None:
    silent = RunConfig(extra_env={"SERVING_START": "silent"})
    server = serve(run_cfg=silent, startup_timeout_s=10_000)
    for limit in ("timeout_s", "idle_timeout_s"):
        started = time.monotonic()

        with pytest.raises(OpenCodeTimeoutError) as caught:
            server.run("say hello", workspace, **{limit: 0.5})

        assert time.monotonic() - started < 0.5 + SLACK_S
        assert caught.value.limit == limit
        assert caught.value.result is not None
        assert caught.value.result.status == "timed_out"


def test_a_start_that_hangs_is_left_by_a_run_that_is_cancelled(
    serve: Serve, workspace: Path
) -> None:
    silent = RunConfig(extra_env={"SERVING_START": "silent"})
    future = serve(run_cfg=silent, startup_timeout_s=10_000).submit("say hello", workspace)
    while not future.running():
        time.sleep(0.01)
    started = time.monotonic()

    future.cancel()

    assert time.monotonic() - started < SLACK_S
    with pytest.raises(OpenCodeCancelledError, match="cancelled"):
        future.result(SLACK_S)


def test_a_turn_on_a_server_that_hangs_ends_at_its_limit(
    server: OpenCodeServer, workspace: Path
) -> None:
    server.run("say warm", workspace)
    stream = server.stream("tool", workspace, timeout_s=3)
    next(event for event in stream if event["type"] == "text_delta")
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    started = time.monotonic()

    with pytest.raises(OpenCodeTimeoutError, match=r"3 s \(timeout_s\)") as caught:
        stream.wait()

    assert time.monotonic() - started < 3 + SLACK_S
    assert caught.value.result is stream.result
    assert tools_of(stream.session_id) == []


def test_a_server_elsewhere_that_never_answers_or_dribbles_ends_nobody_s_limit(
    workspace: Path,
) -> None:
    released = threading.Event()

    def dribble() -> Iterator[bytes]:
        while not released.wait(0.05):
            yield b" "

    with WebServer() as web:
        web.answers["/global/health"] = Answer({"version": "1.18.33"})
        web.answers["/session"] = lambda: Answer(dribble())
        with OpenCodeServer.connect(web.url) as dribbling:
            started = time.monotonic()
            with pytest.raises(OpenCodeTimeoutError, match="timeout_s"):
                dribbling.run("x", workspace, timeout_s=1)
            assert time.monotonic() - started < 1 + SLACK_S
        released.set()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        mute = OpenCodeServer.connect(url)
        started = time.monotonic()
        with pytest.raises(OpenCodeTimeoutError, match="timeout_s"):
            mute.run("x", workspace, timeout_s=1)
        assert time.monotonic() - started < 1 + SLACK_S
        started = time.monotonic()
        mute.close()
        assert time.monotonic() - started < SLACK_S


# --- elsewhere -----------------------------------------------------------------------------------


def test_a_server_elsewhere_is_used_and_not_stopped(
    server: OpenCodeServer, workspace: Path
) -> None:
    url = server.url.replace("http://", f"http://opencode:{server.password}@")

    with OpenCodeServer.connect(url) as there:
        result = there.run("say hello", workspace)
        assert (there.pid, there.url, there.password) == (None, server.url, server.password)

    assert result.final_text == "hello"
    assert server.run("say on", workspace).final_text == "on"


@pytest.mark.parametrize("password", ["not this one", None], ids=["wrong", "none"])
def test_a_wrong_password_is_named_and_not_shown(
    server: OpenCodeServer, workspace: Path, password: str | None
) -> None:
    there = OpenCodeServer.connect(server.url, password)

    with pytest.raises(OpenCodeServerError, match="wrong or missing password") as caught:
        there.run("say hello", workspace)

    assert caught.value.status_code == 401
    assert "not this one" not in f"{caught.value} {there!r}"


def test_attach_sends_a_run_to_the_server_that_it_names(
    serve: Serve, server: OpenCodeServer, workspace: Path
) -> None:
    other = serve()
    cfg = RunConfig(attach=server.url, password=server.password)

    result = other.run("say hello", workspace, run_cfg=cfg)

    assert result.final_text == "hello"
    assert "not started" in repr(other)
    with pytest.raises(OpenCodeConfigError, match="lean is the same for all"):
        other.run("say hello", workspace, run_cfg=cfg.replace(lean=True))


def attached_to(server: OpenCodeServer) -> OpenCodeClient:
    return OpenCodeClient(run_cfg=RunConfig(attach=server.url, password=server.password))


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12's own
def test_a_forked_child_of_an_attached_client_has_connections_of_its_own(
    server: OpenCodeServer, workspace: Path
) -> None:
    with attached_to(server) as client:
        client.run("say hello", workspace)
        inherited = client._attached[os.getpid()]

        child = os.fork()
        if child == 0:
            status = 1
            try:
                with client:
                    answer = client.run("say from the child", workspace).answer
                    is_own = client._attached[os.getpid()] is not inherited
                status = 0 if answer == "from the child" and is_own else 2
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)

        assert os.waitstatus_to_exitcode(status) == 0
        assert client.run("say on", workspace).answer == "on"


def test_an_attached_client_that_nobody_holds_any_more_disconnects(
    server: OpenCodeServer, workspace: Path
) -> None:
    server.run("say warm", workspace)
    before = set(threading.enumerate())
    client = attached_to(server)
    client.run("say hello", workspace)

    del client
    gc.collect()

    assert set(threading.enumerate()) <= before


def test_a_server_pickles_as_its_settings_a_connected_one_with_where_it_is(
    serve: Serve, server: OpenCodeServer, workspace: Path
) -> None:
    with serve(max_workers=3, run_cfg=RunConfig(model="a/b")) as other:
        assert pickle.loads(pickle.dumps(other))._settings == other._settings

    with OpenCodeServer.connect(server.url, server.password) as there:
        copy = pickle.loads(pickle.dumps(there))

    with copy:
        assert copy.run("say hello", workspace).final_text == "hello"


def test_the_settings_that_people_see_are_those_that_they_can_pass() -> None:
    for make in (OpenCodeServer, OpenCodeServer.connect):
        assert not [name for name in inspect.signature(make).parameters if name.startswith("_")]
