"""Which model a run asks, and when it goes on to the next one.

    RunConfig.model, fallback_models --> model --> the settings of each attempt
    events ----------read()---> a refusal after which waiting does not help --+
    error at the end blame()--> a model that cannot be used ------------------+--> leave()
                                                                                     |
                  the next model, and a ``fallback`` event for each that is out <----+

A model is never left once a tool has run, since the next one would do its work again. Knows events
and names of models; starts and stops nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .config import RunConfig
from .events import ErrorBody, Event, FallbackEvent
from .reading import OUTPUT_TOOL, ErrorInfo, Tried, number_of, part_of

LONG_WAIT_S = 30.0  # a provider that asks for more is not waited for
REFUSALS = 2  # of one request; OpenCode 1.18.33 would ask six times

# No credits, no such model, no access, too many requests; and whatever is the provider's own fault.
_REFUSING = (401, 402, 403, 404, 429)
# What OpenCode 1.18.33 ends a run with for a provider that it cannot reach, or has no key for.
_UNUSABLE = ("APIError", "ProviderAuthError")
# What it says of a model or a provider that it does not know; and what Anthropic says, with a 400,
# where others say 402.
_WORDS = (
    *("ProviderModelNotFoundError", "ProviderInitError", "Model not found: "),
    "credit balance is too low",
)


class Fallback:
    """The models of one run.

    Attributes:
        model: The one that is asked; None where the settings name none.
    """

    def __init__(self, cfg: RunConfig, passed_over: Sequence[Tried] = ()) -> None:
        """
        Args:
            passed_over: Models that are out already. The last one of the run is asked nevertheless.
        """
        self.model = cfg.model
        self._left = deque(cfg.fallback_models)
        self._is_on = bool(cfg.fallback_models)
        last = cfg.fallback_models[-1:]
        self._out = {each.model: each for each in passed_over if each.model not in last}
        self._has_acted = False
        self._n_refusals = 0  # of the request under way
        self._wait_s: float | None = None  # as the last refusal says

    @property
    def has_next(self) -> bool:
        """Whether another model can be asked."""
        return bool(self._left) and not self._has_acted

    def read(
        self, events: Sequence[Event], *, may_leave: bool = False
    ) -> tuple[Sequence[Event], ErrorBody | None]:
        """Take note of *events*.

        Args:
            may_leave: Look for a refusal after which the model is not asked again.

        Returns:
            The events, without the retry that is not to be; and the refusal, or None.
        """
        last: Event | None = None
        for event in events if self._is_on else ():
            kind = event.get("type")
            if kind == "sub_agent" or (kind == "tool_use" and not _is_answer(event)):
                self._has_acted = True
            elif kind == "step_finish":
                self._n_refusals, self._wait_s, last = 0, None, None
            elif kind == "retry":
                self._n_refusals += 1
                wait_s = event.get("retry_after_s")
                self._wait_s = None if wait_s is None else number_of(wait_s)
                last = event if self._is_hopeless() else None
        if last is None or self._has_acted or not may_leave:
            return events, None
        return [event for event in events if event is not last], _refusal_in(last)

    def asked(self, model: str | None) -> None:
        """Note which model an attempt has asked.

        A command that names its own would ask no other in a further attempt either.
        """
        if self._is_on and model is not None and model != self.model:
            self.model = model
            self._left.clear()
            self._out.clear()

    def _is_hopeless(self) -> bool:
        is_long = (self._wait_s or 0.0) > LONG_WAIT_S
        return is_long or (self._n_refusals >= REFUSALS and self.has_next)

    def blame(self, info: ErrorInfo | None, error: BaseException) -> ErrorBody | None:
        """What is wrong with the model, if that has ended an attempt, or None.

        Args:
            info: What the attempt's ``error`` event says.
            error: What the attempt ended with.
        """
        if info is None or self._has_acted or not self._is_on:
            return None
        status, reason = info.status_code, getattr(error, "reason", None) or info.message
        if status is not None and (status in _REFUSING or status >= 500):
            return _body(info.name, info.message, status)
        if status is None and info.name in _UNUSABLE:
            return _body(info.name, info.message)
        if any(words in reason for words in _WORDS):
            beginning = replace(info, message="")
            return _body(info.name, reason.removeprefix(f"{beginning}: "), status)
        return None

    def leave(self, error: ErrorBody) -> list[Event]:
        """Go on to the next model, if there is one; return the events that tell so."""
        wait_s, self._wait_s, self._n_refusals = self._wait_s, None, 0
        return [self._step(error, wait_s), *self.pass_over()]

    def pass_over(self) -> list[Event]:
        """Go on to a model that is not out; return an event for each that is passed over."""
        events: list[Event] = []
        while self.model is not None and (out := self._out.get(self.model)) is not None:
            error = _body(out.error.name, out.error.message, out.error.status_code)
            events.append(self._step(error, out.retry_after_s, was_asked=False))
        return events

    def _step(self, error: ErrorBody, wait_s: float | None, *, was_asked: bool = True) -> Event:
        next_model = self._left.popleft() if self.has_next else None
        event: FallbackEvent = {
            "type": "fallback",
            "timestamp": time.time_ns() // 1_000_000,
            "model": str(self.model),
            "next_model": next_model,
            "error": error,
            "was_asked": was_asked,
        }
        if wait_s is not None:
            event["retry_after_s"] = wait_s
        self.model = next_model or self.model
        return event


def _is_answer(event: Event) -> bool:
    """Whether a tool's event is only the model's structured answer."""
    return part_of(event).get("tool") == OUTPUT_TOOL


def _refusal_in(retry: Event) -> ErrorBody:
    """What a ``retry`` event says, as the error that it is if nobody asks again."""
    message, status = str(retry.get("message")), retry.get("statusCode")
    if not isinstance(status, int):
        return _body("APIError", message)
    return _body("APIError", message.removeprefix(f"{status} "), status)


def _body(name: str, message: str, status_code: int | None = None) -> ErrorBody:
    status: dict[str, Any] = {} if status_code is None else {"statusCode": status_code}
    return {"name": name, "data": {"message": message, **status}}  # type: ignore[typeddict-item]
