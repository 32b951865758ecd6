"""Events folded into a RunResult.

    append_event(event) --+--> texts       final_text, answer
                          +--> tool_calls  denied_tools
                          +--> steps       turns, token_usage, total_cost, finish_reason
                          +--> error

Folding never raises, whatever an event holds: missing or odd values count as nothing.
Knows nothing of where the events came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, cast

from ._reading import (
    ErrorInfo,
    TokenUsage,
    denied_tool,
    error_info,
    message_text,
    number_of,
    text_of,
    usage_of,
)
from .events import Event, OtherEvent

__all__ = [
    "ErrorInfo",
    "RunResult",
    "Status",
    "TokenUsage",
    "aggregate_run_result",
    "run_result_fuzzy_text",
]

Status = Literal["ok", "error", "denied", "incomplete", "timed_out", "cancelled", "over_budget"]

_FUZZY_KEYS = ("content", "text", "delta", "output", "message", "result", "value")


@dataclass(eq=False)
class RunResult:
    """What a run produced; partial while it is under way or where it broke off.

    Attributes:
        events: The events in order, plain dicts.
        tool_calls: The events of tools, whole.
        exit_code: The exit status; None where there was no process, or it has not ended.
        stderr: All of it, with its colours.
        raw_stdout_lines: The lines as they came, without newlines.
        token_usage: Tokens, summed over the steps.
        total_cost: US dollars, summed over the steps; 0.0 where the provider reports none.
        turns: How many steps the model took.
        session_id: To continue the conversation with.
        error: What went wrong, from the first ``error`` event.
        denied_tools: Names of tools whose use was refused, in order.
        finish_reason: Of the last step: ``"stop"``, ``"length"``, ``"tool-calls"``, ...; None
            while a step is under way.
        truncated: The output ended in the middle of a line.
        prompt, workspace, index, key: What was asked; *index* and *key* in a batch.
        attempts: How often a process was started for it.
        duration_s: Seconds from the start of the first process to the end of the last.
        parsed: The validated value of structured output.
    """

    events: list[Event] = field(default_factory=list, repr=False)
    tool_calls: list[Event] = field(default_factory=list, repr=False)
    exit_code: int | None = None
    stderr: str = field(default="", repr=False)
    raw_stdout_lines: list[str] = field(default_factory=list, repr=False)
    token_usage: TokenUsage = field(default_factory=TokenUsage)
    total_cost: float = 0.0
    turns: int = 0
    session_id: str | None = None
    error: ErrorInfo | None = None
    denied_tools: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    truncated: bool = False
    prompt: str = field(default="", repr=False)
    workspace: str = ""
    index: int | None = None
    key: str | None = None
    attempts: int = 0
    duration_s: float = 0.0
    parsed: Any = None
    _stopped: Status | None = field(default=None, repr=False)
    _paragraphs: list[str] = field(default_factory=list, repr=False)
    _deltas: list[str] = field(default_factory=list, repr=False)  # of the paragraph being written
    _step_from: int = field(default=0, repr=False)  # the last step's first paragraph

    @property
    def final_text(self) -> str:
        """The model's text of all steps; whole parts stand apart by a blank line."""
        return self._text_from(0)

    @property
    def answer(self) -> str:
        """The text of the last step alone."""
        return self._text_from(self._step_from)

    @property
    def status(self) -> Status:
        """How the run ended, so far as is known: ``"incomplete"`` until the closing step."""
        if self._stopped is not None:
            return self._stopped
        if self.error is not None or self.exit_code:
            return "error"
        if self.denied_tools:
            return "denied"
        if self.truncated or self.finish_reason in (None, "tool-calls"):
            return "incomplete"
        return "ok"

    def mark_stopped(self, status: Literal["timed_out", "cancelled", "over_budget"]) -> None:
        """Record that the run was ended from outside, which then is its status."""
        self._stopped = status

    def append_event(self, event: Event) -> None:
        """Keep *event* and fold it in. Never raises for what it holds."""
        self.events.append(event)
        self.fold(event)

    def fold(self, event: Event) -> None:
        """Count *event* in without keeping it."""
        if self.session_id is None and isinstance(session := event.get("sessionID"), str):
            self.session_id = session
        kind = event.get("type")
        rule = _RULES.get(kind) if isinstance(kind, str) else None
        if rule is not None:
            rule(self, event)

    def to_dict(self) -> dict[str, Any]:
        """All of it as values that ``json`` takes, ``status``, texts and usage included.

        ``parsed`` stands as it is: whether JSON takes it depends on the schema.
        """
        names = [f.name for f in fields(self) if not f.name.startswith("_")]
        data = {name: getattr(self, name) for name in names}
        data["token_usage"] = asdict(self.token_usage)
        data["error"] = None if self.error is None else asdict(self.error)
        data.update(status=self.status, final_text=self.final_text, answer=self.answer)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunResult:
        """The result that :meth:`to_dict` gave *data* for; unknown keys are ignored."""
        known = {f.name for f in fields(cls) if not f.name.startswith("_")}
        result = cls(**{key: value for key, value in data.items() if key in known})
        result.token_usage = TokenUsage(**(data.get("token_usage") or {}))
        result.error = ErrorInfo(**data["error"]) if data.get("error") else None
        answer = data.get("answer") or ""
        before = (data.get("final_text") or "").removesuffix(answer).removesuffix("\n\n")
        result._paragraphs = [text for text in (before, answer) if text]
        result._step_from = len(result._paragraphs) - bool(answer)
        if data.get("status") in ("timed_out", "cancelled", "over_budget"):
            result._stopped = data["status"]
        return result

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RunResult):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment] # it changes while its run goes on

    def _text_from(self, first: int) -> str:
        paragraphs = self._paragraphs[first:]
        if self._deltas:
            paragraphs.append("".join(self._deltas))
        return "\n\n".join(paragraphs)

    def _end_paragraph(self) -> None:
        if self._deltas:
            self._paragraphs.append("".join(self._deltas))
            self._deltas = []


