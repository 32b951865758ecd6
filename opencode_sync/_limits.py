"""The bounds of a run, and what of them it has used.

    Limits      what the caller asked for, checked
    Meter       start(), heard(events) --> patience(), timeout(), overspent(), endless()

Knows clocks, prices and steps; starts, stops and reads nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ._checks import check_count, check_number, shown
from ._reading import ended_well
from .errors import (
    OpenCodeBudgetError,
    OpenCodeConfigError,
    OpenCodeIncompleteError,
    OpenCodeTimeoutError,
)
from .events import Event
from .result import RunResult, TokenUsage

# 146 years: beyond twice as many, the system's clocks refuse to be waited on.
LONGEST_WAIT_S = threading.TIMEOUT_MAX / 2

# What a job of a batch may have of its own.
LIMITS_OF_A_JOB = ("timeout_s", "max_cost", "max_steps", "max_tokens")

# Steps in a row without a tool call and without a good end. OpenCode 1.18.33 asks again at once
# after each, 10 to 18 times a second, for ever. One or two may be a provider's hiccup.
ENDLESS_STEPS = 3


@dataclass(frozen=True)
class Limits:
    """Bounds of a run, checked when made.

    Attributes:
        timeout_s: Seconds from the first process's start, over all attempts.
        idle_timeout_s: Seconds without an event or a log line.
        max_cost: US dollars; a run that passes it in mid-work is stopped at that step.
        max_steps: Steps of the model, those of sub-agents not among them; a run that has taken
            them and is not done is stopped.
        max_tokens: Tokens, see :func:`tokens_of`; as for *max_cost*.
        max_retries: Further attempts after a start-up failure that is safe to repeat.
        retry_delay_s: Seconds between attempts.
        max_repairs: How often an answer that does not fit its schema is sent back.
    """

    timeout_s: float | None = None
    idle_timeout_s: float | None = None
    max_cost: float | None = None
    max_steps: int | None = None
    max_tokens: int | None = None
    max_retries: int = 2
    retry_delay_s: float = 1.0
    max_repairs: int = 1

    def __post_init__(self) -> None:
        for name in ("timeout_s", "idle_timeout_s"):
            check_number(name, getattr(self, name), optional=True, positive=True)
        check_number("max_cost", self.max_cost, optional=True)
        for name in ("max_steps", "max_tokens"):
            check_count(name, getattr(self, name), 1)
        check_number("retry_delay_s", self.retry_delay_s)
        for name in ("max_retries", "max_repairs"):
            value = getattr(self, name)
            check_number(name, value)
            if not isinstance(value, int):
                raise OpenCodeConfigError(f"{name} is {shown(value)}: use a whole number")


def tokens_of(usage: TokenUsage) -> int:
    """Tokens as budgets count them: what OpenCode calls the total, or the sum of input, output,
    reasoning, and the cache's reads and writes, whichever is more.
    """
    parts = usage.input + usage.output + usage.reasoning + usage.cache_read + usage.cache_write
    return max(usage.total, parts)


class Meter:
    """What one run has used of its limits.

    Attributes:
        limits: The limits.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._started_at: float | None = None
        self._heard_at = math.inf
        self._last_retry = ""
        # By session, a sub-agent's too: steps in a row that led to nothing, and how the last ended.
        self._fruitless: dict[object, int] = {}
        self._last_reason = ""

    def start(self, instant: float) -> None:
        """An attempt's process was started; the first one starts the clock."""
        if self._started_at is None:
            self._started_at = instant
        self._heard_at = time.monotonic()

    def heard(self, events: Iterable[Event]) -> None:
        """Something came, if only a sign of life."""
        self._heard_at = time.monotonic()
        for event in events:
            # Anything else means that the provider has answered since.
            is_retry = event.get("type") == "retry"
            self._last_retry = str(event.get("message", "")) if is_retry else ""
            self._count_step(event)

    def elapsed(self) -> float:
        """Seconds since the start of the first process."""
        return 0.0 if self._started_at is None else time.monotonic() - self._started_at

    def left(self) -> float:
        """Seconds until ``timeout_s`` passes; infinite where there is no such limit."""
        limit = self.limits.timeout_s
        return math.inf if limit is None else max(0.0, limit - self.elapsed())

    def patience(self) -> float | None:
        """Seconds that a wait which begins now may take; None for ever."""
        left, idle = self.left(), self.limits.idle_timeout_s
        if idle is not None:
            # Only our own waiting counts: a slow consumer does not make the run idle.
            self._heard_at = time.monotonic()
            left = min(left, idle)
        return None if left == math.inf else min(left, LONGEST_WAIT_S)

    def timeout(self) -> OpenCodeTimeoutError | None:
        """The error for the time limit that has passed, if one has."""
        limits, elapsed = self.limits, self.elapsed()
        if limits.timeout_s is not None and self.left() <= 0:
            what, name, limit = "the run took over", "timeout_s", limits.timeout_s
        elif limits.idle_timeout_s is not None and self._idle() >= limits.idle_timeout_s:
            what, name, limit = "nothing was heard for", "idle_timeout_s", limits.idle_timeout_s
        else:
            return None
        retry = f"; the provider was being retried: {self._last_retry}" if self._last_retry else ""
        message = f"{what} {limit:g} s ({name}); stopped after {elapsed:.1f} s{retry}"
        return OpenCodeTimeoutError(message, limit=name, limit_s=limit, elapsed_s=elapsed)

    def overspent(self, result: RunResult) -> OpenCodeBudgetError | None:
        """The error for a run that has spent a budget and is not done."""
        # A run that ended well is not taken from the user for its price. A refused tool is no end
        # here: mostly the model goes on.
        if ended_well(result.finish_reason, was_denied=False):
            return None
        limits, cost, tokens = self.limits, result.total_cost, tokens_of(result.token_usage)
        steps = f"after {result.turns} steps"
        if limits.max_cost is not None and cost > limits.max_cost:
            name, limit, spent = "max_cost", limits.max_cost, cost
            what = f"of ${limit:g} passed: ${spent:g} spent {steps}"
        elif limits.max_tokens is not None and tokens > limits.max_tokens:
            name, limit, spent = "max_tokens", limits.max_tokens, tokens
            what = f"of {limit:,} passed: {spent:,} tokens used {steps}"
        elif limits.max_steps is not None and result.turns >= limits.max_steps:
            name, limit, spent = "max_steps", limits.max_steps, result.turns
            what = f"of {limit:,} reached: the run was not done {steps}"
        else:
            return None
        return OpenCodeBudgetError(f"{name} {what}", limit_name=name, limit=limit, spent=spent)

    def endless(self) -> OpenCodeIncompleteError | None:
        """The error for a run whose model is asked again and again, and gets nothing done."""
        n = max(self._fruitless.values(), default=0)
        if n < ENDLESS_STEPS:
            return None
        return OpenCodeIncompleteError(
            f"the model was asked {n} times in a row, and each answer called no tool and ended for "
            f"the reason {self._last_reason!r}, upon which OpenCode asks again: the run was stopped"
        )

    def _count_step(self, event: Mapping[str, Any]) -> None:
        kind, session = event.get("type"), event.get("sessionID")
        if kind == "tool_use":
            self._fruitless[session] = -1  # the step that it is part of does not count
        elif kind == "step_finish" and isinstance(step := event.get("part"), Mapping):
            reason = step.get("reason")
            if not isinstance(reason, str) or ended_well(reason, was_denied=False):
                self._fruitless[session] = 0
            else:
                self._fruitless[session] = self._fruitless.get(session, 0) + 1
                self._last_reason = reason

    def _idle(self) -> float:
        return time.monotonic() - self._heard_at
