"""One prompt in a session of a server, as a source of events.

    mailbox --> Translator --> events --> receive()          (the caller's thread)
                    |
    GAP, silence ---+-- ask the server for the state: nothing lost, nothing twice
    questions ------> answers, given in the caller's thread

Knows requests and messages; nothing of deadlines, nor of whose the server is.

What is answered to the permission requests and questions of a turn.

    permission.asked --+--> note() --> give() --> the caller's answer --> server
    question.asked   --+               (in the caller's thread)

OpenCode puts what was answered with "always" after all rules, denials included (1.18.33). So it is
told "once", and what comes later is allowed here, where no rule denies it. Knows requests and the
bodies of replies; nothing of turns.
"""

from __future__ import annotations

import contextlib
import math
import queue
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

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
from ..core.reading import ARGUMENTS_ERROR, why_cut
from ..core.request import PermissionAnswer, QuestionAnswer
from ..core.result import RunResult
from ..process import tree
from ..process.stderr import no_space
from .connection import REQUEST_S, Connection, Requests, Within
from .feed import GAP, Mailbox, Message, mapping
from .protocol import Translator, parts_of
from .sessions import is_prompt_with_format, stored_messages

Body = Mapping[str, Any]


def reject(request: Body) -> Body:
    """The answer to a permission request where nobody is there to ask."""
    return {"reply": "reject"}


def allow_once(request: Body) -> Body:
    """The answer of ``auto=True``; what a rule denies does not come to be asked."""
    return {"reply": "once"}


def decline(request: Body) -> None:
    """The answer to a question where nobody is there to ask."""


