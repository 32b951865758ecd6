"""One prompt in a session of a server, as a source of events.

    mailbox --> Translator --> events --> receive()          (the caller's thread)
                    |
    GAP, silence ---+-- ask the server for the state: nothing is lost, nothing comes twice
    permission and question requests --> Replies --> the caller's answer --> server

OpenCode puts a rule for what was answered with "always" after all other rules, denials included
(1.18.33). So it gets "once", and later requests are allowed here if no rule denies them.
Knows requests and messages, nothing of time limits and of the server's start.
"""

from __future__ import annotations

import contextlib
import math
import queue
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core import lifetime
from ..core.denials import matches
from ..core.errors import (
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeProcessError,
    OpenCodeServerError,
)
from ..core.events import Event, warning_events
from ..core.lifetime import CancelScope
from ..core.reading import ARGUMENTS_ERROR, called_session, why_cut
from ..core.request import Request
from ..core.result import RunResult
from ..process import tree
from ..process.stderr import no_space
from .connection import REQUEST_S, Connection
from .feed import ANSWER, GAP, WAKE, Mailbox, Message
from .protocol import Translator, parts_of
from .sessions import is_prompt_with_format, path_of, stored_messages

if TYPE_CHECKING:
    from .running import RunningServer

DOUBT_S = 0.5  # silence after which the server is asked whether the turn is over, if it may be
LOOK_S = 2.0  # the same where nothing suggests that it is over; doubled each time
LONGEST_LOOK_S = 30.0
REFUSAL_S = 1.0  # how long a retry event waits for its reason, which comes by the server's stderr
BEGIN_S = 60.0  # how long a prompt that was taken may show no sign of life
ABORT_S = 1.0  # bound on each request at the end of a turn
LATE_ABORT_S = 10.0  # how long an abort that was not answered in that time is still tried
BEGUN_S = 2.0  # bound on waiting, at an early end, for a turn to begin: only then it can be aborted
PAUSE_S = 0.02

Body = Mapping[str, Any]


