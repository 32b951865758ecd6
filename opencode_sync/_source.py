"""Where the events of one attempt come from: a process, or a turn on a server.

What a stream asks of either; the rooms _run and server have one each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ._interrupt import CancelScope
from .errors import OpenCodeError
from .events import Event
from .result import RunResult


class Source(Protocol):
    """One attempt under way. One thread receives; stop() may come from any."""

    @property
    def label(self) -> str:
        """For log lines, such as ``"run 3 (pid 4711)"``."""

    @property
    def started_at(self) -> float:
        """When its work began, a ``time.monotonic()`` instant."""

    @property
    def session_id(self) -> str | None:
        """The run's session, if it is known: the first event may be a sub-agent's."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended by itself; events may still be there to be received."""

    def receive(self, timeout: float | None) -> Sequence[Event] | None:
        """The next events, none where only a sign of life came, or None at the end.

        Raises:
            queue.Empty: If nothing came for *timeout* seconds.
        """

    def stop(self) -> None:
        """End the attempt with its tools; bounded, idempotent."""

    def settle(self, result: RunResult) -> OpenCodeError | None:
        """Complete *result* after the end, and say what went wrong.

        Sets its exit status and stderr, and adds to its raw lines.
        """

    def may_repeat(self, result: RunResult) -> bool:
        """Whether the attempt failed before it did anything, for a reason that may pass."""

    def close(self) -> None:
        """Give back files and directories; after the end."""


OpenSource = Callable[[CancelScope], Source]
"""Starts an attempt; what waits in it, and in the source's requests, ends with the scope."""

Review = Callable[[RunResult], OpenSource | None]
"""Looks at a run that ended well: None if that was all, or how a further turn of it is begun.

What it raises is the run's error.
"""