class Replies:
    """The open requests of one turn, its sub-agents' included.

    Attributes:
        timeout_s: Bound on handing over an answer.
    """

    def __init__(
        self,
        connection: Requests,
        directory: str,
        permission: PermissionAnswer = reject,
        question: QuestionAnswer = decline,
        always: list[tuple[str, str]] | None = None,
    ) -> None:
        """
        Args:
            always: Permissions and patterns that were allowed for all later turns; added to.
            permission: Gives the body of the reply to a request.
            question: The same; None declines.
        """
        self._connection = connection
        self._directory = directory
        self._permission = permission
        self._question = question
        self._always = [] if always is None else always
        self._open: list[Message] = []
        self._seen: set[str] = set()
        self.timeout_s = REQUEST_S

    def note(self, message: Message) -> None:
        """Take in *message*, if it is a request, and a new one."""
        request_id = str(message.properties.get("id"))
        if message.type in ("permission.asked", "question.asked") and request_id not in self._seen:
            self._seen.add(request_id)
            self._open.append(message)

    def give(self) -> None:
        """Answer what is open. What an answer raises comes here, after a refusal in its place.

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
                    self._send(path, reject(request) if is_permission else None)
                raise
            self._send(path, body)

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

    def _send(self, path: str, body: Body | None) -> None:
        verb = "reject" if body is None else "reply"
        try:
            self._connection.post(
                f"{path}/{verb}", body, directory=self._directory, timeout_s=self.timeout_s
            )
        except OpenCodeServerError as error:
            if error.status_code != 404:  # somebody else was faster, or the turn was aborted
                raise


DOUBT_S = 0.5  # silence after which the server is asked whether the turn is over, if it may be
LOOK_S = 2.0  # the same where nothing speaks for it; doubled each time
LONGEST_LOOK_S = 30.0
REFUSAL_S = 1.0  # how long a retry waits for what the server's stderr tells of its reason
BEGIN_S = 60.0  # how long a prompt that was taken may show no sign of life
ABORT_S = 1.0  # bound on each request for the end
LATE_ABORT_S = 10.0  # how long an abort that was not answered in that time is still tried
BEGUN_S = 2.0  # bound on waiting, at an early end, for a turn to begin: only then it can be aborted
PAUSE_S = 0.02


class Turn:
    """A turn under way; see :class:`~opencode_sync.core.request.Source` for what it promises.

    Attributes:
        session_id: The session it is a turn of.
        started_at: When the prompt was sent, a ``time.monotonic()`` instant.
    """

    def __init__(
        self,
        connection: Connection,
        mailbox: Mailbox,
        session_id: str,
        directory: str,
        *,
        since: int = 0,
        with_reasoning: bool = False,
        keep_background: bool = False,
        has_marks: bool = False,
        env: Mapping[str, str] | None = None,
        replies: Replies | None = None,
        warnings: Sequence[str] = (),
        at_end: Callable[[tuple[str, str] | None], list[str]] = lambda model: [],
        scope: CancelScope | None = None,
    ) -> None:
        """
        Args:
            mailbox: Of the session; closed with the turn.
            since: When the session's last message was made, in the server's milliseconds.
            has_marks: The server is one of ours: its tools' processes bear the session's id and can
                be stopped by it, and its stderr tells of a provider's refusals.
            env: What the server was started with, where it is one of ours.
            replies: To permission requests and questions; None refuses them all.
            warnings: What is known before the prompt is sent; given first, as events.
            at_end: Asked for further ones when the turn has ended by itself; gets provider and name
                of the model that answered.
            scope: Of the run; its requests end with it.
        """
        self.session_id = session_id
        self.started_at = time.monotonic()
        self.label = f"turn in {session_id} on {connection.label}"
        self._connection, self._directory = connection, directory
        self._mailbox = mailbox
        self._translator = Translator(
            session_id, since=since, with_reasoning=with_reasoning, tells_refusals=has_marks
        )
        self._keep_background, self._has_marks = keep_background, has_marks
        self._env = env
        self._scope = CancelScope() if scope is None else scope
        self._wait_until = math.inf  # an instant at which receive() is to return
        self._replies = replies or Replies(connection.within(self._scope), directory)
        self._sent: Mapping[str, Any] = {}
        self._on_close: list[Callable[[], None]] = []
        self._look_s, self._idle_looks = LOOK_S, 0
        self._loss: OpenCodeServerError | None = None
        self._trees: dict[str, tree.Tree] = {}  # of the sessions' tools, when last looked at
        self._messages: deque[Message] = deque()  # taken, not read yet
        self._ready = warning_events(warnings)
        self._at_end = at_end
        self._is_done = self._was_stopped = False

    @property
    def is_over(self) -> bool:
        return self._is_done

    @property
    def has_used_tools(self) -> bool:
        """Whether tools have been at work, so far as is known."""
        return self._translator.has_used_tools

    @property
    def keeps_background(self) -> bool:
        """Whether what its tools leave running is to go on."""
        return self._keep_background

    def on_close(self, call: Callable[[], None]) -> None:
        """Have *call* called once, when all is done."""
        self._on_close.append(call)

    def send(self, body: Mapping[str, Any]) -> None:
        """Give the server the prompt.

        Raises:
            OpenCodeServerError: If it refuses.
        """
        self._sent = body
        if "command" not in body:
            self._requests.post(self._path("prompt_async"), body, directory=self._directory)
            return

        def answered(error: OpenCodeServerError | None) -> None:
            self._mailbox.put(Message(self.session_id, "answer", {"error": error}))

        # There is no request for a command that is answered at once.
        path = f"{self._path('command')}?directory={quote(self._directory)}"
        self._connection.in_background(path, body, answered, scope=self._scope)

    def receive(self, timeout: float | None) -> list[Event] | None:
        """The next events; see :meth:`~opencode_sync.core.request.Source.receive`."""
        if self._is_done and not self._ready:
            return None
        deadline = None if timeout is None else time.monotonic() + timeout
        scope = self._scope
        self._wait_until = math.inf if deadline is None else deadline
        try:
            if not self._was_stopped:
                self._replies.timeout_s = REQUEST_S if timeout is None else min(REQUEST_S, timeout)
                self._replies.give()
            while not (self._messages or self._ready or self._is_done):
                try:
                    self._mailbox.wait(self._patience(deadline))
                    break
                except queue.Empty:
                    if deadline is not None and time.monotonic() >= deadline:
                        raise
                self._ready += self._look()
            if not self._is_done:
                self._read()
            if self._is_done and not self._was_stopped:
                self._warn()
        except OpenCodeServerError as error:
            if not self._was_stopped and not (error.status_code is None and self._has_run_out()):
                with contextlib.suppress(OpenCodeServerError):
                    self._abort()  # it may have failed us, and be there all the same
                self._loss, self._is_done = error, True
            elif scope is self._scope and self._was_stopped:
                self._is_done = True
            elif not self._is_done:  # the run's end has cut the request
                raise queue.Empty from error
        events, self._ready = self._ready, []
        return events or (None if self._is_done else [])

    def stop(self) -> None:
        """Abort the turn, and end its tools; see :meth:`.request.Source.stop`."""
        self._translator.stopped()
        was_done, self._was_stopped = self._is_done, True
        self._scope = CancelScope()  # the run's has ended
        self._look_at_tools()
        try:
            has_begun = was_done or self._has_begun()
            if not was_done:
                self._abort()
            # What has not begun yet cannot be aborted, and would begin unseen.
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
        """Wait no longer for a server that does not answer, and abort the turn if it ever does."""
        if not self._is_done and self._connection.lost is None:
            path = f"{self._path('abort')}?directory={quote(self._directory)}"
            # A server that is stopped in the midst of a turn goes on with it when it is continued.
            with contextlib.suppress(RuntimeError):  # no thread to be had
                self._connection.in_background(path, {}, _nothing, timeout_s=LATE_ABORT_S)
        self._is_done = True
        self._mailbox.put(Message(self.session_id, "given up", {}))  # wakes who waits for more

    def settle(self, result: RunResult) -> OpenCodeError | None:
        """Complete *result*, and say what went wrong."""
        # After a stop too: it came from another thread, perhaps, which is still at it.
        may_have_left = self._translator.has_used_tools and not self._keep_background
        if may_have_left or self._was_stopped or self._loss is not None:
            self._stop_tools()
        self._take_format_away()
        result.session_id = self.session_id
        result._json = self._translator.structured
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

    def close(self) -> None:
        self._mailbox.close()
        while self._on_close:
            self._on_close.pop()()

    # -- messages ------------------------------------------------------------------------------

    def _warn(self) -> None:
        # The answer is there, whether or not the server tells more about it.
        with contextlib.suppress(OpenCodeServerError):
            self._ready += warning_events(self._at_end(self._translator.model))

    def _read(self) -> None:
        """Read what has come. A Ctrl-C meanwhile loses none of it."""
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

    def _patience(self, deadline: float | None) -> float:
        wait_s = DOUBT_S if self._translator.is_doubtful else self._look_s
        if self._translator.has_unexplained:
            wait_s = min(wait_s, REFUSAL_S)
        return wait_s if deadline is None else max(0.0, min(wait_s, deadline - time.monotonic()))

    def _look(self) -> list[Event]:
        """Nothing came for a while: has the end been missed?"""
        if events := self._translator.take_unexplained():
            return events
        if self._is_busy():
            self._look_s, self._idle_looks = min(2 * self._look_s, LONGEST_LOOK_S), 0
            return []
        self._idle_looks += 1
        has_started = self._translator.has_begun or self._translator.is_doubtful
        has_started = has_started or time.monotonic() - self.started_at > BEGIN_S
        # Once may be the moment before it begins.
        if self._idle_looks < 2 or not has_started:
            return []
        events = [*self._stored(), *self._translator.end()]
        self._is_done = True
        return events

    def _catch_up(self) -> list[Event]:
        """Messages were lost: take what the server has stored in their place."""
        events = self._stored()
        status = "busy" if self._is_busy() else "idle"
        events += self._translator.read(
            Message(self.session_id, "session.status", {"status": {"type": status}})
        )
        for kind in ("permission", "question"):
            for request in self._objects(f"/{kind}"):
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
                stored = stored_messages(
                    self._requests, session_id, self._directory, timeout_s=self._bound()
                )
                events += self._translator.read_stored(session_id, stored)
                for part in (part for entry in stored for part in parts_of(entry)):
                    metadata = mapping(mapping(part.get("state")).get("metadata"))
                    if part.get("tool") == "task" and (child := metadata.get("sessionId")):
                        self._mailbox.follow(str(child))
        return events

    # -- requests ------------------------------------------------------------------------------

    def _path(self, verb: str) -> str:
        return f"/session/{quote(self.session_id, safe='')}/{verb}"

    @property
    def _requests(self) -> Within:
        return self._connection.within(self._scope)

    def _objects(self, path: str, **params: Any) -> list[dict[str, Any]]:
        return self._requests.objects(
            path, directory=self._directory, timeout_s=self._bound(), **params
        )

    def _bound(self) -> float:
        if self._was_stopped:
            return ABORT_S
        return max(0.0, min(REQUEST_S, self._wait_until - time.monotonic()))

    def _has_run_out(self) -> bool:
        """Whether a request failed for the end of the time that it had, or for a cancellation."""
        return self._scope.is_over or time.monotonic() >= self._wait_until

    def _is_busy(self) -> bool:
        return self.session_id in self._requests.object(
            "GET", "/session/status", directory=self._directory, timeout_s=self._bound()
        )

    def _has_begun(self) -> bool:
        if self._translator.has_begun or self._is_busy():
            return True
        try:
            last = self._objects(self._path("message"), limit=1)
        except OpenCodeServerError as error:
            if is_prompt_with_format(error):  # our own
                return True
            raise
        return any(map(self._translator.covers, last))

    def _abort(self) -> None:
        # Not in the scope, whose end may be what ends the turn.
        path = self._path("abort")
        self._connection.post(path, directory=self._directory, timeout_s=ABORT_S)

    def _take_format_away(self) -> None:
        """Leave a session that can be read and forked: with a format in it, it cannot (1.18.33)."""
        if "format" not in self._sent or self._loss is not None or self._connection.is_silent:
            return
        kept = {key: value for key, value in self._sent.items() if key not in ("format", "parts")}
        body = {**kept, "messageID": self._translator.prompt_id, "noReply": True, "parts": []}
        # The answer is there all the same.
        with contextlib.suppress(OpenCodeServerError):
            path = self._path("message")
            self._connection.post(path, body, directory=self._directory, timeout_s=ABORT_S)

    def _look_at_tools(self) -> None:
        """Remember their processes: with its shell, one may lose the only sign that it is ours."""
        if self._has_marks:
            for session_id in tuple(self._mailbox.sessions):
                self._trees[session_id] = tree.Tree.of(session_id)

    def _stop_tools(self) -> None:
        if self._has_marks:
            for session_id in tuple(self._mailbox.sessions):
                found = self._trees.pop(session_id, None)
                if found is None:
                    tree.stop(session_id)
                else:
                    found.stop()


def _nothing(error: OpenCodeServerError | None) -> None:
    pass
