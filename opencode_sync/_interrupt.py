"""Signals, whose handlers run between any two steps of Python in the main thread.

deferred()  Ctrl-C held back while a process or a directory is made: it could come between the
            making of a thing and the first reference to it, and nobody could give it back
Flag        to be set in a handler that interrupts who sets the same one, or waits for it
Queue       to be waited for without taking, and so to be taken from while Ctrl-C is held back
"""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator
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
