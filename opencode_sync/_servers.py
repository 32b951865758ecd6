"""Where servers come from: started by us, or running elsewhere.

    Own.start() ------> process, data directory, configuration --+
    Elsewhere.start() --> URL, password -------------------------+--> InUse: a link to it

Knows how a server is started and ended; nothing of when, nor of what is asked of it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ._http import Connection
from ._link import Busy, Link, dispose
from ._serve import Server
from .core import lifetime
from .core.config import RunConfig
from .core.denials import PRELOAD, enforced
from .core.errors import OpenCodeConfigError, OpenCodeError, OpenCodeServerError
from .core.secrets import Secrets
from .process import tree
from .process.command import PLUGIN, build_env, resolve_binary, unpacking_in, without_user_config
from .process.data_dirs import DataDirectories, Lease
from .process.versions import check_program_version
from .process.watchdog import add_directory, discard_directory, guard

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
        env = build_env(self._cfg.replace(agent=None))  # each prompt names its own
        env = enforced(env, self._cfg, is_server=True)
        _check_plugin(env)
        if self._watchdog:
            guard()
        if self._leases:
            self._leases[0].empty()  # the one before has loaded what it has unpacked
        else:
            self._leases.append(self._directories.lease(env))
        data = self._leases[0].path
        env["XDG_DATA_HOME"] = str(data)
        env = unpacking_in(self._leases[0].unpacked, env)
        if not self._cfg.inherit_user_config:
            empty = self._directories.empty_config()
            env = without_user_config(env, self._cfg, empty)
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
