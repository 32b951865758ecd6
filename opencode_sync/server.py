"""A warm server: the verbs of the client, without a process per run.

Request --> Fleet: the server in use --> Link.begin() --> Turn, a source of events
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import _watchdog
from ._bodies import check_server_wide
from ._command import DEFAULT_BINARY, build_env, resolve_binary, without_user_config
from ._datadir import DataDirectories, Lease
from ._fleet import Fleet, InUse
from ._link import Link
from ._serve import Server, spare_installation
from ._turn import Turn
from .config import RunConfig, validate_config_for_run
from .errors import OpenCodeConfigError, OpenCodeServerError
from .runner import Request, Runner, StrPath

# A server takes 0.4 GB, with 16 sessions at work 0.8, with 8 directories 1.3: one that takes more
# than this has kept what it should not.
MAX_MEMORY_MB = 2_000
# With a model that takes half a second, 8 runs at a time got 9 done per second, 16 got 14; its one
# thread has enough to do with 28 per second. Where the model takes longer, more can pay.
WORKERS = 16


class OpenCodeServer(Runner):
    """Runs each prompt on one warm ``opencode serve``: some twenty times faster than a process.

    Safe to share between threads, picklable as its settings, and a context manager: closing it
    ends the runs under way, and the server with all that it started.

    The server is started on entry, or with the first run. It listens on loopback, with a random
    password. If it dies, its runs end with OpenCodeServerError, and the next one starts it again.
    """

    def __init__(
        self,
        binary: StrPath = DEFAULT_BINARY,
        *,
        run_cfg: RunConfig | None = None,
        data_dir: StrPath | None = None,
        max_workers: int | None = None,
        startup_timeout_s: float = 30.0,
        max_memory_mb: int | None = MAX_MEMORY_MB,
        watchdog: bool = True,
    ) -> None:
        """
        Args:
            binary: A path, or a name on ``PATH``; looked for when the server is started.
            run_cfg: Settings of the server, and of runs that bring none of their own. What is
                the same for all runs of a server (``extra_env``, ``mcp``, ``config_overrides``,
                ``instructions``, ...) can be set only here.
            data_dir: Where to keep sessions; None for a temporary directory.
            max_workers: Threads for ``submit`` and ``map``.
            startup_timeout_s: Seconds until it must listen; it takes 1 to 2.
            max_memory_mb: A server that takes more is followed by a fresh one, while the runs on
                it go on to their end; None for no limit.
            watchdog: Keep a small process that stops the server if this process is killed outright.
        """
        super().__init__(run_cfg, max_workers)
        self._settings: dict[str, Any] = {
            "binary": binary,
            "run_cfg": run_cfg,
            "data_dir": data_dir,
            "max_workers": max_workers,
            "startup_timeout_s": startup_timeout_s,
            "max_memory_mb": max_memory_mb,
            "watchdog": watchdog,
        }
        self._elsewhere: tuple[str, str | None, str | None] | None = None
        if self._run_cfg.pure:
            raise OpenCodeConfigError(
                "pure=True leaves out all plugins, also ours that keeps the server's password from "
                "its tools: run it by OpenCodeClient"
            )
        self._begin_anew()

    @classmethod
    def connect(
        cls,
        url: str,
        password: str | None = None,
        *,
        username: str | None = None,
        run_cfg: RunConfig | None = None,
        max_workers: int | None = None,
    ) -> OpenCodeServer:
        """Use a server that runs elsewhere; it is never stopped.

        Its tools are stopped by its own means alone, and its sub-agents ask for what its own
        configuration has them ask for, not for what a run's ``permission`` says.

        Args:
            url: Where it is, such as ``"http://127.0.0.1:4096"``.
        """
        server = cls(run_cfg=run_cfg, max_workers=max_workers, watchdog=False)
        server._elsewhere = (url, username, password)
        return server

    def _begin_anew(self) -> None:
        self._owner_pid = os.getpid()
        self._fleet = Fleet(self._start, self._settings["max_memory_mb"])
        self._leases: list[Lease] = []  # one, once a server was started
        has_watchdog = self._settings["watchdog"]
        self._directories = DataDirectories(
            self._settings["data_dir"],
            on_make=_watchdog.add_directory if has_watchdog else _nothing,
            on_remove=_watchdog.discard_directory if has_watchdog else _nothing,
        )
        weakref.finalize(
            self, _close_in, self._owner_pid, self._fleet, self._leases, self._directories
        )

    @property
    def url(self) -> str:
        """Where the server is; starts it, as all of these do."""
        return self._server().link.connection.url

    @property
    def password(self) -> str | None:
        """What it asks for; the user name is ``"opencode"``."""
        process = self._server().process
        return process.password if process is not None else (self._elsewhere or (None,) * 3)[2]

    @property
    def pid(self) -> int | None:
        """Its process id; None for one that runs elsewhere."""
        process = self._server().process
        return process.pid if process is not None else None

    @property
    def version(self) -> str:
        """OpenCode's version, as the server says."""
        return self._server().link.version

    def __enter__(self) -> OpenCodeServer:
        super().__enter__()
        self._server()
        return self

    def close(self) -> None:
        super().close()
        _close_in(self._owner_pid, self._fleet, self._leases, self._directories)

    def __repr__(self) -> str:
        where = self._fleet.url or "not started"
        state = "closed" if self._closed else f"{len(self._streams)} running"
        return f"<OpenCodeServer {where}, {state}>"

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self._settings, "elsewhere": self._elsewhere}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["settings"])  # type: ignore[misc]
        self._elsewhere = state["elsewhere"]

    # -- runs ----------------------------------------------------------------------------------

    def _check(self, cfg: RunConfig) -> None:
        validate_config_for_run(cfg)
        check_server_wide(cfg, self._run_cfg)

    def _default_workers(self) -> int:
        return WORKERS

    def _open(self, request: Request, cancelled: Callable[[], bool], keep_raw: bool) -> Turn:
        fleet = self._checked_fleet()
        try:
            turn = fleet.begin(request.prompt, request.workspace, request.cfg)
        except OpenCodeServerError as error:
            # One that had died before has taken nothing; the next one may.
            if error.status_code is not None or not fleet.has_died():
                raise
            turn = fleet.begin(request.prompt, request.workspace, request.cfg)
        if self._settings["data_dir"] is not None:
            for lease in self._leases:
                lease.remember(turn.session_id, str(request.workspace))
        return turn

    # -- servers -------------------------------------------------------------------------------

    def _server(self) -> InUse:
        return self._checked_fleet().current()

    def _checked_fleet(self) -> Fleet:
        self._check_open()
        if os.getpid() != self._owner_pid:  # forked: the server is the parent's
            self._streams.clear()
            self._begin_anew()
        return self._fleet

    def _start(self) -> InUse:
        if self._elsewhere is not None:
            url, username, password = self._elsewhere
            return InUse(Link(url, username=username, password=password), None)
        settings, cfg = self._settings, self._run_cfg
        binary = resolve_binary(settings["binary"])
        if settings["watchdog"]:
            _watchdog.guard()
        env = build_env(cfg)
        if not self._leases:
            self._leases.append(self._directories.lease(env))
        data = self._leases[0].path
        env["XDG_DATA_HOME"] = str(data)
        if not cfg.inherit_user_config:
            empty = self._directories.empty_config()
            spare_installation(empty)
            env = without_user_config(env, cfg, empty)
        links: list[Link] = []  # of this server, once it is there

        def on_exit(reason: str) -> None:
            for link in links:
                link.lose(reason)

        def on_refusal(session_id: str, status: int) -> None:
            for link in links:
                link.note_refusal(session_id, status)

        process = Server(
            binary,
            env,
            data,
            timeout_s=settings["startup_timeout_s"],
            on_exit=on_exit,
            on_refusal=on_refusal,
        )
        try:
            links.append(Link(process.url, password=process.password, has_marks=True))
            if process.has_exited:
                raise OpenCodeServerError(f"the server (pid {process.pid}) ended at once")
        except BaseException:
            process.stop()
            raise
        return InUse(links[0], process)


def _close_in(pid: int, fleet: Fleet, leases: list[Lease], directories: DataDirectories) -> None:
    if os.getpid() == pid:
        fleet.close()
        while leases:
            leases.pop().release()
        directories.close()


def _nothing(path: Path) -> None:
    pass
