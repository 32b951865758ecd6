"""The bounds of a run and of a batch, and what of them is used.

    Limits   what the caller asked for, checked
    Meter    start(), heard(events) --> patience(), timeout(), overspent(), endless()
    Spent    what runs have cost --> Budget of a batch: is it spent, and what is left

Knows clocks, prices and steps; starts, stops and reads nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .config import checked_count, checked_number, shown
from .errors import (
    OpenCodeBinaryNotFoundError,
    OpenCodeBudgetError,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodePermissionError,
    OpenCodeTimeoutError,
)
from .events import Event
from .reading import OUTPUT_TOOL, ended_well, part_of, void_call
from .result import RunResult, TokenUsage

# 146 years; the system's clocks refuse to wait for more than twice as long.
LONGEST_WAIT_S = threading.TIMEOUT_MAX / 2

# Limits that a job of a batch may have of its own.
LIMITS_OF_A_JOB = ("timeout_s", "max_cost", "max_steps", "max_tokens")

# Steps in a row without a tool call and without a good end. OpenCode 1.18.33 asks the model again
# at once after each, 10 to 18 times a second, for ever. One or two may be a provider's hiccup.
ENDLESS_STEPS = 3
# The same for steps that call only tools that do not exist, or with wrong arguments. OpenCode asks
# again whatever such a step's reason is; but the model is told what was wrong, and may need tries.
VOID_STEPS = 5
_ROUNDING = 1e-12  # dollars: less than a token costs anywhere
# After these OpenCode does not ask again. A sub-agent that is called often may end so every time.
_LAST_REASONS = ("stop", "length", "content-filter")
# Errors that another try would only meet again; and statuses of a provider that are not such.
_LASTING = (
    OpenCodeBinaryNotFoundError,
    OpenCodeBudgetError,
    OpenCodeConfigError,
    OpenCodePermissionError,
)
_MAY_PASS = (408, 409, 425, 429)  # timeout, conflict, too early, too many requests


@dataclass(frozen=True)
class Limits:
    """Bounds of a run, checked when made; ``Runner.run`` explains those that are not here.

    Attributes:
        max_total_cost, max_total_tokens: What is left of a batch's budget for this job.
    """

    timeout_s: float | None = None
    idle_timeout_s: float | None = None
    max_cost: float | None = None
    max_steps: int | None = None
    max_tokens: int | None = None
    startup_retries: int = 2
    startup_retry_delay_s: float = 1.0
    max_repairs: int = 1
    max_total_cost: float | None = None
    max_total_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("timeout_s", "idle_timeout_s"):
            self._set(name, checked_number(name, getattr(self, name), optional=True, positive=True))
        self._set("max_cost", checked_number("max_cost", self.max_cost, optional=True))
        for name in ("max_steps", "max_tokens"):
            self._set(name, checked_count(name, getattr(self, name), 1))
        delay_s = checked_number("startup_retry_delay_s", self.startup_retry_delay_s)
        self._set("startup_retry_delay_s", delay_s)
        for name in ("startup_retries", "max_repairs"):
            self._set(name, _checked_tries(name, getattr(self, name)))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _checked_tries(name: str, value: object) -> int:
    number = checked_number(name, value)
    if not isinstance(number, int):
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use a whole number")
    return number


@dataclass(frozen=True)
class Retry:
    """How a failed job of a batch is tried again: from its beginning, in its workspace as it is.

    Attributes:
        count: Further tries of a job, at most.
        delay_s: Seconds before each of them; other jobs go on in the meantime.
        on: The class of the errors after which a job is tried again, or a tuple of classes. None
            for all errors that may pass by themselves, which leaves out: refused settings, a
            missing program, an exceeded limit of cost, steps or tokens, a denied tool that has
            run, and a provider's status from 400 to 499, except for 408, 409, 425 and 429.

    A job that was cancelled, or stopped since the batch's budget is spent, is not tried again.

    Raises:
        OpenCodeConfigError: A value makes no sense.
    """

    count: int = 1
    delay_s: float = 5.0
    on: type[OpenCodeError] | tuple[type[OpenCodeError], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", _checked_tries("retries", self.count))
        object.__setattr__(self, "delay_s", checked_number("delay_s", self.delay_s))
        kinds = self.on if isinstance(self.on, tuple) else (self.on or OpenCodeError,)
        if not all(isinstance(kind, type) and issubclass(kind, OpenCodeError) for kind in kinds):
            raise OpenCodeConfigError(f"on is {shown(self.on)}: use classes of OpenCodeError")

    def applies_to(self, error: OpenCodeError) -> bool:
        """Whether a job that ended with *error* is to be tried again."""
        if isinstance(error, OpenCodeCancelledError) or is_of_batch(error):
            return False
        if self.on is not None:
            return isinstance(error, self.on)
        info = error.result and error.result.error
        status = (info and info.status_code) or 0
        is_refusal = 400 <= status < 500 and status not in _MAY_PASS
        return not isinstance(error, _LASTING) and not is_refusal


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
        self._void: dict[object, str] = {}  # in these steps, the tool of the last failed call
        self._has_void: set[object] = set()  # in the step under way
        # Sessions that have called a tool in their last step: OpenCode asks again with its result,
        # also where the step ended with "stop", as it does with some providers.
        self._has_called: set[object] = set()
        self._has_warned = False

    def start(self, instant: float) -> None:
        """Note the start of an attempt, or of its opening; the first call starts the clock."""
        if self._started_at is None:
            self._started_at = instant
        self._heard_at = time.monotonic()
        # The next prompt is ours: OpenCode is not asking again.
        self._fruitless.clear()
        self._void.clear()
        self._has_void.clear()
        self._has_called.clear()

    def heard(self, events: Iterable[Event]) -> None:
        """Count *events*; none are a sign of life, such as a log line."""
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
        return max(0.0, self.deadline() - time.monotonic())

    def patience(self) -> float | None:
        """Seconds that a wait which begins now may take; None for any time."""
        left, idle = self.left(), self.limits.idle_timeout_s
        if idle is not None:
            # Only our own waiting counts: a slow consumer does not make the run idle.
            self._heard_at = time.monotonic()
            left = min(left, idle)
        return None if left == math.inf else min(left, LONGEST_WAIT_S)

    def deadline(self) -> float:
        """The ``time.monotonic()`` instant at which ``timeout_s`` passes; infinite without."""
        # One instant for all that wait: reckoned anew, it could come before timeout() sees it.
        started_at, limit = self._started_at, self.limits.timeout_s
        if limit is None:
            return math.inf
        return limit + (time.monotonic() if started_at is None else started_at)

    def idle_deadline(self) -> float:
        """The instant at which one of the limits passes if nothing more is heard."""
        idle = self.limits.idle_timeout_s
        return min(self.deadline(), math.inf if idle is None else self._heard_at + idle)

    def timeout(self) -> OpenCodeTimeoutError | None:
        """The error for the time limit that has passed, if one has."""
        limits, elapsed = self.limits, self.elapsed()
        now = time.monotonic()
        if limits.timeout_s is not None and now >= self.deadline():
            what, name, limit = "the run took over", "timeout_s", limits.timeout_s
        elif limits.idle_timeout_s is not None and now >= self._heard_at + limits.idle_timeout_s:
            what, name, limit = "nothing was heard for", "idle_timeout_s", limits.idle_timeout_s
        else:
            return None
        retry = f"; the provider was being retried: {self._last_retry}" if self._last_retry else ""
        message = f"{what} {limit:g} s ({name}); stopped after {elapsed:.1f} s{retry}"
        return OpenCodeTimeoutError(message, limit=name, limit_s=limit, elapsed_s=elapsed)

    def overspent(self, result: RunResult) -> OpenCodeBudgetError | None:
        """The error for a run that has exceeded a budget and is not done."""
        # A run that ended well is not failed for its price. A refused tool is not an end here, as
        # the model mostly goes on.
        is_end = result.session_id not in self._has_called
        if is_end and ended_well(result.finish_reason, was_denied=False):
            return None
        limits, cost, tokens = self.limits, result.total_cost, tokens_of(result.token_usage)
        steps = f"after {result.turns} steps"
        if limits.max_cost is not None and cost > limits.max_cost:
            name, limit, spent = "max_cost", limits.max_cost, cost
            what = f"of ${limit:g} exceeded: ${spent:g} spent {steps}"
        elif limits.max_tokens is not None and tokens > limits.max_tokens:
            name, limit, spent = "max_tokens", limits.max_tokens, tokens
            what = f"of {limit:,} exceeded: {spent:,} tokens used {steps}"
        elif limits.max_steps is not None and result.turns >= limits.max_steps:
            name, limit, spent = "max_steps", limits.max_steps, result.turns
            what = f"of {limit:,} reached: the run was not done {steps}"
        elif limits.max_total_cost is not None and cost > limits.max_total_cost:
            name, limit, spent = "max_total_cost", limits.max_total_cost, cost
            what = (
                f"is spent: ${limit:g} of it were left for this run, which spent ${spent:g} {steps}"
            )
        elif limits.max_total_tokens is not None and tokens > limits.max_total_tokens:
            name, limit, spent = "max_total_tokens", limits.max_total_tokens, tokens
            what = (
                f"is spent: {limit:,} were left for this run, which used {spent:,} tokens {steps}"
            )
        else:
            return None
        return OpenCodeBudgetError(f"{name} {what}", limit_name=name, limit=limit, spent=spent)

    def endless(self) -> OpenCodeIncompleteError | None:
        """The error for a run whose model is asked again and again, and does nothing."""
        for session, n in self._fruitless.items():
            tool = self._void.get(session)
            if n >= (ENDLESS_STEPS if tool is None else VOID_STEPS):
                what = f"called no tool and ended for the reason {self._last_reason!r}"
                if tool is not None:
                    what = (
                        "called only tools that do not exist, or with wrong arguments (the last "
                        f"was {tool[:80]!r})"
                    )
                return OpenCodeIncompleteError(
                    f"the model was asked {n} times in a row, and each answer {what}, after which "
                    "OpenCode asks again: the run was stopped"
                )
        return None

    def warning(self, result: RunResult) -> str | None:
        """A warning, once, if ``max_cost`` cannot bind."""
        if self.limits.max_cost is None or self._has_warned:
            return None
        tokens = unpriced_tokens(result)
        self._has_warned = tokens > 0
        return unpriced(tokens, "max_cost") if tokens else None

    def _count_step(self, event: Mapping[str, Any]) -> None:
        kind, session = event.get("type"), event.get("sessionID")
        if kind == "step_start":
            self._has_called.discard(session)
        elif kind == "tool_use" and part_of(event).get("tool") != OUTPUT_TOOL:
            self._has_called.add(session)
        if kind == "tool_use" and (tool := void_call(event)) is not None:
            self._void[session] = tool
            self._has_void.add(session)
        elif kind == "tool_use":
            self._void.pop(session, None)
            self._fruitless[session] = -1  # the step that it is part of does not count
        elif kind == "step_finish" and isinstance(step := event.get("part"), Mapping):
            reason = step.get("reason")
            is_last = not isinstance(reason, str) or reason in _LAST_REASONS
            if is_last and session not in self._has_void:
                self._fruitless[session] = 0
                self._void.pop(session, None)
            else:
                self._fruitless[session] = self._fruitless.get(session, 0) + 1
                self._last_reason = str(reason)
            self._has_void.discard(session)


def tokens_of(usage: TokenUsage) -> int:
    """Tokens as budgets count them: what OpenCode calls the total, or the sum of input, output,
    reasoning, and the cache's reads and writes, if that is more.
    """
    parts = usage.input + usage.output + usage.reasoning + usage.cache_read + usage.cache_write
    return max(usage.total, parts)


def unpriced_tokens(result: RunResult) -> int:
    """The tokens of *result* at $0.00: its own, and each sub-agent's, if they cost nothing."""
    cost, tokens, free = result.total_cost, tokens_of(result.token_usage), 0
    for each in result.sub_agents:
        used = tokens_of(each.token_usage)
        cost, tokens = cost - each.total_cost, tokens - used
        free += 0 if each.total_cost else used
    return free + (tokens if cost < _ROUNDING else 0)


