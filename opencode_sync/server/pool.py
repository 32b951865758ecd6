"""The servers of one runner; one of them is in use.

    begin() --> current(): the server in use --> RunningServer.begin() --> Turn, sent
                  |
                  +-- started with the first turn, and again when it has died
                  +-- replaced when it has grown too large: its turns go on to their end,
                      and with the last of them it is closed

    Launcher.start() --> process, data directory, configuration --+
    Attacher.start() --> URL, password ---------------------------+--> RunningServer

All servers of one pool have the same sessions. Knows when and how a server is started and closed;
nothing of what it is asked.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from ..core.config import RunConfig
from ..core.errors import (
    OpenCodeCancelledError,
    OpenCodeError,
    OpenCodeServerError,
)
from ..core.lifetime import CancelScope, Flag
from ..core.request import Request
from ..core.secrets import Secrets
from ..process.command import build_env, check_plugin, resolve_binary, server_env
from ..process.data_dirs import DataDirectories, Lease
from ..process.versions import check_program_version
from ..process.watchdog import guard
from .connection import Connection
from .launch import ServerProcess
from .running import RunningServer
from .turn import Turn

_log = logging.getLogger("opencode_sync")

OPEN_S = 10.0  # a server that listens may always take this long to respond
START_ENDS_S = 8.0  # bound on waiting for a start that was given up

_CANCELLED = "the run was cancelled while it was starting"
_CLOSED = "the server was closed while the run was starting"


AtWork = dict[str, CancelScope]
"""The sessions with a turn under way, on any server of a pool, and whose turn it is."""


@dataclass(frozen=True, repr=False)  # a repr shows no password
class Attacher:
    """Reaches a server that somebody else started."""

    url: str
    username: str | None = None
    password: str | None = None
    any_version: bool = False

    def start(self, scope: CancelScope, at_work: AtWork) -> RunningServer:
        """Connect to it; raise OpenCodeError if that is not possible. *scope* ends the waiting."""
        opening = CancelScope(time.monotonic() + OPEN_S)
        with scope.waking(opening.cancel):
            return RunningServer(
                Connection(self.url, username=self.username, password=self.password),
                any_version=self.any_version,
                at_work=at_work,
                scope=opening,
            )

    def remember(self, session_id: str, workspace: str) -> None:
        """Do nothing: the server keeps its own sessions."""

    def close(self) -> None:
        """Do nothing: the server goes on."""


class Launcher:
    """Starts our own servers, one after another, on one data directory."""

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
            timeout_s: Time limit of a start.
        """
        self._any_version = any_version
        self._binary = binary
        self._cfg = cfg
        self._timeout_s = timeout_s
        self._watchdog = watchdog
        self._is_kept = data_dir is not None
        self._directories = DataDirectories(data_dir, watchdog=watchdog)
        self._lease: Lease | None = None  # from the first start on

    def start(self, scope: CancelScope, at_work: AtWork) -> RunningServer:
        """Start one; raise OpenCodeError if that fails. *scope* ends the waiting."""
        try:
            return self._start(scope, at_work)
        except OpenCodeError as error:
            Secrets(self._cfg).clean_error(error)
            raise

    def _start(self, scope: CancelScope, at_work: AtWork) -> RunningServer:
        binary = resolve_binary(self._binary)
        if not self._any_version:
            check_program_version(binary, scope.is_cancelled)
        env = build_env(self._cfg)
        secret = "the server's password from its tools"
        check_plugin(self._cfg, env, secret, "use OpenCodeClient", with_preload=True)
        if self._watchdog:
            guard()
        if self._lease is None:
            self._lease = self._directories.lease(env)
        else:
            self._lease.empty()  # the server before has loaded what it has unpacked
        env = server_env(
            self._cfg,
            unpacked=self._lease.unpacked,
            data_home=self._lease.path,
            empty_config=(
                None if self._cfg.inherit_user_config else self._directories.empty_config()
            ),
        )
        deadline = time.monotonic() + self._timeout_s
        process = ServerProcess(
            binary, env, self._lease.path, timeout_s=self._timeout_s, scope=scope
        )
        opening = CancelScope(max(deadline, time.monotonic() + OPEN_S))
        try:
            with scope.waking(opening.cancel):
                return RunningServer(
                    Connection(process.url, password=process.password),
                    process,
                    any_version=self._any_version,
                    at_work=at_work,
                    scope=opening,
                )
        except BaseException:
            process.stop(at_once=opening.is_over)
            raise

    def remember(self, session_id: str, workspace: str) -> None:
        """Note the session in a data directory that is kept, for later runners."""
        if self._is_kept and self._lease is not None:
            self._lease.remember(session_id, workspace)

    def close(self) -> None:
        """Remove temporary directories, once the last server has ended. Idempotent."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()
        self._directories.close()


class ServerPool:
    """The servers of one runner.

    Thread-safe. Its lock is not held while a server starts, ends or is asked.
    """

    def __init__(self, starter: Launcher | Attacher, max_memory_mb: int | None = None) -> None:
        """
        Args:
            max_memory_mb: A server that takes more is replaced; None for no limit.
        """
        self._starter = starter
        self._max_memory_mb = max_memory_mb
        # Reentrant, since a finaliser may end a turn at any line.
        self._lock = threading.RLock()
        self._current: RunningServer | None = None
        self._starting: _Start | None = None
        self._servers: set[RunningServer] = set()
        self._at_work: AtWork = {}
        self._life = CancelScope()  # ends starts

    @property
    def url(self) -> str | None:
        """The URL of the server in use; None if there is none."""
        current = self._current
        return None if current is None else current.connection.url

    def current(self, scope: CancelScope | None = None, *, for_turn: bool = False) -> RunningServer:
        """Return the server in use, started if there is none.

        Args:
            scope: Ends the waiting for a start, which goes on.
            for_turn: Add *scope* to the server's ``turns``: it is kept until it leaves them.

        Raises:
            OpenCodeError: If it does not start.
            OpenCodeCancelledError: If this was closed, or *scope* was cancelled.
        """
        scope = CancelScope() if scope is None else scope
        is_fresh = False
        while True:
            with self._lock:
                if self._life.is_cancelled():
                    raise OpenCodeCancelledError(_CLOSED)
                if self._starting is None:
                    current = self._current
                    if current is not None and self._is_usable(current, is_fresh):
                        if for_turn:
                            current.turns.add(scope)
                        return current
                    self._current = None
                    self._starting = _Start(functools.partial(self._start, current))
                starting = self._starting
            starting.wait(scope)
            is_fresh = True

    def _start(self, former: RunningServer | None) -> None:
        """Start a server in place of *former*, in a thread of its own."""
        try:
            if former is not None:
                former.retire()
            server = self._starter.start(self._life, self._at_work)
        except BaseException as error:
            with self._lock:
                self._starting = None
            if self._life.is_cancelled() and isinstance(error, OpenCodeServerError):
                raise OpenCodeCancelledError(_CLOSED) from error
            raise
        with self._lock:
            # Without those that are closed.
            there = {each for each in self._servers if each.turns or not each.is_gone}
            self._servers = there | {server}
            self._current, self._starting = server, None

    def begin(self, request: Request, scope: CancelScope) -> Turn:
        """Send *request* to the server in use.

        Args:
            scope: The run's; what waits for the server ends with it.

        Raises:
            OpenCodeError: As :meth:`current` and :meth:`RunningServer.begin` do.
            OpenCodeCancelledError: If *scope* was cancelled.
        """
        server = self.current(scope, for_turn=True)
        try:
            turn = server.begin(request, scope)
        except OpenCodeServerError as error:
            if error.status_code is not None or scope.is_over or not server.is_gone:
                raise
            # It had died before, and has taken nothing: the next one may.
            server = self.current(scope, for_turn=True)
            turn = server.begin(request, scope)
        try:
            if scope.is_cancelled():
                raise OpenCodeCancelledError(_CANCELLED)
            # Before it is sent: a Ctrl-C after that would leave a turn at work that nobody stops.
            self._starter.remember(turn.session_id, str(request.workspace))
            turn.send()
        except BaseException:
            turn.close()
            raise  # the prompt may be at work: it is not sent twice
        return turn

    def give_up(self) -> None:
        """Start no more servers, and stop waiting for one that starts; from any thread."""
        self._life.cancel()

    def close(self) -> None:
        """Close all servers. Idempotent."""
        self.give_up()
        with self._lock:
            starting, self._current = self._starting, None
        if starting is not None:
            starting.join()
        while self._servers:
            self._servers.pop().close()
        self._starter.close()

    def _is_usable(self, server: RunningServer, is_fresh: bool) -> bool:
        # One that is too large from the start is used anyway.
        return not server.is_gone and (is_fresh or not self._is_too_large(server))

    def _is_too_large(self, server: RunningServer) -> bool:
        if self._max_memory_mb is None or server.process is None:
            return False
        megabytes = server.process.memory() // 1_000_000
        if megabytes <= self._max_memory_mb:
            return False
        _log.info("the server (pid %d) takes %d MB: replaced", server.process.pid, megabytes)
        return True


class _Start:
    """A server's start, in a thread of its own: a waiting thread may leave before its end."""

    def __init__(self, start: Callable[[], None]) -> None:
        self._start = start
        self._end: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="opencode-start", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no thread to be had, or the interpreter is at its end
            raise OpenCodeServerError(f"no thread can be started: {error}") from error

    def wait(self, scope: CancelScope) -> None:
        """Return when the server has started.

        Raises:
            OpenCodeError: Why it did not start.
            OpenCodeCancelledError: If *scope* was cancelled before.
            OpenCodeServerError: If the deadline of *scope* has passed before.
        """
        flag = Flag()
        self._end.add_done_callback(lambda end: flag.set())
        scope.wait(flag)
        if not self._end.done():
            if scope.is_cancelled():
                raise OpenCodeCancelledError(_CANCELLED)
            raise OpenCodeServerError("the server did not start in time")
        if (error := self._end.exception()) is not None:
            # A copy: it is raised in each thread that waited.
            raise copy.copy(error) from error.__cause__

    def join(self) -> None:
        """Wait for the end of the thread; bounded."""
        if self._thread is not threading.current_thread():
            self._thread.join(START_ENDS_S)

    def _run(self) -> None:
        try:
            self._start()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._end.set_exception(error)
        else:
            self._end.set_result(None)


