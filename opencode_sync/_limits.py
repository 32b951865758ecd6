"""The bounds of a run, and what of them it has used.

    Limits      what the caller asked for, checked
    Meter       start(), heard(events) --> patience(), timeout(), overspent()

Knows clocks and prices; starts, stops and reads nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from ._checks import check_number, shown
from .errors import OpenCodeBudgetError, OpenCodeConfigError, OpenCodeTimeoutError
from .events import Event
from .result import RunResult

# 146 years: beyond twice as many, the system's clocks refuse to be waited on.
LONGEST_WAIT_S = threading.TIMEOUT_MAX / 2


@dataclass(frozen=True)
class Limits:
    """Bounds of a run, checked when made.

    Attributes:
        timeout_s: Seconds from the first process's start, over all attempts.
        idle_timeout_s: Seconds without an event or a log line.
        max_cost: US dollars; a run that passes it in mid-work is stopped at that step.
        max_retries: Further attempts after a start-up failure that is safe to repeat.
        retry_delay_s: Seconds between attempts.
        max_repairs: How often an answer that does not fit its schema is sent back.
    """

    timeout_s: float | None = None
    idle_timeout_s: float | None = None
    max_cost: float | None = None
    max_retries: int = 2
    retry_delay_s: float = 1.0
    max_repairs: int = 1

    def __post_init__(self) -> None:
        for name in ("timeout_s", "idle_timeout_s"):
            check_number(name, getattr(self, name), optional=True, positive=True)
        check_number("max_cost", self.max_cost, optional=True)
        check_number("retry_delay_s", self.retry_delay_s)
        for name in ("max_retries", "max_repairs"):
            value = getattr(self, name)
            check_number(name, value)
            if not isinstance(value, int):
                raise OpenCodeConfigError(f"{name} is {shown(value)}: use a whole number")


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
        """The error for a run that costs more than ``max_cost`` and is not done."""
        limit, spent = self.limits.max_cost, result.total_cost
        # A run whose last step has closed is done, and is not taken from the user for its price.
        is_done = result.finish_reason not in (None, "tool-calls")
        if limit is None or spent <= limit or is_done:
            return None
        return OpenCodeBudgetError(
            f"max_cost of ${limit:g} passed: ${spent:g} spent after {result.turns} steps",
            limit=limit,
            spent=spent,
        )

    def _idle(self) -> float:
        return time.monotonic() - self._heard_at
