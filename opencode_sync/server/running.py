"""A server in use: its process or none, its connection, its feed, and the turns on it.

    begin(request) --> session: new, resumed or forked --> Turn, whose send() sends the prompt
    health thread ---> is our own server alive? One that does not answer is stopped
    retire() --------> closed with the last of its turns

The same for our own server and for one that runs elsewhere. Knows the requests to a server and
their order; nothing of when a server is started.
"""

from __future__ import annotations

import functools
import logging
import threading
from contextlib import closing, suppress
from typing import Any

from ..core.errors import OpenCodeConfigError, OpenCodeServerError
from ..core.lifetime import CancelScope, Flag
from ..core.reading import mapping, warnings_of
from ..core.request import Request
from ..process import tree
from ..process.command import sealed
from ..process.versions import check_server_version, unknown_variant
from .connection import FIRST_S, Connection
from .feed import EventStream
from .launch import NEXT, ServerProcess
from .protocol import (
    check_command,
    command_body,
    created_at,
    missing_rules,
    permission_rules,
    prompt_body,
    session_body,
)
from .sessions import Sessions, id_of, rules_of, stored_messages
from .turn import ABORT_S, Turn, add_no_space

_log = logging.getLogger("opencode_sync")

DISPOSE_S = 1.5  # bound on asking a server to stop what it runs; it takes 0.3 s
EXIT_S = 1.0  # how long the exit of a server that has broken a connection may take to be seen

# Our own server counts as dead if it leaves two such requests in a row unanswered. Two, so that it
# is not blamed where all of us were suspended for a while, as a container can be.
ANSWER_S = 5.0
# One that uses the processor all the while is busy, or the machine is; so is an endless loop.
BUSY_S = 30.0
LOOK_S = 2.0  # between requests
JOIN_S = 2.0  # bound on waiting for the health thread


