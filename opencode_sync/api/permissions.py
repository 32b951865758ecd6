"""What OpenCode asks during a turn: permission for a tool, and questions of the model.

    the server's request --> PermissionRequest, QuestionRequest --> on_permission, on_question
    the body of a reply  <-- checked                            <-- its return value

Three such functions are here: allow_reads, allow_all and ask_in_terminal. Sends nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from ..core.errors import OpenCodeConfigError
from ..core.request import Answers
from ..core.text import count, spelled_out

Reply = Literal["once", "always", "reject"]
PermissionReply = Reply | tuple[Literal["reject"], str]
"""``"always"`` allows later requests too; the model gets the message of a rejection and goes on."""

_REPLIES = ("once", "always", "reject")
_READS = ("read", "glob", "grep", "list", "lsp", "skill", "todoread", "todowrite")
_SHOWN_CHARACTERS = 2_000  # of a diff or a command on a terminal


@dataclass(frozen=True)
class PermissionRequest:
    """A tool waits for permission.

    Attributes:
        permission: Its kind: ``"bash"``, ``"edit"`` (every tool that writes), ``"read"``,
            ``"webfetch"``, ``"external_directory"``, ...
        patterns: What the tool wants to use: commands, paths, addresses.
        always: The patterns that ``"always"`` would allow, until the server ends.
        metadata: Details, such as ``command``, ``filepath`` and ``diff``.
        session_id: The tool's session; a sub-agent has a session of its own.
        id: The request's id.
    """

    permission: str
    patterns: tuple[str, ...] = ()
    always: tuple[str, ...] = field(default=(), repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    session_id: str = field(default="", repr=False)
    id: str = field(default="", repr=False)


@dataclass(frozen=True)
class Option:
    """An answer that a question offers."""

    label: str
    description: str = field(default="", repr=False)


@dataclass(frozen=True)
class Question:
    """One question of the model.

    Attributes:
        question: The question.
        options: The answers that it offers.
        header: The question in a word or two.
        multiple: Whether several answers may be chosen.
        custom: Whether an answer that is not offered may be given.
    """

    question: str
    options: tuple[Option, ...] = ()
    header: str = field(default="", repr=False)
    multiple: bool = False
    custom: bool = True


@dataclass(frozen=True)
class QuestionRequest:
    """The model asks, and waits for an answer to each of its questions.

    Attributes:
        questions: The questions.
        session_id: The session of the model; a sub-agent has a session of its own.
        id: The request's id.
    """

    questions: tuple[Question, ...]
    session_id: str = field(default="", repr=False)
    id: str = field(default="", repr=False)


QuestionReply = Sequence[str | Sequence[str]] | None
"""For each question a label or several labels; None declines to answer."""
OnPermission = Callable[[PermissionRequest], PermissionReply]
OnQuestion = Callable[[QuestionRequest], QuestionReply]


def answers_of(on_permission: OnPermission | None, on_question: OnQuestion | None) -> Answers:
    """Return the callbacks as functions from the body of a request to that of its reply.

    They raise OpenCodeConfigError if a callback returns something else than a reply.
    """
    for name, call in (("on_permission", on_permission), ("on_question", on_question)):
        if call is not None and not callable(call):
            raise OpenCodeConfigError(f"{name} is {type(call).__name__}: use a function")

    def permission(body: Mapping[str, Any]) -> Mapping[str, Any]:
        assert on_permission is not None
        return _permission_body(on_permission(permission_request(body)))

    def question(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
        assert on_question is not None
        request = question_request(body)
        return _question_body(request, on_question(request))

    return Answers(
        permission if on_permission is not None else None,
        question if on_question is not None else None,
    )


def permission_request(body: Mapping[str, Any]) -> PermissionRequest:
    """Read a request of the server; missing fields are empty."""
    return PermissionRequest(
        permission=str(body.get("permission")),
        patterns=tuple(map(str, body.get("patterns") or ())),
        always=tuple(map(str, body.get("always") or ())),
        metadata=dict(body.get("metadata") or {}),
        session_id=str(body.get("sessionID")),
        id=str(body.get("id")),
    )


def question_request(body: Mapping[str, Any]) -> QuestionRequest:
    """Read a request of the server; missing fields are empty."""
    questions = tuple(_question(each) for each in body.get("questions") or ())
    return QuestionRequest(questions, str(body.get("sessionID")), str(body.get("id")))


def _question(body: Mapping[str, Any]) -> Question:
    return Question(
        question=str(body.get("question")),
        options=tuple(
            Option(str(each.get("label")), str(each.get("description", "")))
            for each in body.get("options") or ()
        ),
        header=str(body.get("header", "")),
        multiple=bool(body.get("multiple", False)),
        custom=bool(body.get("custom", True)),
    )


def _permission_body(reply: object) -> dict[str, str]:
    if isinstance(reply, str) and reply in _REPLIES:
        return {"reply": reply}
    if isinstance(reply, (tuple, list)) and len(reply) == 2 and reply[0] == "reject":
        return {"reply": "reject", "message": str(reply[1])}
    raise OpenCodeConfigError(
        f"on_permission returned {reply!r}: use 'once', 'always', 'reject' or ('reject', message)"
    )


def _question_body(request: QuestionRequest, reply: object) -> dict[str, Any] | None:
    if reply is None:
        return None
    asked = len(request.questions)
    if isinstance(reply, (str, bytes)) or not isinstance(reply, Sequence) or len(reply) != asked:
        raise OpenCodeConfigError(
            f"on_question returned {reply!r}: use a label, or a list of them, for each of the "
            f"{asked} questions, or None"
        )
    pairs = zip(request.questions, reply, strict=True)
    return {"answers": [_labels(question, chosen) for question, chosen in pairs]}


def _labels(question: Question, chosen: str | Sequence[str]) -> list[str]:
    if not isinstance(chosen, Sequence):
        raise OpenCodeConfigError(
            f"on_question chose {chosen!r} for {question.question!r}: use labels"
        )
    labels = [chosen] if isinstance(chosen, str) else [str(label) for label in chosen]
    offered = [option.label for option in question.options]
    unknown = [label for label in labels if label not in offered]
    if unknown and not question.custom:
        raise OpenCodeConfigError(
            f"on_question chose {unknown[0]!r} for {question.question!r}: use one of {offered}"
        )
    return labels


# -- functions to pass as on_permission and on_question ------------------------------------------


def allow_reads(request: PermissionRequest) -> PermissionReply:
    """Allow tools that only read, in the workspace; reject everything else with a message."""
    if request.permission in _READS:
        return "once"
    return "reject", "Only reading in the workspace is allowed here."


def allow_all(request: PermissionRequest) -> PermissionReply:
    """Allow every request; a tool that a rule denies is denied without a request."""
    return "once"


@overload
def ask_in_terminal(request: PermissionRequest) -> PermissionReply: ...


@overload
def ask_in_terminal(request: QuestionRequest) -> QuestionReply: ...


def ask_in_terminal(
    request: PermissionRequest | QuestionRequest,
) -> PermissionReply | QuestionReply:
    """Ask the user at the terminal; for *on_permission* and *on_question* alike.

    Input that was typed before a permission request is shown is dropped. At the end of stdin a
    request is rejected, and a question declined.
    """
    try:
        if isinstance(request, PermissionRequest):
            return _ask_permission(request)
        return [_ask_question(question) for question in request.questions]
    except EOFError:
        return "reject" if isinstance(request, PermissionRequest) else None


def _ask_permission(request: PermissionRequest) -> PermissionReply:
    _forget_typed()
    _say(f"OpenCode asks for permission: {request.permission} {', '.join(request.patterns)}")
    for name in ("command", "diff"):
        if detail := str(request.metadata.get(name, "")):
            _say(detail[:_SHOWN_CHARACTERS])
            if (more := len(detail) - _SHOWN_CHARACTERS) > 0:
                _say(f"... and {count(more, 'character')} more, not shown")
    while True:
        word = _ask("once (y), always (a), no (n), or no with words to the model: ")
        if word.lower() in ("y", "yes", "once"):
            return "once"
        if word.lower() in ("a", "always"):
            return "always"
        if word.lower() in ("n", "no", "reject"):
            return "reject"
        if word:
            return "reject", word


def _ask_question(question: Question) -> list[str]:
    _say(f"OpenCode asks: {question.question}")
    for number, option in enumerate(question.options, 1):
        _say(f"  {number}. {option.label}" + f"  {option.description}".rstrip())
    several = "numbers, with commas between" if question.multiple else "number"
    own = ", or an answer of your own" if question.custom else ""
    while True:
        text = _ask(f"{several}{own}: ")
        labels = _chosen(question, text)
        if labels:
            return labels
        if text and question.custom:
            return [text]


def _chosen(question: Question, text: str) -> list[str]:
    """Return the labels that numbers in *text* stand for; [] where it is anything else."""
    words = [word.strip() for word in text.split(",")]
    most = len(question.options) if question.multiple else 1
    if len(words) > most or not all(word.isdecimal() for word in words):
        return []
    numbers = [int(word) for word in words]
    if not all(1 <= number <= len(question.options) for number in numbers):
        return []
    return [question.options[number - 1].label for number in numbers]


def _forget_typed() -> None:
    """Drop what was typed before there was a request: it is not an answer to it."""
    import termios

    with suppress(OSError, ValueError, termios.error):  # stdin is not a terminal
        termios.tcflush(sys.stdin, termios.TCIFLUSH)


def _say(text: str) -> None:
    # The text may come from a model: it must not move the cursor over the request, nor hide a part
    # of it in an escape sequence.
    print(spelled_out(text), file=sys.stderr)


def _ask(prompt: str) -> str:
    print(prompt, end="", file=sys.stderr, flush=True)
    return input().strip()
