"""The warm server's verbs, with a stand-in for ``opencode serve``."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from opencode_sync import (
    TESTED_VERSION,
    OpenCodeCancelledError,
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeServerError,
    OpenCodeTimeoutError,
    RunConfig,
    RunStream,
)
from opencode_sync.api.server import OpenCodeServer
from opencode_sync.process import tree
from opencode_sync.process.data_dirs import UNPACKED
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


def test_a_session_of_another_directory_is_refused(
    server: OpenCodeServer, workspace: Path, tmp_path: Path
) -> None:
    session_id = server.run("say one", workspace).session_id

    with pytest.raises(OpenCodeConfigError, match="pass that workspace"):
        server.run("say two", tmp_path, run_cfg=RunConfig(session_id=session_id))


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


def with_tool(server: OpenCodeServer, workspace: Path, **limits: float) -> RunStream:
    """A stream whose tool runs."""
    stream = server.stream("tool", workspace, **limits)  # type: ignore[arg-type]
    next(event for event in stream if event["type"] == "text_delta")
    assert len(tools_of(stream.session_id)) == 1
    return stream


def test_a_run_that_is_stopped_leaves_the_others_alone(
    server: OpenCodeServer, workspace: Path
) -> None:
    with with_tool(server, workspace) as other, with_tool(server, workspace) as stream:
        stream.close()

        assert tools_of(stream.session_id) == []
        assert len(tools_of(other.session_id)) == 1


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


def test_after_its_death_the_next_run_starts_it_again_and_sessions_go_on(
    serve: Serve, workspace: Path, tmp_path: Path
) -> None:
    server = serve(data_dir=tmp_path / "kept")
    library = tmp_path / "kept" / "0" / UNPACKED / ".1-0.so"
    with server.session(workspace) as chat:
        chat.send("say one")
        library.touch()
        with pytest.raises(OpenCodeServerError, match="status 3; the next call starts a new one"):
            chat.send("die")

        assert chat.send("say two").final_text == "two"
        assert not library.exists()  # what the first one has unpacked


def test_a_question_about_a_session_that_the_server_dies_of_says_so(
    server: OpenCodeServer, workspace: Path
) -> None:
    with server.session(workspace, title="fatal") as chat:
        chat.send("say one")

        with pytest.raises(OpenCodeServerError, match="status 3; the next call starts a new one"):
            chat.messages()


def test_a_prompt_that_may_have_been_taken_is_not_sent_to_the_next_server(
    serve: Serve, workspace: Path, tmp_path: Path
) -> None:
    server = serve(data_dir=tmp_path / "kept")

    with pytest.raises(OpenCodeServerError, match="status 3; the next call starts a new one"):
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


def succeeds_in_a_fork(work: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12's own
def test_a_forked_child_starts_a_server_of_its_own(server: OpenCodeServer, workspace: Path) -> None:
    server.run("say hello", workspace)

    def work() -> bool:
        knows_none = "not started" in repr(server)  # of the parent's
        with server:
            return knows_none and server.run("say hello", workspace).answer == "hello"

    assert succeeds_in_a_fork(work)
    assert server.run("say on", workspace).answer == "on"


# --- where it hangs; see live/test_hung_server.py too ---------------------------------------------


SLACK_S = 2.0 + 3.0  # what is promised beyond a limit, and what a busy machine may add


@contextmanager
def ends_within(limit_s: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < limit_s + SLACK_S


@pytest.mark.parametrize("limit", ["timeout_s", "idle_timeout_s"])
def test_a_start_that_hangs_is_left_at_the_limit(serve: Serve, workspace: Path, limit: str) -> None:
    silent = RunConfig(extra_env={"SERVING_START": "silent"})
    server = serve(run_cfg=silent, startup_timeout_s=10_000)

    with ends_within(0.5), pytest.raises(OpenCodeTimeoutError, match=limit) as caught:
        server.run("say hello", workspace, **{limit: 0.5})  # type: ignore[arg-type]

    assert caught.value.result is not None
    assert caught.value.result.status == "timed_out"


def test_a_turn_on_a_server_that_hangs_ends_at_its_limit_with_its_tool(
    server: OpenCodeServer, workspace: Path
) -> None:
    stream = with_tool(server, workspace, timeout_s=3)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)

    with ends_within(3), pytest.raises(OpenCodeTimeoutError, match=r"3 s \(timeout_s\)"):
        stream.wait()

    assert tools_of(stream.session_id) == []


@pytest.mark.parametrize("path", ["/global/health", "/session"], ids=["at first", "in a run"])
def test_a_server_elsewhere_that_dribbles_is_left_at_the_limit(workspace: Path, path: str) -> None:
    released = threading.Event()
    with WebServer() as web:
        web.answers["/global/health"] = Answer({"version": "1.18.33"})
        web.answers[path] = lambda: Answer(b" " for _ in iter(lambda: released.wait(0.05), True))
        server = OpenCodeServer.connect(web.url)

        with ends_within(1), pytest.raises(OpenCodeTimeoutError, match="timeout_s"):
            server.run("x", workspace, timeout_s=1)

        with ends_within(0):
            server.close()
        released.set()


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

        def work() -> bool:
            with client:
                return client.run("say from the child", workspace).answer == "from the child"

        assert succeeds_in_a_fork(work)
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
    other = serve(max_workers=3, run_cfg=RunConfig(model="a/b"))
    assert pickle.loads(pickle.dumps(other))._settings == other._settings

    with OpenCodeServer.connect(server.url, server.password) as there:
        copy = pickle.loads(pickle.dumps(there))

    with copy:
        assert copy.run("say hello", workspace).final_text == "hello"
