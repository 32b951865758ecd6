"""How many jobs may be in flight while a provider refuses requests for being too many.

    refused(job)   --> down to as many jobs as are not waiting: what the provider accepts
    recovered(job) --> that job no longer waits
    succeeded()    --> up again: fast to half of what was too many, slowly around it

    left(model)    --> Outages --> passed_over(job): models that other jobs have found to be out

Additive increase with a slow start, as TCP has it. Knows numbers, the words of providers, and of
jobs their index, models and results. Not thread-safe: its owner holds a lock.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec

from ..core.config import RunConfig
from ..core.events import to_json
from ..core.reading import Tried, asked_to_wait_s, mapping
from ..core.result import RunResult

_P = ParamSpec("_P")
_log = logging.getLogger("opencode_sync")

BURST_S = 1.0  # refusals this close together have one cause
MAX_PAUSE_S = 300.0  # a retry-after of hours means that a quota is used up: then jobs fail
OUT_S = 60.0  # how long a model is passed over where its provider does not say
_NEAR_REFUSAL = 0.25  # of the usual step upward, near the number that was refused before

_TOO_MANY = (429, 529)  # 529: "overloaded", Anthropic's
_TOO_MANY_WORDS = re.compile(r"rate.?limit|too many requests|overloaded|quota", re.IGNORECASE)


def never_raises(note: Callable[_P, None]) -> Callable[_P, None]:
    """Have a method that only counts log its failure, which is no reason to end a batch."""

    @functools.wraps(note)
    def noted(*args: _P.args, **options: _P.kwargs) -> None:
        try:
            note(*args, **options)
        except Exception:  # noqa: BLE001 - whatever it is, jobs are worth more
            _log.exception("the numbers of the batch are not right any more")

    return noted


class Outages:
    """Which models the jobs of a batch pass over, since they were out for another job.

    Once the time that the provider named has passed, one job asks such a model; the others pass it
    over until that job has ended.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: dict[tuple[int, str], _Outage] = {}  # by account and model

    def passed_over(self, job: int, cfg: RunConfig) -> tuple[Tried, ...]:
        """The models of *cfg* that *job*, which begins now, is not to ask."""
        if not self._found:
            return ()
        passed: list[Tried] = []
        account, is_first = _account_of(cfg), True
        for model in (str(cfg.model), *cfg.fallback_models)[:-1]:  # the last is always asked
            outage = self._found.get((account, model))
            if outage is not None and (outage.asked_by is not None or self._clock() < outage.until):
                passed.append(outage.tried)
            elif is_first:
                is_first = False
                if outage is not None:
                    outage.asked_by = job
        return tuple(passed)

    def left(self, cfg: RunConfig, tried: Tried) -> None:
        """Note that a job with *cfg* has left a model that it had asked."""
        wait_s = OUT_S if tried.retry_after_s is None else tried.retry_after_s
        outage = _Outage(tried, self._clock() + wait_s)
        self._found[_account_of(cfg), tried.model] = outage

    def ended(self, job: int, result: RunResult | None) -> None:
        """Note that *job* has ended: a model that it has asked again may be back."""
        for key, outage in list(self._found.items()):
            if outage.asked_by == job:
                outage.asked_by = None
                if result is not None and result.turns and result.model == key[1]:
                    del self._found[key]


@dataclass
class _Outage:
    tried: Tried
    until: float
    asked_by: int | None = None  # the job that finds out whether it is over


def _account_of(cfg: RunConfig) -> int:
    """Equal for settings with the same keys: a model may be out for one account alone."""
    return hash(to_json([cfg.attach, cfg.extra_env, cfg.config_overrides], default=str))


class Throttle:
    """The number of jobs that may be in flight, between 1 and *most*.

    Attributes:
        most: How many are allowed without refusals.
        is_adaptive: Whether refusals change how many are allowed.
        refusals: How often a provider refused a request.
        lowest: The lowest number that was allowed so far.
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
        self._too_many = math.inf  # the number that was refused last
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

    @never_raises
    def refused(
        self, in_flight: int, job: int | None = None, retry_after_s: float | None = None
    ) -> None:
        """Note that a provider refused a request while *in_flight* jobs were under way.

        Args:
            job: Index of the job, which waits; None for one that has ended.
            retry_after_s: Seconds that the provider asks to wait, or None.
        """
        self.refusals += 1
        if not self.is_adaptive:
            return
        if retry_after_s is not None:
            self.pause(min(retry_after_s, MAX_PAUSE_S))
        if job is not None:
            self._waiting.add(job)
            self._cut(in_flight - len(self._waiting))
        # Refusals that come while more are in flight than allowed belong to the last cut.
        elif self._clock() >= self._cut_at + BURST_S and in_flight <= self.limit:
            self._cut(in_flight // 2)

    @never_raises
    def recovered(self, job: int) -> None:
        """Note that *job* goes on, or has ended."""
        self._waiting.discard(job)

    @never_raises
    def succeeded(self) -> None:
        """Note that a job ended well."""
        step = 1.0 / self._level
        if self._level + 1 <= self._too_many / 2:
            step = 1.0
        elif abs(self._level - self._too_many) <= 1:
            step *= _NEAR_REFUSAL
        self._level = min(float(self.most), self._level + step)

    @never_raises
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
    """Whether a provider refused for too many requests; the words count without a status only."""
    if isinstance(status_code, int):
        return status_code in _TOO_MANY
    return isinstance(message, str) and _TOO_MANY_WORDS.search(message) is not None


def retry_after_s(event: Mapping[str, Any]) -> float | None:
    """The seconds that a ``retry`` or ``error`` event asks to wait, or None if it does not say.

    An ``error`` event has the headers of the refusal that made OpenCode give up.
    """
    headers = mapping(mapping(event.get("error")).get("data")).get("responseHeaders")
    if isinstance(headers, Mapping):
        return asked_to_wait_s(headers.get("retry-after"), headers.get("retry-after-ms"))
    value = event.get("retry_after_s")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type,operator]
        return None
    return float(value)  # type: ignore[arg-type]