def unpriced(tokens: int, limit_name: str) -> str:
    """The warning for *tokens* at $0.00, which no limit of dollars binds."""
    instead = "max_total_tokens" if limit_name == "max_total_cost" else "max_tokens"
    return (
        f"{tokens:,} tokens were counted at $0.00, so {limit_name} does not bind: the model is "
        f"free, or OpenCode does not know its prices; {instead} binds in both cases"
    )


@dataclass(frozen=True)
class Spent:
    """What runs have cost: US dollars, and tokens as budgets count them."""

    cost: float = 0.0
    tokens: int = 0

    @classmethod
    def on(cls, result: RunResult | None) -> Spent:
        """What was spent on *result*, so far; nothing on None."""
        if result is None:
            return cls()
        return cls(result.total_cost, tokens_of(result.token_usage))

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.cost + other.cost, self.tokens + other.tokens)

    def __bool__(self) -> bool:
        return bool(self.cost or self.tokens)


@dataclass(frozen=True)
class Budget:
    """What all jobs of a batch may spend together; None for no limit."""

    max_total_cost: float | None = None
    max_total_tokens: int | None = None

    def __bool__(self) -> bool:
        return self.max_total_cost is not None or self.max_total_tokens is not None

    def is_spent(self, spent: Spent) -> bool:
        """Whether nothing is left of it."""
        is_cost = self.max_total_cost is not None and spent.cost >= self.max_total_cost
        is_tokens = self.max_total_tokens is not None and spent.tokens >= self.max_total_tokens
        return is_cost or is_tokens

    def left(self, spent: Spent) -> dict[str, float | int]:
        """What is left of it, as arguments of :class:`Limits`."""
        left: dict[str, float | int] = {}
        if self.max_total_cost is not None:
            left["max_total_cost"] = max(0.0, self.max_total_cost - spent.cost)
        if self.max_total_tokens is not None:
            left["max_total_tokens"] = max(1, self.max_total_tokens - spent.tokens)
        return left

    def error(self, spent: Spent, earlier: Spent, what: str) -> OpenCodeBudgetError:
        """The error for a job that did not run, or was stopped, because the budget is spent.

        Args:
            earlier: How much of *spent* earlier batches of the same checkpoint have spent.
            what: What became of the job, in words.
        """
        limit: float | None
        used: float
        before: float
        is_cost = self.max_total_cost is not None and (
            self.max_total_tokens is None or spent.cost >= self.max_total_cost
        )
        if is_cost:
            name, unit, limit = "max_total_cost", "${:g}", self.max_total_cost
            used, before = spent.cost, earlier.cost
        else:
            name, unit, limit = "max_total_tokens", "{:,} tokens", self.max_total_tokens
            used, before = spent.tokens, earlier.tokens
        share = f", {unit.format(before)} of it before, as the checkpoint says" if before else ""
        return OpenCodeBudgetError(
            f"{name} of {unit.format(limit)} is spent ({unit.format(used)}{share}): {what}",
            limit_name=name,
            limit=limit,
            spent=used,
        )


NO_BUDGET = Budget()


def is_of_batch(error: object) -> bool:
    """Whether it says that a batch's budget is spent, and not the job's own."""
    return isinstance(error, OpenCodeBudgetError) and error.limit_name.startswith("max_total_")
