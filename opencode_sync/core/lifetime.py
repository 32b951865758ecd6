"""Signals, whose handlers run between any two steps of Python in the main thread.

deferred()  Ctrl-C held back while a process or a directory is made: it could come between the
            making of a thing and the first reference to it, and nobody could give it back
Flag        to be set in a handler that interrupts who sets the same one, or waits for it
Queue       to be waited for without taking, and so to be taken from while Ctrl-C is held back
CancelScope a deadline and a cancellation for all that waits in its name; to be cancelled in a
            handler that interrupts who waits

What is under way, ended before the interpreter waits for its threads.

    main thread ends --> what was registered last, first: batches, submitted runs, streams
                     --> concurrent.futures waits for its workers, which wait for runs
                     --> atexit's own calls

Knows weak references; what is to be ended, and how, is its maker's matter.

What stays in its process: threads and a run hang on it, which no copy would have.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - has to be registered before us
import math
import os
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, ClassVar, Generic, NoReturn, SupportsIndex, TypeVar

from .errors import OpenCodeConfigError

T = TypeVar("T")


@contextmanager
def deferred() -> Iterator[None]:
    """Let a Ctrl-C that comes inside of the block take effect at its end.

    Only the main thread of the main interpreter gets any; elsewhere this does nothing. The block
    has to be short: it cannot be interrupted.
    """
    caught: list[tuple[int, FrameType | None]] = []
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # ignored, or the end of the program
        yield
        return
    try:
        signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    except ValueError:  # another thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[0])


class Flag:
    """A ``threading.Event`` without its lock, on which a handler would wait for ever."""

    def __init__(self) -> None:
        self._is_set = False
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()  # reentrant by its design

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._wakes.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is set, after at most *timeout* seconds."""
        if not self._is_set:
            with suppress(queue.Empty):
                self._wakes.get(timeout=timeout)
                self._wakes.put(None)  # for whoever else waits
        return self._is_set


class Queue(queue.SimpleQueue[T]):
    """A queue that can be waited for without taking anything from it; for one taker."""

    def __init__(self) -> None:
        super().__init__()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # rings for each item

    def put(self, item: T, *args: Any) -> None:
        super().put(item, *args)
        self._bell.put(None)

    def wait(self, timeout: float | None) -> None:
        """Return when it holds something; raises queue.Empty after *timeout* seconds."""
        while self.empty():
            self._bell.get(timeout=timeout)  # at once where it rang for what is taken by now


class CancelScope:
    """A deadline and a cancellation, for all that waits in its name.

    Attributes:
        deadline: The ``time.monotonic()`` instant at which waiting ends; infinity for never.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self._is_cancelled = False
        self._wakes: dict[int, Callable[[], None]] = {}
        self._lock = threading.RLock()  # reentrant: a handler may cancel what it interrupted

    def is_cancelled(self) -> bool:
        return self._is_cancelled

    @property
    def is_over(self) -> bool:
        """Whether it was cancelled, or its deadline has passed."""
        return self._is_cancelled or self.left() <= 0

    def left(self) -> float:
        """Seconds until the deadline; infinite where there is none."""
        return max(0.0, self.deadline - time.monotonic())

    def cancel(self) -> None:
        """Wake all that waits. Idempotent, from any thread."""
        self._is_cancelled = True
        with self._lock:
            for wake in tuple(self._wakes.values()):
                wake()

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Have :meth:`cancel` call *wake* during the block, and never after it."""
        with self._lock:
            self._wakes[id(wake)] = wake
        try:
            if self._is_cancelled:
                wake()
            yield
        finally:
            with self._lock:
                self._wakes.pop(id(wake), None)

    def wait(self, flag: Flag, timeout: float = math.inf) -> bool:
        """Whether *flag* is set; waits *timeout* seconds and to the end of this scope at most.

        A cancellation sets *flag*, which therefore has to be of this waiter alone.
        """
        with self.waking(flag.set):
            flag.wait(min(timeout, self.left(), threading.TIMEOUT_MAX))
        return flag.is_set() and not self._is_cancelled


REASON = "the interpreter is shutting down"


class UnderWay(Generic[T]):
    """Things that a forked child does not own, and that end with the interpreter.

    They are in a plain dict, whose single operations are atomic: a lock could be held by the very
    thread that a finaliser interrupts.
    """

    def __init__(self, end: Callable[[T], Any], *, is_minded: bool = True) -> None:
        """
        Args:
            end: Called at the interpreter's exit with each that is there.
            is_minded: Register at once; else :meth:`mind_exit` does.
        """
        self._end = end
        self._there: dict[int, weakref.ref[T]] = {}
        self._minded: set[bool] = set()
        if is_minded:
            self.mind_exit()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._there.clear)

    def add(self, item: T) -> None:
        self._there[id(item)] = weakref.ref(item)

    def discard(self, item: T) -> None:
        self._there.pop(id(item), None)

    def mind_exit(self) -> None:
        """Be called at the exit, before all that have been registered until now.

        Once; and once more if it was since then that the pools of processes were first imported,
        which wait for their own.
        """
        has_processes = "concurrent.futures.process" in sys.modules
        if has_processes in self._minded:
            return
        self._minded.add(has_processes)
        # concurrent.futures waits for its workers before atexit's own calls are made, and runs that
        # they wait for have to end before that. CPython has no public door to this (bpo-39812).
        getattr(threading, "_register_atexit", atexit.register)(self._end_all)

    def _end_all(self) -> None:
        for ref in list(self._there.values()):
            if (item := ref()) is not None:
                self._end(item)


class Pinned:
    """Neither pickled nor copied."""

    _instead: ClassVar[str] = "pass on its result"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        kind = type(self).__name__
        raise OpenCodeConfigError(f"a {kind} cannot leave its process: {self._instead}")