class RunningServer:
    """A server, ready for turns.

    Attributes:
        connection: For requests.
        feed: Its messages.
        process: The process of our own server; None for one that runs elsewhere.
        env: What our own server was started with; None for one that runs elsewhere.
        sessions: The sessions that it keeps.
        version: OpenCode's version, as the server says.
        warnings: Sentences about it, for each result.
        turns: The scopes of the runs that have a turn on it, or are about to.
    """

    def __init__(
        self,
        connection: Connection,
        process: ServerProcess | None = None,
        *,
        any_version: bool = False,
        at_work: dict[str, CancelScope],
        scope: CancelScope,
    ) -> None:
        """Check the version, and open the event stream.

        Args:
            connection: Closed with this, or if this raises.
            process: Left to the caller if this raises.
            any_version: Accept every version.
            at_work: The sessions with a turn under way, on all servers with the same sessions.
            scope: Ends the waiting.

        Raises:
            OpenCodeConfigError: If the version is not known.
            OpenCodeServerError: If the server refuses or does not respond.
        """
        self.connection = connection
        self.feed = EventStream(connection)
        self.sessions = Sessions(connection)
        self.process = process
        self.turns: set[CancelScope] = set()
        self.env = None if process is None else process.env
        self._at_work = at_work
        self._is_retired = self._has_used_tools = self._keeps_background = False
        self._always: dict[str, list[tuple[str, str]]] = {}  # by directory
        self._without_mcp: set[str] = set()  # directories whose configuration has no MCP server
        self._variants: dict[tuple[str, str, str], list[str] | None] = {}  # by directory and model
        self._life = CancelScope()  # ends the health thread
        self._health: threading.Thread | None = None
        try:
            if process is not None:
                self.connection.await_loss = functools.partial(process.wait_exited, EXIT_S)
                process.feed = self.feed
                if process.ending is not None:  # before it could tell the feed
                    raise OpenCodeServerError(process.ending)
            health = self.connection.get("/global/health", scope=scope)
            self.version = str(mapping(health).get("version"))
            name = connection.url if process is None else process.binary
            self.warnings = [] if any_version else check_server_version(name, self.version)
            self.feed.open(scope)
            if process is not None:
                self._health = threading.Thread(
                    target=self._watch,
                    args=(process,),
                    name=f"opencode-{process.pid}-health",
                    daemon=True,
                )
                self._health.start()
        except BaseException:
            self.feed.close()
            self.connection.close()
            raise

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, so far as is known."""
        has_exited = self.process is not None and self.process.has_exited
        return has_exited or self.connection.lost is not None

    def retire(self) -> None:
        """Take no more turns, and close when the last one has ended."""
        self._is_retired = True
        if not self.turns:
            self.close()

    def close(self) -> None:
        """Stop our own server with all that it started; one elsewhere goes on. Idempotent."""
        self._life.cancel()
        if self._health is not None and self._health is not threading.current_thread():
            self._health.join(JOIN_S)
        if self.process is not None:
            if not self.is_gone and not self.connection.is_silent:
                # It stops what it runs, also what we could not find.
                with suppress(OpenCodeServerError):
                    self.connection.post("/global/dispose", timeout_s=DISPOSE_S)
            self.process.stop(at_once=self.connection.is_silent)
        self.feed.close()
        self.connection.close()

    # -- turns ---------------------------------------------------------------------------------

    def begin(self, request: Request, scope: CancelScope) -> Turn:
        """Prepare a turn, in the session that the settings name or in a new one.

        Its prompt is not sent yet. *scope*, which is in :attr:`turns`, leaves it when the turn is
        closed, or where this raises.

        Args:
            scope: The run's; all requests end with it, those of the turn too.

        Raises:
            OpenCodeConfigError: If the session is unknown, in use, or of another directory.
            OpenCodeServerError: If the server refuses or does not respond.
        """
        cfg = request.cfg
        directory = cfg.remote_dir or str(request.workspace)
        sessions = Sessions(self.connection, scope)
        session_id, is_new = cfg.session_id, False
        try:
            body = self._body(request, directory, scope)
            if cfg.continue_session:
                session_id = sessions.latest(directory)
                if session_id is None and cfg.fork:
                    raise OpenCodeConfigError(
                        f"fork=True, but there is no session yet in {directory}"
                    )
            if session_id is None:
                is_new = True
                made = self.connection.request(
                    "POST",
                    "/session",
                    session_body(request),
                    directory=directory,
                    timeout_s=FIRST_S,
                    scope=scope,
                )
                session_id = id_of(made)
            else:
                session_id = _resume(session_id, directory, request, sessions)
            if cfg.share:
                sessions.share(session_id, directory)
            if self._at_work.setdefault(session_id, scope) is not scope:
                raise OpenCodeConfigError(
                    f"session {session_id!r} has a run under way: wait for it"
                )
        except BaseException as error:
            self.leave(scope)
            if isinstance(error, OpenCodeServerError):
                add_no_space(error, self.env)
            raise
        try:
            since = 0 if is_new else self._last_message(session_id, directory, scope)
            mailbox = self.feed.mailbox(session_id)
            turn = Turn(self, request, scope, mailbox, directory, body, since=since)
        except BaseException:
            del self._at_work[session_id]
            self.leave(scope)
            raise
        self._keeps_background |= cfg.keep_background
        return turn

    def leave(self, scope: CancelScope) -> None:
        """Take *scope* out of :attr:`turns`."""
        self.turns.discard(scope)
        if self._is_retired and not self.turns:
            self.close()

    def forget(self, turn: Turn) -> None:
        """Take *turn*, which is closed, out of what is under way."""
        self._at_work.pop(turn.session_id, None)
        self._has_used_tools |= turn.has_used_tools
        self.leave(turn.scope)
        # While other turns go on, nobody can tell which of them a process belongs to.
        if self._has_used_tools and not self.turns and not self._keeps_background:
            self._has_used_tools = False
            if self.process is not None and not self.is_gone:
                # What tools have left running without a session's mark.
                tree.stop_strays(self.process.token)

    def _body(self, request: Request, directory: str, scope: CancelScope) -> dict[str, Any]:
        command = request.cfg.command
        if command is None:
            return prompt_body(request)
        # A command has no format: the schema of its answer is said in words.
        arguments = request.instructed
        if arguments.strip():
            known = self.connection.objects(
                "/command", timeout_s=FIRST_S, directory=directory, scope=scope
            )
            # The server refuses an unknown one.
            templates = [each.get("template") for each in known if each.get("name") == command]
            template = str(templates[0]) if templates else ""
            has_plugin = self.process is not None
            check_command(command, template, arguments, has_plugin=has_plugin)
            arguments = sealed(arguments) if has_plugin else arguments
        return command_body(request, arguments)

    def _last_message(self, session_id: str, directory: str, scope: CancelScope) -> int:
        """Return when the session's last message was made; 0 where it has none."""
        # Two: a prompt whose format was taken away is as young as its answer.
        newest = stored_messages(self.connection, session_id, directory, limit=2, scope=scope)
        return max(map(created_at, newest), default=0)

    def always_allowed(self, directory: str) -> list[tuple[str, str]]:
        """Return the permissions and patterns that were answered with "always"; to be added to."""
        return self._always.setdefault(directory, [])

    def ignored_in(self, turn: Turn) -> list[str]:
        """Return what OpenCode ignored silently in a turn that has ended, in sentences."""
        warnings: list[str] = []
        directory, variant, model = turn.directory, turn.request.cfg.variant, turn.model
        settings: dict[str, Any] = {"timeout_s": ABORT_S, "scope": turn.scope}
        settings["directory"] = directory
        if directory not in self._without_mcp:
            states = self.connection.get("/mcp", **settings)
            warnings += warnings_of(states)
            if states == {}:
                self._without_mcp.add(directory)
        if variant is not None and model is not None:
            key = (directory, *model)
            if key not in self._variants:
                providers = self.connection.get("/config/providers", **settings)
                self._variants[key] = _variants_in(providers, *model)
            known = self._variants[key]
            if known is not None and variant not in known:
                warnings.append(unknown_variant(variant, "/".join(model), known))
        return warnings

    # -- the health thread ---------------------------------------------------------------------

    def _watch(self, process: ServerProcess) -> None:
        """While somebody waits for the server, ask whether it is alive; stop a dead one."""
        n_silent, cpu_s = 0, 0.0
        woken = Flag()
        # A connection of its own: what is silent here says nothing of the other requests.
        with closing(Connection(self.connection.url, password=self.connection.password)) as own:
            while not self._life.is_cancelled():
                if not n_silent:
                    self._life.wait(woken, LOOK_S)
                    if not (self.turns or self.connection.is_waiting):
                        continue
                if _answers(own, self._life):
                    n_silent = 0
                    continue
                if self._life.is_cancelled() or process.has_exited:
                    return
                n_silent += 1
                used_s, cpu_s = process.cpu_s() - cpu_s, process.cpu_s()
                is_busy = used_s > 0.02 * ANSWER_S
                if n_silent >= (BUSY_S / ANSWER_S if is_busy else 2):
                    silence = f"did not answer for {n_silent * ANSWER_S:g} s, and was stopped"
                    reason = f"the server (pid {process.pid}) {silence}; {NEXT}"
                    _log.warning("%s", reason)
                    self.feed.lose(reason)
                    process.stop(at_once=True)
                    return


