"""The check that every test stands under notices each kind of leak, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests import leaks
from tests.leaks import Footprint, footprint, left_behind

AT_ONCE = 0.0
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


@pytest.fixture
def before() -> Footprint:
    return footprint()


def test_threads_children_descriptors_and_temporary_files_are_left_behind(
    before: Footprint,
) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten")
    thread.start()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        subprocess.Popen(sleep) as child,
        open(os.devnull) as file,
        tempfile.TemporaryDirectory(prefix=leaks.PREFIX) as directory,
    ):
        left = left_behind(before, AT_ONCE)
        descriptors = [(file.fileno(), os.devnull)]
        child.kill()
    end.set()
    thread.join()

    assert left.threads == [thread]
    assert [process.pid for process in left.processes] == [child.pid]
    assert left.files == [directory]
    if os.path.isdir(leaks.DESCRIPTORS):
        assert left.descriptors == descriptors
    assert not left_behind(before, AT_ONCE)


@pytest.mark.parametrize(
    "mark, is_ours",
    [(leaks.MARK, True), (f"{leaks.MARK}/inner", True), ("/other", False)],
    ids=["ours", "of a session within ours", "somebody else's"],
)
def test_a_process_without_a_parent_is_ours_by_its_mark(
    before: Footprint, tmp_path: Path, mark: str, is_ours: bool
) -> None:
    fifo = tmp_path / "ready"
    os.mkfifo(fifo)
    subprocess.run([sys.executable, "-c", ORPHAN, fifo], env={leaks.SESSION: mark}, check=True)
    orphan = psutil.Process(int(fifo.read_text()))

    left = left_behind(before, AT_ONCE)
    left.kill()
    with suppress(psutil.NoSuchProcess):
        orphan.kill()

    assert left.processes == ([orphan] if is_ours else [])
