"""Where servers come from: started by us, or running elsewhere.

    Own.start() ------> process, data directory, configuration --+
    Elsewhere.start() --> URL, password -------------------------+--> InUse: a link to it

Knows how a server is started and ended; nothing of when, nor of what is asked of it.

Of the servers of one runner, one is in use.

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
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..core import lifetime
from ..core.config import RunConfig
from ..core.errors import (
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeServerError,
)
from ..core.lifetime import CancelScope, Flag
from ..core.request import Request
from ..core.secrets import Secrets
from ..process import tree
from ..process.command import PLUGIN, PRELOAD, build_env, resolve_binary, server_env
from ..process.data_dirs import DataDirectories, Lease
from ..process.versions import check_program_version
from ..process.watchdog import add_directory, discard_directory, guard
from .connection import Connection
from .launch import Server
from .running import Busy, Link, dispose
from .turn import Turn

_log = logging.getLogger("opencode_sync")

# Of our own servers, one that leaves two such questions in a row unanswered is taken for dead. Two,
# so that it is not blamed where all of us were stopped for a while, as a container can be.
ANSWER_S = 5.0
# One that uses the processor all the while is busy, or the machine is; a loop that never ends does
# that too.
BUSY_S = 30.0
LOOK_S = 2.0  # between questions
OPEN_S = 10.0  # how long one that listens may always take to answer
JOIN_S = 2.0  # bound on waiting for the thread that asks


@dataclass(eq=False)
class InUse:
    """A server with the turns on it; *process* is None for one that runs elsewhere.

    Attributes:
        has_used_tools: A turn has, since the last time that there was none.
        keeps_background: A turn was to leave alone what its tools left running.
    """

    link: Link
    process: Server | None = None
    health: Health | None = None
    turns: set[object] = field(default_factory=set)
    is_retired: bool = False
    has_used_tools: bool = False
    keeps_background: bool = False

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, as far as is known."""
        return self.link.is_lost or (self.process is not None and self.process.has_exited)

    def stop_strays(self) -> None:
        """End what tools have left running without a session's mark; only between turns."""
        if self.process is not None and not self.is_gone:
            tree.stop_strays(self.process.token)

    def close(self) -> None:
        """Stop a server of ours with all that it started; let go of another one."""
        if self.health is not None:
            self.health.close()
        if self.process is not None:
            connection = self.link.connection
            if not self.is_gone and not connection.is_silent:
                dispose(connection)
            self.process.stop(at_once=connection.is_silent)
        self.link.close()


