"""Clients between threads, and every way to end a run of theirs, on the stand-in."""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from opencode_sync import (
    OpenCodeCancelledError,
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeTimeoutError,
    RunStream,
)
from tests.endings import Tools, script
from tests.faults import standin_client, write_standin

LONG_S = 20.0


@pytest.fixture
def client(tmp_path: Path) -> Iterator[OpenCodeClient]:
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


# --- one client, many threads --------------------------------------------------------------------


def test_a_client_is_shared_between_threads(client: OpenCodeClient, workspace: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        prompts = [f"echo {number}" for number in range(80)]
        results = list(pool.map(lambda prompt: client.run(prompt, workspace), prompts))

    assert [result.answer for result in results] == [str(number) for number in range(80)]


def test_closing_the_client_ends_the_runs_of_all_threads(
    client: OpenCodeClient, workspace: Path
) -> None:
    begun = threading.Barrier(5)

    def run() -> BaseException | None:
        with client.stream("fall_silent", workspace) as stream:
            next(stream)
            begun.wait(LONG_S)
            try:
                stream.wait()
            except OpenCodeCancelledError as error:
                return error
        return None

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(run) for _ in range(4)]
        begun.wait(LONG_S)
        started = time.monotonic()
        client.close()
        errors = [future.result(LONG_S) for future in futures]

    assert [str(error) for error in errors] == ["the runner was closed"] * 4
    assert time.monotonic() - started < LONG_S


def test_a_closed_client_says_so(client: OpenCodeClient, workspace: Path) -> None:
    client.close()
    client.close()

    with pytest.raises(OpenCodeConfigError, match="OpenCodeClient is closed"):
        client.run("well", workspace)


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


def test_starts_that_wait_for_a_slot_end_with_the_client(tmp_path: Path, workspace: Path) -> None:
    client = standin_client(tmp_path, isolate_db=False, startup_delay_s=LONG_S)
    waiting = threading.Barrier(4)
    errors = []

    def run() -> None:
        waiting.wait(LONG_S)
        try:
            client.run("silent", workspace)
        except (OpenCodeCancelledError, OpenCodeConfigError) as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    waiting.wait(LONG_S)
    started = time.monotonic()
    client.close()
    for thread in threads:
        thread.join(LONG_S)

    assert len(errors) == 3
    assert time.monotonic() - started < LONG_S


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


def test_a_client_pickles_as_its_settings(client: OpenCodeClient, workspace: Path) -> None:
    with pickle.loads(pickle.dumps(client)) as copy:
        assert copy.run("echo hello", workspace).answer == "hello"


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


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_client_works_in_multiprocessing(
    client: OpenCodeClient, workspace: Path, method: str
) -> None:
    client.run("well", workspace)

    with multiprocessing.get_context(method).Pool(2) as pool:
        results = [pool.apply_async(_run, (client, workspace, str(n))) for n in range(4)]
        answers = [result.get(60) for result in results]
        pool.close()
        pool.join()

    assert answers == ["0", "1", "2", "3"]


def _run(client: OpenCodeClient, workspace: Path, words: str) -> str:
    with client:
        return client.run(f"echo {words}", workspace).answer


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


def test_after_a_timeout_the_tools_are_gone(
    client: OpenCodeClient, workspace: Path, tools: Tools
) -> None:
    with pytest.raises(OpenCodeTimeoutError):
        client.run("with_tools", workspace, timeout_s=1.0)

    assert not tools.living()


def test_without_a_holder_the_tools_are_gone(
    client: OpenCodeClient, workspace: Path, tools: Tools
) -> None:
    stream = client.stream("with_tools", workspace)
    tools.wait_until_started()

    del stream

    assert not tools.living()


def test_after_ctrl_c_the_tools_are_gone_before_the_script_goes_on(
    workspace: Path, tools: Tools, tmp_path: Path
) -> None:
    with script(write_standin(tmp_path), workspace, "with_tools") as started:
        tools.wait_until_started()
        started.wait_for_the_run()

        started.process.send_signal(signal.SIGINT)

        assert started.line() == b"interrupted\n"
        assert not tools.living()
        assert started.process.wait(LONG_S) == 130


def test_after_the_interpreter_s_exit_the_tools_are_gone(
    workspace: Path, tools: Tools, tmp_path: Path
) -> None:
    with script(write_standin(tmp_path), workspace, "with_tools") as started:
        tools.wait_until_started()

        started.exit()

        assert started.process.wait(LONG_S) == 0
        assert not tools.living()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_soon_after_a_script_was_killed_the_tools_are_gone(
    workspace: Path, tools: Tools, tmp_path: Path, number: signal.Signals
) -> None:
    with script(write_standin(tmp_path), workspace, "with_tools") as started:
        tools.wait_until_started()
        started.wait_for_the_run()

        started.process.send_signal(number)

        assert started.process.wait(LONG_S) == -number
        tools.wait_until_gone()
