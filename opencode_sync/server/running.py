"""A server in use: a connection, its event stream, and the turns under way.

    begin(request) --> session: new, continued or forked --> prompt sent --> Turn

Serves a server of our own and one that runs elsewhere alike. Knows what is asked of a server and in
which order; nothing of processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ..core.config import RunConfig
from ..core.errors import OpenCodeConfigError, OpenCodeServerError
from ..core.lifetime import CancelScope
from ..core.mcp import warnings_of
from ..core.request import Request
from ..process.command import sealed
from ..process.stderr import no_space
from ..process.versions import check_server_version, unknown_variant
from .connection import FIRST_S, Connection, Requests, Within
from .feed import EventStream, Message, mapping
from .protocol import (
    REFUSED,
    check_command,
    command_body,
    missing_rules,
    permission_rules,
    prompt_body,
    session_body,
)
from .sessions import Sessions, id_of, rules_of, stored_messages
from .turn import ABORT_S, Replies, Turn, allow_once, decline, reject

DISPOSE_S = 1.5  # bound on asking a server to end what it runs; it takes 0.3 s


class Busy:
    """The sessions that have a turn under way, on whichever of the servers that share them."""

    def __init__(self) -> None:
        self._sessions: set[str] = set()
        self._lock = threading.RLock()  # reentrant: a finaliser may end a turn at any line

    def take(self, session_id: str) -> None:
        """Note that *session_id* has one.

        Raises:
            OpenCodeConfigError: If it has one already.
        """
        with self._lock:
            if session_id in self._sessions:
                raise OpenCodeConfigError(
                    f"session {session_id!r} has a run under way: wait for it"
                )
            self._sessions.add(session_id)

    def give_back(self, session_id: str) -> None:
        self._sessions.discard(session_id)


class Link:
    """Opens the event stream when made.

    Attributes:
        connection: For requests.
        sessions: Those that the server keeps.
        version: The server's.
    """

    def __init__(
        self,
        url: str,
        *,
        username: str | None = None,
        password: str | None = None,
        has_marks: bool = False,
        env: Mapping[str, str] | None = None,
        name: str | None = None,
        any_version: bool = False,
        busy: Busy | None = None,
        scope: CancelScope | None = None,
    ) -> None:
        """
        Args:
            has_marks: The processes of its tools bear the session's id.
            env: What it was started with, where it is one of ours.
            name: What it is called in a message; None for its URL.
            any_version: Use it whatever its version is.
            busy: Of all servers with the same sessions.
            scope: Ends the opening.

        Raises:
            OpenCodeConfigError: If *url* is not an HTTP URL, or the version is not known.
            OpenCodeServerError: If the server refuses or does not answer.
        """
        self.connection = Connection(url, username=username, password=password)
        self.sessions = Sessions(self.connection)
        self._stream = EventStream(self.connection)
        self._has_marks, self._env = has_marks, env
        self._busy = Busy() if busy is None else busy
        scope = CancelScope() if scope is None else scope
        self._always: dict[
            str, list[tuple[str, str]]
        ] = {}  # permissions and patterns, by directory
        self._without_mcp: set[str] = set()  # directories whose configuration has no MCP server
        self._models: dict[tuple[str, str, str], list[str] | None] = {}  # variants of models
        try:
            health = self.connection.within(scope).get("/global/health")
            self.version = str(mapping(health).get("version"))
            self._warnings = [] if any_version else check_server_version(name or url, self.version)
            self._stream.open(scope)
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

    def note_refusal(self, session_id: str, status: int, retry_after_s: float | None) -> None:
        """Tell the session that a provider refused a request of it."""
        refusal = {"status": status, "retry_after_s": retry_after_s}
        self._stream.put(Message(session_id, REFUSED, refusal))

    def note_error(self, session_id: str, error: Mapping[str, Any]) -> None:
        """Tell the session that our plugin has ended its prompt."""
        self._stream.put(Message(session_id, "session.error", {"error": error}))

    def close(self) -> None:
        """End threads and connections; the server goes on."""
        self._stream.close()
        self.connection.close()

    # -- turns ---------------------------------------------------------------------------------

    def begin(
        self,
        request: Request,
        before_send: Callable[[], None] = lambda: None,
        scope: CancelScope | None = None,
    ) -> Turn:
        """Send the prompt, in the session that its settings say, or a new one.

        Args:
            before_send: Called when all is ready; what fails later may have been done.
            scope: Of the run: it ends all requests, those of the turn too.

        Raises:
            OpenCodeConfigError: If the session is unknown, in use, or of another directory.
            OpenCodeServerError: If the server refuses or does not answer.
        """
        cfg, workspace = request.cfg, request.workspace
        directory = cfg.remote_dir or str(workspace)
        scope = CancelScope() if scope is None else scope
        requests = self.connection.within(scope)
        body = (
            prompt_body(request.prompt, cfg, workspace, request.output)
            # There is no format for a command: it is asked for in words.
            if cfg.command is None
            else command_body(
                self._arguments(request, cfg.command, directory, requests), cfg, workspace
            )
        )
        with self._space_told():
            session_id = self._session(request, directory, requests)
        self._busy.take(session_id)
        try:
            turn = self._turn(session_id, directory, request, scope)
        except BaseException:
            self._busy.give_back(session_id)
            raise
        try:
            before_send()
            with self._space_told():
                _send(turn, body)
        except BaseException:
            turn.close()
            raise
        return turn

    def _arguments(self, request: Request, command: str, directory: str, requests: Requests) -> str:
        """What to send for a command's arguments, which are not to be expanded."""
        arguments = request.instructed
        if not arguments.strip():
            return arguments
        listed = requests.get("/command", timeout_s=FIRST_S, directory=directory)
        # An unknown one is refused by the server.
        templates = [mapping(each) for each in listed if mapping(each).get("name") == command]
        template = str(templates[0].get("template")) if templates else ""
        check_command(command, template, arguments, has_plugin=self._has_marks)
        return sealed(arguments) if self._has_marks else arguments

    def _turn(self, session_id: str, directory: str, request: Request, scope: CancelScope) -> Turn:
        cfg, answers = request.cfg, request.answers
        requests = self.connection.within(scope)
        is_new = not (cfg.session_id or cfg.continue_session)
        permission = answers.permission or (allow_once if cfg.auto else reject)
        question = answers.question or decline
        turn = Turn(
            self.connection,
            self._stream.mailbox(session_id),
            session_id,
            directory,
            since=0 if is_new else _last_message(requests, session_id, directory),
            with_reasoning=bool(cfg.thinking),
            keep_background=cfg.keep_background,
            has_marks=self._has_marks,
            env=self._env,
            warnings=[*request.warnings, *self._warnings],
            at_end=lambda model: self._unheeded(cfg, directory, model, requests),
            replies=Replies(
                requests, directory, permission, question, self._always.setdefault(directory, [])
            ),
            scope=scope,
        )
        turn.on_close(lambda: self._busy.give_back(session_id))
        return turn

    @contextmanager
    def _space_told(self) -> Iterator[None]:
        """Add the reason to a failure that a full disk explains."""
        try:
            yield
        except OpenCodeServerError as error:
            has_failed = error.status_code is not None and error.status_code >= 500
            if has_failed and self._env is not None and (full := no_space(self._env)):
                error.args = (f"{error}; {full}",)
            raise

    def _unheeded(
        self, cfg: RunConfig, directory: str, model: tuple[str, str] | None, requests: Within
    ) -> list[str]:
        """What OpenCode passed over without a word in a turn that has ended, in sentences.

        Raises:
            OpenCodeServerError: If the server does not say.
        """
        warnings: list[str] = []
        if directory not in self._without_mcp:
            states = requests.get("/mcp", directory=directory, timeout_s=ABORT_S)
            warnings += warnings_of(states)
            if states == {}:
                self._without_mcp.add(directory)
        if cfg.variant is not None and model is not None:
            known = self._variants(directory, *model, requests)
            if known is not None and cfg.variant not in known:
                warnings.append(unknown_variant(cfg.variant, "/".join(model), known))
        return warnings

    def _variants(
        self, directory: str, provider: str, model: str, requests: Within
    ) -> list[str] | None:
        """Names of the model's variants, or None where the server does not know the model."""
        key = directory, provider, model
        if key not in self._models:
            found: list[str] | None = None
            answer = requests.get("/config/providers", directory=directory, timeout_s=ABORT_S)
            listed = mapping(answer).get("providers")
            for each in listed if isinstance(listed, list) else ():
                if mapping(each).get("id") == provider:
                    there = mapping(mapping(each).get("models")).get(model)
                    found = None if there is None else list(mapping(mapping(there).get("variants")))
            self._models[key] = found
        return self._models[key]

    # -- sessions ------------------------------------------------------------------------------

    def _session(self, request: Request, directory: str, requests: Within) -> str:
        cfg, sessions = request.cfg, Sessions(requests)
        session_id = cfg.session_id
        if cfg.continue_session:
            session_id = sessions.latest(directory)
            if session_id is None and cfg.fork:
                raise OpenCodeConfigError(f"fork=True, but there is no session yet in {directory}")
        if session_id is None:
            body = session_body(request.prompt, cfg, **_allowed(request))
            made = requests.object("POST", "/session", body, timeout_s=FIRST_S, directory=directory)
            session_id = id_of(made)
        else:
            session_id = self._taken_up(session_id, directory, request, sessions)
        if cfg.share:
            sessions.share(session_id, directory)
        return session_id

    def _taken_up(
        self, session_id: str, directory: str, request: Request, sessions: Sessions
    ) -> str:
        """The session itself, or a fork of it, with the rules of *request* added to its own."""
        cfg = request.cfg
        session = sessions.known(session_id, directory)
        own = str(session.get("directory"))
        if own != directory and own != sessions.resolved(directory):
            raise OpenCodeConfigError(
                f"session {session_id!r} works in {own!r}, not in {directory!r}: "
                "pass that workspace"
            )
        rules = permission_rules(cfg, **_allowed(request))
        change: dict[str, Any] = {}
        if cfg.fork:
            session_id = sessions.fork(session_id, directory, rules=rules)
        elif missing := missing_rules(rules_of(session), rules):
            change["permission"] = missing
        if cfg.title is not None:
            change["title"] = cfg.title
        if change:
            sessions.change(session_id, directory, **change)
        return session_id


def _allowed(request: Request) -> dict[str, bool]:
    """What of *request* needs a rule, beside its settings."""
    return {
        "with_questions": request.answers.question is not None,
        "with_output": request.output is not None,
    }


def _send(turn: Turn, body: Mapping[str, Any]) -> None:
    """Send the prompt; one that may have been taken all the same is aborted."""
    try:
        turn.send(body)
    except BaseException as error:
        if not isinstance(error, OpenCodeServerError) or error.status_code is None:
            turn.stop()
        raise


def _last_message(requests: Requests, session_id: str, directory: str) -> int:
    """When the session's last message was made; 0 where it has none."""
    # Not the last one alone: a prompt whose format was taken away is as young as that.
    newest = stored_messages(requests, session_id, directory, limit=2)
    times = [mapping(mapping(entry.get("info")).get("time")).get("created") for entry in newest]
    return max((time for time in times if isinstance(time, int)), default=0)


def dispose(connection: Connection) -> None:
    """Have a server end all that it runs, before it is stopped."""
    with suppress(OpenCodeServerError):
        connection.post("/global/dispose", timeout_s=DISPOSE_S)