class Turn:
    """A turn under way; see :class:`~opencode_sync.core.request.Source` for what it promises.

    Attributes:
        request: What it is a turn for.
        scope: The run's.
        session_id: The session it is a turn of.
        directory: Where the session works.
        started_at: When it was made, a ``time.monotonic()`` instant.
    """

    def __init__(
        self,
        server: RunningServer,
        request: Request,
        scope: CancelScope,
        mailbox: Mailbox,
        directory: str,
        body: Body,
        *,
        since: int = 0,
    ) -> None:
        """Send nothing yet.

        Args:
            scope: Requests end with it.
            mailbox: The session's; closed with the turn.
            body: The prompt or command, as the server takes it.
            since: When the session's last message was made, in the server's milliseconds.
        """
        self.request, self.scope, self.directory = request, scope, directory
        self.session_id = mailbox.session_id
        self.started_at = time.monotonic()
        self._server, self._connection, self._mailbox = server, server.connection, mailbox
        self.label = f"turn in {self.session_id} on {self._connection.label}"
        self._body = body
        # Of our own server alone: its tools' processes have the session's id and can be stopped by
        # it, and its stderr tells of a provider's refusals.
        self._env = server.env
        self._scope = scope  # of requests; another one once the run's has ended
        self._translator = Translator(
            self.session_id,
            since=since,
            with_reasoning=bool(request.cfg.thinking),
            tells_refusals=self._env is not None,
        )
        always = server.always_allowed(directory)
        self._replies = Replies(request, self._connection, directory, scope, always)
        self._wait_until = math.inf  # the instant at which receive() has to return
        self._look_s, self._idle_looks = LOOK_S, 0
        self._loss: OpenCodeServerError | None = None
        self._trees: dict[str, tree.Tree] = {}  # the sessions' tools, when last looked at
        self._messages: deque[Message] = deque()  # taken, not read yet
        self._ready = warning_events([*request.warnings, *server.warnings])
        self._is_done = self._was_stopped = self._is_closed = False

    @property
    def is_over(self) -> bool:
        return self._is_done

    @property
    def has_used_tools(self) -> bool:
        """Whether tools have been at work, or may have been before the server told of them."""
        return self._translator.has_used_tools or self._was_stopped

    @property
    def model(self) -> tuple[str, str] | None:
        """Provider and name of the model that answers; None until one does."""
        return self._translator.model

    def send(self) -> None:
        """Send the prompt. One that may have been taken although this raises is aborted.

        Raises:
            OpenCodeServerError: If the server refuses or does not respond.
        """
        try:
            if "command" in self._body:
                # OpenCode has no request for a command that it responds to at once.
                self._connection.in_background(
                    self._path("command"),
                    self._body,
                    self._answered,
                    scope=self._scope,
                    directory=self.directory,
                )
            else:
                path = self._path("prompt_async")
                self._connection.post(path, self._body, **self._settings())
        except BaseException as error:
            if not isinstance(error, OpenCodeServerError) or error.status_code is None:
                self.stop()
            else:
                add_no_space(error, self._env)
            raise

    def _answered(self, error: OpenCodeServerError | None) -> None:
        self._mailbox.put(Message(self.session_id, ANSWER, {"error": error}))

    def receive(self, timeout: float | None) -> list[Event] | None:
        """Return the next events; see :meth:`~opencode_sync.core.request.Source.receive`."""
        if self._is_done and not self._ready:
            return None
        self._wait_until = math.inf if timeout is None else time.monotonic() + timeout
        scope = self._scope
        try:
            self._step()
        except OpenCodeServerError as error:
            is_cut = error.status_code is None and self._has_run_out()
            if not self._was_stopped and not is_cut:
                with contextlib.suppress(OpenCodeServerError):
                    self._abort()  # the server may still be there
                self._loss, self._is_done = error, True
            elif self._was_stopped and scope is self._scope:
                self._is_done = True
            elif not self._is_done:  # the run's end has cut the request
                raise queue.Empty from error
        events, self._ready = self._ready, []
        return events or (None if self._is_done else [])

    def _step(self) -> None:
        """Give the answers that are due, wait for something to come, and read it."""
        if not self._was_stopped:
            self._replies.give(self._bound())
        while not (self._messages or self._ready or self._is_done):
            try:
                self._mailbox.wait(self._patience())
                break
            except queue.Empty:
                if time.monotonic() >= self._wait_until:
                    raise
            self._ready += self._look()
        if not self._is_done:
            self._read()
        if self._is_done and not self._was_stopped:
            # The answer is there, whether or not the server tells more about it.
            with contextlib.suppress(OpenCodeServerError):
                self._ready += warning_events(self._server.ignored_in(self))

    def stop(self) -> None:
        """Abort the turn, and stop its tools; see :meth:`.request.Source.stop`."""
        self._translator.stopped()
        was_done, self._was_stopped = self._is_done, True
        self._scope = CancelScope()
        self._look_at_tools()
        try:
            has_begun = was_done or self._has_begun()
            if not was_done:
                self._abort()
            # A turn that has not begun yet cannot be aborted, and would begin unseen.
            end = time.monotonic() + BEGUN_S
            while not has_begun and time.monotonic() < end:
                time.sleep(PAUSE_S)
                has_begun = self._has_begun()
                if has_begun:
                    self._abort()
        except OpenCodeServerError as error:
            if error.status_code is None:
                self._give_up()
        self._stop_tools()

    def _give_up(self) -> None:
        """Wait no longer for a server that does not respond; abort the turn if it ever does."""
        if not self._is_done and self._connection.lost is None:
            # A server that is suspended in the middle of a turn goes on with it when resumed.
            with contextlib.suppress(RuntimeError):  # no thread to be had
                self._connection.in_background(
                    self._path("abort"),
                    {},
                    lambda error: None,
                    timeout_s=LATE_ABORT_S,
                    directory=self.directory,
                )
        self._is_done = True
        self._mailbox.put(Message(self.session_id, WAKE, {}))

    def settle(self, result: RunResult) -> OpenCodeError | None:
        """Complete *result*, and return what went wrong."""
        # After a stop too: it may have come from another thread, which is still at it.
        may_have_left = self.has_used_tools and not self.request.cfg.keep_background
        if may_have_left or self._was_stopped or self._loss is not None:
            self._stop_tools()
        self._take_format_away()
        result.session_id = self.session_id
        result._json = self._translator.structured
        if self._translator.model is not None:
            result.model = "/".join(self._translator.model)
        if self._loss is not None:
            self._loss.result = result
            return self._loss
        if result.error is not None and result.error.name == ARGUMENTS_ERROR:
            return OpenCodeConfigError(result.error.message, result=result)
        if result.status == "error":
            reason = str(result.error)
            is_unexplained = result.error is not None and result.error.name == "UnknownError"
            if is_unexplained and self._env is not None and (full := no_space(self._env)):
                reason = f"{reason}; {full}"
            return OpenCodeProcessError(None, events=result.events, reason=reason, result=result)
        if result.status == "incomplete":
            last = result.finish_reason or "none"
            message = f"the turn ended without a closing step (last reason: {last})"
            return OpenCodeIncompleteError(why_cut(last) or message, result=result)
        return None

    def may_repeat(self, result: RunResult) -> bool:
        """Never: what keeps a prompt from being taken is raised before there is a turn."""
        return False

    def take_back(self) -> str | None:
        """Delete the prompt and what came of it; see :meth:`.request.Source.take_back`."""
        if self._loss is not None:
            return None
        try:
            for message_id in reversed(self._translator.messages):
                self._connection.request(
                    "DELETE",
                    self._path(f"message/{message_id}"),
                    directory=self.directory,
                    timeout_s=ABORT_S,
                )
        except OpenCodeServerError:  # the model will see the prompt twice
            return None
        return self.session_id

    def close(self) -> None:
        self._mailbox.close()
        if not self._is_closed:
            self._is_closed = True
            self._server.forget(self)

    # -- messages ------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read the messages that have come; a Ctrl-C in the meantime loses nothing."""
        self._look_s, self._idle_looks = LOOK_S, 0
        with lifetime.deferred(), contextlib.suppress(queue.Empty):
            self._messages += self._mailbox.receive(0)
        while self._messages:
            if self._messages[0] is GAP:
                self._ready += self._catch_up()
                self._messages.popleft()
            with lifetime.deferred():
                while self._messages and self._messages[0] is not GAP:
                    message = self._messages.popleft()
                    self._ready += self._translator.read(message)
                    self._replies.note(message)
        self._is_done = self._translator.is_over

    def _patience(self) -> float:
        wait_s = DOUBT_S if self._translator.is_doubtful else self._look_s
        if self._translator.has_unexplained:
            wait_s = min(wait_s, REFUSAL_S)
        return max(0.0, min(wait_s, self._wait_until - time.monotonic()))

    def _look(self) -> list[Event]:
        """Nothing came for a while: find out whether the turn's end was missed."""
        if events := self._translator.take_unexplained():
            return events
        if self._is_busy():
            self._look_s, self._idle_looks = min(2 * self._look_s, LONGEST_LOOK_S), 0
            return []
        self._idle_looks += 1
        has_started = self._translator.has_begun or self._translator.is_doubtful
        has_started = has_started or time.monotonic() - self.started_at > BEGIN_S
        # The first time may be the moment before it begins.
        if self._idle_looks < 2 or not has_started:
            return []
        events = [*self._stored(), *self._translator.end()]
        self._is_done = True
        return events

    def _catch_up(self) -> list[Event]:
        """Messages were lost: take what the server has stored instead."""
        events = self._stored()
        status = "busy" if self._is_busy() else "idle"
        events += self._translator.read(
            Message(self.session_id, "session.status", {"status": {"type": status}})
        )
        for kind in ("permission", "question"):
            for request in self._connection.objects(f"/{kind}", **self._settings()):
                session_id = request.get("sessionID")
                if isinstance(session_id, str) and session_id in self._mailbox.sessions:
                    message = Message(session_id, f"{kind}.asked", request)
                    events += self._translator.read(message)
                    self._replies.note(message)
        return events

    def _stored(self) -> list[Event]:
        events: list[Event] = []
        told: set[str] = set()
        while new := [name for name in self._mailbox.sessions if name not in told]:
            for session_id in new:
                told.add(session_id)
                stored = stored_messages(self._connection, session_id, **self._settings())
                events += self._translator.read_stored(session_id, stored)
                for part in (part for entry in stored for part in parts_of(entry)):
                    if child := called_session({"part": part}):
                        self._mailbox.follow(child)
        return events

    # -- requests ------------------------------------------------------------------------------

    def _path(self, verb: str) -> str:
        return path_of(self.session_id, f"/{verb}")

    def _settings(self) -> dict[str, Any]:
        """What requests under way have in common."""
        return {"directory": self.directory, "scope": self._scope, "timeout_s": self._bound()}

    def _bound(self) -> float:
        if self._was_stopped:
            return ABORT_S
        return max(0.0, min(REQUEST_S, self._wait_until - time.monotonic()))

    def _has_run_out(self) -> bool:
        """Whether a request failed for the end of its time, or for a cancellation."""
        return self._scope.is_over or time.monotonic() >= self._wait_until

    def _is_busy(self) -> bool:
        return self.session_id in self._connection.object("/session/status", **self._settings())

    def _has_begun(self) -> bool:
        if self._translator.has_begun or self._is_busy():
            return True
        try:
            last = self._connection.objects(self._path("message"), limit=1, **self._settings())
        except OpenCodeServerError as error:
            if is_prompt_with_format(error):  # our own
                return True
            raise
        return any(map(self._translator.covers, last))

    def _post_at_end(self, verb: str, body: Body | None = None) -> None:
        # Not in the scope: its end may be what ends the turn.
        path = self._path(verb)
        self._connection.post(path, body, directory=self.directory, timeout_s=ABORT_S)

    def _abort(self) -> None:
        self._post_at_end("abort")

    def _take_format_away(self) -> None:
        """Leave a session that can be read and forked: with a format in it, it cannot (1.18.33)."""
        if "format" not in self._body or self._loss is not None or self._connection.is_silent:
            return
        kept = {key: value for key, value in self._body.items() if key not in ("format", "parts")}
        body = {**kept, "messageID": self._translator.prompt_id, "noReply": True, "parts": []}
        # The answer is there nevertheless.
        with contextlib.suppress(OpenCodeServerError):
            self._post_at_end("message", body)

    # -- tools ---------------------------------------------------------------------------------

    def _look_at_tools(self) -> None:
        """Remember their processes: with its shell, one may lose the only sign that it is ours."""
        if self._env is not None:
            for session_id in tuple(self._mailbox.sessions):
                self._trees[session_id] = tree.Tree.of(session_id)

    def _stop_tools(self) -> None:
        if self._env is not None:
            for session_id in tuple(self._mailbox.sessions):
                found = self._trees.pop(session_id, None)
                if found is None:
                    tree.stop(session_id)
                else:
                    found.stop()


