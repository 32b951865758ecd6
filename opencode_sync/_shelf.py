"""Ends of tasks, from the thread that puts them up to the one that takes them down.

    put() --> ready, by index --> take()   the consumer's thread waits: for a place, or for anything
    ring() ---------------------> on_change(), while it waits

From any thread; under the lock that it shares with whoever fills it. Knows indexes and what failed,
nothing of how an end came about.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from ._task import End
from .checkpoint import Saved
from .core.errors import OpenCodeError


class Shelf:
    """What has ended and was not taken yet.

    Attributes:
        failed_at: The lowest index of a failure, None before the first.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self.failed_at: int | None = None
        self._lock = lock
        self._ready: dict[int, End | Saved] = {}  # in the order of coming
        self._bells: list[queue.SimpleQueue[None]] = []  # of consumers that wait

    def put(self, index: int, end: End | Saved) -> None:
        """Have *end* taken."""
        is_failure = isinstance(end, OpenCodeError) or (isinstance(end, Saved) and end.is_failure)
        with self._lock:
            self._ready[index] = end
            if is_failure:
                self.failed_at = index if self.failed_at is None else min(index, self.failed_at)

    def has(self, index: int | None) -> bool:
        """Whether there is something to take: what belongs at *index*, or anything."""
        return bool(self._ready) if index is None else index in self._ready

    def ring(self) -> None:
        """Wake who waits: something is ready, or a number has changed."""
        with self._lock:
            bells, self._bells = self._bells, []
        for bell in bells:
            bell.put(None)

    def take(
        self,
        index: int | None,
        on_change: Callable[[], None],
        hopeless: Callable[[], OpenCodeError | None],
    ) -> tuple[int, End | Saved]:
        """Wait for what belongs at *index*, or for anything, and take it.

        Args:
            on_change: Called in this thread, without the lock, after each ring.
            hopeless: Tells why nothing more will come, once nothing will; asked with the lock.

        Raises:
            OpenCodeError: What *hopeless* told.
        """
        while True:
            with self._lock:
                if self.has(index):
                    found = next(iter(self._ready)) if index is None else index
                    return found, self._ready.pop(found)
                if (error := hopeless()) is not None:
                    raise error
                bell: queue.SimpleQueue[None] = queue.SimpleQueue()
                self._bells.append(bell)
            bell.get()
            on_change()
