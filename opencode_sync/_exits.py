"""What is under way, ended before the interpreter waits for its threads.

    main thread ends --> what was registered last, first: batches, submitted runs, streams
                     --> concurrent.futures waits for its workers, which wait for runs
                     --> atexit's own calls

Knows weak references; what is to be ended, and how, is its maker's matter.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - has to be registered before us
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

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
