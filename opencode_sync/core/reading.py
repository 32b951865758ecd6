"""What an event says: texts, usage, errors, refusals.

Nothing here raises, whatever an event holds: missing or odd values count as nothing. Facts of
OpenCode 1.18.33 where no other version is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .text import strip_ansi

# Offered to the model unless denied (OpenCode 1.18.33).
_BUILT_IN_TOOLS = frozenset(
    {"bash", "edit", "glob", "grep", "read", "skill", "task", "todowrite", "webfetch", "write"}
)
ARGUMENTS_ERROR = "CommandArgumentsError"  # of our plugin
TEXT_TYPES = ("text", "message", "assistant", "model")
_REPEATED = ("type", "sessionID", "messageID")
_NAMELESS = "UnknownError"
# Follows a step that ends for "content-filter", the one reason that is an error to OpenCode.
FILTERED = "ContentFilterError"
_WHY_CUT = {
    "length": "the answer was cut off at the model's output limit",
    "content-filter": "the answer was cut off by the provider's content filter",
    "error": "the provider ended the answer with an error",
}
_TEXT_KEYS = ("text", "delta", "output", "message", "result", "value")  # beside "content"


@dataclass(frozen=True)
class TokenUsage:
    """Tokens, summed over the steps."""

    total: int = 0
    input: int = 0
    output: int = 0
    reasoning: int = 0
    cache_read: int = 0
    cache_write: int = 0

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(TokenUsage))
        )


@dataclass(frozen=True)
class ErrorInfo:
    """An ``error`` event in short.

    Attributes:
        name: OpenCode's name for it, such as ``"APIError"``.
        message: The provider's or OpenCode's words, without colours.
        status_code: The provider's HTTP status, or None.
    """

    name: str
    message: str
    status_code: int | None = None

    def __str__(self) -> str:
        status = f" {self.status_code}" if self.status_code else ""
        message = f": {self.message}" if self.message else ""
        return f"{self.name}{status}{message}"


@dataclass(frozen=True)
class SubAgent:
    """What one sub-agent used in a run; the run's totals include it.

    Attributes:
        session_id: The sub-agent's session.
        agent: Its name, such as ``"general"``; ``""`` where OpenCode did not tell.
        title: What it was called for; ``""`` where OpenCode did not tell.
        parent_id: The session that called it: the run's, or another sub-agent's.
        token_usage: Tokens, summed over its steps in this run, without its own sub-agents'.
        total_cost: US dollars, summed in the same way.
    """

    session_id: str
    agent: str = ""
    title: str = ""
    parent_id: str = ""
    token_usage: TokenUsage = TokenUsage()
    total_cost: float = 0.0


@dataclass
class Step:
    """What the model said in one step.

    Attributes:
        message_id: Of OpenCode's message, or None.
        reason: Why the step ended; None while it is under way.
    """

    message_id: str | None = None
    paragraphs: list[str] = field(default_factory=list)
    reason: str | None = None


@dataclass
class Texts:
    """The model's texts in order; joined only when they are read, and so cheap to add to.

    Attributes:
        steps: The model's steps; texts before the first one are a step too.
        summaries: Ids of messages in which OpenCode had the conversation summed up, for itself.
        answered: The step with the whole answer, where OpenCode went on by itself after it.
    """

    steps: list[Step] = field(default_factory=lambda: [Step()])
    pieces: list[str] = field(default_factory=list)  # of the paragraph being written
    summaries: set[str] = field(default_factory=set)
    answered: Step | None = None
    _latest: str | None = None  # the message of the latest step, also of a summary

    def add(self, text: str, *, is_piece: bool = False, message_id: object = None) -> None:
        if is_piece:
            self.pieces.append(text)
        elif text and message_id not in self.summaries:
            if self.pieces:
                self.end_paragraph()
            self.steps[-1].paragraphs.append(text)

    def end_paragraph(self) -> None:
        if self.pieces:
            self.steps[-1].paragraphs.append("".join(self.pieces))
            self.pieces = []

    def begin_step(self, message_id: str | None = None) -> None:
        self.end_paragraph()
        self._latest = message_id
        if message_id not in self.summaries:
            self.steps.append(Step(message_id))

    def end_step(self, reason: str) -> None:
        if self._latest not in self.summaries:
            self.steps[-1].reason = reason

    def leave_out(self, message_id: str) -> None:
        """Leave out a message that is a summary, whether it has come or is still to come."""
        self.summaries.add(message_id)
        self.steps = [s for s in self.steps if s.message_id != message_id] or [Step()]

    def go_on(self) -> None:
        """Take note that OpenCode, after a summary, prompts the model by itself.

        Where the model had given its whole answer before, that remains the answer, as it would be
        without the summary.
        """
        if self._latest is not None:
            self.leave_out(self._latest)
        if self.answered is None and self.steps[-1].reason == "stop":
            self.answered = self.steps[-1]

    def begin_turn(self) -> None:
        """Take what comes from now on as the answer to a further prompt."""
        self.answered, self.steps[-1].reason = None, None

    def joined(self) -> str:
        return self._join([text for step in self.steps for text in step.paragraphs], self.pieces)

    def answer(self) -> str:
        if self.answered is not None:
            return self._join(self.answered.paragraphs, [])
        return self._join(self.steps[-1].paragraphs, self.pieces)

    @staticmethod
    def _join(paragraphs: list[str], pieces: list[str]) -> str:
        return "\n\n".join([*paragraphs, "".join(pieces)] if pieces else paragraphs)


def ended_well(reason: str | None, *, was_denied: bool) -> bool:
    """Whether a last step with this *reason* closes a whole answer.

    Args:
        was_denied: A tool's use was refused, at which OpenCode ends a run with the step closed.
    """
    # The others say that the answer is cut, or that nobody knows ("unknown", "other", none at all).
    return reason == "stop" or (reason == "tool-calls" and was_denied)


def why_cut(reason: str | None) -> str | None:
    """What is wrong with an answer whose last step ended for *reason*.

    None where the reason is that of a whole answer, or the step is not the last: then what follows
    is missing.
    """
    if reason in (None, "stop", "tool-calls"):
        return None
    why = _WHY_CUT.get(reason, "the answer may be cut off: the provider gave no known reason")
    return f"{why} (finish reason: {reason})"


def is_unsaid(part: Mapping[str, Any]) -> bool:
    """Whether a text part is OpenCode's own or a plugin's, not the model's."""
    return bool(part.get("synthetic") or part.get("ignored"))


