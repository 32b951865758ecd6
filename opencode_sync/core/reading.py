"""What one event says, and the values that results are made of.

    text_of  message_id_of            texts, and whose they are
    ended_well  why_cut               why a step ended
    denied_tool  void_call  ...       tool calls
    error_info --> ErrorInfo          errors; asked_to_wait_s for a provider's refusal
    usage_of --> TokenUsage           tokens; number_of for dollars
    unavailable, warnings_of          MCP servers that do not work

Nothing here raises, whatever an event holds: a missing or odd value counts as nothing. What is said
of OpenCode was seen with 1.18.33.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .text import strip_ansi

ARGUMENTS_ERROR = "CommandArgumentsError"  # of our plugin
OUTPUT_TOOL = "StructuredOutput"  # OpenCode gives it to the model where a prompt has a format
_TEXT_TYPES = ("text", "message", "assistant", "model")
# Follows a step that ends for "content-filter", the one reason that is an error to OpenCode.
FILTERED = "ContentFilterError"

# Offered to the model unless denied.
_BUILT_IN_TOOLS = frozenset(
    {"bash", "edit", "glob", "grep", "read", "skill", "task", "todowrite", "webfetch", "write"}
)
_REFUSALS = ("rejected permission", "a rule which prevents you", "user dismissed this question")
_NOT_OFFERED = "unavailable tool"
_MISFITTING = "was called with invalid arguments"
_NAMELESS = "UnknownError"
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
        return TokenUsage(**{name: n + getattr(other, name) for name, n in vars(self).items()})


@dataclass(frozen=True)
class ErrorInfo:
    """What an ``error`` event says.

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
class Tried:
    """A model that did not answer, so that the next one of ``fallback_models`` was asked.

    Attributes:
        model: ``"provider/model"``.
        error: What the provider or OpenCode said.
        total_cost: US dollars that the run had spent on it.
        retry_after_s: Seconds that the provider asked to wait; None where it did not say.
        was_asked: False if this job of a batch passed it over, since it was out for another job.
    """

    model: str
    error: ErrorInfo
    total_cost: float = 0.0
    retry_after_s: float | None = None
    was_asked: bool = True

    def __str__(self) -> str:
        return f"{self.model} ({'' if self.was_asked else 'passed over: '}{self.error})"


@dataclass(frozen=True)
class SubAgent:
    """What one sub-agent used in a run; the run's totals include it.

    Attributes:
        session_id: The sub-agent's session.
        agent: Its name, such as ``"general"``; ``""`` if OpenCode did not tell.
        title: What it was called for; ``""`` if OpenCode did not tell.
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


def tried_in(event: Mapping[str, Any], total_cost: float = 0.0) -> Tried:
    """What a ``fallback`` event tells of the model that is out."""
    wait_s = event.get("retry_after_s")
    return Tried(
        model=str(event.get("model")),
        error=error_info(event.get("error")),
        total_cost=total_cost,
        retry_after_s=None if wait_s is None else number_of(wait_s),
        was_asked=event.get("was_asked") is not False,
    )


def saved_tried(data: Any) -> Tried:
    """The model that was written as a dict, such as in ``RunResult.to_dict()``."""
    data = mapping(data)
    error = mapping(data.get("error"))
    status, wait_s = error.get("status_code"), data.get("retry_after_s")
    return Tried(
        model=str(data.get("model")),
        error=ErrorInfo(
            str(error.get("name")),
            str(error.get("message")),
            status if isinstance(status, int) else None,
        ),
        total_cost=number_of(data.get("total_cost")),
        retry_after_s=None if wait_s is None else number_of(wait_s),
        was_asked=data.get("was_asked") is not False,
    )


# --- parts ---------------------------------------------------------------------------------------


def mapping(value: Any) -> Mapping[str, Any]:
    """*value*, or an empty mapping if it is something else."""
    # A dict nearly always, which is quicker to check than the abstract class.
    return value if isinstance(value, (dict, Mapping)) else {}


def part_of(event: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(event.get("part"))


def message_id_of(event: Mapping[str, Any]) -> str | None:
    """The id of the message that an event's part belongs to, or None."""
    message_id = part_of(event).get("messageID")
    return message_id if isinstance(message_id, str) else None


