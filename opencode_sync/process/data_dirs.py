"""Data directories: one for each run in flight, reused by later runs.

    root/0, root/1, ...     XDG_DATA_HOME of a run; leased to one run at a time, lowest first
    root/N/opencode/auth.json       a link to the user's credentials
    root/N/opencode-sync-unpacked   libraries that OpenCode unpacks; emptied after each run, and
                            before a server takes the place of another one
    root/config             an empty XDG_CONFIG_HOME for runs that leave the user's out
    root/sessions.jsonl     which directory holds which session, and where it was last used
    root/N.lock             held while leased, since other processes may share the root

The last two are in kept roots only; a temporary root goes with its owner. Parallel runs on one
OpenCode database lock one another out; with a directory each they do not. A session is in the
directory of the run that began it. Credentials are never copied: OpenCode writes a refreshed OAuth
token in place, so a copy would leave the user with a revoked one. A finaliser may return a lease at
any point: returning waits for no lock.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import lifetime
from ..core.config import checked_path
from ..core.errors import OpenCodeCancelledError, OpenCodeConfigError, OpenCodeError
from .watchdog import add_directory, discard_directory

if TYPE_CHECKING:
    from filelock import BaseFileLock

_log = logging.getLogger("opencode_sync")

CREDENTIALS = ("auth.json", "mcp-auth.json", "account.json")
TEMPORARY_PREFIX = "opencode-sync-"
UNPACKED = "opencode-sync-unpacked"  # in a data directory; preload.js knows the name


class DataDirectories:
    """A pool of data directories below one root, temporary or kept."""

    def __init__(self, root: str | os.PathLike[str] | None, *, watchdog: bool = False) -> None:
        """
        Args:
            root: A directory to keep, made where it is missing; None for a temporary one, made
                with the first lease and removed by :meth:`close`.
            watchdog: Have a temporary root removed by the watchdog if this process is killed.
        """
        self._kept = None if root is None else checked_path("data_dir", root, "a directory")
        self._temporary: Path | None = None
        self._watchdog = watchdog
        self._lock = threading.RLock()
        self._users: dict[int, int] = {}  # slot -> runs on it
        self._busy: set[str] = set()  # sessions with a run on them
        self._sessions = SessionIndex(self._kept)
        self._file_locks: dict[int, BaseFileLock] = {}
        self._returned: deque[tuple[int, str | None]] = deque()
        self._is_closed = False
        self._pid = os.getpid()

    def lease(
        self,
        env: Mapping[str, str],
        *,
        session_id: str | None = None,
        workspace: str | None = None,
        fork: bool = False,
        holds_sessions: bool = True,
    ) -> Lease:
        """Lease a directory for one run: the one of *session_id*, else one that is free.

        Args:
            env: The run's environment; says where the user's credentials are.
            workspace: The directory that the run works in; None for any.
            fork: The run branches the session. Several may at a time, as it stays as it is.
            holds_sessions: The run keeps its session here; otherwise it only needs ``unpacked``.

        Raises:
            OpenCodeConfigError: If the session is unknown here, works in another directory, or has
                a run on it now.
            OpenCodeCancelledError: If this was closed in the meantime.
            OpenCodeError: If there is no place for a directory.
        """
        with in_words(self._kept), lifetime.deferred():
            # No name here may refer to it: a Ctrl-C's traceback would keep it leased.
            return self._lease(env, session_id, workspace, fork, holds_sessions)

    def _lease(
        self,
        env: Mapping[str, str],
        session_id: str | None,
        workspace: str | None,
        fork: bool,
        holds_sessions: bool,
    ) -> Lease:
        own = None if fork else session_id
        with self._locked():
            if self._is_closed:
                raise OpenCodeCancelledError("the client was closed while the run was starting")
            slot = self._free_slot() if session_id is None else self._slot_of(session_id, workspace)
            path, is_first = self._root() / str(slot), slot not in self._users
            self._users[slot] = self._users.get(slot, 0) + 1
            if own is not None:
                self._busy.add(own)
            lease = Lease(self, slot, path, own, holds_sessions=holds_sessions)
        try:
            if is_first:  # a run whose Python process was killed may have left something
                _empty(lease.unpacked)
            lease.unpacked.mkdir(mode=0o700, parents=True, exist_ok=True)
            link_credentials(env, lease.path)
        except BaseException:
            lease.release()
            raise
        return lease

    def last_session(self, workspace: str) -> str | None:
        """The session last used in *workspace*, or None."""
        with in_words(self._kept), self._locked():
            return self._sessions.last_in(workspace)

    def empty_config(self) -> Path:
        """A directory without configuration, in which OpenCode finds nothing to install.

        It would load a package by npm, which takes 3 s, and the first prompt waits for it.
        """
        with in_words(self._kept), lifetime.deferred(), self._locked():
            path = self._root() / "config"
            directory = path / "opencode"
            lock_file = directory / "package-lock.json"
            if not lock_file.exists():
                for part in (path, directory, directory / "node_modules"):
                    part.mkdir(mode=0o700, exist_ok=True)
                lock = {"packages": {"": {"dependencies": {"@opencode-ai/plugin": "*"}}}}
                lock_file.write_text(json.dumps(lock), encoding="utf-8")
        return path

    def close(self) -> None:
        """Remove a temporary root with everything in it; a kept one stays."""
        with self._locked():
            self._is_closed = True
            root, self._temporary = self._temporary, None
        if root is not None:
            shutil.rmtree(root, ignore_errors=True)
            if self._watchdog and not root.exists():  # else the watchdog tries again later
                with lifetime.deferred():
                    discard_directory(root)

    def _root(self) -> Path:
        if self._kept is not None:
            try:
                self._kept.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise OpenCodeConfigError(
                    f"data_dir {str(self._kept)!r}: {error.strerror}"
                ) from None
            return self._kept
        if self._temporary is None:
            try:
                made = tempfile.mkdtemp(prefix=temporary_prefix())
            except OSError as error:
                raise OpenCodeError(
                    f"no place for a temporary data directory ({error.strerror}): set TMPDIR to "
                    "one that can be written, or pass data_dir="
                ) from error
            self._temporary = Path(made)
            if self._watchdog:
                add_directory(self._temporary)
        return self._temporary

    def _free_slot(self) -> int:
        slot = 0
        while slot in self._users or not self._lock_file(slot):
            slot += 1
        return slot

    def _slot_of(self, session_id: str, workspace: str | None) -> int:
        home = self._sessions.find(session_id)
        if home is None:
            raise OpenCodeConfigError(
                f"session {session_id!r} is unknown here: a client finds the sessions of its own "
                "runs, with data_dir= also in a later process, and with isolate_db=False those "
                "of your own opencode"
            )
        check_directory(session_id, home.workspace, workspace)
        if session_id in self._busy:
            raise OpenCodeConfigError(f"session {session_id!r} has a run under way: wait for it")
        if home.slot not in self._users and not self._lock_file(home.slot):
            raise OpenCodeConfigError(
                f"the directory of session {session_id!r} is in use by another process: wait for it"
            )
        return home.slot

    def _lock_file(self, slot: int) -> bool:
        """Hold the slot against other processes; always True for a temporary root."""
        if self._kept is None:
            return True
        from filelock import FileLock, Timeout

        lock = FileLock(self._root() / f"{slot}.lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            return False
        self._file_locks[slot] = lock
        return True

    def _release(self, slot: int, session_id: str | None) -> None:
        if os.getpid() != self._pid:  # forked: the locks are the parent's
            return
        self._returned.append((slot, session_id))
        self._take_back()

    def _take_back(self) -> None:
        # Never waits for the lock: a finaliser may call in a thread that holds others' locks, a
        # log handler's say. Whoever holds it takes back when done.
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._free(*self._returned.popleft())
            except IndexError:  # another thread was first
                pass
            finally:
                self._lock.release()

    def _free(self, slot: int, session_id: str | None) -> None:
        self._busy.discard(session_id or "")
        self._users[slot] -= 1
        if self._users[slot]:
            return
        del self._users[slot]
        if (root := self._kept or self._temporary) is not None:
            _empty(root / str(slot) / UNPACKED)
        if (lock := self._file_locks.pop(slot, None)) is not None:
            lock.release()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            yield
        self._take_back()

    def _remember(self, session_id: str, slot: int, workspace: str) -> None:
        home = SessionHome(slot, workspace)
        with self._locked():
            self._sessions.note(session_id, home)
        try:
            self._sessions.keep(session_id, home)
        except OSError as error:  # no reason to end a run that is under way
            _log.warning("session %s will not be found by later processes: %s", session_id, error)


class Lease:
    """One data directory, held for a run.

    Attributes:
        path: The ``XDG_DATA_HOME`` of the run.
        unpacked: An empty directory for what OpenCode unpacks.
    """

    def __init__(
        self,
        owner: DataDirectories,
        slot: int,
        path: Path,
        session: str | None,
        *,
        holds_sessions: bool = True,
    ) -> None:
        self.path = path
        self.unpacked = path / UNPACKED
        self._holds_sessions = holds_sessions
        self._owner = owner
        self._slot = slot
        self._session = session
        self._released = False

    def __del__(self) -> None:
        self.release()  # lost by an exception that came before anybody kept us

    def remember(self, session_id: str, workspace: str) -> None:
        """Record that *session_id* is here, and is the last one in *workspace*."""
        if self._holds_sessions:
            self._owner._remember(session_id, self._slot, workspace)

    def empty(self) -> None:
        """Remove what was unpacked."""
        _empty(self.unpacked)

    def release(self) -> None:
        """Give the directory to the next run; idempotent."""
        if not self._released:
            self._released = True
            self._owner._release(self._slot, self._session)


# --- which directory holds which session ----------------------------------------------------------


@dataclass
class SessionHome:
    """The directory that holds a session, and the workspace that it was last used in."""

    slot: int
    workspace: str


class SessionIndex:
    """The sessions of a pool of data directories."""

    def __init__(self, root: Path | None) -> None:
        """
        Args:
            root: Where to keep it; None for in memory alone.
        """
        self._file = None if root is None else root / "sessions.jsonl"
        self._homes: dict[str, SessionHome] = {}  # in the order of their last use

    def find(self, session_id: str) -> SessionHome | None:
        """Where *session_id* is, or None."""
        if session_id not in self._homes:
            self._read()
        return self._homes.get(session_id)

    def last_in(self, workspace: str) -> str | None:
        """The session last used in *workspace*, also by other processes; or None."""
        self._read()
        homes = reversed(self._homes.items())
        return next((each for each, home in homes if home.workspace == workspace), None)

    def note(self, session_id: str, home: SessionHome) -> None:
        """Note *session_id* as the last one used, in memory."""
        self._homes.pop(session_id, None)
        self._homes[session_id] = home

    def keep(self, session_id: str, home: SessionHome) -> None:
        """Write it down for later processes.

        Raises:
            OSError: If it cannot be written; it stays noted.
        """
        if self._file is None:
            return
        entry = {"session": session_id, "slot": home.slot, "workspace": home.workspace}
        fd = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        # One write of one line: processes that share the root do not mix theirs.
        with open(fd, "wb", buffering=0) as index:
            index.write(json.dumps(entry).encode() + b"\n")

    def _read(self) -> None:
        try:
            lines = b"" if self._file is None else self._file.read_bytes()
        except FileNotFoundError:
            return
        for line in lines.split(b"\n"):
            # A line that a full disk cut short costs one session, not all of them.
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                home = SessionHome(int(entry["slot"]), str(entry["workspace"]))
                self.note(str(entry["session"]), home)


def check_directory(session_id: str, own: str | None, workspace: str | None) -> None:
    """Refuse to continue a session outside of *own*, the directory that it works in.

    OpenCode would run the prompt there, print nothing, and not end (1.18.33).
    None means any directory.
    """
    if own is not None and workspace is not None and own != workspace:
        raise OpenCodeConfigError(
            f"session {session_id!r} works in {own!r}, not in {workspace!r}: pass that workspace"
        )


def stored_directory(database: Path, session_id: str) -> str | None:
    """The directory of a session in OpenCode's *database*; None where it does not say."""
    import sqlite3

    with suppress(sqlite3.Error):  # there is none yet, or its tables are another version's
        uri = f"{database.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=1.0)) as connection:
            query = "select directory from session where id = ?"
            row = connection.execute(query, (session_id,)).fetchone()
            return None if row is None else str(row[0])
    return None


