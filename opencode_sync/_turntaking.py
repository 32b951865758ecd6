"""Whose turn it is in a conversation, and what its turns have cost.

Knows threads and results; nothing of sessions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .core.errors import OpenCodeConfigError
from .core.reading import number_of, usage_of
from .core.result import RunResult, TokenUsage


class TurnTaking:
    """One at a time; a turn begins in one thread, and ends in any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None

    def take(self) -> Callable[[], None]:
        """Wait for a turn; returns what ends it, once.

        Raises:
            OpenCodeConfigError: If this thread would wait for itself.
        """
        if self._owner is threading.current_thread():
            raise OpenCodeConfigError(
                "this thread has a turn of the session under way: let its stream end first"
            )
        self._lock.acquire()
        self._owner = threading.current_thread()
        held = [self._lock]

        def release() -> None:
            with suppress(IndexError):  # it was ended before
                lock = held.pop()
                self._owner = None
                lock.release()

        return release


@dataclass(frozen=True)
class Account:
    """What the turns have cost: those that have ended, and the one under way."""

    _cost: float = 0.0
    _usage: TokenUsage = field(default_factory=TokenUsage)
    _live: RunResult | None = None

    @property
    def cost(self) -> float:
        return self._cost + (self._live.total_cost if self._live is not None else 0.0)

    @property
    def usage(self) -> TokenUsage:
        live = self._live
        return self._usage if live is None else self._usage + live.token_usage

    def going_on(self, live: RunResult) -> Account:
        return Account(self._cost, self._usage, live)

    def with_turn(self, ended: RunResult) -> Account:
        return Account(self._cost + ended.total_cost, self._usage + ended.token_usage)

    def with_message(self, info: Mapping[str, Any]) -> Account:
        """With what the answer cost that *info* describes."""
        cost, usage = number_of(info.get("cost")), usage_of(info.get("tokens"))
        return Account(self._cost + cost, self._usage + usage)
