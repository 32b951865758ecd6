"""A server in use: a connection, its event stream, and the turns under way.

    begin(prompt, workspace, cfg) --> session: new, continued or forked --> prompt sent --> Turn

Serves a server of our own and one that runs elsewhere alike. Knows what is asked of a server and in
which order; nothing of processes.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ._bodies import command_body, permission_rules, prompt_body, session_body
from ._http import Connection
from ._replies import PermissionAnswer, QuestionAnswer, Replies, allow_once, decline, reject
from ._sse import EventStream, Message, mapping
from ._translate import REFUSED
from ._turn import Turn
from .config import RunConfig
from .errors import OpenCodeConfigError, OpenCodeServerError

DISPOSE_S = 3.0  # bound on asking a server to end what it runs; it takes 0.3 s


class Link:
    """Opens the event stream when made.

    Attributes:
        connection: For requests.
        version: The server's.
    """

    def __init__(
        self,
        url: str,
        *,
        username: str | None = None,
        password: str | None = None,
        has_marks: bool = False,
    ) -> None:
        """
        Args:
            has_marks: The processes of its tools bear the session's id.

        Raises:
            OpenCodeConfigError: If *url* is none.
            OpenCodeServerError: If the server refuses or does not answer.
        """
        self.connection = Connection(url, username=username, password=password)
        self._stream = EventStream(self.connection)
        self._has_marks = has_marks
        self._busy: set[str] = set()  # sessions with a turn under way
        self._lock = threading.RLock()
        try:
            self.version = str(mapping(self.connection.get("/global/health")).get("version"))
            self._stream.open()
        except BaseException:
            self.close()
            raise

    @property
    def is_lost(self) -> bool:
        """Whether the server is gone, as far as is known."""
        return self.connection.lost is not None

    def lose(self, reason: str) -> None:
        """The server is gone: tell all who wait."""
        self._stream.lose(reason)

    def note_refusal(self, session_id: str, status: int) -> None:
        """A provider refused a request of this session."""
        self._stream.put(Message(session_id, REFUSED, {"status": status}))

    def close(self) -> None:
        """End threads and connections; the server goes on."""
        self._stream.close()
        self.connection.close()

    # -- turns ---------------------------------------------------------------------------------

    def begin(
        self,
        prompt: str,
        workspace: Path,
        cfg: RunConfig,
        *,
        permission: PermissionAnswer | None = None,
        question: QuestionAnswer = decline,
    ) -> Turn:
        """Send *prompt*, in the session that *cfg* says, or a new one.

        Args:
            permission, question: What to answer to requests; None for what ``cfg.auto`` says.

        Raises:
            OpenCodeConfigError: If the session is unknown, in use, or of another directory.
            OpenCodeServerError: If the server refuses or does not answer.
        """
        directory = cfg.remote_dir or str(workspace)
        body = (
            prompt_body(prompt, cfg, workspace)
            if cfg.command is None
            else command_body(prompt, cfg, workspace)
        )
        session_id = self._session(prompt, directory, cfg)
        with self._lock:
            if session_id in self._busy:
                raise OpenCodeConfigError(
                    f"session {session_id!r} has a run under way: wait for it"
                )
            self._busy.add(session_id)
        try:
            turn = self._turn(session_id, directory, cfg, permission, question)
        except BaseException:
            self._busy.discard(session_id)
            raise
        try:
            turn.send(body)
        except BaseException:
            turn.close()
            raise
        return turn

    def _turn(
        self,
        session_id: str,
        directory: str,
        cfg: RunConfig,
        permission: PermissionAnswer | None,
        question: QuestionAnswer,
    ) -> Turn:
        is_new = not (cfg.session_id or cfg.continue_session)
        if permission is None:
            permission = allow_once if cfg.auto else reject
        turn = Turn(
            self.connection,
            self._stream.mailbox(session_id),
            session_id,
            directory,
            since=0 if is_new else self._last_message(session_id, directory),
            with_reasoning=bool(cfg.thinking),
            keep_background=cfg.keep_background,
            has_marks=self._has_marks,
            replies=Replies(self.connection, directory, permission, question),
        )
        turn.on_close(lambda: self._busy.discard(session_id))
        return turn

    def _last_message(self, session_id: str, directory: str) -> int:
        """When the session's last message was made; 0 where it has none."""
        stored = self._get(session_id, "/message", directory=directory, limit=1)
        times = [mapping(mapping(entry.get("info")).get("time")).get("created") for entry in stored]
        return max((time for time in times if isinstance(time, int)), default=0)

    # -- sessions ------------------------------------------------------------------------------

    def _session(self, prompt: str, directory: str, cfg: RunConfig) -> str:
        session_id = cfg.session_id
        if cfg.continue_session:
            session_id = self._latest(directory)
            if session_id is None and cfg.fork:
                raise OpenCodeConfigError(f"fork=True, but there is no session yet in {directory}")
        if session_id is None:
            made = self.connection.post("/session", session_body(prompt, cfg), directory=directory)
            session_id = str(made["id"])
        else:
            session_id = self._taken_up(session_id, directory, cfg)
        if cfg.share:
            self.connection.post(_path(session_id, "/share"), directory=directory)
        return session_id

    def _latest(self, directory: str) -> str | None:
        found = self.connection.get("/session", directory=directory, roots="true", limit=1)
        return str(found[0]["id"]) if found else None

    def _taken_up(self, session_id: str, directory: str, cfg: RunConfig) -> str:
        """The session itself, or a fork of it, with the rules of *cfg* added to its own."""
        session = self._known(session_id, directory)
        own = str(session.get("directory"))
        if own != directory:
            raise OpenCodeConfigError(
                f"session {session_id!r} works in {own!r}, not in {directory!r}: "
                "pass that workspace"
            )
        rules, has = permission_rules(cfg), session.get("permission") or []
        if cfg.fork:
            rules, has = [*has, *rules], []  # a fork begins without any
            fork = self.connection.post(_path(session_id, "/fork"), {}, directory=directory)
            session_id = str(fork["id"])
        change: dict[str, Any] = {}
        if rules and has[-len(rules) :] != rules:
            change["permission"] = rules
        if cfg.title is not None:
            change["title"] = cfg.title
        if change:
            self.connection.request("PATCH", _path(session_id), change, directory=directory)
        return session_id

    def _known(self, session_id: str, directory: str) -> Any:
        # An id of another form makes the server fail, not refuse.
        if session_id.startswith("ses"):
            try:
                return self._get(session_id, directory=directory)
            except OpenCodeServerError as error:
                if error.status_code != 404:
                    raise
        raise OpenCodeConfigError(f"session {session_id!r} is unknown to the server")

    def _get(self, session_id: str, what: str = "", **params: Any) -> Any:
        return self.connection.get(_path(session_id, what), **params)


def dispose(connection: Connection) -> None:
    """Have a server end all that it runs, before it is stopped."""
    with suppress(OpenCodeServerError):
        connection.post("/global/dispose", timeout_s=DISPOSE_S)


def _path(session_id: str, what: str = "") -> str:
    return f"/session/{quote(session_id, safe='')}{what}"