def text_of(event: Mapping[str, Any]) -> tuple[str, bool]:
    """The text of an event of TEXT_TYPES, and whether it is a piece of a longer one."""
    if event.get("type") != "text":
        return _content_text(event.get("content")), False
    part = event.get("part")
    if isinstance(part, (dict, Mapping)) and isinstance(text := part.get("text"), str):
        return "" if is_unsaid(part) else text, False
    for key in ("content", "text", "delta"):
        value = event.get(key)
        if isinstance(value, str):
            return value, key == "delta"
    return "", False


def _content_text(content: Any) -> str:
    """The text of a message's ``content``: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    texts = []
    for part in content:
        if isinstance(part, Mapping):
            part = part.get("text") if isinstance(part.get("text"), str) else part.get("content")
        if isinstance(part, str):
            texts.append(part)
    return "".join(texts)


def strings_in(event: Mapping[str, Any]) -> list[str]:
    """Readable texts of an event of any shape, stripped."""
    kind = event.get("type")
    if kind == "diagnostic":
        return []
    if kind in TEXT_TYPES and (text := text_of(event)[0].strip()):
        return [text]
    inner = event.get("message")
    values = [_content_text(event.get("content")), *map(event.get, _TEXT_KEYS)]
    if isinstance(inner, Mapping):
        values += [inner.get("content"), inner.get("text")]
    return [text for value in values if isinstance(value, str) and (text := value.strip())]


def message_id_of(event: Mapping[str, Any]) -> str | None:
    """The id of the message that an event's part belongs to, or None."""
    part = event.get("part")
    message_id = part.get("messageID") if isinstance(part, (dict, Mapping)) else None
    return message_id if isinstance(message_id, str) else None


def share_words(event: Mapping[str, Any], known: dict[str, str]) -> None:
    """Have equal ids and types of many events be one object: a third of a short event's memory."""
    part = event.get("part")
    for owner in (event, part):
        if type(owner) is dict:
            for key in _REPEATED:
                word = owner.get(key)
                if type(word) is str:
                    owner[key] = known.setdefault(word, word)