# --- the end of a step ---------------------------------------------------------------------------


def ended_well(reason: str | None, *, was_denied: bool) -> bool:
    """Whether the answer is whole if its last step ended for *reason*.

    Args:
        was_denied: A tool's use was refused: then OpenCode may end the run after "tool-calls".
    """
    # Any other reason says that the answer is cut, or that nobody knows ("unknown", "other", None).
    return reason == "stop" or (reason == "tool-calls" and was_denied)


def why_cut(reason: str | None) -> str | None:
    """What is wrong with an answer whose last step ended for *reason*, in words.

    None if the answer is whole, or if another step should have followed.
    """
    if reason in (None, "stop", "tool-calls"):
        return None
    why = _WHY_CUT.get(reason, "the answer may be cut off: the provider gave no known reason")
    return f"{why} (finish reason: {reason})"


# --- texts ---------------------------------------------------------------------------------------


def is_synthetic(part: Mapping[str, Any]) -> bool:
    """Whether OpenCode or a plugin wrote a text part, and not the model."""
    return bool(part.get("synthetic") or part.get("ignored"))


def text_of(event: Mapping[str, Any]) -> tuple[str, bool]:
    """The text of an event with text, and whether it is a piece of a longer one."""
    if event.get("type") != "text":
        return _content_text(event.get("content")), False
    part = part_of(event)
    if isinstance(text := part.get("text"), str):
        return "" if is_synthetic(part) else text, False
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
    """Readable texts in an event of any shape, stripped."""
    kind = event.get("type")
    if kind == "diagnostic":
        return []
    if kind in _TEXT_TYPES and (text := text_of(event)[0].strip()):
        return [text]
    inner = event.get("message")
    values = [_content_text(event.get("content")), *map(event.get, _TEXT_KEYS)]
    if isinstance(inner, Mapping):
        values += [inner.get("content"), inner.get("text")]
    return [text for value in values if isinstance(value, str) and (text := value.strip())]


# --- tool calls ----------------------------------------------------------------------------------


def denied_tool(event: Mapping[str, Any]) -> str | None:
    """The name of the tool whose use was refused, or None if *event* tells of no refusal."""
    part = part_of(event)
    tool, state = part.get("tool"), mapping(part.get("state"))
    error = state.get("error")
    if isinstance(error, str) and state.get("status") == "error":
        is_refused = any(words in error for words in _REFUSALS) or _is_not_offered(tool, error)
        return tool if isinstance(tool, str) and is_refused else None
    # A tool that is denied as a whole is not offered to the model. A call of it becomes a call of
    # "invalid", and so do calls of tools that do not exist, or with arguments that are not JSON.
    asked = mapping(state.get("input"))
    wanted, why = asked.get("tool"), asked.get("error", _NOT_OFFERED)
    return wanted if tool == "invalid" and _is_not_offered(wanted, why) else None


def _is_not_offered(tool: Any, why: object) -> bool:
    """Whether *tool* is one of OpenCode's own that was not offered to the model.

    Args:
        why: The error. If everything is denied, it names the tool "invalid" for any call.
    """
    if not isinstance(tool, str) or tool not in _BUILT_IN_TOOLS or not isinstance(why, str):
        return False
    said, _, offered = why.partition("Available tools: ")
    return _NOT_OFFERED in said and tool not in offered.rstrip(".").split(", ")


def void_call(event: Mapping[str, Any]) -> str | None:
    """The name of a tool that could not be called, or None if *event* tells of a call.

    The model has no such tool, or its arguments are not JSON, or do not fit the tool.
    """
    part = part_of(event)
    tool, state = part.get("tool"), mapping(part.get("state"))
    if tool == "invalid":
        return str(mapping(state.get("input")).get("tool", tool))
    error = state.get("error")
    is_void = isinstance(error, str) and (_NOT_OFFERED in error or _MISFITTING in error)
    return str(tool) if is_void and state.get("status") == "error" else None


