"""How many jobs may be in flight, when a provider says that they are too many.

    refused(job)   --> as many as are not waiting for the provider, which are those that it bears
    recovered(job) --> that one waits no more
    succeeded()    --> more again: fast up to half of what was too many, slowly around it

Additive increase with a slow start, as TCP has it. Knows numbers and words of providers; nothing of
jobs but their names. Not thread-safe: its owner holds a lock.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..process.stderr import asked_to_wait_s

BURST_S = 1.0  # refusals this close together have one cause
MAX_PAUSE_S = 300.0  # a retry-after of hours is a quota that is used up: jobs are to fail of it
_NEAR_REFUSAL = 0.25  # share of the usual step upward where it was refused before

_TOO_MANY = (429, 529)  # 529: "overloaded", Anthropic's
_TOO_MANY_WORDS = re.compile(r"rate.?limit|too many requests|overloaded|quota", re.IGNORECASE)


class Throttle:
    """The number of jobs that may be in flight, between 1 and *most*.

    Attributes:
        most: What is allowed without refusals.
        is_adaptive: Whether refusals change what is allowed.
        refusals: How often a provider said that it was too much.
        lowest: The least that was allowed so far.
    """

    def __init__(
        self, most: int, *, adaptive: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.most = most
        self.refusals = 0
        self.lowest = most
        self.is_adaptive = adaptive
        self._clock = clock
        self._level = float(most)
        self._too_many = math.inf  # what was refused last
        self._cut_at = -math.inf
        self._waiting: set[int] = set()
        self._paused_until = -math.inf

    @property
    def limit(self) -> int:
        """How many jobs may be in flight now."""
        return int(self._level)

    def pause_s(self) -> float:
        """Seconds until the next job may start; 0.0 for at once."""
        return max(0.0, self._paused_until - self._clock())

    def refused(
        self, in_flight: int, job: int | None = None, retry_after_s: float | None = None
    ) -> None:
        """Note that a provider refused a request while *in_flight* jobs were under way.

        Args:
            job: Which of them it was; None for one that has ended by now.
            retry_after_s: How long the provider wants to be left alone.
        """
        self.refusals += 1
        if not self.is_adaptive:
            return
        if retry_after_s is not None:
            self.pause(min(retry_after_s, MAX_PAUSE_S))
        if job is not None:
            self._waiting.add(job)
            self._cut(in_flight - len(self._waiting))
        # While there are more than allowed, refusals are those of the last cut, still at work.
        elif self._clock() >= self._cut_at + BURST_S and in_flight <= self.limit:
            self._cut(in_flight // 2)

    def recovered(self, job: int) -> None:
        """Note that *job* goes on, or has ended."""
        self._waiting.discard(job)

    def succeeded(self) -> None:
        """Note that a job ended well."""
        step = 1.0 / self._level
        if self._level + 1 <= self._too_many / 2:
            step = 1.0
        elif abs(self._level - self._too_many) <= 1:
            step *= _NEAR_REFUSAL
        self._level = min(float(self.most), self._level + step)

    def pause(self, seconds: float) -> None:
        """Start nothing for *seconds*."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)

    def _cut(self, level: int) -> None:
        level = max(1, level)
        if level < self._level:
            self._cut_at = self._clock()
            self._too_many = level + 1
            self._level = float(level)
            self.lowest = min(self.lowest, level)


def is_rate_limit(status_code: object, message: object) -> bool:
    """Whether a provider's refusal means: too much at a time.

    Words count only where the status is not known.
    """
    if isinstance(status_code, int):
        return status_code in _TOO_MANY
    return isinstance(message, str) and _TOO_MANY_WORDS.search(message) is not None


def retry_after_s(event: Mapping[str, Any]) -> float | None:
    """The seconds that a ``retry`` or ``error`` event asks to wait, or None where it does not say.

    An ``error`` event has the headers of the refusal upon which OpenCode gave up.
    """
    error = event.get("error")
    data = error.get("data") if isinstance(error, Mapping) else None
    headers = data.get("responseHeaders") if isinstance(data, Mapping) else None
    if isinstance(headers, Mapping):
        return asked_to_wait_s(headers.get("retry-after"), headers.get("retry-after-ms"))
    value = event.get("retry_after_s")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type,operator]
        return None
    return float(value)  # type: ignore[arg-type]