class Pools:
    """The pools of one runner: one of its own servers, and one for each server elsewhere.

    A forked child has servers and connections of its own. Thread-safe.
    """

    def __init__(
        self,
        launcher: Callable[[], Launcher] | None = None,
        *,
        max_memory_mb: int | None = None,
        any_version: bool = False,
    ) -> None:
        """
        Args:
            launcher: Makes what starts our own servers.
            any_version: For the servers that ``RunConfig(attach=...)`` names.
        """
        self._launcher = launcher
        self._max_memory_mb = max_memory_mb
        self._any_version = any_version
        self._pools: dict[tuple[int, Attacher | None], ServerPool] = {}  # by process

    def get(self, attacher: Attacher | None) -> ServerPool:
        """Return the pool of the server that *attacher* reaches; None for our own servers."""
        key = os.getpid(), attacher
        if (pool := self._pools.get(key)) is None:
            if attacher is None:
                assert self._launcher is not None
                pool = ServerPool(self._launcher(), self._max_memory_mb)
            else:
                pool = ServerPool(attacher)
            # One operation, so that two threads get the same.
            pool = self._pools.setdefault(key, pool)
        return pool

    def attached(self, cfg: RunConfig) -> ServerPool:
        """Return the pool of the server that *cfg* names."""
        assert cfg.attach is not None
        return self.get(Attacher(cfg.attach, cfg.username, cfg.password, self._any_version))

    def close(self) -> None:
        """Close this process's pools, which start nothing afterwards. Idempotent."""
        for (pid, _), pool in self._pools.copy().items():
            if pid == os.getpid():
                pool.close()