def called_session(event: Mapping[str, Any]) -> str | None:
    """The session of the sub-agent that was called, or None if *event* tells of no such call."""
    part = part_of(event)
    if part.get("tool") != "task":
        return None
    session = mapping(mapping(part.get("state")).get("metadata")).get("sessionId")
    return session if isinstance(session, str) and session else None


# --- errors and usage ----------------------------------------------------------------------------


def error_info(error: Any) -> ErrorInfo:
    """What the ``error`` of an event says, whatever its shape."""
    if not isinstance(error, Mapping):
        return ErrorInfo(_NAMELESS, _words(error))
    data = error.get("data")
    data = data if isinstance(data, Mapping) else error
    status = data.get("statusCode")
    return ErrorInfo(
        # A refusal by OpenCode's HTTP layer has a tag instead of a name, and no message.
        name=_words(error.get("name") or error.get("_tag")) or _NAMELESS,
        message=_words(data.get("message")),
        status_code=status if type(status) is int else None,
    )


def _words(value: Any) -> str:
    return "" if value is None else strip_ansi(str(value))


def asked_to_wait_s(retry_after: Any, retry_after_ms: Any = None) -> float | None:
    """How many seconds a provider asks to wait; None where it does not say.

    Args:
        retry_after: Its header ``Retry-After``: seconds, or an HTTP date.
        retry_after_ms: Its header ``Retry-After-Ms``, which is more exact.
    """
    for value, unit_s in ((retry_after_ms, 0.001), (retry_after, 1.0)):
        try:
            wait_s = float(value) * unit_s
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(wait_s) and wait_s >= 0:
            return wait_s
    from email.utils import parsedate_to_datetime  # loads the network's modules

    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError, AttributeError, IndexError):
        return None


def number_of(value: Any) -> float:
    """*value* if it is a finite number from 0 up, else 0.0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0.0
    try:
        number = float(value)
    except OverflowError:  # an int of hundreds of digits
        return 0.0
    return number if number >= 0 and math.isfinite(number) else 0.0


def usage_of(tokens: Any) -> TokenUsage:
    """The usage in the ``tokens`` of a step."""
    tokens = mapping(tokens)
    cache = mapping(tokens.get("cache"))
    counts = [tokens.get(key) for key in ("total", "input", "output", "reasoning")]
    return TokenUsage(*map(_count, (*counts, cache.get("read"), cache.get("write"))))


_COUNTS = [f.name for f in fields(TokenUsage)]


def saved_usage(usage: Any) -> TokenUsage:
    """The usage that was written as a dict, such as in ``RunResult.to_dict()``."""
    usage = mapping(usage)
    return TokenUsage(*[_count(usage.get(name)) for name in _COUNTS])


def _count(value: Any) -> int:
    if type(value) is int and 0 <= value < 2**63:  # nearly always
        return value
    return int(number_of(value))


# --- MCP servers that do not work ----------------------------------------------------------------


def unavailable(name: str, status: str, error: str = "") -> str:
    """A sentence on a server whose tools the model did not get, or lost."""
    why = ": ".join(filter(None, (status.replace("_", " "), error)))
    advice = f"; run 'opencode mcp auth {name}'" if status == "needs_auth" else ""
    return f"The model was without the tools of the MCP server {name!r} ({why}{advice})."


def warnings_of(statuses: Any) -> list[str]:
    """One sentence for each server of ``GET /mcp`` that is switched on and does not work."""
    return [
        unavailable(str(name), str(state.get("status")), str(state.get("error") or ""))
        for name, state in mapping(statuses).items()
        if isinstance(state, Mapping) and state.get("status") not in ("connected", "disabled")
    ]
