"""A semaphore around start-ups that share a database.

On a fresh database, two OpenCodes that migrate it at the same time kill one another. So a start
takes a slot, and gives it back at the first line of output, at the exit, or after a delay.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .core import lifetime
from .core.errors import OpenCodeCancelledError

SLICE_S = 0.05  # how soon a waiting start notices that it was cancelled


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
                with lifetime.deferred():  # its lock is entered in Python: see _dispatch
                    self._semaphore.release()
