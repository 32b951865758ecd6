"""The servers of one runner: of several, one is in use.

    begin() --> the server in use --> Link.begin() --> Turn
                  |
                  +-- started with the first turn, and again when it has died
                  +-- followed by a fresh one when it has grown too large: the turns on it go on to
                      their end, and with the last of them it ends too

All have the same data directory, so a session goes on in whichever. Knows when a server is started
and ended; nothing of how, nor of what is asked of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ._link import Link, dispose
from ._serve import Server
from ._turn import Turn
from .errors import OpenCodeServerError

_log = logging.getLogger("opencode_sync")

EXIT_S = 1.0  # how long one that does not answer may take to be seen to have ended


@dataclass(eq=False)
class InUse:
    """A server with the turns on it; *process* is None for one that runs elsewhere."""

    link: Link
    process: Server | None
    turns: set[object] = field(default_factory=set)
    is_retired: bool = False

    @property
    def is_gone(self) -> bool:
        return self.link.is_lost or (self.process is not None and self.process.has_exited)

    def close(self) -> None:
        """Stop a server of ours with all that it started; let go of another one."""
        if self.process is not None:
            if not self.is_gone:
                dispose(self.link.connection)
            self.process.stop()
        self.link.close()


class Fleet:
    """Thread-safe; no lock is held while a server is asked something, but while one starts."""

    def __init__(self, start: Callable[[], InUse], max_memory_mb: int | None) -> None:
        """
        Args:
            start: Starts a server.
            max_memory_mb: A server that takes more is followed by a fresh one; None for no limit.
        """
        self._start = start
        self._max_memory_mb = max_memory_mb
        # Reentrant, since a finaliser may end a turn in the middle of anything.
        self._lock = threading.RLock()
        self._current: InUse | None = None
        self._all: set[InUse] = set()
        self._is_closed = False

    @property
    def url(self) -> str | None:
        """Where the one in use is; None where none is."""
        current = self._current
        return None if current is None else current.link.connection.url

    def current(self) -> InUse:
        """The server to use now, started where there is none.

        Raises:
            OpenCodeServerError: If it does not start, or this was closed.
        """
        with self._lock:
            if self._is_closed:
                raise OpenCodeServerError("the server was closed while the run was starting")
            current = self._current
            if current is not None and (current.is_gone or self._is_too_large(current)):
                self._retire(current)
                current = None
            if current is None:
                current = self._current = self._start()
                self._all.add(current)
            return current

    def begin(self, *args: Any, **kwargs: Any) -> Turn:
        """A turn on the server in use, arguments as for :meth:`Link.begin`."""
        ticket = object()
        with self._lock:
            server = self.current()
            server.turns.add(ticket)
        try:
            turn = server.link.begin(*args, **kwargs)
        except BaseException:
            self._leave(server, ticket)
            raise
        turn.on_close(lambda: self._leave(server, ticket))
        return turn

    def has_died(self) -> bool:
        """Whether the server in use has ended by itself, if there is one."""
        current = self._current
        if current is None or current.is_gone:
            return True
        return current.process is not None and current.process.wait_exited(EXIT_S)

    def close(self) -> None:
        """End all servers. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._current = None
        while self._all:
            self._all.pop().close()

    def _is_too_large(self, server: InUse) -> bool:
        if self._max_memory_mb is None or server.process is None:
            return False
        megabytes = server.process.memory() // 1_000_000
        if megabytes <= self._max_memory_mb:
            return False
        _log.info("the server (pid %d) takes %d MB: recycled", server.process.pid, megabytes)
        return True

    def _retire(self, server: InUse) -> None:
        server.is_retired = True
        self._current = None
        self._end_if_done(server)

    def _leave(self, server: InUse, ticket: object) -> None:
        server.turns.discard(ticket)
        self._end_if_done(server)

    def _end_if_done(self, server: InUse) -> None:
        with self._lock:
            is_done = server.is_retired and not server.turns and server in self._all
            if is_done:
                self._all.discard(server)
        if is_done:
            server.close()