def denied_tool(event: Mapping[str, Any]) -> str | None:
    """The tool whose use *event* tells was refused, or None."""
    part = event.get("part")
    state = part.get("state") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(state, Mapping):
        return None
    tool, error = part.get("tool"), state.get("error")
    if not isinstance(tool, str):
        return None
    if isinstance(error, str) and state.get("status") == "error":
        return tool if _is_refusal(error) or _is_not_offered(tool, error) else None
    # A tool that is denied as a whole is not offered to the model, and a call of it comes back as
    # "invalid", just as one of a tool that the model made up, or one whose arguments are not JSON.
    asked = state.get("input")
    if tool != "invalid" or not isinstance(asked, Mapping):
        return None
    wanted, why = asked.get("tool"), asked.get("error", _NOT_OFFERED)
    return wanted if isinstance(wanted, str) and _is_not_offered(wanted, why) else None


def called_session(event: Mapping[str, Any]) -> str | None:
    """The session of the sub-agent that *event* tells was called, or None."""
    part = event.get("part")
    if not isinstance(part, (dict, Mapping)) or part.get("tool") != "task":
        return None
    state = part.get("state")
    metadata = state.get("metadata") if isinstance(state, Mapping) else None
    session = metadata.get("sessionId") if isinstance(metadata, Mapping) else None
    return session if isinstance(session, str) and session else None


def gives_output(event: Mapping[str, Any]) -> bool:
    """Whether *event* is the call of OpenCode's tool for structured output, which ends a run."""
    part = event.get("part")
    return isinstance(part, Mapping) and part.get("tool") == "StructuredOutput"


def void_call(event: Mapping[str, Any]) -> str | None:
    """The tool that *event* tells was called in vain, or None where a tool has begun.

    There is no such tool for the model, or its arguments are not JSON, or not those of the tool.
    """
    part = event.get("part")
    state = part.get("state") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(state, Mapping):
        return None
    tool, error = part.get("tool"), state.get("error")
    if tool == "invalid":
        asked = state.get("input")
        return str(asked.get("tool") if isinstance(asked, Mapping) else tool)
    is_void = isinstance(error, str) and (_NOT_OFFERED in error or _MISFITTING in error)
    return str(tool) if is_void and state.get("status") == "error" else None


_MISFITTING = "was called with invalid arguments"
_REFUSALS = ("rejected permission", "a rule which prevents you", "user dismissed this question")


_NOT_OFFERED = "unavailable tool"


def _is_not_offered(tool: str, why: object) -> bool:
    """Whether a call came to nothing since *tool*, one of OpenCode's own, was not offered.

    Where all is denied, "invalid" is too: then it is the one that *why* names for any call.
    """
    if tool not in _BUILT_IN_TOOLS or not isinstance(why, str):
        return False
    said, _, offered = why.partition("Available tools: ")
    return _NOT_OFFERED in said and tool not in offered.rstrip(".").split(", ")


def _is_refusal(text: str) -> bool:
    return any(words in text for words in _REFUSALS)


def error_info(error: Any) -> ErrorInfo:
    """What the ``error`` of an event says, whatever its shape."""
    if not isinstance(error, Mapping):
        return ErrorInfo(_NAMELESS, _words(error))
    data = error.get("data")
    data = data if isinstance(data, Mapping) else error
    status = data.get("statusCode")
    return ErrorInfo(
        # What its HTTP layer refuses has a tag in the place of a name, and no words (1.18.33).
        name=_words(error.get("name") or error.get("_tag")) or _NAMELESS,
        message=_words(data.get("message")),
        status_code=status if type(status) is int else None,
    )


def _words(value: Any) -> str:
    return "" if value is None else strip_ansi(str(value))


def number_of(value: Any) -> float:
    """*value* if it is a number that can be counted with, else 0.0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0.0
    try:
        number = float(value)
    except OverflowError:  # an int of hundreds of digits
        return 0.0
    return number if number >= 0 and math.isfinite(number) else 0.0


def usage_of(tokens: Any) -> TokenUsage:
    if not isinstance(tokens, Mapping):
        return TokenUsage()
    cache = tokens.get("cache")
    cache = cache if isinstance(cache, Mapping) else {}
    counts = [tokens.get(key) for key in ("total", "input", "output", "reasoning")]
    return TokenUsage(
        *(int(number_of(n)) for n in (*counts, cache.get("read"), cache.get("write")))
    )
