"""Of the servers of one runner, one is in use.

    begin() --> the server in use --> Link.begin() --> Turn
                  |
                  +-- started with the first turn, and again when it has died
                  +-- followed by a fresh one when it has grown too large: the turns on it go on to
                      their end, and with the last of them it ends too

All have the same sessions. Knows when a server is started and ended; nothing of how.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ._request import Request
from ._servers import Elsewhere, InUse, Origin
from ._turn import Turn
from .config import RunConfig
from .errors import OpenCodeCancelledError, OpenCodeServerError

_log = logging.getLogger("opencode_sync")

EXIT_S = 1.0  # how long one that does not answer may take to be seen to have ended

_CLOSED = "the server was closed while the run was starting"


class Fleet:
    """Thread-safe. Its lock is held while a server starts or ends, not while one is asked."""

    def __init__(self, origin: Origin, max_memory_mb: int | None = None) -> None:
        """
        Args:
            max_memory_mb: A server that takes more is followed by a fresh one; None for no limit.
        """
        self._origin = origin
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
            OpenCodeError: If it does not start.
            OpenCodeCancelledError: If this was closed.
        """
        with self._lock:
            if self._is_closed:
                raise OpenCodeCancelledError(_CLOSED)
            current = self._current
            if current is not None and (current.is_gone or self._is_too_large(current)):
                self._current = None
                current.is_retired = True
                self._end_if_done(current)
                current = None
            if current is None:
                current = self._current = self._start()
                self._all.add(current)
            return current

    def _start(self) -> InUse:
        try:
            return self._origin.start()
        except OpenCodeServerError as error:
            if self._is_closed:
                raise OpenCodeCancelledError(_CLOSED) from error
            raise

    def begin(self, request: Request, cancelled: Callable[[], bool] = lambda: False) -> Turn:
        """Send *request* to the server in use.

        Args:
            cancelled: Asked before it is sent.

        Raises:
            OpenCodeError: What :meth:`current` and :meth:`Link.begin` raise.
            OpenCodeCancelledError: If it was cancelled.
        """
        ticket = object()
        server = self._enter(ticket)
        has_sent: list[bool] = []

        def before_send() -> None:
            has_sent.append(True)
            if cancelled():
                raise OpenCodeCancelledError("the run was cancelled while it was starting")

        try:
            return self._begin(server, ticket, request, before_send)
        except OpenCodeServerError as error:
            # A prompt that was sent may be at work: it is not sent twice.
            if error.status_code is not None or has_sent or not _has_died(server):
                raise
        # It had died before, and has taken nothing: the next one may.
        return self._begin(self._enter(ticket), ticket, request, before_send)

    def _enter(self, ticket: object) -> InUse:
        with self._lock:
            server = self.current()
            server.turns.add(ticket)
        return server

    def _begin(
        self, server: InUse, ticket: object, request: Request, before_send: Callable[[], None]
    ) -> Turn:
        try:
            turn = server.link.begin(request, before_send)
        except BaseException:
            self._leave(server, ticket)
            raise
        turn.on_close(lambda: self._leave(server, ticket))
        self._origin.remember(turn.session_id, str(request.workspace))
        return turn

    def give_up(self) -> None:
        """Start no more servers, nor wait for one that is starting; from any thread."""
        self._is_closed = True
        self._origin.give_up()

    def close(self) -> None:
        """End all servers. Idempotent."""
        self.give_up()
        with self._lock:
            self._current = None
        while self._all:
            self._all.pop().close()
        self._origin.close()

    def _is_too_large(self, server: InUse) -> bool:
        if self._max_memory_mb is None or server.process is None:
            return False
        megabytes = server.process.memory() // 1_000_000
        if megabytes <= self._max_memory_mb:
            return False
        _log.info("the server (pid %d) takes %d MB: recycled", server.process.pid, megabytes)
        return True

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


def _has_died(server: InUse) -> bool:
    return server.is_gone or (server.process is not None and server.process.wait_exited(EXIT_S))


class Attached:
    """The servers that ``RunConfig(attach=...)`` names, each reached once. Thread-safe."""

    def __init__(self, *, any_version: bool = False) -> None:
        """
        Args:
            any_version: Use them whatever their version is.
        """
        self._any_version = any_version
        self._fleets: dict[tuple[str, str | None, str | None], Fleet] = {}

    def of(self, cfg: RunConfig) -> Fleet:
        """The one that *cfg* names."""
        assert cfg.attach is not None
        key = (cfg.attach, cfg.username, cfg.password)
        # One operation, so that two threads get the same.
        origin = Elsewhere(*key, any_version=self._any_version)
        return self._fleets.setdefault(key, Fleet(origin))

    def close(self) -> None:
        """Let go of them. Idempotent."""
        while self._fleets:
            self._fleets.popitem()[1].close()