def _answers(connection: Connection, scope: CancelScope) -> bool:
    try:
        connection.get("/global/health", timeout_s=ANSWER_S, keeps_open=False, scope=scope)
    except OpenCodeServerError as error:
        # A refusal is an answer; the process's exit is seen elsewhere.
        return error.status_code is not None or not connection.is_silent
    return True


def _resume(session_id: str, directory: str, request: Request, sessions: Sessions) -> str:
    """Add the rules of *request* to the session, or to a fork of it; return the id of either."""
    cfg = request.cfg
    session = sessions.known(session_id, directory)
    own = str(session.get("directory"))
    if own != directory and own != sessions.resolved(directory):
        raise OpenCodeConfigError(
            f"session {session_id!r} works in {own!r}, not in {directory!r}: pass that workspace"
        )
    rules = permission_rules(request)
    changes: dict[str, Any] = {}
    if cfg.fork:
        session_id = sessions.fork(session_id, directory, rules=rules)
    elif missing := missing_rules(rules_of(session), rules):
        changes["permission"] = missing
    if cfg.title is not None:
        changes["title"] = cfg.title
    if changes:
        sessions.change(session_id, directory, **changes)
    return session_id


def _variants_in(providers: Any, provider: str, model: str) -> list[str] | None:
    """Return the names of the model's variants; None where the server does not know the model."""
    listed = mapping(providers).get("providers")
    for each in listed if isinstance(listed, list) else ():
        if mapping(each).get("id") == provider:
            found = mapping(mapping(each).get("models")).get(model)
            return None if found is None else list(mapping(mapping(found).get("variants")))
    return None
