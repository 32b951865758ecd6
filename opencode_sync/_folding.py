"""What each type of event does to a result.

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

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from ._reading import (
    TEXT_TYPES,
    SubAgent,
    denied_tool,
    error_info,
    message_id_of,
    number_of,
    text_of,
    usage_of,
)
from .events import Event, OtherEvent

if TYPE_CHECKING:
    from .result import RunResult

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
