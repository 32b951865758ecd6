"""Events folded into a RunResult.

    append_event(event) --> the rule for its type --> texts, tool calls, steps, error

What is large is made when it is first asked for: the text is joined, raw lines are decoded. Knows
nothing of where the events came from.

What each type of event does to a result.

    text, message, ...   --> texts       final_text, answer
    tool_use, ...        --> tool_calls  denied_tools
    compaction           --> texts       whose words a text is
    step_start, _finish  --> steps       turns, token_usage, total_cost, finish_reason
    error                --> error
    warning              --> warnings
    sub_agent            --> sub_agents

A rule never raises, whatever an event holds: missing or odd values count as nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, cast

from .events import Event, OtherEvent
from .reading import (
    FILTERED,
    TEXT_TYPES,
    ErrorInfo,
    Step,
    SubAgent,
    Texts,
    TokenUsage,
    denied_tool,
    ended_well,
    error_info,
    is_unsaid,
    message_id_of,
    number_of,
    share_words,
    strings_in,
    text_of,
    usage_of,
)
from .text import result_markdown

Rule = Callable[["RunResult", Mapping[str, Any]], None]


def _fold_text(result: RunResult, event: Mapping[str, Any]) -> None:
    text, is_piece = text_of(event)
    if text:
        result._texts.add(text, is_piece=is_piece, message_id=message_id_of(event))
    elif _is_continuation(event):
        result._texts.go_on()


def _is_continuation(event: Mapping[str, Any]) -> bool:
    """Whether it is OpenCode's own prompt after a summary (1.18.33)."""
    part = event.get("part")
    metadata = part.get("metadata") if isinstance(part, Mapping) else None
    return isinstance(metadata, Mapping) and bool(metadata.get("compaction_continue"))


def _fold_compaction(result: RunResult, event: Mapping[str, Any]) -> None:
    message_id = event.get("messageID")
    if isinstance(message_id, str):
        result._texts.leave_out(message_id)
        # A run does not end with a summary but with the model's step before it.
        result.finish_reason = result._texts.steps[-1].reason


def _fold_step_start(result: RunResult, event: Mapping[str, Any]) -> None:
    result._texts.begin_step(message_id_of(event))
    result.finish_reason = None


def _fold_step_finish(result: RunResult, event: Mapping[str, Any]) -> None:
    step = event.get("part")
    if not isinstance(step, Mapping) or not step:
        step = event
    result.turns += 1
    _count_spending(result, step)
    reason = step.get("reason")
    result._texts.end_step(reason if isinstance(reason, str) else "unknown")
    result.finish_reason = result._texts.steps[-1].reason
    if "tool" in event:
        result.tool_calls.append(OtherEvent(type="step_tool", payload=event["tool"]))


def _count_spending(result: RunResult, step: Mapping[str, Any]) -> None:
    result.total_cost += number_of(step.get("cost"))
    result.token_usage += usage_of(step.get("tokens"))


def _fold_sub_agent(result: RunResult, event: Mapping[str, Any]) -> None:
    names = ("childID", "agent", "title", "parentID")
    session, agent, title, parent = (
        value if isinstance(value := event.get(name), str) else "" for name in names
    )
    if session and all(known.session_id != session for known in result.sub_agents):
        result.sub_agents.append(SubAgent(session, agent, title, parent))


def _fold_sub_agents_step(result: RunResult, event: Mapping[str, Any]) -> None:
    step = event.get("part")
    step = step if isinstance(step, Mapping) else event
    _count_spending(result, step)
    session = str(event.get("sessionID"))
    _fold_sub_agent(result, {"childID": session})  # an event may be all that was kept of it
    for number, known in enumerate(result.sub_agents):
        if known.session_id == session:
            result.sub_agents[number] = replace(
                known,
                token_usage=known.token_usage + usage_of(step.get("tokens")),
                total_cost=known.total_cost + number_of(step.get("cost")),
            )


