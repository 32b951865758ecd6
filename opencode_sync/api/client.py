"""A process per run: the default runner, which needs nothing running.

    Request --> data_dirs: a leased directory --> command: argv, env, stdin --+
                capacity: a start-up slot, where runs share a database -------+--> ProcessRun
    Request with attach --> server.pool: a turn on a server that runs elsewhere

The checks of a prompt are in core.request, the verbs in api.runner.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import lifetime
from ..core.config import (
    RunConfig,
    check_flag,
    check_program,
    checked_count,
    checked_number,
    checked_path,
)
from ..core.errors import OpenCodeConfigError
from ..core.lifetime import CancelScope
from ..core.request import Request, Source, StrPath
from ..process.capacity import Gate
from ..process.command import DEFAULT_BINARY, build_env, resolve_binary, run_command
from ..process.data_dirs import (
    DataDirectories,
    check_directory,
    in_words,
    link_credentials,
    stored_directory,
    user_database,
)
from ..process.run import ProcessRun
from ..process.versions import check_program_version, warn_of_variant
from ..process.watchdog import guard
from .runner import Runner

if TYPE_CHECKING:
    from ..server.pool import Pools


class OpenCodeClient(Runner):
    """Runs each prompt in an ``opencode run`` process of its own.

    Safe to share between threads, picklable as its settings, and a context manager: closing it
    ends the runs under way and removes what it made.
    """

    def __init__(
        self,
        binary: StrPath = DEFAULT_BINARY,
        startup_concurrency: int | None = 1,
        startup_delay_s: float = 0.3,
        isolate_db: bool = True,
        *,
        data_dir: StrPath | None = None,
        run_cfg: RunConfig | None = None,
        max_workers: int | None = None,
        watchdog: bool = True,
        any_version: bool = False,
    ) -> None:
        """
        Args:
            binary: A path, or a name on ``PATH``; looked for with the first run.
            startup_concurrency: How many runs that share a database may start at a time; 0 or
                None for any number. With *isolate_db* none share one.
            startup_delay_s: Seconds after which a start no longer delays the next one.
            isolate_db: Give runs data directories of the client's own, so that parallel ones do
                not lock one another's database. Credentials are linked from the user's.
            data_dir: Where to keep these directories, with the sessions in them; None for
                temporary ones. With ``isolate_db=False``, the one directory that all runs share.
            run_cfg: Settings of runs that are given none of their own.
            max_workers: Threads for ``submit`` and ``map``; None for what the machine carries.
            watchdog: Keep a small process that stops the runs if this process is killed.
            any_version: Use whatever OpenCode is found, at your own risk. Without it, a program or
                an attached server that is newer than 1.x, or whose version cannot be read, is
                refused with OpenCodeConfigError before anything is started; one older than 1.17
                puts a warning in the result.
        """
        super().__init__(run_cfg, max_workers)
        check_program("binary", binary)
        startup_concurrency = checked_count("startup_concurrency", startup_concurrency, 0)
        startup_delay_s = checked_number("startup_delay_s", startup_delay_s)
        check_flag("isolate_db", isolate_db)
        check_flag("watchdog", watchdog)
        check_flag("any_version", any_version)
        if data_dir is not None:
            data_dir = checked_path("data_dir", data_dir, "a directory")
        self._settings: dict[str, Any] = {
            "binary": binary,
            "startup_concurrency": startup_concurrency,
            "startup_delay_s": startup_delay_s,
            "isolate_db": isolate_db,
            "data_dir": data_dir,
            "run_cfg": run_cfg,
            "max_workers": self._max_workers,
            "watchdog": watchdog,
            "any_version": any_version,
        }
        self._resolved: str | None = None
        self._gate = Gate(startup_concurrency)
        # Of servers that settings name: from the first such run on.
        self._server_pools: list[Pools] = []
        weakref.finalize(self, _disconnect, self._server_pools)
        self._make_directories()

    def _make_directories(self) -> None:
        self._owner_pid = os.getpid()
        settings = self._settings
        own = settings["data_dir"] if settings["isolate_db"] else None
        self._directories = DataDirectories(own, watchdog=settings["watchdog"])
        weakref.finalize(self, _close_in, self._owner_pid, self._directories)

    def resolved_binary(self) -> str:
        """The absolute path of the program that runs use; looked for once.

        Raises:
            OpenCodeBinaryNotFoundError: Names what was looked for, and how to get it.
        """
        if self._resolved is None:
            self._resolved = resolve_binary(self._settings["binary"])
        return self._resolved

    def close(self) -> None:
        super().close()
        _disconnect(self._server_pools)
        _close_in(self._owner_pid, self._directories)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._under_way())} running"
        risk = "any_version, " if self._settings["any_version"] else ""
        return f"<OpenCodeClient binary={os.fspath(self._settings['binary'])!r}, {risk}{state}>"

    def __getstate__(self) -> dict[str, Any]:
        return self._settings

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self.__init__(**settings)  # type: ignore[misc]

    def _check(self, cfg: RunConfig, *, may_ask: bool = False) -> list[str]:
        warnings = super()._check(cfg, may_ask=may_ask)
        if cfg.attach is not None:
            from ..server.protocol import check_server_wide

            check_server_wide(cfg, RunConfig())
        return warnings

    def _counts_opening(self, request: Request) -> bool:
        return request.cfg.attach is not None

    def _open(self, request: Request, scope: CancelScope, keep_raw: bool) -> Source:
        if request.cfg.attach is not None:
            return self._attach(request, scope)
        binary, settings = self.resolved_binary(), self._settings
        warnings = list(request.warnings)
        if not settings["any_version"]:
            warnings += check_program_version(binary, scope.is_cancelled)
        if os.getpid() != self._owner_pid:  # forked: the directories are the parent's
            self._gate = Gate(settings["startup_concurrency"])
            self._make_directories()
        if settings["watchdog"]:
            with lifetime.deferred():
                guard()
        isolated = settings["isolate_db"] and "XDG_DATA_HOME" not in (request.cfg.extra_env or {})
        if isolated:
            request = self._with_session(request)
        cfg = request.cfg
        env = build_env(cfg)
        with ExitStack() as undo:
            lease = self._directories.lease(
                env,
                session_id=cfg.session_id if isolated else None,
                workspace=str(request.workspace),
                fork=cfg.fork,
                holds_sessions=isolated,
            )
            undo.callback(lease.release)
            command = run_command(
                binary,
                request,
                unpacked=lease.unpacked,
                data_home=lease.path if isolated else self._shared_home(env),
                empty_config=None if cfg.inherit_user_config else self._directories.empty_config(),
                keeps_database=not isolated,
            )
            if not isolated and cfg.session_id is not None:
                _check_workspace(cfg.session_id, command.env, request.workspace)
            warnings += warn_of_variant(binary, request, command.env, scope.is_cancelled)
            with ExitStack() as starting:
                if not isolated:
                    starting.enter_context(self._gate.slot(scope.is_cancelled))
                run = ProcessRun(
                    command,
                    request,
                    lease=lease,
                    keep_raw=keep_raw,
                    warnings=warnings,
                )
                undo.callback(run.close)  # a Ctrl-C's traceback would keep it alive
                if not isolated and self._gate.is_limited:
                    run.wait_started(settings["startup_delay_s"], scope.is_cancelled)
            undo.pop_all()
        return run

    def _attach(self, request: Request, scope: CancelScope) -> Source:
        # Over HTTP: the binary's own --attach loses events, 18 runs of 18.
        from ..server.pool import Pools  # takes as long to load as all the rest

        if not self._server_pools:
            self._server_pools.append(Pools(any_version=self._settings["any_version"]))
        # The first, so that two threads use the same.
        return self._server_pools[0].attached(request.cfg).begin(request, scope)

    def _with_session(self, request: Request) -> Request:
        """*request* with the id of the session that ``continue_session`` means."""
        cfg = request.cfg
        if not cfg.continue_session:
            return request
        last = self._directories.last_session(str(request.workspace))
        if last is None and cfg.fork:
            raise OpenCodeConfigError(
                f"fork=True, but there is no session yet in {request.workspace}"
            )
        return replace(request, cfg=cfg.replace(continue_session=False, session_id=last))

    def _shared_home(self, env: Mapping[str, str]) -> Path | None:
        """The one data directory of all runs; None for that of *env*."""
        shared: Path | None = self._settings["data_dir"]
        if self._settings["isolate_db"] or shared is None:
            return None
        with in_words(shared):
            link_credentials(env, shared, is_ours=False)
        return shared


def _check_workspace(session_id: str, env: Mapping[str, str], workspace: Path) -> None:
    database = user_database(env)
    own = None if database is None else stored_directory(database, session_id)
    check_directory(session_id, own, str(workspace))


def _close_in(pid: int, directories: DataDirectories) -> None:
    if os.getpid() == pid:
        directories.close()


def _disconnect(pools: list[Pools]) -> None:
    for each in pools:
        each.close()
