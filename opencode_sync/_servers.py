"""Where servers come from: started by us, or running elsewhere.

    Own.start() ------> process, data directory, configuration --+
    Elsewhere.start() --> URL, password -------------------------+--> InUse: a link to it

Knows how a server is started and ended; nothing of when, nor of what is asked of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from . import _interrupt, _watchdog
from ._command import PLUGIN, build_env, resolve_binary, unpacking_in, without_user_config
from ._datadir import DataDirectories, Lease
from ._denials import enforced
from ._link import Link, dispose
from ._secrets import Secrets
from ._serve import Server
from ._versions import check_program_version
from .config import RunConfig
from .errors import OpenCodeConfigError, OpenCodeError, OpenCodeServerError


@dataclass(eq=False)
class InUse:
    """A server with the turns on it; *process* is None for one that runs elsewhere."""

    link: Link
    process: Server | None = None
    turns: set[object] = field(default_factory=set)
    is_retired: bool = False

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, as far as is known."""
        return self.link.is_lost or (self.process is not None and self.process.has_exited)

    def close(self) -> None:
        """Stop a server of ours with all that it started; let go of another one."""
        if self.process is not None:
            if not self.is_gone:
                dispose(self.link.connection)
            self.process.stop()
        self.link.close()


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

    def start(self) -> InUse:
        """Reach it; see :class:`Origin`."""
        link = Link(
            self._url,
            username=self._username,
            password=self._password,
            any_version=self._any_version,
        )
        return InUse(link)

    def give_up(self) -> None:
        """Nothing: what it does not answer to, it is asked with a bound."""

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
            on_make=_watchdog.add_directory if watchdog else _nothing,
            on_remove=_watchdog.discard_directory if watchdog else _nothing,
        )
        self._leases: list[Lease] = []  # one, from the first start on
        self._settled = _interrupt.Flag()  # the start under way
        self._is_given_up = False

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
            check_program_version(binary, lambda: self._is_given_up)
        env = build_env(self._cfg.replace(agent=None))  # each prompt names its own
        env = enforced(env, self._cfg, is_server=True)
        _check_plugin(env)
        if self._watchdog:
            _watchdog.guard()
        if not self._leases:
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

        self._settled = _interrupt.Flag()
        if self._is_given_up:  # give_up() looks for the event after it has said so
            self._settled.set()
        process = Server(
            binary,
            env,
            data,
            timeout_s=self._timeout_s,
            settled=self._settled,
            on_exit=on_exit,
            on_refusal=on_refusal,
        )
        try:
            link = Link(
                process.url,
                password=process.password,
                has_marks=True,
                env=env,
                name=binary,
                any_version=self._any_version,
            )
            links.append(link)
            if process.has_exited:
                raise OpenCodeServerError(f"the server (pid {process.pid}) ended at once")
        except BaseException:
            process.stop()
            for link in links:
                link.close()
            raise
        return InUse(links[0], process)

    def give_up(self) -> None:
        """See :class:`Origin`."""
        self._is_given_up = True
        self._settled.set()

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
