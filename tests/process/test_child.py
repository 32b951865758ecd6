"""One child process: what it writes, how it ends, and what is left of it."""

from __future__ import annotations

import gc
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from opencode_sync.process import child, tree
from opencode_sync.process.child import LineSplitter, Process
from tests.process import is_alive

Start = Callable[..., Process]

LONG_S = 20.0
ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a Python program, or the *argv* that is given."""
    processes: list[Process] = []

    def start(program: str, *, stdin: bytes = b"", argv: list[str] | None = None) -> Process:
        processes.append(
            Process(
                argv or [sys.executable, "-S", "-E", "-c", f"import os, sys, time\n{program}"],
                cwd=str(tmp_path),
                env=dict(os.environ),
                stdin=stdin,
                token=tree.run_token(),
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.stop()
        process.close()


def read_all(process: Process) -> dict[str, bytes]:
    output = {"stdout": b"", "stderr": b""}
    while (block := process.receive(LONG_S)) is not None:
        channel, data = block
        output[channel] += data
    return output


def wait_for(process: Process, expected: bytes) -> None:
    got = b""
    while expected not in got:
        block = process.receive(LONG_S)
        assert block is not None
        got += block[1]


# --- input and output ----------------------------------------------------------------------------


def test_both_outputs_arrive_whole(start: Start) -> None:
    process = start("os.write(1, b'out' * 1_000_000); os.write(2, b'err' * 1_000_000)")

    output = read_all(process)

    assert output == {"stdout": b"out" * 1_000_000, "stderr": b"err" * 1_000_000}


def test_what_is_written_at_the_very_end_arrives(start: Start) -> None:
    for _ in range(20):
        process = start("os.write(1, b'last'); os._exit(7)")

        assert read_all(process)["stdout"] == b"last"
        assert process.returncode == 7


def test_the_prompt_is_read_verbatim_and_has_an_end(start: Start) -> None:
    prompt = b'--x "q" \\ \n\0 \xff' * 300_000

    process = start("os.write(1, sys.stdin.buffer.read())", stdin=prompt)

    assert read_all(process)["stdout"] == prompt


def test_the_child_has_its_directory_in_pwd_and_a_session_of_its_own(
    start: Start, tmp_path: Path
) -> None:
    process = start("print(os.environ['PWD'], os.getcwd(), os.getsid(0))")

    expected = [str(tmp_path), str(tmp_path), str(process.pid)]
    assert read_all(process)["stdout"].decode().split() == expected


def test_the_child_inherits_no_descriptor_but_its_three(start: Start) -> None:
    with open(os.devnull, "rb"):
        process = start("print(len(os.listdir('/proc/self/fd')))")

    assert int(read_all(process)["stdout"]) == 4  # and the one that lists them


def test_a_wait_for_output_is_bounded(start: Start) -> None:
    process = start("time.sleep(600)")

    with pytest.raises(queue.Empty):
        process.receive(0.05)


def test_a_start_is_over_with_the_first_output_the_end_a_cancel_or_the_delay(start: Start) -> None:
    talking, ended, mute = start("print()"), start(""), start("time.sleep(600)")
    begun = time.monotonic()

    for process, delay in ((talking, LONG_S), (ended, LONG_S), (mute, 0.05)):
        process.wait_started(delay)
    mute.wait_started(LONG_S, lambda: True)

    assert time.monotonic() - begun < LONG_S


def test_what_goes_wrong_in_a_reader_is_raised_where_the_caller_waits(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> bytes:
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "pread", fail)
    process = start("time.sleep(600)")

    with pytest.raises(OSError, match="the disk is gone"):
        process.receive(LONG_S)


def test_a_flood_that_nobody_takes_stays_on_disk(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "BLOCK_BYTES", 1_000)
    process = start("os.write(1, b'x' * 1_000_000)")
    while process.returncode is None:
        process.wait_started(0.01)

    assert process._queue.qsize() <= child.BACKLOG + 2  # one more for each reader
    assert len(read_all(process)["stdout"]) == 1_000_000


# --- starting that fails -------------------------------------------------------------------------


def test_a_child_that_an_exception_hides_from_us_is_ended(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def interrupted(*args: Any, **options: Any) -> None:
        hidden.append(popen(*args, **options))
        raise SystemExit  # as a signal's handler may, which runs between any two steps

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(SystemExit):
        start("time.sleep(600)")

    assert not psutil.pid_exists(hidden[0].pid)  # ended, and reaped
    hidden[0].wait()


@pytest.mark.parametrize(
    "argv", [["/nowhere/opencode"], ["/"], ["/etc/passwd"]], ids=["missing", "directory", "data"]
)
def test_what_cannot_be_started_leaves_nothing_open(start: Start, argv: list[str]) -> None:
    with pytest.raises(OSError, match=r"No such file|denied"):
        start("", argv=argv)


def test_a_child_without_a_thread_to_read_it_is_stopped(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def refuse(thread: threading.Thread) -> None:
        started.append(int(thread.name.split("-")[1]))
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)

    with pytest.raises(OSError, match="no thread to read its output"):
        start("time.sleep(600)")

    assert not is_alive(started[0])


def test_ctrl_c_in_the_middle_of_the_start_leaves_no_child(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *args: object, **options: object) -> None:
            signal.raise_signal(signal.SIGINT)
            super().__init__(*args, **options)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)

    with pytest.raises(KeyboardInterrupt):
        start("time.sleep(600)")

    assert started[0].wait(LONG_S) in (-signal.SIGTERM, -signal.SIGKILL)


def test_a_process_in_a_cycle_is_stopped_by_the_collector_in_whichever_thread(
    tmp_path: Path,
) -> None:
    argv = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    token = tree.run_token()
    process = Process(argv, cwd=str(tmp_path), env=dict(os.environ), stdin=b"", token=token)
    process.itself = process  # type: ignore[attr-defined]
    pid = process.pid
    del process

    collector = threading.Thread(target=gc.collect)
    collector.start()
    collector.join(LONG_S)

    assert not is_alive(pid)


# --- stopping ------------------------------------------------------------------------------------


def test_a_stopped_child_is_reaped_and_its_output_readable(start: Start) -> None:
    process = start("os.write(1, b'before'); time.sleep(600)")
    process.wait_started(LONG_S)

    process.stop()

    assert process.returncode == -signal.SIGTERM
    assert read_all(process)["stdout"] == b"before"


def test_stopping_twice_and_from_many_threads_is_harmless(start: Start) -> None:
    process = start("time.sleep(600)")
    threads = [threading.Thread(target=process.stop) for _ in range(4)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    process.stop()

    assert process.returncode == -signal.SIGTERM


def test_stopping_tells_whether_the_child_left_something(start: Start) -> None:
    process = start("os.fork() or (os.setsid(), time.sleep(600))")
    read_all(process)

    assert process.stop()
    assert not process.stop()


def test_a_forked_child_leaves_our_process_alone(start: Start) -> None:
    process = start("print(flush=True); time.sleep(600)")
    process.wait_started(LONG_S)

    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            process.__del__()
        os._exit(0)
    os.waitpid(pid, 0)

    assert process.returncode is None


def test_files_have_no_names(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    process = start("print(flush=True); time.sleep(600)", stdin=b"secret")
    process.wait_started(LONG_S)

    assert not list(tmp_path.iterdir())


# --- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks, lines, rest",
    [
        pytest.param([b"a\nb\n"], [b"a", b"b"], b"", id="whole lines"),
        pytest.param([b"a", b"b\nc"], [b"ab"], b"c", id="a line in two blocks"),
        pytest.param([b"\n\n"], [b"", b""], b"", id="empty lines"),
        pytest.param([b"\n"], [b""], b"", id="an empty line"),
        pytest.param(
            [b"a\r\x0b\x0c\x1c\xc2\x85\xe2\x80\xa8b\n"],
            [b"a\r\x0b\x0c\x1c\xc2\x85\xe2\x80\xa8b"],
            b"",
            id="only newlines end a line",
        ),
        pytest.param([], [], b"", id="nothing"),
    ],
)
def test_blocks_become_lines(blocks: list[bytes], lines: list[bytes], rest: bytes) -> None:
    splitter = LineSplitter()

    found = [whole for block in blocks if (whole := splitter.feed(block)) is not None]

    assert [line for whole in found for line in whole.split(b"\n")] == lines
    assert splitter.rest() == rest
    assert splitter.rest() == b""