class Health:
    """Asks a server of ours, while somebody waits for it, whether it is alive; ends a dead one.

    In a thread of its own, over a connection of its own.
    """

    def __init__(self, server: InUse, process: Server) -> None:
        link = server.link
        self._server, self._process = server, process
        self._connection = Connection(link.connection.url, password=link.connection.password)
        self._closing = lifetime.Flag()
        name = f"opencode-{process.pid}-health"
        self._thread = threading.Thread(target=self._ask, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop asking. Idempotent, from any thread."""
        self._closing.set()
        self._connection.close()
        if self._thread is not threading.current_thread():
            self._thread.join(JOIN_S)

    def _ask(self) -> None:
        n_silent, cpu_s = 0, 0.0
        while not self._closing.wait(0.0 if n_silent else LOOK_S):
            is_waited_for = self._server.turns or self._server.link.connection.is_asked
            if not is_waited_for and not n_silent:
                continue
            if self._answers():
                n_silent = 0
                continue
            if self._closing.is_set() or self._process.has_exited:
                return
            n_silent += 1
            used_s, cpu_s = self._process.cpu_s() - cpu_s, self._process.cpu_s()
            is_busy = used_s > 0.02 * ANSWER_S
            if n_silent >= (BUSY_S / ANSWER_S if is_busy else 2):
                return self._end(n_silent * ANSWER_S)

    def _answers(self) -> bool:
        try:
            self._connection.get("/global/health", timeout_s=ANSWER_S, keeps_open=False)
        except OpenCodeServerError as error:
            # What is refused at once is not silent; the process's end is seen elsewhere.
            return error.status_code is not None or not self._connection.is_silent
        return True

    def _end(self, silent_s: float) -> None:
        reason = f"the server (pid {self._process.pid}) did not answer for {silent_s:g} s: ended"
        _log.warning("%s", reason)
        self._server.link.lose(reason)
        self._process.stop(at_once=True)


class Origin(Protocol):
    """Gives servers, one after another, with the same sessions."""

    def start(self) -> InUse:
        """A server, ready for turns.

        Raises:
            OpenCodeError: If there is none to be had.
        """

    def give_up(self) -> None:
        """Have a start that is under way fail, as far as it can be helped; from any thread."""

    def remember(self, session_id: str, workspace: str) -> None:
        """Keep in mind, beyond our end, that there is this session."""

    def close(self) -> None:
        """Give back what servers share, once the last one has ended. Idempotent."""


class Elsewhere:
    """A server that somebody else started."""

    def __init__(
        self,
        url: str,
        username: str | None = None,
        password: str | None = None,
        *,
        any_version: bool = False,
    ) -> None:
        self._url, self._username, self._password = url, username, password
        self._any_version = any_version
        self._busy = Busy()
        self._scope = lifetime.CancelScope()

    def start(self) -> InUse:
        """Reach it; see :class:`Origin`."""
        opening = lifetime.CancelScope(time.monotonic() + OPEN_S)
        with self._scope.waking(opening.cancel):
            link = Link(
                self._url,
                username=self._username,
                password=self._password,
                any_version=self._any_version,
                busy=self._busy,
                scope=opening,
            )
        return InUse(link)

    def give_up(self) -> None:
        """See :class:`Origin`."""
        self._scope.cancel()

    def remember(self, session_id: str, workspace: str) -> None:
        """Nothing: it keeps its own sessions."""

    def close(self) -> None:
        """Nothing: it goes on."""


class Own:
    """Servers of ours, on one data directory."""

    def __init__(
        self,
        binary: str | os.PathLike[str],
        cfg: RunConfig,
        *,
        data_dir: str | os.PathLike[str] | None,
        timeout_s: float,
        watchdog: bool,
        any_version: bool = False,
    ) -> None:
        """
        Args:
            data_dir: None for a temporary one.
            timeout_s: How long a start may take.
            any_version: Start whatever OpenCode there is.
        """
        self._any_version = any_version
        self._binary = binary
        self._cfg = cfg
        self._timeout_s = timeout_s
        self._watchdog = watchdog
        self._is_kept = data_dir is not None
        self._directories = DataDirectories(
            data_dir,
            on_make=add_directory if watchdog else _nothing,
            on_remove=discard_directory if watchdog else _nothing,
        )
        self._leases: list[Lease] = []  # one, from the first start on
        self._busy = Busy()
        self._scope = lifetime.CancelScope()  # of all starts

    def start(self) -> InUse:
        """Start one; see :class:`Origin`."""
        try:
            return self._start()
        except OpenCodeError as error:
            Secrets(self._cfg).clean_error(error)
            raise

    def _start(self) -> InUse:
        binary = resolve_binary(self._binary)
        if not self._any_version:
            check_program_version(binary, self._scope.is_cancelled)
        env = build_env(self._cfg)
        _check_plugin(env)
        if self._watchdog:
            guard()
        if self._leases:
            self._leases[0].empty()  # the one before has loaded what it has unpacked
        else:
            self._leases.append(self._directories.lease(env))
        data = self._leases[0].path
        empty = None if self._cfg.inherit_user_config else self._directories.empty_config()
        env = server_env(
            self._cfg, unpacked=self._leases[0].unpacked, data_home=data, empty_config=empty
        )
        links: list[Link] = []  # to this server, once it is there

        def on_exit(reason: str) -> None:
            for link in links:
                link.lose(reason)

        def on_refusal(session_id: str, status: int, wait_s: float | None) -> None:
            for link in links:
                link.note_refusal(session_id, status, wait_s)

        def on_error(session_id: str, error: Mapping[str, Any]) -> None:
            for link in links:
                link.note_error(session_id, error)

        deadline = time.monotonic() + self._timeout_s
        process = Server(
            binary,
            env,
            data,
            timeout_s=self._timeout_s,
            scope=self._scope,
            on_exit=on_exit,
            on_refusal=on_refusal,
            on_error=on_error,
        )
        opening = lifetime.CancelScope(max(deadline, time.monotonic() + OPEN_S))
        try:
            with self._scope.waking(opening.cancel):
                link = Link(
                    process.url,
                    password=process.password,
                    has_marks=True,
                    env=env,
                    name=binary,
                    any_version=self._any_version,
                    busy=self._busy,
                    scope=opening,
                )
            links.append(link)
            if process.has_exited:
                raise OpenCodeServerError(f"the server (pid {process.pid}) ended at once")
            server = InUse(link, process)
            server.health = Health(server, process)
        except BaseException:
            process.stop(at_once=opening.is_over)
            for link in links:
                link.close()
            raise
        return server

    def give_up(self) -> None:
        """See :class:`Origin`."""
        self._scope.cancel()

    def remember(self, session_id: str, workspace: str) -> None:
        """See :class:`Origin`; in a temporary directory there is no beyond."""
        for lease in self._leases if self._is_kept else ():
            lease.remember(session_id, workspace)

    def close(self) -> None:
        """Remove what is temporary; see :class:`Origin`."""
        while self._leases:
            self._leases.pop().release()
        self._directories.close()


def _check_plugin(env: Mapping[str, str]) -> None:
    """Refuse a server without our plugin, whose tools could read its password."""
    if env.get("OPENCODE_PURE", "").lower() in ("1", "true"):
        why, instead = "OPENCODE_PURE leaves out all plugins", "unset it"
    elif PRELOAD in env:
        why, instead = f"{PRELOAD} is set, and so leaves out what goes with our plugin", "unset it"
    elif not PLUGIN.is_file():
        why, instead = "there is no file of it (a package in an archive?)", "install the package"
    else:
        return
    raise OpenCodeConfigError(
        f"{why}, and our plugin keeps the server's password from its tools: {instead}, or use "
        "OpenCodeClient"
    )


def _nothing(path: Path) -> None:
    pass


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