def _fold_tool(result: RunResult, event: Mapping[str, Any]) -> None:
    result.tool_calls.append(cast(Event, event))
    if (name := denied_tool(event)) is not None:
        result.denied_tools.append(name)


def _fold_error(result: RunResult, event: Mapping[str, Any]) -> None:
    if result.error is None:
        result.error = error_info(event.get("error"))


def _fold_warning(result: RunResult, event: Mapping[str, Any]) -> None:
    message = event.get("message")
    if isinstance(message, str) and message and message not in result.warnings:
        result.warnings.append(message)


RULES: dict[str, Rule] = {
    **dict.fromkeys(TEXT_TYPES, _fold_text),
    "step_start": _fold_step_start,
    "step_finish": _fold_step_finish,
    "tool_use": _fold_tool,
    "tool_call": _fold_tool,
    "tool_result": _fold_tool,
    "tool": _fold_tool,
    "error": _fold_error,
    "compaction": _fold_compaction,
    "warning": _fold_warning,
    "sub_agent": _fold_sub_agent,
}
# What a sub-agent says is said to its parent, which tells of its failures too.
RULES_FOR_SUB_AGENTS: dict[str, Rule] = {
    "step_finish": _fold_sub_agents_step,
    "tool_use": _fold_tool,
    "warning": _fold_warning,
}


__all__ = [
    "ErrorInfo",
    "RunResult",
    "Status",
    "SubAgent",
    "TokenUsage",
    "aggregate_run_result",
    "run_result_fuzzy_text",
]

Status = Literal["ok", "error", "denied", "incomplete", "timed_out", "cancelled", "over_budget"]

_SHOWN_CHARS = 80  # of a text in a repr


class _FinalText:
    """The attribute ``RunResult.final_text``: a field like the others, kept in ``_texts``."""

    def __get__(self, result: RunResult | None, owner: object = None) -> str:
        return "" if result is None else result._texts.joined()  # "" is the field's default

    def __set__(self, result: RunResult, text: str) -> None:
        if text != result._texts.joined():
            result._texts = Texts([Step(paragraphs=[text] if text else [])])


class _RawLines:
    """The attribute ``RunResult.raw_stdout_lines``: decoded when it is first asked for."""

    def __get__(self, result: RunResult | None, owner: object = None) -> Any:
        if result is None:
            return ()  # the field's default
        lines, blocks = result._raw
        if blocks:
            text = b"\n".join(blocks).decode("utf-8", "replace")
            lines = lines + text.split("\n")
            result._raw = lines, ()
        return lines

    def __set__(self, result: RunResult, lines: Iterable[str]) -> None:
        result._raw = list(lines), ()


