"""What has to hold while signals, the interpreter's exit and forks come at any moment.

    deferred()   holds Ctrl-C back while a process or a directory is made: between its
                 creation and the first reference to it, nobody could close it
    Flag         can be set in a signal's handler that interrupts its setter or its waiter
    Queue        can be waited for without taking, and so be taken from while Ctrl-C is held back
    CancelScope  a deadline and a cancellation for everything that waits in its name
    UnderWay     what ends before the interpreter waits for its threads:
                     main thread ends --> what was registered last, first: batches, runners, streams
                                      --> concurrent.futures joins its workers, which wait for runs
                                      --> atexit's own calls
    Pinned       what cannot leave its process

Knows weak references and callbacks; their owners know what is ended, and how.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - has to be registered before us
import inspect
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
from typing import Any, ClassVar, Generic, NoReturn, SupportsIndex, TypeVar

from .errors import OpenCodeConfigError

T = TypeVar("T")


@contextmanager
def deferred() -> Iterator[None]:
    """Let a Ctrl-C that comes inside of the block take effect at its end.

    Only the main thread of the main interpreter gets signals; elsewhere this does nothing. The
    block has to be short, as it cannot be interrupted.
    """
    caught: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # ignored, or the end of the program
        yield
        return
    try:
        # Not the frame that it came in: the traceback would keep what was made there alive.
        signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    except ValueError:  # another thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(caught[0], inspect.currentframe())


# The kernel may hand a signal to another thread than the main one, which alone runs handlers: a
# wait without end would not notice. So each wait is cut into pieces of this length.
SLICE_S = 1.0


def _take(wakes: queue.SimpleQueue[None], timeout: float | None) -> None:
    """Take one from *wakes*; raises queue.Empty after *timeout* seconds."""
    left = math.inf if timeout is None else timeout
    while True:
        try:
            return wakes.get(timeout=min(left, SLICE_S))
        except queue.Empty:
            left -= SLICE_S
            if left <= 0:
                raise


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
                _take(self._wakes, timeout)
                self._wakes.put(None)  # for whoever else waits
        return self._is_set


class Queue(queue.SimpleQueue[T]):
    """A queue that can be waited for without taking anything from it; for one reader."""

    def __init__(self) -> None:
        super().__init__()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each item

    def put(self, item: T, *args: Any) -> None:
        super().put(item, *args)
        self._wakes.put(None)

    def wait(self, timeout: float | None) -> None:
        """Return when it holds an item; raises queue.Empty after *timeout* seconds."""
        while self.empty():
            _take(self._wakes, timeout)  # at once where the item was taken in the meantime


class CancelScope:
    """A deadline and a cancellation for everything that waits in its name.

    Can be cancelled in a signal's handler that interrupts who waits.

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
        """Wake everything that waits. Idempotent, from any thread."""
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

        A cancellation sets *flag*, so no other waiter may share it.
        """
        with self.waking(flag.set):
            flag.wait(min(timeout, self.left(), threading.TIMEOUT_MAX))
        return flag.is_set() and not self._is_cancelled


REASON = "the interpreter is shutting down"


class UnderWay(Generic[T]):
    """Things that end with the interpreter, and that a forked child does not own.

    They are kept in a plain dict, whose single operations are atomic: a lock could be held by the
    very thread that a finaliser interrupts.
    """

    def __init__(self, end: Callable[[T], Any], *, is_registered: bool = True) -> None:
        """
        Args:
            end: Called at the interpreter's exit with each thing that is left.
            is_registered: Register for the exit at once; else :meth:`register` does.
        """
        self._end = end
        self._items: dict[int, weakref.ref[T]] = {}
        self._registered: set[bool] = set()
        if is_registered:
            self.register()
        os.register_at_fork(after_in_child=self._items.clear)

    def add(self, item: T) -> None:
        self._items[id(item)] = weakref.ref(item)

    def discard(self, item: T) -> None:
        self._items.pop(id(item), None)

    def register(self) -> None:
        """Be called at the exit, before everything that is registered by now.

        Idempotent; but registers again once the pools of processes are imported, which wait for
        their workers.
        """
        has_processes = "concurrent.futures.process" in sys.modules
        if has_processes in self._registered:
            return
        self._registered.add(has_processes)
        # concurrent.futures waits for its workers before atexit's own calls are made, and the runs
        # that these wait for have to end before. CPython has no public way for it (bpo-39812).
        getattr(threading, "_register_atexit", atexit.register)(self._end_all)

    def _end_all(self) -> None:
        for ref in list(self._items.values()):
            if (item := ref()) is not None:
                self._end(item)


class Pinned:
    """Cannot be pickled or copied: threads and a run depend on it, and a copy would have none."""

    _instead: ClassVar[str] = "pass on its result"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        kind = type(self).__name__
        raise OpenCodeConfigError(f"a {kind} cannot leave its process: {self._instead}")
