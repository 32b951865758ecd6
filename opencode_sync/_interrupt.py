"""Ctrl-C, held back for the moment in which a process or a directory is made.

It may come between any two steps of Python, also between the making of a thing and the first
reference to it; what is made then could never be given back.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
