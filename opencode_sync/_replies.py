"""What is answered to the permission requests and questions of a turn.

    permission.asked --+--> note() --> give() --> the caller's answer --> server
    question.asked   --+               (in the caller's thread)

OpenCode puts what was answered with "always" after all rules, denials included (1.18.33). So it is
told "once", and what comes later is allowed here, where no rule denies it. Knows requests and the
bodies of replies; nothing of turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from ._http import REQUEST_S, Requests
from ._sse import Message
from .core.denials import matches
from .core.errors import OpenCodeServerError
from .core.request import PermissionAnswer, QuestionAnswer

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
