"""What was left behind: threads, processes, file descriptors, temporary files.

    before = footprint()
    ...
    left_behind(before)    -- empty soon after, or what is still there

A process is ours if we are among its parents, or if its environment bears the mark of this test
session: that finds what has a parent no more. Of opencode_sync it knows only what is kept on
purpose until the interpreter ends.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass

import psutil

from opencode_sync.process import tree, watchdog

# The environment of every process that a test starts holds SESSION with MARK, or with what begins
# with it: a test may run a session of tests of its own.
SESSION = "OPENCODE_SYNC_TEST_SESSION"
MARK = f"{os.environ.get(SESSION, '')}/{uuid.uuid4().hex}"
PREFIX = "opencode-sync"  # of all temporary files and directories that the package makes
SETTLE_S = 5.0
DESCRIPTORS = "/proc/self/fd"

# Threads by the name of their class that libraries keep until the interpreter ends.
LIFELONG_THREADS = {"TMonitor": "tqdm: one for all its bars, started with the first"}


# Pids of programs that are shared by tests and start helpers when they see fit. What is below them
# in the tree of processes is for them to end.
families: set[int] = set()


@dataclass(frozen=True)
class Footprint:
    """What there was at one moment; of processes all on the machine, whosever they are."""

    threads: frozenset[threading.Thread]
    processes: frozenset[int]
    descriptors: frozenset[tuple[int, str]]
    files: frozenset[str]


@dataclass(frozen=True)
class LeftBehind:
    """What there is now and was not before; falsy where that is nothing."""

    threads: list[threading.Thread]
    processes: list[psutil.Process]
    descriptors: list[tuple[int, str]]
    files: list[str]

    def __bool__(self) -> bool:
        return any((self.threads, self.processes, self.descriptors, self.files))

    def __str__(self) -> str:
        return "\n".join(
            [
                *map(_describe_thread, self.threads),
                *map(_describe_process, self.processes),
                *(f"file descriptor {number}: {target}" for number, target in self.descriptors),
                *(f"temporary file {path}" for path in self.files),
            ]
        )

    def kill(self) -> None:
        """End the processes, so that one test's leak does not burden the tests after it."""
        for process in self.processes:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(self.processes, timeout=SETTLE_S)


def footprint() -> Footprint:
    return Footprint(
        frozenset(threading.enumerate()), frozenset(psutil.pids()), _descriptors(), _files()
    )


def left_behind(before: Footprint, within_s: float) -> LeftBehind:
    """What was not there *before* and does not go away *within_s* seconds.

    Returns at once where there is nothing. What waits for the garbage collector counts as gone:
    a failed test's own traceback keeps things alive that nobody else holds.
    """
    deadline = time.monotonic() + within_s
    left = _compare(before)
    if left:
        gc.collect()
        left = _compare(before)
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = _compare(before)
    return left


def _compare(before: Footprint) -> LeftBehind:
    lifelong_processes, lifelong_descriptors = _lifelong()
    return LeftBehind(
        threads=[
            thread
            for thread in threading.enumerate()
            if thread not in before.threads and type(thread).__name__ not in LIFELONG_THREADS
        ],
        processes=[
            process
            for pid in sorted({*psutil.pids()} - before.processes - lifelong_processes)
            if (process := _our_process(pid))
        ],
        descriptors=[
            (number, target)
            for number, target in sorted(_descriptors() - before.descriptors)
            if number not in lifelong_descriptors
        ],
        files=sorted(_files() - before.files),
    )


def _descriptors() -> frozenset[tuple[int, str]]:
    found = set()
    # Linux alone says what a descriptor is; elsewhere they go unchecked.
    for name in os.listdir(DESCRIPTORS) if os.path.isdir(DESCRIPTORS) else ():
        with suppress(OSError):  # the listing's own, closed by now
            found.add((int(name), os.readlink(f"{DESCRIPTORS}/{name}")))
    return frozenset(found)


def _files() -> frozenset[str]:
    with os.scandir(tempfile.gettempdir()) as entries:
        return frozenset(entry.path for entry in entries if entry.name.startswith(PREFIX))


def _our_process(pid: int) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        if families and families & {pid, *(parent.pid for parent in process.parents())}:
            return None
        with suppress(psutil.AccessDenied, psutil.ZombieProcess):
            if process.environ().get(SESSION, "").startswith(MARK):
                return process
        return process if os.getpid() in {parent.pid for parent in process.parents()} else None
    except psutil.NoSuchProcess:
        return None


def _lifelong() -> tuple[set[int], set[int]]:
    """Pids and descriptors that are kept on purpose until the interpreter ends."""
    # The watchdog's process needs no leave: it is nobody's child and bears no mark.
    pids: set[int] = set()
    descriptors = {*tree.descriptors(), *watchdog.descriptors()}
    # Started by multiprocessing with the first process that is spawned and not forked.
    if module := sys.modules.get("multiprocessing.resource_tracker"):
        pids.add(module._resource_tracker._pid)
        descriptors.add(module._resource_tracker._fd)
    return pids, descriptors


def _describe_thread(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    where = f" in {frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""
    return f"thread {thread.name!r}{where}"


def _describe_process(process: psutil.Process) -> str:
    try:
        with process.oneshot():
            status = process.status()
            command = [] if status == psutil.STATUS_ZOMBIE else process.cmdline()
    except psutil.Error:
        return f"process {process.pid}, ended by now"
    return f"process {process.pid} ({status}): {' '.join(command)[:200]}"
