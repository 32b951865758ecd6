"""Sources of events that do as a test says: no process, and no clock but the test's."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from opencode_sync import OpenCodeError, RunResult, RunStream
from opencode_sync.api.runner import Runner
from opencode_sync.core.lifetime import CancelScope
from opencode_sync.core.request import Request, RunSettings


def step(reason: str = "stop", cost: float = 0.0) -> dict[str, Any]:
    return {"type": "step_finish", "part": {"reason": reason, "cost": cost}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "sessionID": "ses_1", "part": {"text": words}}


def forever() -> threading.Event:
    """What nobody sets."""
    return threading.Event()


RETRY: dict[str, Any] = {"type": "retry", "message": "429 slow down"}


class Script:
    """A source that gives *parts* in turn.

    A list of events is given at once, an Event is waited for, a callable is called, and an
    exception raised. After the last part it has ended.
    """

    label = "run 1 (pid 2)"
    session_id: str | None = None

    def __init__(self, *parts: Any, error: OpenCodeError | None = None, repeats: bool = False):
        self.parts = list(parts)
        self.error = error
        self.repeats = repeats
        self.started_at = time.monotonic()
        self.stopped = threading.Event()
        self.stops = 0
        self.closes = 0
        self.settles = 0

    @property
    def is_over(self) -> bool:
        return self.stopped.is_set() or not any(isinstance(p, threading.Event) for p in self.parts)

    def receive(self, timeout: float | None) -> Sequence[Any] | None:
        if self.stopped.is_set() or not self.parts:
            return None
        part = self.parts[0]
        if isinstance(part, threading.Event):
            end = None if timeout is None else time.monotonic() + timeout
            while not part.wait(0.005):
                if self.stopped.is_set():
                    return None
                if end is not None and time.monotonic() >= end:
                    raise queue.Empty
            part = []
        self.parts.pop(0)
        if isinstance(part, BaseException):
            raise part
        if callable(part):
            part()
            return []
        return part  # type: ignore[no-any-return]

    def stop(self) -> None:
        self.stops += 1
        self.stopped.set()

    def settle(self, result: RunResult) -> OpenCodeError | None:
        self.settles += 1
        return self.error

    def may_repeat(self, result: RunResult) -> bool:
        return self.repeats

    def take_back(self) -> str | None:
        return None

    def close(self) -> None:
        self.closes += 1


class Scripts(Runner):
    """Opens sources one after another; a callable among them is called with the scope."""

    def __init__(self, *sources: Any) -> None:
        super().__init__()
        self.requests: list[Request] = []
        self._sources = iter(sources)

    def _open(self, request: Request, scope: CancelScope, keep_raw: bool) -> Script:
        self.requests.append(request)
        source = next(self._sources)
        return source(scope) if callable(source) else source  # type: ignore[no-any-return]


Told = Callable[[RunStream], None]


def stream_of(
    *sources: Any, on_begin: Told | None = None, on_end: Told | None = None, **options: Any
) -> RunStream:
    """A stream whose attempts are *sources*; *options* as for ``Runner.stream``."""
    settings = RunSettings.of(options)
    return Scripts(*sources).begin("Go", "/", settings, on_begin=on_begin, on_end=on_end)