_Rule = Callable[[RunResult, Mapping[str, Any]], None]


def _fold_text(result: RunResult, event: Mapping[str, Any]) -> None:
    text, is_delta = text_of(event)
    if is_delta:
        result._deltas.append(text)
    elif text:
        result._end_paragraph()
        result._paragraphs.append(text)


def _fold_message(result: RunResult, event: Mapping[str, Any]) -> None:
    if text := message_text(event.get("content")):
        result._end_paragraph()
        result._paragraphs.append(text)


def _fold_step_start(result: RunResult, event: Mapping[str, Any]) -> None:
    result._end_paragraph()
    result._step_from = len(result._paragraphs)
    result.finish_reason = None


def _fold_step_finish(result: RunResult, event: Mapping[str, Any]) -> None:
    step = event.get("part")
    if not isinstance(step, Mapping):
        step = event
    result.turns += 1
    result.total_cost += number_of(step.get("cost"))
    result.token_usage += usage_of(step.get("tokens"))
    reason = step.get("reason")
    result.finish_reason = reason if isinstance(reason, str) else "unknown"
    if "tool" in event:
        result.tool_calls.append(OtherEvent(type="step_tool", payload=event["tool"]))


def _fold_tool(result: RunResult, event: Mapping[str, Any]) -> None:
    result.tool_calls.append(cast(Event, event))
    if (name := denied_tool(event)) is not None:
        result.denied_tools.append(name)


def _fold_error(result: RunResult, event: Mapping[str, Any]) -> None:
    if result.error is None:
        result.error = error_info(event.get("error"))


_RULES: dict[str, _Rule] = {
    "text": _fold_text,
    "message": _fold_message,
    "assistant": _fold_message,
    "model": _fold_message,
    "step_start": _fold_step_start,
    "step_finish": _fold_step_finish,
    "tool_use": _fold_tool,
    "tool_call": _fold_tool,
    "tool_result": _fold_tool,
    "tool": _fold_tool,
    "error": _fold_error,
}


def aggregate_run_result(
    *,
    events: Iterable[Event],
    raw_stdout_lines: Iterable[str] = (),
    exit_code: int | None = None,
    stderr: str = "",
) -> RunResult:
    """The result of events that are already there, such as a log file's."""
    result = RunResult(raw_stdout_lines=list(raw_stdout_lines), exit_code=exit_code, stderr=stderr)
    for event in events:
        result.append_event(event)
    return result


def run_result_fuzzy_text(result: RunResult) -> str:
    """Whatever readable text a result holds, for output of unknown shape.

    ``final_text`` where there is any, else strings found in the events, else the raw lines.
    """
    if text := result.final_text.strip():
        return text
    found = [text for event in result.events for text in _strings_in(event)]
    return "\n".join(found or [line for raw in result.raw_stdout_lines if (line := raw.strip())])


def _strings_in(event: Mapping[str, Any]) -> list[str]:
    if event.get("type") == "diagnostic":
        return []
    inner = event.get("message")
    values = [event.get(key) for key in _FUZZY_KEYS]
    if isinstance(inner, Mapping):
        values += [inner.get("content"), inner.get("text")]
    return [text for value in values if isinstance(value, str) and (text := value.strip())]