# --- the user's own data, and names of ours -------------------------------------------------------


def user_data(env: Mapping[str, str]) -> Path:
    """OpenCode's own data directory under *env*."""
    # A user without a home has none, and nothing is found below a directory named "~".
    home = env.get("HOME") or os.path.expanduser("~")
    return Path(env.get("XDG_DATA_HOME") or Path(home) / ".local/share") / "opencode"


def user_database(env: Mapping[str, str]) -> Path | None:
    """OpenCode's database under *env*; None for one in memory."""
    name = env.get("OPENCODE_DB") or "opencode.db"
    return None if name == ":memory:" else user_data(env) / name  # which an absolute one replaces


def link_credentials(env: Mapping[str, str], data: Path, *, is_ours: bool = True) -> None:
    """Make *data* an ``XDG_DATA_HOME``, with links to the credentials that *env* leads to.

    Args:
        is_ours: The directory is ours: a link to another place is out of date, and replaced. In
            one of the user's, what is there stays.

    Raises:
        OSError: If it cannot be written.
    """
    target, source = data / "opencode", user_data(env).absolute()
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in CREDENTIALS:
        link, original = target / name, source / name
        if is_ours and link.is_symlink() and Path(os.readlink(link)) != original:
            link.unlink(missing_ok=True)  # the user's directory has moved since
        try:
            is_there = original.exists()
        except OSError as error:  # a directory that may not be searched, say
            _log.warning("credentials %s cannot be used: %s", original, error.strerror)
            continue
        if is_there:
            # It may be there already: another run may have made it in between.
            with suppress(FileExistsError):
                link.symlink_to(original)


@contextmanager
def in_words(kept: Path | None) -> Iterator[None]:
    """Raise OpenCodeError for a file that cannot be read or written inside the block.

    Args:
        kept: The root that is named where the system names no file; None for a temporary one.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or kept
        name = "data directory" if where is None else f"data directory {str(where)!r}"
        raise OpenCodeError(f"{name}: {error.strerror}") from error


def pid_space() -> str:
    """A name for where this process's pid is valid: this machine, or a container on it."""
    import platform

    names = [platform.node()]
    with suppress(OSError):  # all but Linux
        names.append(os.readlink("/proc/self/ns/pid"))
    return f"{zlib.crc32(' '.join(names).encode()):08x}"


def temporary_prefix() -> str:
    """The prefix of our temporary names, from which :mod:`.leftovers` sees whose they are."""
    return f"{TEMPORARY_PREFIX}{os.getpid()}-{pid_space()}-"


def _empty(directory: Path) -> None:
    with suppress(OSError):  # it is gone, or not to be read: the next lease tries again
        for path in directory.iterdir():
            with suppress(OSError):
                path.unlink()
