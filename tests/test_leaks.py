"""The check that every test stands under notices each kind of leak, and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from opencode_sync.process import tree, watchdog
from tests import leaks
from tests.leaks import Footprint, footprint, left_behind

AT_ONCE = 0.0
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]

# Its parent ends at once, and it leaves the session: nothing but the environment tells whose it is.
ORPHAN = """
import os, sys, time
if os.fork():
    os._exit(0)
os.setsid()
with open(sys.argv[1], "w") as ready:
    ready.write(str(os.getpid()))
time.sleep(60)
"""


# Has a child, which ends with it.
PARENT = """
import subprocess, sys
child = "print('there', flush=True); input()"
with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE) as child:
    sys.stdin.read()
    child.kill()
"""


@pytest.fixture
def before() -> Footprint:
    return footprint()


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[Callable[[dict[str, str]], int]]:
    """Start a process without a parent, in an environment of its own; its pid."""
    pids = []

    def start(env: dict[str, str]) -> int:
        fifo = tmp_path / "ready"
        os.mkfifo(fifo)
        subprocess.run([sys.executable, "-c", ORPHAN, fifo], env=env, check=True)
        pids.append(int(fifo.read_text()))
        return pids[-1]

    yield start
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()


def test_where_nothing_has_changed_nothing_is_left_behind(before: Footprint) -> None:
    left = left_behind(before, AT_ONCE)

    assert not left
    assert str(left) == ""


def test_a_thread_is_left_behind(before: Footprint) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten")
    thread.start()

    text = str(left_behind(before, AT_ONCE))
    end.set()
    thread.join()

    assert text.startswith("thread 'forgotten' in ")


def test_a_child_is_left_behind(before: Footprint) -> None:
    with subprocess.Popen(SLEEP) as child:
        text = str(left_behind(before, AT_ONCE))
        child.kill()

    assert text.startswith(f"process {child.pid} (")
    assert text.endswith("time.sleep(60)")


def test_what_a_shared_program_starts_is_left_to_it(
    before: Footprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([*SLEEP[:2], PARENT], stdin=pipe, stdout=pipe) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdout.readline()
        monkeypatch.setattr(leaks, "families", {parent.pid})
        processes = left_behind(before, AT_ONCE).processes
        parent.stdin.close()

    assert processes == []


def test_a_child_that_nobody_waited_for_is_left_behind(before: Footprint) -> None:
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    text = str(left_behind(before, AT_ONCE))
    os.waitpid(pid, 0)

    assert text.startswith(f"process {pid} (zombie)")


def test_a_process_that_bears_our_mark_is_left_behind(
    before: Footprint, orphan: Callable[[dict[str, str]], int]
) -> None:
    pid = orphan({leaks.SESSION: leaks.MARK})

    left = left_behind(before, AT_ONCE)

    assert [process.pid for process in left.processes] == [pid]


def test_a_process_of_a_session_within_ours_is_left_behind(
    before: Footprint, orphan: Callable[[dict[str, str]], int]
) -> None:
    pid = orphan({leaks.SESSION: f"{leaks.MARK}/inner"})

    left = left_behind(before, AT_ONCE)

    assert [process.pid for process in left.processes] == [pid]


def test_somebody_elses_process_is_no_leak_of_ours(
    before: Footprint, orphan: Callable[[dict[str, str]], int]
) -> None:
    orphan({leaks.SESSION: "/other"})

    assert not left_behind(before, AT_ONCE)


@pytest.mark.skipif(not os.path.isdir(leaks.DESCRIPTORS), reason="no /proc")
def test_a_file_descriptor_is_left_behind(before: Footprint, tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as file:
        left = left_behind(before, AT_ONCE)

        assert left.descriptors == [(file.fileno(), str(tmp_path / "log"))]


def test_a_temporary_directory_is_left_behind(before: Footprint) -> None:
    with tempfile.TemporaryDirectory(prefix=leaks.PREFIX) as directory:
        left = left_behind(before, AT_ONCE)

    assert left.files == [directory]


def test_what_ends_soon_is_not_left_behind(before: Footprint) -> None:
    threading.Timer(0.1, print).start()

    assert not left_behind(before, leaks.SETTLE_S)


def test_what_the_garbage_collector_takes_is_not_left_behind(before: Footprint) -> None:
    class Circle:
        def __init__(self) -> None:
            self.me = self
            self.directory = tempfile.mkdtemp(prefix=leaks.PREFIX)

        def __del__(self) -> None:
            os.rmdir(self.directory)

    Circle()

    assert not left_behind(before, AT_ONCE)


def test_what_is_kept_until_the_interpreter_ends_is_not_left_behind(before: Footprint) -> None:
    watchdog.guard()
    tree.run_token()
    multiprocessing.get_context("spawn").Lock()

    assert not left_behind(before, AT_ONCE)


def test_processes_left_behind_can_be_ended(
    before: Footprint, orphan: Callable[[dict[str, str]], int]
) -> None:
    orphan({leaks.SESSION: leaks.MARK})

    left_behind(before, AT_ONCE).kill()

    assert not left_behind(before, AT_ONCE)