@dataclass(eq=False, repr=False)
class RunResult:
    """What a run produced; partial while it is under way or where it broke off.

    Attributes:
        events: The events in order, plain dicts.
        final_text: The model's text of all steps; whole parts stand apart by a blank line. What
            OpenCode adds by itself (summaries of a long conversation, "Continue ...") is not in it.
        tool_calls: The events of tools, whole; those of sub-agents too.
        exit_code: The exit status; None where there was no process, or it has not ended.
        stderr: All of it, with its colours.
        raw_stdout_lines: The lines as they came, without newlines.
        token_usage: Tokens, summed over the steps; those of sub-agents at any depth too.
        total_cost: US dollars, summed over the steps; those of sub-agents at any depth, and of a
            compaction, too. 0.0 where the provider reports none. OpenCode has no figures for a
            step that was broken off, for requests that the provider refused, and for a title that
            it asks the model for in a session that was begun elsewhere without one. Sub-agents in
            the background, an experiment of OpenCode, are counted until the run's end.
        sub_agents: What each sub-agent used, in the order of their first calls.
        turns: How many steps the model took, without those of sub-agents.
        session_id: To continue the conversation with.
        error: What went wrong, from the first ``error`` event.
        denied_tools: Names of tools whose use was refused, in order.
        warnings: Full sentences on what did not take effect as it was asked for, each once, such
            as an MCP server that did not start. They do not change the status.
        finish_reason: Of the last step: ``"stop"``, ``"length"``, ``"tool-calls"``, ...; None
            while a step is under way.
        truncated: The output ended in the middle of a line.
        prompt, workspace, index, key: What was asked; *index* and *key* in a batch.
        attempts: How often a process was started for it.
        started_at: When the first process started, a Unix time in seconds; None before that.
        duration_s: Seconds from the start of the first process to the end of the last.
        parsed: The validated value of structured output.
    """

    # First, so that the constructor has set it when it comes to final_text.
    _texts: Texts = field(default_factory=Texts, kw_only=True)
    _stopped: Status | None = field(default=None, kw_only=True)
    _json: Any = field(default=None, kw_only=True)  # what *parsed* was made of
    # Lines, and blocks of lines that are not among them yet. Replaced as one, for other threads.
    _raw: tuple[list[str], tuple[bytes, ...]] = field(default=([], ()), init=False)
    _words: dict[str, str] = field(default_factory=dict, kw_only=True)  # see share_words()

    events: list[Event] = field(default_factory=list)
    final_text: _FinalText = _FinalText()
    tool_calls: list[Event] = field(default_factory=list)
    exit_code: int | None = None
    stderr: str = ""
    raw_stdout_lines: _RawLines = _RawLines()
    token_usage: TokenUsage = field(default_factory=TokenUsage)
    total_cost: float = 0.0
    turns: int = 0
    session_id: str | None = None
    error: ErrorInfo | None = None
    denied_tools: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sub_agents: list[SubAgent] = field(default_factory=list)
    finish_reason: str | None = None
    truncated: bool = False
    prompt: str = ""
    workspace: str = ""
    index: int | None = None
    key: str | None = None
    attempts: int = 0
    started_at: float | None = None
    duration_s: float = 0.0
    parsed: Any = None

    @property
    def answer(self) -> str:
        """The text of the last step alone.

        Where OpenCode sums the conversation up after a whole answer, and then goes on by itself,
        it is that answer.
        """
        return self._texts.answer()

    @property
    def status(self) -> Status:
        """How the run ended, so far as is known: ``"incomplete"`` until the closing step.

        ``"incomplete"`` too where the closing step says that the answer is cut (``"length"``,
        ``"content-filter"``), or does not say why it ended (``"unknown"``, ``"other"``).
        """
        if self._stopped is not None:
            return self._stopped
        if self.error is not None and self.error.name == FILTERED:
            return "incomplete"
        if self.error is not None or self.exit_code:
            return "error"
        if self.truncated or not ended_well(self.finish_reason, was_denied=bool(self.denied_tools)):
            return "incomplete"
        return "denied" if self.denied_tools else "ok"

    @property
    def _is_empty(self) -> bool:
        """Whether the model neither said nor did anything."""
        return not self.tool_calls and not self.answer.strip()

    def _is_said(self, event: Event) -> bool:
        """Whether a text event, which is folded in already, has words of the model to the user."""
        session, part = event.get("sessionID"), event.get("part")
        is_ours = not session or session == self.session_id
        is_added = isinstance(part, Mapping) and is_unsaid(part)
        return is_ours and not is_added and message_id_of(event) not in self._texts.summaries

    def _begin_turn(self) -> None:
        """Take what comes from now on as the answer to a further prompt."""
        self.finish_reason = None
        self._texts.begin_turn()

    def mark_stopped(
        self, status: Literal["timed_out", "cancelled", "over_budget", "incomplete", "error"]
    ) -> None:
        """Record that the run was ended from outside, or by an error, which then is its status."""
        self._stopped = status

    def add_raw(self, blocks: Iterable[bytes]) -> None:
        """Add *blocks* of lines, each without its last newline, to the raw lines."""
        lines, before = self._raw
        self._raw = lines, (*before, *blocks)

    def append_event(self, event: Event) -> None:
        """Keep *event* and fold it in. Never raises for what it holds."""
        share_words(event, self._words)
        self.events.append(event)
        self.fold(event)

    def fold(self, event: Event) -> None:
        """Count *event* in without keeping it."""
        session = event.get("sessionID")
        rules = RULES
        if session and session != self.session_id and isinstance(session, str):
            if self.session_id is None:
                self.session_id = session
            else:
                rules = RULES_FOR_SUB_AGENTS
        kind = event.get("type")
        rule = rules.get(kind) if isinstance(kind, str) else None
        if rule is not None:
            rule(self, event)

    def to_dict(self) -> dict[str, Any]:
        """All of it as values that ``json`` takes, ``status``, texts and usage included.

        ``parsed`` stands as it is: whether JSON takes it depends on the schema.
        """
        data = {name: getattr(self, name) for name in _public_fields(RunResult)}
        for name in _LISTS:
            data[name] = list(data[name])
        data["token_usage"] = asdict(self.token_usage)
        data["sub_agents"] = [asdict(each) for each in self.sub_agents]
        data["error"] = None if self.error is None else asdict(self.error)
        return {"status": self.status, **data, "answer": self.answer}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunResult:
        """The result that :meth:`to_dict` gave *data* for; unknown keys are ignored."""
        result = cls(**_known(RunResult, data))
        for name in _LISTS:
            setattr(result, name, list(data.get(name) or ()))
        result.token_usage = _usage_in(data)
        result.sub_agents = [
            SubAgent(**{**_known(SubAgent, each), "token_usage": _usage_in(each)})
            for each in data.get("sub_agents") or ()
        ]
        if error := data.get("error"):
            result.error = ErrorInfo(**_known(ErrorInfo, error))
        text = data.get("final_text") or ""
        answer = data.get("answer", text) or ""
        before = text.removesuffix(answer).removesuffix("\n\n" if answer else "")
        last = Step(paragraphs=[answer] if answer else [])
        result._texts = Texts([Step(paragraphs=[before] if before else []), last])
        if not text.endswith(answer):  # OpenCode had gone on after it
            result._texts = Texts([Step(paragraphs=[text])], answered=last)
        stopped = ("timed_out", "cancelled", "over_budget", "incomplete", "error")
        # A result that is incomplete by its events may still go on.
        if (status := data.get("status")) in stopped and status != result.status:
            result._stopped = status
        return result

    def __repr__(self) -> str:
        text = self.final_text
        facts = {
            "status": self.status,
            "final_text": text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}...",
            "error": self.error and str(self.error),
            "denied_tools": self.denied_tools,
            "warnings": self.warnings,
            "turns": self.turns,
            "total_cost": self.total_cost,
            "session_id": self.session_id,
            "key": self.key,
        }
        return f"RunResult({', '.join(f'{k}={v!r}' for k, v in facts.items() if v)})"

    def _repr_markdown_(self) -> str:
        """For notebooks: the answer, and how it came about."""
        return result_markdown(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RunResult):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment] # it changes while its run goes on


_LISTS = ("events", "tool_calls", "raw_stdout_lines", "denied_tools", "warnings")


def _usage_in(data: Mapping[str, Any]) -> TokenUsage:
    return TokenUsage(**_known(TokenUsage, data.get("token_usage") or {}))


def _public_fields(cls: type[RunResult | TokenUsage | ErrorInfo | SubAgent]) -> list[str]:
    return [f.name for f in fields(cls) if not f.name.startswith("_")]


def _known(cls: type[RunResult | TokenUsage | ErrorInfo | SubAgent], data: Any) -> dict[str, Any]:
    return {name: data[name] for name in _public_fields(cls) if name in data}


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
    found = [text for event in result.events for text in strings_in(event)]
    return "\n".join(found or [line for raw in result.raw_stdout_lines if (line := raw.strip())])


def is_cut_off(result: RunResult) -> bool:
    """Whether the model was stopped at its output limit, in what it said last."""
    return result.finish_reason == "length"
