"""What OpenCode asks in the middle of a turn, and who answers.

    request's body --> PermissionRequest, QuestionRequest --> the caller's function
    reply's body   <-- checked                            <-- its answer

Three such functions are ready made: allow_reads, allow_all, ask_in_terminal. Sends nothing.
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
"""``"always"`` is for what comes later too; a message is for the model, which goes on."""

_REPLIES = ("once", "always", "reject")
_READS = ("read", "glob", "grep", "list", "lsp", "skill", "todoread", "todowrite")
_SHOWN_CHARACTERS = 2_000  # of a diff or a command on a terminal


@dataclass(frozen=True)
class PermissionRequest:
    """A tool waits for permission.

    Attributes:
        permission: What for: ``"bash"``, ``"edit"`` (for all that writes), ``"read"``,
            ``"webfetch"``, ``"external_directory"``, ...
        patterns: What of it: commands, paths, addresses.
        always: What ``"always"`` would allow, as patterns, until the server ends.
        metadata: More about it, such as ``command``, ``filepath`` and ``diff``.
        session_id: Whose tool it is; a sub-agent's session is its own.
        id: The request's.
    """

    permission: str
    patterns: tuple[str, ...] = ()
    always: tuple[str, ...] = field(default=(), repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    session_id: str = field(default="", repr=False)
    id: str = field(default="", repr=False)


@dataclass(frozen=True)
class Option:
    """One of the answers that a question offers."""

    label: str
    description: str = field(default="", repr=False)


@dataclass(frozen=True)
class Question:
    """One question of the model.

    Attributes:
        question: The question.
        options: Answers to choose from.
        header: The same in a word or two.
        multiple: Several may be chosen.
        custom: The answer may be another one.
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
        session_id: Whose they are; a sub-agent's session is its own.
        id: The request's.
    """

    questions: tuple[Question, ...]
    session_id: str = field(default="", repr=False)
    id: str = field(default="", repr=False)


QuestionReply = Sequence[str | Sequence[str]] | None
"""For each question a label, or several; None declines to answer."""
OnPermission = Callable[[PermissionRequest], PermissionReply]
OnQuestion = Callable[[QuestionRequest], QuestionReply]


def answers_of(on_permission: OnPermission | None, on_question: OnQuestion | None) -> Answers:
    """The answers of a conversation, on the bodies that a server sends and takes.

    They raise OpenCodeConfigError for a reply that is none, and what the functions raise.
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
    """What the body of a request says; what it lacks is left out."""
    return PermissionRequest(
        permission=str(body.get("permission")),
        patterns=tuple(map(str, body.get("patterns") or ())),
        always=tuple(map(str, body.get("always") or ())),
        metadata=dict(body.get("metadata") or {}),
        session_id=str(body.get("sessionID")),
        id=str(body.get("id")),
    )


def question_request(body: Mapping[str, Any]) -> QuestionRequest:
    """The same for questions."""
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


# --- ready made ----------------------------------------------------------------------------------


def allow_reads(request: PermissionRequest) -> PermissionReply:
    """Allow what only reads, in the workspace; the model is told so for anything else."""
    if request.permission in _READS:
        return "once"
    return "reject", "Only reading in the workspace is allowed here."


def allow_all(request: PermissionRequest) -> PermissionReply:
    """Allow everything that is asked for; what a rule denies is not asked for."""
    return "once"


@overload
def ask_in_terminal(request: PermissionRequest) -> PermissionReply: ...


@overload
def ask_in_terminal(request: QuestionRequest) -> QuestionReply: ...


def ask_in_terminal(
    request: PermissionRequest | QuestionRequest,
) -> PermissionReply | QuestionReply:
    """Ask who sits at the terminal; for *on_permission* and *on_question* alike.

    What was typed before a tool's request is shown gives it no permission, and is dropped. Where
    nobody answers, at the end of stdin, it rejects or declines.
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
    """The labels that numbers in *text* stand for; none where it is anything else."""
    words = [word.strip() for word in text.split(",")]
    most = len(question.options) if question.multiple else 1
    if len(words) > most or not all(word.isdecimal() for word in words):
        return []
    numbers = [int(word) for word in words]
    if not all(1 <= number <= len(question.options) for number in numbers):
        return []
    return [question.options[number - 1].label for number in numbers]


def _forget_typed() -> None:
    """Drop what was typed before there was a question: it is no answer to it."""
    try:
        import termios
    except ImportError:  # Windows
        return
    with suppress(OSError, ValueError, termios.error):  # stdin is no terminal
        termios.tcflush(sys.stdin, termios.TCIFLUSH)


def _say(text: str) -> None:
    # It may come from a model, and is not to move the cursor over what was asked, nor to be taken
    # for part of a sequence that shows nothing.
    print(spelled_out(text), file=sys.stderr)


def _ask(prompt: str) -> str:
    print(prompt, end="", file=sys.stderr, flush=True)
    return input().strip()
