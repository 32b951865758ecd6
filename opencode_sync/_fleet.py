"""Of the servers of one runner, one is in use.

    begin() --> the server in use --> Link.begin() --> Turn
                  |
                  +-- started with the first turn, and again when it has died
                  +-- followed by a fresh one when it has grown too large: the turns on it go on to
                      their end, and with the last of them it ends too

All have the same sessions. Knows when a server is started and ended; nothing of how.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections.abc import Callable

from ._servers import Elsewhere, InUse, Origin
from ._turn import Turn
from .core.config import RunConfig
from .core.errors import OpenCodeCancelledError, OpenCodeServerError
from .core.lifetime import CancelScope, Flag
from .core.request import Request

_log = logging.getLogger("opencode_sync")

EXIT_S = 1.0  # how long one that does not answer may take to be seen to have ended

START_ENDS_S = 8.0  # bound on waiting for a start that was given up

_CANCELLED = "the run was cancelled while it was starting"
_CLOSED = "the server was closed while the run was starting"


class Fleet:
    """Thread-safe. Its lock is not held while a server starts, ends or is asked."""

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
        self._starting: _Start | None = None
        self._all: set[InUse] = set()
        self._is_closed = False

    @property
    def url(self) -> str | None:
        """Where the one in use is; None where none is."""
        current = self._current
        return None if current is None else current.link.connection.url

    def current(self, ticket: object = None, scope: CancelScope | None = None) -> InUse:
        """Return the server to use now, started where there is none.

        Args:
            ticket: Of a turn that begins: the server goes on as long as it has that.
            scope: Ends the waiting for a start, which goes on.

        Raises:
            OpenCodeError: If it does not start.
            OpenCodeCancelledError: If this was closed, or the run was cancelled.
        """
        is_fresh = False
        while True:
            with self._lock:
                if self._is_closed:
                    raise OpenCodeCancelledError(_CLOSED)
                if self._starting is None:
                    current = self._current
                    if current is not None and self._is_usable(current, is_fresh):
                        if ticket is not None:
                            current.turns.add(ticket)
                        return current
                    self._current = None
                    self._starting = _Start(functools.partial(self._start, current))
                starting = self._starting
            starting.wait(CancelScope() if scope is None else scope)
            is_fresh = True

    def _start(self, former: InUse | None) -> None:
        """Start a server in the place of *former*, in a thread of its own."""
        try:
            if former is not None:
                former.is_retired = True
                self._end_if_done(former)
            server = self._origin.start()
        except BaseException as error:
            with self._lock:
                self._starting = None
            if self._is_closed and isinstance(error, OpenCodeServerError):
                raise OpenCodeCancelledError(_CLOSED) from error
            raise
        with self._lock:
            self._all.add(server)
            self._current, self._starting = server, None

    def begin(self, request: Request, scope: CancelScope | None = None) -> Turn:
        """Send *request* to the server in use.

        Args:
            scope: Of the run; what waits for the server ends with it.

        Raises:
            OpenCodeError: What :meth:`current` and :meth:`Link.begin` raise.
            OpenCodeCancelledError: If it was cancelled.
        """
        ticket = object()
        scope = CancelScope() if scope is None else scope
        server = self.current(ticket, scope)
        has_sent: list[bool] = []

        def before_send() -> None:
            has_sent.append(True)
            if scope.is_cancelled():
                raise OpenCodeCancelledError(_CANCELLED)

        try:
            return self._begin(server, ticket, request, before_send, scope)
        except OpenCodeServerError as error:
            if error.status_code is not None or scope.is_over:
                raise
            has_died = _has_died(server)
            # A prompt that was sent may be at work: it is not sent twice.
            if has_sent or not has_died:
                if (reason := server.link.connection.lost) is not None:
                    raise OpenCodeServerError(reason) from error
                raise
        # It had died before, and has taken nothing: the next one may.
        server = self.current(ticket, scope)
        return self._begin(server, ticket, request, before_send, scope)

    def _begin(
        self,
        server: InUse,
        ticket: object,
        request: Request,
        before_send: Callable[[], None],
        scope: CancelScope,
    ) -> Turn:
        try:
            turn = server.link.begin(request, before_send, scope)
        except BaseException:
            self._leave(server, ticket)
            raise
        if turn.keeps_background:
            server.keeps_background = True
        turn.on_close(lambda: self._end_turn(server, ticket, turn))
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
            starting, self._current = self._starting, None
        if starting is not None:
            starting.join()
        while self._all:
            self._all.pop().close()
        self._origin.close()

    def _is_usable(self, server: InUse, is_fresh: bool) -> bool:
        # One that is too large from the start is used all the same.
        return not server.is_gone and (is_fresh or not self._is_too_large(server))

    def _is_too_large(self, server: InUse) -> bool:
        if self._max_memory_mb is None or server.process is None:
            return False
        megabytes = server.process.memory() // 1_000_000
        if megabytes <= self._max_memory_mb:
            return False
        _log.info("the server (pid %d) takes %d MB: recycled", server.process.pid, megabytes)
        return True

    def _end_turn(self, server: InUse, ticket: object, turn: Turn) -> None:
        if turn.has_used_tools:
            server.has_used_tools = True
        self._leave(server, ticket)
        # Of several turns, none can be told to have left them.
        if server.has_used_tools and not server.turns and not server.keeps_background:
            server.has_used_tools = False
            server.stop_strays()

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


class _Start:
    """A server's start, in a thread of its own: who waits for it may leave before its end."""

    def __init__(self, start: Callable[[], None]) -> None:
        self._start = start
        self._error: BaseException | None = None
        self._is_done = False
        self._waiters: list[Flag] = []
        self._thread = threading.Thread(target=self._run, name="opencode-start", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no thread to be had, or the interpreter is at its end
            raise OpenCodeServerError(f"there is no thread to start it: {error}") from error

    def wait(self, scope: CancelScope) -> None:
        """Return when the server has started.

        Raises:
            OpenCodeError: What kept it from starting.
            OpenCodeCancelledError: If *scope* was cancelled before.
            OpenCodeServerError: If the deadline of *scope* has passed before.
        """
        flag = Flag()
        self._waiters.append(flag)  # before the look at whether it is done
        if self._is_done:
            flag.set()
        scope.wait(flag)
        if not self._is_done:
            if scope.is_cancelled():
                raise OpenCodeCancelledError(_CANCELLED)
            raise OpenCodeServerError("the server did not start in time")
        if self._error is not None:
            # A copy: it is raised in each thread that waited.
            raise copy.copy(self._error) from self._error.__cause__

    def join(self) -> None:
        """Wait for the end of the thread; bounded."""
        if self._thread is not threading.current_thread():
            self._thread.join(START_ENDS_S)

    def _run(self) -> None:
        try:
            self._start()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error
        self._is_done = True
        for flag in self._waiters:
            flag.set()


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
