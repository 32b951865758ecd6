"""How many runs at a time: what this machine carries, and how many may start at once.

    workers_for_processes()   min(2 x cores, memory / 0.55 GiB, 32), at least 1
    Gate                      a semaphore around start-ups that share a database

A run of OpenCode takes 0.55 GiB, and 3 seconds of a core's time to start. On 2 cores, with a model
that takes half a second, 1 at a time got 0.28 prompts done per second, 4 got 0.36 and 8 got 0.35:
more than two per core only slow one another down. Where the model takes minutes, more can pay.

On a fresh database, two OpenCodes that migrate it at the same time break one another. So a start
takes a slot, and gives it back at the first line of output, at the exit, or after a delay.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core import lifetime
from ..core.errors import OpenCodeCancelledError

RUN_BYTES = int(0.55 * 2**30)  # resident, of one `opencode run` (1.18.33)
RUNS_PER_CORE = 2
MOST = 32  # more is for the user to decide, who knows the provider
SLICE_S = 0.05  # how soon a waiting start notices that it was cancelled

_CGROUP = Path("/sys/fs/cgroup")


class Gate:
    """At most *limit* start-ups at a time; None or 0 lets all through."""

    def __init__(self, limit: int | None) -> None:
        self._semaphore = threading.BoundedSemaphore(limit) if limit else None

    @property
    def is_limited(self) -> bool:
        return self._semaphore is not None

    @contextmanager
    def slot(self, cancelled: Callable[[], bool]) -> Iterator[None]:
        """Hold a slot inside the block.

        Raises:
            OpenCodeCancelledError: If *cancelled* comes true in the wait for one.
        """
        if self._semaphore is None:
            yield
            return
        is_held = False
        try:
            while not is_held:
                with lifetime.deferred():  # or a slot could be taken, and nobody know of it
                    is_held = self._semaphore.acquire(timeout=SLICE_S)
                if not is_held and cancelled():
                    raise OpenCodeCancelledError("the run was cancelled before it had started")
            yield
        finally:
            if is_held:
                with lifetime.deferred():  # or a Ctrl-C could leave it locked
                    self._semaphore.release()


def workers_for_processes() -> int:
    """How many ``opencode run`` processes at a time."""
    carried = available_memory() // RUN_BYTES
    return max(1, min(RUNS_PER_CORE * available_cores(), carried, MOST))


def available_cores() -> int:
    """Cores that this process may use: a container's share, not the whole machine."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    quota, _, period = _read("cpu.max").partition(" ")
    with suppress(ValueError, ZeroDivisionError):
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def available_memory() -> int:
    """Bytes that are free for new processes: of a container's share, where there is one."""
    import psutil

    available: int = psutil.virtual_memory().available
    with suppress(ValueError):
        available = min(available, int(_read("memory.max")) - int(_read("memory.current")))
    return max(0, available)


def _read(name: str) -> str:
    """A value of this process's control group; "" where there is none, "max" for no limit."""
    try:
        return (_CGROUP / name).read_text().strip()
    except OSError:
        return ""
