"""The requests and answers of a scripted model, as values.

    Answer: str | ToolCall | Reply --as_reply()--> Reply --> wire_calls(), wire_usage()
    an HTTP request's JSON --> ChatRequest

`opencode_sync.testing` exports the public ones. This module knows OpenAI's chat format; the server
is in `http`, the scripts are in the package.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..core.result import TokenUsage

_USAGE = TokenUsage(input=100, output=20)

Chunk = str | float | threading.Event | Callable[[], object]
"""A part of an answer: text, a pause in seconds, or an event or callable to wait for."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. If *arguments* is a str it is sent as it is, even if it is not JSON."""

    name: str
    arguments: Mapping[str, Any] | str
    id: str | None = None


def tool_call(name: str, /, **arguments: Any) -> ToolCall:
    """Make a call: ``tool_call("bash", command="ls", description="List files")``."""
    return ToolCall(name, arguments)


@dataclass(frozen=True)
class Reply:
    """One answer of the model.

    Attributes:
        text: The text, or a sequence of chunks: a str is sent, a number is a pause in seconds, a
            ``threading.Event`` is waited for, any other callable is called. For a failure: the
            provider's message.
        tool_calls: The tools it calls, after the text.
        reasoning: The reasoning, before the text.
        usage: The tokens it reports: *input* without those of the cache, *output* without
            reasoning. *total* is computed; the chat format has no *cache_write*.
        finish_reason: None means ``"tool_calls"`` if there are any, else ``"stop"``.
        delay_s: Seconds before the first byte.
        status, headers: Of the HTTP response. A status of 400 or above makes it a failure.
        ending: ``"hang"`` stops after the text and keeps the connection open, ``"cut"`` closes
            it there. Without a text not even a status line is sent.
    """

    text: str | Sequence[Chunk] = ""
    tool_calls: Sequence[ToolCall] = ()
    reasoning: str = ""
    usage: TokenUsage = _USAGE
    finish_reason: str | None = None
    delay_s: float = 0.0
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    ending: Literal["finish", "hang", "cut"] = "finish"

    @classmethod
    def calls(cls, *tool_calls: ToolCall, text: str = "") -> Reply:
        """Call several tools in one answer."""
        return cls(text, tool_calls=tool_calls)

    @classmethod
    def failure(cls, status: int, message: str, *, retry_after_s: float | None = None) -> Reply:
        """Fail with an HTTP status.

        After 408, 409, 429, 5xx and a cut answer OpenCode repeats the request up to 5 times,
        silently, after 2, 4, 8, 16 and 32 s or *retry_after_s*; each is a request of its own.
        """
        headers = {}
        if retry_after_s is not None:
            # OpenCode prefers the milliseconds; other clients know only the seconds.
            headers["Retry-After"] = str(math.ceil(retry_after_s))
            headers["Retry-After-Ms"] = str(round(retry_after_s * 1000))
        return cls(message, status=status, headers=headers)

    @classmethod
    def hang(cls, text: str | Sequence[Chunk] = "") -> Reply:
        """Say *text*, then nothing until the client disconnects or the model is closed."""
        return cls(text, ending="hang")

    @classmethod
    def cut(cls, text: str | Sequence[Chunk] = "") -> Reply:
        """Say *text*, then close the connection in the middle of the answer."""
        return cls(text, ending="cut")

    @property
    def chunks(self) -> Sequence[Chunk]:
        """The text as a sequence of chunks."""
        return (self.text,) if isinstance(self.text, str) else self.text


Answer = str | ToolCall | Reply
"""An entry of a script; a str or a ToolCall is short for a Reply with nothing else."""


def as_reply(answer: Answer) -> Reply:
    """Make a Reply of *answer*; raises TypeError for another type."""
    if isinstance(answer, str):
        return Reply(answer)
    if isinstance(answer, ToolCall):
        return Reply(tool_calls=(answer,))
    if isinstance(answer, Reply):
        return answer
    raise TypeError(f"{answer!r} is not a reply: use a str, a ToolCall or a Reply")


@dataclass(frozen=True, eq=False)
class ChatRequest:
    """One request as the model received it.

    Attributes:
        body: The parsed JSON.
        headers: The HTTP headers, with names in lower case.
        received_at: Unix time in seconds.
    """

    body: Mapping[str, Any] = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    received_at: float

    @property
    def model(self) -> str:
        """Name of the requested model."""
        return str(self.body.get("model", ""))

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far, in OpenAI's format."""
        return list(self.body.get("messages", ()))

    @property
    def tools(self) -> list[str]:
        """Names of the tools that the model may call."""
        return [tool["function"]["name"] for tool in self.body.get("tools", ())]

    @property
    def prompt(self) -> str:
        """The exact text of the last user message; "" if there is none.

        If OpenCode sends it in parts they are joined by newlines: attached files come before the
        prompt, a reminder (of the plan agent, say) after it.
        """
        return (self._texts("user") or [""])[-1]

    @property
    def system(self) -> str:
        """The system prompt."""
        return "\n".join(self._texts("system"))

    @property
    def tool_results(self) -> list[str]:
        """The outputs of the tools called so far, oldest first."""
        return self._texts("tool")

    @property
    def session_id(self) -> str | None:
        """The OpenCode session that sent it; a sub-agent has its own."""
        return self.headers.get("x-session-id")

    def _texts(self, role: str) -> list[str]:
        return [_text(m.get("content")) for m in self.messages if m.get("role") == role]


def _text(content: object) -> str:
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if part.get("type") == "text")
    return content if isinstance(content, str) else ""


def finish_reason(reply: Reply) -> str:
    return reply.finish_reason or ("tool_calls" if reply.tool_calls else "stop")


def wire_calls(reply: Reply, name: str) -> list[dict[str, Any]]:
    """The reply's tool calls in OpenAI's format; *name* begins the ids of those without one."""
    calls = []
    for index, call in enumerate(reply.tool_calls):
        arguments = call.arguments
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments)
        function = {"name": call.name, "arguments": arguments}
        calls.append({"id": call.id or f"{name}-{index}", "type": "function", "function": function})
    return calls


def wire_usage(reply: Reply) -> dict[str, Any]:
    """The tokens in OpenAI's format, where input includes the cache and output the reasoning."""
    usage = reply.usage
    prompt = usage.input + usage.cache_read
    completion = usage.output + usage.reasoning
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": usage.cache_read},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }
