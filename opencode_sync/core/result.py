"""What a run produced: events folded into a RunResult.

    append_event(event) --> events        kept as it is
        fold(event)     --> final_text, answer          text, message, assistant, model
                            tool_calls, denied_tools    tool_use, tool_call, tool_result, tool
                            turns, token_usage, total_cost, finish_reason    step_start, step_finish
                            error, warnings, sub_agents                      events of these names
                            tried, model                                     fallback

Folding never raises, whatever an event holds: a missing or odd value counts as nothing. An event of
another session is a sub-agent's: what it spent and its tool calls count, its words do not. Knows
nothing of where the events came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from .events import Event, OtherEvent
from .reading import (
    FILTERED,
    ErrorInfo,
    SubAgent,
    TokenUsage,
    Tried,
    denied_tool,
    ended_well,
    error_info,
    is_synthetic,
    mapping,
    message_id_of,
    number_of,
    part_of,
    saved_tried,
    saved_usage,
    strings_in,
    text_of,
    tried_in,
    usage_of,
)
from .text import result_markdown

__all__ = [
    "ErrorInfo",
    "RunResult",
    "Status",
    "Stopped",
    "SubAgent",
    "TokenUsage",
    "Tried",
    "aggregate_run_result",
    "run_result_fuzzy_text",
]

Stopped = Literal["error", "incomplete", "timed_out", "cancelled", "over_budget"]
Status = Literal["ok", "denied", Stopped]

_SHOWN_CHARS = 80  # of a text in a repr


class _FinalText:
    """The field ``RunResult.final_text``, joined when it is read.

    If each text extended a str, the time would grow with the square of their number.
    """

    def __get__(self, result: RunResult | None, owner: object = None) -> str:
        return "" if result is None else result._texts.joined()  # "" is the field's default

    def __set__(self, result: RunResult, text: str) -> None:
        if text != result._texts.joined():
            result._texts = _Texts.saved(text, text)


@dataclass(eq=False, repr=False)
class RunResult:
    """What a run produced; partial while it is under way, or if it was stopped.

    Attributes:
        events: The events in order, plain dicts.
        final_text: The model's text of all steps, with blank lines between whole texts. It leaves
            out what OpenCode adds (summaries of a long conversation, "Continue ...").
        tool_calls: The events of tools, whole; those of sub-agents too.
        exit_code: The exit status; None if there was no process, or it has not ended.
        stderr: All of it, with its colours.
        raw_stdout_lines: The lines as they came, without newlines.
        token_usage: Tokens, summed over the steps; those of sub-agents at any depth too.
        total_cost: US dollars, summed over the steps; those of sub-agents at any depth, and of a
            compaction, too. 0.0 if the provider reports none. OpenCode has no figures for a step
            that was broken off, for requests that the provider refused, and for a title that it
            asks the model for in a session that was begun elsewhere without one. Sub-agents in the
            background, an experiment of OpenCode, are counted until the run's end.
        sub_agents: What each sub-agent used, in the order of their first calls.
        turns: How many steps the model took, without those of sub-agents.
        session_id: To continue the conversation with.
        error: What went wrong, from the first ``error`` event.
        denied_tools: Names of tools whose use was refused, in order.
        warnings: Full sentences on what did not take effect as it was asked for, such as an MCP
            server that did not start. Each occurs once; they do not change the status.
        finish_reason: Of the last step: ``"stop"``, ``"length"``, ``"tool-calls"``, ...; None
            while a step is under way.
        truncated: The output ended in the middle of a line.
        model: ``"provider/model"`` that answered, or was asked last; None if none was asked.
        tried: The models of ``fallback_models`` that did not answer, in order, and why; the last
            one too where none answered. Their events are in *events*, before a ``fallback`` event
            for each, and their costs in the totals; their texts are left out of *final_text*, and
            their raw lines of *raw_stdout_lines*.
        prompt, workspace, index, key, metadata: What was asked; the last three in a batch.
        attempts: How many processes were started for it.
        started_at: When the first process started, a Unix time in seconds; None before that.
        duration_s: Seconds from the start of the first process to the end of the last.
        parsed: The validated value of structured output.
    """

    # Before final_text, so that the constructor has set it by then.
    _texts: _Texts = field(default_factory=lambda: _Texts(), kw_only=True)
    _stopped: Stopped | None = field(default=None, kw_only=True)
    _json: Any = field(default=None, kw_only=True)  # what *parsed* was made of

    events: list[Event] = field(default_factory=list)
    final_text: _FinalText = _FinalText()
    tool_calls: list[Event] = field(default_factory=list)
    exit_code: int | None = None
    stderr: str = ""
    raw_stdout_lines: list[str] = field(default_factory=list)
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
    metadata: Any = None
    model: str | None = None
    tried: list[Tried] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """The text of the last step alone.

        If OpenCode summarizes the conversation after a whole answer, and then goes on by itself,
        it is that answer.
        """
        return (self._texts.answered or self._texts.steps[-1]).text

    @property
    def status(self) -> Status:
        """How the run ended, as far as is known: ``"incomplete"`` until the closing step.

        Also ``"incomplete"`` if the closing step says that the answer is cut (``"length"``,
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

    # -- events ------------------------------------------------------------------------------------

    def append_event(self, event: Event) -> None:
        """Keep *event* and fold it in. Never raises for what it holds."""
        self.events.append(event)
        self.fold(event)

    def fold(self, event: Event) -> None:
        """Count *event* in without keeping it."""
        kind, session = event.get("type"), event.get("sessionID")
        if session and session != self.session_id and isinstance(session, str):
            if self.session_id is not None:
                self._fold_sub_agents(event, session)
                return
            self.session_id = session
        match kind:
            case "text" | "message" | "assistant" | "model":
                self._fold_text(event)
            case "tool_use" | "tool_call" | "tool_result" | "tool":
                self._fold_tool(event)
            case "step_start":
                self._texts.begin_step(message_id_of(event))
                self.finish_reason = None
            case "step_finish":
                self._fold_step_finish(event)
            case "error":
                self.error = self.error or error_info(event.get("error"))
            case "fallback":
                self._fold_fallback(event)
            case "warning":
                self._fold_warning(event)
            case "sub_agent":
                self._fold_announcement(event)
            case "compaction" if isinstance(message_id := event.get("messageID"), str):
                self._texts.leave_out(message_id)
                # A run does not end with a summary but with the model's step before it.
                self.finish_reason = self._texts.steps[-1].reason

    def _fold_sub_agents(self, event: Event, session: str) -> None:
        """Count an event of another session in: its texts and errors are for its parent."""
        match event.get("type"):
            case "tool_use":
                self._fold_tool(event)
            case "warning":
                self._fold_warning(event)
            case "step_finish":
                self._fold_announcement({"childID": session})  # it may have come unannounced
                usage, cost = self._spend(part_of(event) or event)
                for number, known in enumerate(self.sub_agents):
                    if known.session_id == session:
                        self.sub_agents[number] = replace(
                            known,
                            token_usage=known.token_usage + usage,
                            total_cost=known.total_cost + cost,
                        )

    def _fold_text(self, event: Mapping[str, Any]) -> None:
        text, is_piece = text_of(event)
        if text:
            self._texts.add(text, is_piece=is_piece, message_id=message_id_of(event))
        elif mapping(part_of(event).get("metadata")).get("compaction_continue"):
            self._texts.go_on()  # OpenCode's own prompt after a summary (1.18.33)

    def _fold_tool(self, event: Event) -> None:
        self.tool_calls.append(event)
        if (name := denied_tool(event)) is not None:
            self.denied_tools.append(name)

    def _fold_step_finish(self, event: Mapping[str, Any]) -> None:
        step = part_of(event) or event
        self.turns += 1
        self._spend(step)
        reason = step.get("reason")
        self._texts.end_step(reason if isinstance(reason, str) else "unknown")
        self.finish_reason = self._texts.steps[-1].reason
        if "tool" in event:
            self.tool_calls.append(OtherEvent(type="step_tool", payload=event["tool"]))

    def _spend(self, step: Mapping[str, Any]) -> tuple[TokenUsage, float]:
        """Add what *step* used to the totals; returns it."""
        usage, cost = usage_of(step.get("tokens")), number_of(step.get("cost"))
        self.token_usage += usage
        self.total_cost += cost
        return usage, cost

    def _fold_fallback(self, event: Mapping[str, Any]) -> None:
        before = sum(each.total_cost for each in self.tried)
        self.tried.append(tried_in(event, self.total_cost - before))
        if isinstance(next_model := event.get("next_model"), str):
            self.model, self.session_id, self.error = next_model, None, None
            self._texts, self.finish_reason = _Texts(), None

    def _fold_warning(self, event: Mapping[str, Any]) -> None:
        message = event.get("message")
        if isinstance(message, str) and message and message not in self.warnings:
            self.warnings.append(message)

    def _fold_announcement(self, event: Mapping[str, Any]) -> None:
        names = ("childID", "agent", "title", "parentID")
        session, agent, title, parent = (
            value if isinstance(value := event.get(name), str) else "" for name in names
        )
        if session and all(known.session_id != session for known in self.sub_agents):
            self.sub_agents.append(SubAgent(session, agent, title, parent))

    # -- for streams -------------------------------------------------------------------------------

    def mark_stopped(self, status: Stopped) -> None:
        """Set the status of a run that was stopped, or that an error has ended."""
        self._stopped = status

    def _begin_turn(self) -> None:
        """Take what comes from now on as the answer to a further prompt."""
        self.finish_reason = None
        self._texts.answered, self._texts.steps[-1].reason = None, None

    # -- as values ---------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All of it as values that ``json`` takes, ``status``, texts and usage included.

        ``parsed`` is unchanged: whether JSON can hold it depends on the schema.
        """
        data = {name: getattr(self, name) for name in _FIELDS[RunResult]}
        for name in _LISTS:
            data[name] = list(data[name])
        data["token_usage"] = asdict(self.token_usage)
        data["sub_agents"] = [asdict(each) for each in self.sub_agents]
        data["tried"] = [asdict(each) for each in self.tried]
        data["error"] = None if self.error is None else asdict(self.error)
        return {"status": self.status, **data, "answer": self.answer}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunResult:
        """The result that :meth:`to_dict` gave *data* for; unknown keys are ignored."""
        error, text = data.get("error"), data.get("final_text") or ""
        values = _known(RunResult, data) | {
            **{name: list(data.get(name) or ()) for name in _LISTS},
            "final_text": text,
            "token_usage": saved_usage(data.get("token_usage")),
            "sub_agents": [
                SubAgent(
                    **_known(SubAgent, each) | {"token_usage": saved_usage(each.get("token_usage"))}
                )
                for each in data.get("sub_agents") or ()
            ],
            "tried": [saved_tried(each) for each in data.get("tried") or ()],
            "error": ErrorInfo(**_known(ErrorInfo, error)) if error else None,
        }
        texts = _Texts.saved(text, data.get("answer", text) or "")
        result = cls(**values, _texts=texts)
        # A result that is incomplete by its events may still go on.
        if (status := data.get("status")) in get_args(Stopped) and status != result.status:
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
            "model": self.tried and self.model,
            "tried": [str(each) for each in self.tried],
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


@dataclass
class _Step:
    """What the model said in one step.

    Attributes:
        message_id: The id of OpenCode's message, or None.
        pieces: Texts, and the blank lines between them.
        reason: Why the step ended; None while it is under way.
    """

    message_id: str | None = None
    pieces: list[str] = field(default_factory=list)
    reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass
class _Texts:
    """The model's texts, by step.

    Attributes:
        steps: The first one is of texts before any ``step_start``.
        summaries: Ids of messages in which OpenCode had the conversation summarized.
        answered: The step with the whole answer, where OpenCode went on by itself after it.
        latest: The message of the latest step; that of a summary too.
        is_open: The next piece continues the last one.
    """

    steps: list[_Step] = field(default_factory=lambda: [_Step()])
    summaries: set[str] = field(default_factory=set)
    answered: _Step | None = None
    latest: str | None = None
    is_open: bool = False

    @classmethod
    def saved(cls, text: str, answer: str) -> _Texts:
        """The texts of a result whose ``final_text`` and ``answer`` are these."""
        last = _Step(pieces=[answer] if answer else [])
        is_last = text == answer or not answer or text.endswith(f"\n\n{answer}")
        if not is_last:  # OpenCode had gone on after it
            return cls([_Step(pieces=[text])], answered=last)
        before = text.removesuffix(answer).removesuffix("\n\n" if answer else "")
        return cls([_Step(pieces=[before] if before else []), last])

    def add(self, text: str, *, is_piece: bool, message_id: str | None) -> None:
        if message_id in self.summaries:
            return
        pieces = self.steps[-1].pieces
        if pieces and not (is_piece and self.is_open):
            pieces.append("\n\n")
        pieces.append(text)
        self.is_open = is_piece

    def begin_step(self, message_id: str | None) -> None:
        self.latest = message_id
        if message_id not in self.summaries:
            self.steps.append(_Step(message_id))

    def end_step(self, reason: str) -> None:
        if self.latest not in self.summaries:
            self.steps[-1].reason = reason

    def leave_out(self, message_id: str) -> None:
        """Leave out a message that is a summary, whether it has come or is still to come."""
        self.summaries.add(message_id)
        self.steps = [s for s in self.steps if s.message_id != message_id]

    def joined(self) -> str:
        return "\n\n".join(text for step in self.steps if (text := step.text))

    def go_on(self) -> None:
        """Note that OpenCode, after a summary, prompts the model by itself.

        If the model had given its whole answer before, that remains the answer, as it would be
        without the summary.
        """
        if self.latest is not None:
            self.leave_out(self.latest)
        if self.answered is None and self.steps[-1].reason == "stop":
            self.answered = self.steps[-1]


_LISTS = ("events", "tool_calls", "raw_stdout_lines", "denied_tools", "warnings")


# Found once, since a checkpoint may hold a million results.
_FIELDS = {
    cls: [each.name for each in fields(cls) if not each.name.startswith("_")]
    for cls in (RunResult, ErrorInfo, SubAgent)
}


def _known(cls: type[RunResult | ErrorInfo | SubAgent], data: Any) -> dict[str, Any]:
    return {name: data[name] for name in _FIELDS[cls] if name in data}


def aggregate_run_result(
    *,
    events: Iterable[Event],
    raw_stdout_lines: Iterable[str] = (),
    exit_code: int | None = None,
    stderr: str = "",
) -> RunResult:
    """The result of given events, such as those of a log file."""
    result = RunResult(raw_stdout_lines=list(raw_stdout_lines), exit_code=exit_code, stderr=stderr)
    for event in events:
        result.append_event(event)
    return result


def run_result_fuzzy_text(result: RunResult) -> str:
    """Any readable text in a result, for output of unknown shape.

    ``final_text`` if there is any, else strings found in the events, else the raw lines.
    """
    if text := result.final_text.strip():
        return text
    found = [text for event in result.events for text in strings_in(event)]
    return "\n".join(found or [line for raw in result.raw_stdout_lines if (line := raw.strip())])


def is_by_model(result: RunResult, event: Event) -> bool:
    """Whether a text event, which *result* has already, is the model's text to the user."""
    session = event.get("sessionID")
    is_ours = not session or session == result.session_id
    is_summary = message_id_of(event) in result._texts.summaries
    return is_ours and not is_summary and not is_synthetic(part_of(event))


def is_cut_off(result: RunResult) -> bool:
    """Whether the last step was stopped at the model's output limit."""
    return result.finish_reason == "length"
