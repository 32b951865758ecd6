"""Signals, whose handlers run between any two steps of Python in the main thread.

deferred()  Ctrl-C held back while a process or a directory is made: it could come between the
            making of a thing and the first reference to it, and nobody could give it back
Flag        to be set in a handler that interrupts who sets the same one, or waits for it
Queue       to be waited for without taking, and so to be taken from while Ctrl-C is held back
CancelScope a deadline and a cancellation for all that waits in its name; to be cancelled in a
            handler that interrupts who waits
"""

from __future__ import annotations

import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

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