def add_no_space(error: OpenCodeServerError, env: Mapping[str, str] | None) -> None:
    """Add to *error* that a disk of the server with *env* is full, if that explains it."""
    has_failed = error.status_code is not None and error.status_code >= 500
    if has_failed and env is not None and (full := no_space(env)):
        error.args = (f"{error}; {full}",)


def reject(request: Body) -> Body:
    """The answer to a permission request where nobody is there to ask."""
    return {"reply": "reject"}


def allow_once(request: Body) -> Body:
    """The answer of ``auto=True``; what a rule denies is not asked."""
    return {"reply": "once"}


def decline(request: Body) -> None:
    """The answer to a question where nobody is there to ask."""


class Replies:
    """The open permission requests and questions of one turn, its sub-agents' included."""

    def __init__(
        self,
        request: Request,
        connection: Connection,
        directory: str,
        scope: CancelScope,
        always: list[tuple[str, str]],
    ) -> None:
        """
        Args:
            always: Permissions and patterns that are allowed in all later turns; added to.
        """
        self._connection, self._directory, self._scope = connection, directory, scope
        answers = request.answers
        self._permission = answers.permission or (allow_once if request.cfg.auto else reject)
        self._question = answers.question or decline
        self._always = always
        self._open: list[Message] = []
        self._seen: set[str] = set()

    def note(self, message: Message) -> None:
        """Take in *message*, if it is a request, and a new one."""
        request_id = str(message.properties.get("id"))
        if message.type in ("permission.asked", "question.asked") and request_id not in self._seen:
            self._seen.add(request_id)
            self._open.append(message)

    def give(self, timeout_s: float) -> None:
        """Answer what is open. An exception of an answer comes out here, after a refusal.

        Args:
            timeout_s: Time limit for handing over each answer.

        Raises:
            OpenCodeServerError: If the server does not take an answer.
        """
        while self._open:
            _, kind, request = self._open.pop(0)
            is_permission = kind == "permission.asked"
            path = f"/{'permission' if is_permission else 'question'}/{request.get('id')}"
            try:
                body = self._permit(request) if is_permission else self._question(request)
            except BaseException:
                with contextlib.suppress(OpenCodeServerError):
                    self._send(path, reject(request) if is_permission else None, timeout_s)
                raise
            self._send(path, body, timeout_s)

    def _permit(self, request: Body) -> Body:
        permission = str(request.get("permission"))
        allowed = [pattern for name, pattern in self._always if name == permission]
        asked = [str(pattern) for pattern in request.get("patterns") or ()]
        if asked and all(any(matches(each, pattern) for pattern in allowed) for each in asked):
            return allow_once(request)
        body = self._permission(request)
        if body.get("reply") != "always":
            return body
        self._always += [(permission, str(pattern)) for pattern in request.get("always") or ()]
        return allow_once(request)

    def _send(self, path: str, body: Body | None, timeout_s: float) -> None:
        verb = "reject" if body is None else "reply"
        try:
            self._connection.post(
                f"{path}/{verb}",
                body,
                directory=self._directory,
                timeout_s=timeout_s,
                scope=self._scope,
            )
        except OpenCodeServerError as error:
            if error.status_code != 404:  # somebody else was faster, or the turn was aborted
                raise
