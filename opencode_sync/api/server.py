"""A warm server: the verbs of the client, without a process per run.

    run(), stream(), ... --> Request --> ServerPool.begin() --> Turn, a source of events

Two kinds: a server of our own, started when it is needed, and one that somebody else started, which
``connect`` reaches. Runs whose settings say ``attach`` go to the server that they name.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

from ..core.config import (
    RunConfig,
    check_flag,
    check_program,
    checked_count,
    checked_number,
    checked_path,
)
from ..core.lifetime import CancelScope
from ..core.request import Request, StrPath, directory
from ..process.command import DEFAULT_BINARY
from ..server.pool import Attacher, Launcher, Pools, ServerPool
from ..server.protocol import check_server_wide
from ..server.running import RunningServer
from ..server.turn import Turn
from .runner import Runner

if TYPE_CHECKING:
    from ..server.sessions import SessionInfo, Sessions

# A server takes 0.4 GB, with 16 sessions at work 0.8, with 8 directories 1.3: one that takes more
# than this does not free its memory.
MAX_MEMORY_MB = 2_000
# With a model that takes half a second, 8 runs at a time did 9 per second, 16 did 14; the server's
# one thread is busy with 28 per second. With a slower model more workers can help.
WORKERS = 16


class OpenCodeServer(Runner):
    """Runs each prompt on one warm ``opencode serve``: some twenty times faster than a process.

    Safe to share between threads, picklable as its settings, and a context manager: closing it
    cancels the runs under way, and stops the server with all that it started.

    The server is started on entry, or with the first run. It listens on loopback, with a random
    password. If it dies, its runs end with OpenCodeServerError, and the next run starts it again.
    """

    _keeps_sessions = True

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
        any_version: bool = False,
    ) -> None:
        """
        Args:
            binary: A path, or a name on ``PATH``; looked for when the server is started.
            run_cfg: Settings of the server, and of runs that bring none of their own. Settings
                that are the same for all runs of a server (``extra_env``, ``mcp``,
                ``config_overrides``, ``instructions``, ...) can be set only here.
            data_dir: Where to keep sessions; None for a temporary directory.
            max_workers: Threads for ``submit`` and ``map``.
            startup_timeout_s: Seconds until the server must listen; it takes 1 to 2.
            max_memory_mb: A server that takes more megabytes is replaced by a fresh one, while the
                runs on it go on to their end; None for no limit.
            watchdog: Keep a small process that stops the server if this process is killed outright.
            any_version: Use whatever OpenCode there is, at your own risk. Without it, a program or
                an attached server that is newer than 1.x, or whose version cannot be read, is
                refused with OpenCodeConfigError before anything is started; one older than 1.17
                puts a warning in the result.
        """
        super().__init__(run_cfg, max_workers)
        check_program("binary", binary)
        startup_timeout_s = checked_number("startup_timeout_s", startup_timeout_s, positive=True)
        max_memory_mb = checked_count("max_memory_mb", max_memory_mb, 1)
        check_flag("watchdog", watchdog)
        check_flag("any_version", any_version)
        if data_dir is not None:
            data_dir = checked_path("data_dir", data_dir, "a directory")
        self._settings: dict[str, Any] = {
            "binary": binary,
            "run_cfg": run_cfg,
            "data_dir": data_dir,
            "max_workers": self._max_workers,
            "startup_timeout_s": startup_timeout_s,
            "max_memory_mb": max_memory_mb,
            "watchdog": watchdog,
            "any_version": any_version,
        }
        self._attacher: Attacher | None = None  # of a server that runs elsewhere
        launcher = functools.partial(
            Launcher,
            binary,
            self._run_cfg,
            data_dir=data_dir,
            timeout_s=startup_timeout_s,
            watchdog=watchdog,
            any_version=any_version,
        )
        self._server_pools = Pools(launcher, max_memory_mb=max_memory_mb, any_version=any_version)
        weakref.finalize(self, self._server_pools.close)

    @classmethod
    def connect(
        cls,
        url: str,
        password: str | None = None,
        *,
        username: str | None = None,
        run_cfg: RunConfig | None = None,
        max_workers: int | None = None,
        any_version: bool = False,
    ) -> OpenCodeServer:
        """Use a server that runs elsewhere; it is never stopped.

        Its tools can be stopped only by the server itself. Its sub-agents ask for what the server's
        own configuration has them ask for, not for what a run's ``permission`` says. What that
        denies is denied to new sub-agents too; one that is resumed keeps the rules of its session.
        A run in which a denied tool runs nevertheless is stopped.

        Args:
            url: Where the server is, such as ``"http://127.0.0.1:4096"``.
            any_version: Use it also where it says that it is of an unknown version.
        """
        server = cls(run_cfg=run_cfg, max_workers=max_workers, any_version=any_version)
        server._attacher = Attacher(url, username, password, any_version)
        return server

    @property
    def url(self) -> str:
        """The server's URL; starts it, as the other properties do."""
        return self._server().connection.url

    @property
    def password(self) -> str | None:
        """The server's password; the user name of a server of our own is ``"opencode"``."""
        return self._server().connection.password

    @property
    def pid(self) -> int | None:
        """The server's process id; None for one that runs elsewhere."""
        process = self._server().process
        return process.pid if process is not None else None

    @property
    def version(self) -> str:
        """OpenCode's version, as the server says."""
        return self._server().version

    def __enter__(self) -> OpenCodeServer:
        super().__enter__()
        self._server()
        return self

    def close(self) -> None:
        self._servers.give_up()  # runs that wait for a start would not end before it does
        super().close()
        self._server_pools.close()

    def __repr__(self) -> str:
        where = self._servers.url or "not started"
        state = "closed" if self._closed else f"{len(self._under_way())} running"
        risk = "any_version, " if self._settings["any_version"] else ""
        return f"<OpenCodeServer {where}, {risk}{state}>"

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self._settings, "attacher": self._attacher}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["settings"])  # type: ignore[misc]
        self._attacher = state["attacher"]

    def sessions(self, workspace: StrPath | None = None) -> list[SessionInfo]:
        """List the server's sessions, of one directory or of all; the last used first."""
        where = None if workspace is None else str(directory(workspace))
        return self._server().sessions.all(where)

    # -- for Runner ----------------------------------------------------------------------------

    def _default_workers(self) -> int:
        return WORKERS

    def _check(self, cfg: RunConfig, *, may_ask: bool = False) -> list[str]:
        warnings = super()._check(cfg, may_ask=may_ask)
        check_server_wide(cfg, self._run_cfg if self._is_launched(cfg) else RunConfig())
        return warnings

    def _config(self, run_cfg: RunConfig | None) -> RunConfig:
        cfg = super()._config(run_cfg)
        if not self._is_launched(cfg) or cfg.config_overrides is not None:
            return cfg
        # What the server's settings deny is denied to each of its sessions.
        return cfg.replace(config_overrides=self._run_cfg.config_overrides)

    def _is_launched(self, cfg: RunConfig) -> bool:
        """Whether runs with *cfg* go to a server of our own."""
        return not cfg.attach and self._attacher is None

    def prepare(self, cfg: RunConfig) -> None:
        if not cfg.attach:
            self._server()

    def _counts_opening(self, request: Request) -> bool:
        return True

    def _open(self, request: Request, scope: CancelScope, keep_raw: bool) -> Turn:
        return self._servers_for(request.cfg).begin(request, scope)

    def _kept_sessions(self, cfg: RunConfig) -> Sessions:
        self._check_open()
        return self._servers_for(cfg).current().sessions

    def _server(self) -> RunningServer:
        self._check_open()
        return self._servers.current()

    def _servers_for(self, cfg: RunConfig) -> ServerPool:
        return self._server_pools.attached(cfg) if cfg.attach else self._servers

    @property
    def _servers(self) -> ServerPool:
        return self._server_pools.get(self._attacher)
