"""Which data directory holds which session, and where each was last used.

    note() --> in memory, the last used last
    keep() --> root/sessions.jsonl, a line each (kept roots only) --> found by later processes too

Takes no lock: its owner has one. What OpenCode's own database knows of a session is looked up here,
too, for runs that share one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from .core.errors import OpenCodeConfigError


@dataclass
class SessionHome:
    """Where a session is, and the workspace that it was last used in."""

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
        """The session last used in *workspace*, by other processes too; or None."""
        self._read()
        found = (
            each for each, home in reversed(self._homes.items()) if home.workspace == workspace
        )
        return next(found, None)

    def note(self, session_id: str, home: SessionHome) -> None:
        """Have *session_id* as the last used, in memory."""
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

    def clear(self) -> None:
        """Forget what is in memory."""
        self._homes.clear()

    def _read(self) -> None:
        for session_id, home in self._entries():
            self.note(session_id, home)

    def _entries(self) -> Iterator[tuple[str, SessionHome]]:
        if self._file is None:
            return
        try:
            lines = self._file.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        for line in lines:
            # A line that a full disk cut short costs one session, not all of them.
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                home = SessionHome(int(entry["slot"]), str(entry["workspace"]))
                yield str(entry["session"]), home


def check_directory(session_id: str, own: str | None, workspace: str | None) -> None:
    """Refuse to continue a session elsewhere than in *own*, the directory that it works in.

    OpenCode would carry the prompt out there all the same, print nothing, and not end (1.18.33).
    None stands for any directory.
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
