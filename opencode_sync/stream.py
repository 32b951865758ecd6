"""One job's life: attempts, deadlines, limits, from the first process to the result.

    open_source(cancelled) --> Source --receive()--> events --+--> log_file
       ^                         |                            +--> RunResult
       +--- again, where safe ---+--settle()--> error         +--> the caller's loop

The caller's thread is the only one that waits here; cancel() comes from any thread, ends the
source, and so wakes the one that waits. A stream ends in one way of these: all events given, an
error raised, or closed. In each of them the source and its tools are gone. Knows events and limits;
whether they come from a process or a server is the source's matter.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - has to be registered before us, see the end
import contextlib
import logging
import math
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Protocol

from .errors import (
    OpenCodeBudgetError,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeTimeoutError,
)
from .events import Event, OtherEvent, dump_event
from .result import RunResult

_log = logging.getLogger("opencode_sync")

DRAIN_S = 2.0  # bound on reading what a stopped source had still written


class Source(Protocol):
    """Where the events of one attempt come from."""

    @property
    def label(self) -> str:
        """For log lines, such as ``"run 3 (pid 4711)"``."""

    def receive(self, timeout: float | None) -> Sequence[Event] | None:
        """The next events, none where only a sign of life came, or None at the end.

        Raises:
            queue.Empty: If nothing came for *timeout* seconds.
        """

    def stop(self) -> None:
        """End the attempt with its tools; bounded, idempotent, from any thread."""

    def settle(self, result: RunResult) -> OpenCodeError | None:
        """Complete *result* after the end, and say what went wrong."""

    def may_repeat(self, result: RunResult) -> bool:
        """Whether the attempt failed before it did anything, for a reason that may pass."""

    def close(self) -> None:
        """Give back threads, files and directories; after the end."""


OpenSource = Callable[[Callable[[], bool]], Source]
"""Starts an attempt; its argument tells whether the job was cancelled in the meantime."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a run, checked when made.

    Attributes:
        timeout_s: Seconds from the first process's start, over all attempts.
        idle_timeout_s: Seconds without an event or a log line.
        max_cost: US dollars; a run that passes it in mid-work is stopped at that step.
        max_retries: Further attempts after a start-up failure that is safe to repeat.
        retry_delay_s: Seconds between attempts.
    """

    timeout_s: float | None = None
    idle_timeout_s: float | None = None
    max_cost: float | None = None
    max_retries: int = 2
    retry_delay_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("timeout_s", "idle_timeout_s"):
            _check_number(name, getattr(self, name), optional=True, positive=True)
        _check_number("max_cost", self.max_cost, optional=True)
        _check_number("retry_delay_s", self.retry_delay_s)
        _check_number("max_retries", self.max_retries)
        if not isinstance(self.max_retries, int):
            raise OpenCodeConfigError(f"max_retries is {self.max_retries!r}: use a whole number")


def _check_number(
    name: str, value: object, *, optional: bool = False, positive: bool = False
) -> None:
    if value is None and optional:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (positive and value == 0):  # type: ignore[arg-type,operator]
        bound = "above 0" if positive else "of 0 or more"
        none = ", or None for no limit" if optional else ""
        raise OpenCodeConfigError(f"{name} is {value!r}: use a number {bound}{none}")


class RunStream(Iterator[Event]):
    """The events of a run as they come, and its result.

    An iterator and a context manager. Leaving the block, or losing the last reference, ends the
    run with its tools. Iterating raises, after the last event, the OpenCodeError that the run
    ended with. One thread iterates; :meth:`cancel` and :meth:`close` may come from any.
    """

    def __init__(
        self,
        open_source: OpenSource,
        result: RunResult,
        limits: Limits,
        *,
        log_file: str | os.PathLike[str] | None = None,
        keep_events: bool = True,
        on_end: Callable[[RunStream], None] | None = None,
    ) -> None:
        self._source: Source | None = None
        self._ended = threading.Event()
        self._error: OpenCodeError | None = None
        self._open_source = open_source
        self._result = result
        self._limits = limits
        self._keep = result.append_event if keep_events else result.fold
        self._on_end = on_end
        self._ready: deque[Event] = deque()
        self._cancelled = threading.Event()
        self._cancel_reason = ""
        self._advancing = threading.Lock()
        self._started_at: float | None = None
        self._heard_at = 0.0
        self._last_retry = ""
        self._pid = os.getpid()
        self._log_file: BinaryIO | None = _open_log(log_file)
        _live[id(self)] = weakref.ref(self)
        try:
            self._begin_attempt()
        except BaseException:
            self._release()
            raise

    @property
    def result(self) -> RunResult:
        """What the run has produced; partial until the stream has ended."""
        return self._result

    @property
    def session_id(self) -> str | None:
        """The session to continue with; None until the first event."""
        return self._result.session_id

    def __iter__(self) -> RunStream:
        return self

    def __next__(self) -> Event:
        while not self._ready:
            if not self._advance():
                raise StopIteration
        return self._ready.popleft()

    def wait(self) -> RunResult:
        """Let the run end, and return its result; events not yet taken are skipped.

        Raises:
            OpenCodeError: As iterating does.
        """
        while self._advance():
            self._ready.clear()
        return self._result

    def cancel(self, reason: str = "the run was cancelled") -> None:
        """End the run with its tools; who waits for it gets OpenCodeCancelledError.

        Returns when the tools are gone. Without effect on a run that has ended.
        """
        self._stop(reason, OpenCodeCancelledError(reason, result=self._result))

    def wait_ended(self, timeout: float | None = None) -> bool:
        """Whether the run has ended, after at most *timeout* seconds; takes no events."""
        return self._ended.wait(timeout)

    def close(self) -> None:
        """End the run with its tools, if it is under way; iteration then just ends."""
        self._stop("the stream was closed", None)

    def __enter__(self) -> RunStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_ended", None) or self._ended.is_set():
            return
        with contextlib.suppress(Exception):  # a finaliser has nobody to raise to
            self.close()

    # -- the caller's thread -------------------------------------------------------------------

    def _advance(self) -> bool:
        """Take the next events; False at the end. Raises the error that the run ended with."""
        if not self._advancing.acquire(blocking=False):
            raise OpenCodeConfigError("this stream is being iterated by another thread")
        try:
            if self._ended.is_set():
                error, self._error = self._error, None
                if error is not None:
                    raise error
                return False
            try:
                self._receive()
            except BaseException:  # Ctrl-C, or a helper thread's error
                self._finish("cancelled", None)
                raise
            return True
        finally:
            self._advancing.release()

    def _receive(self) -> None:
        assert self._source is not None
        try:
            events = self._source.receive(self._patience())
        except queue.Empty:
            if (timeout := self._timeout()) is not None:
                self._finish("timed_out", timeout)
            return
        if events is None:
            self._end_attempt()
            return
        self._heard_at = time.monotonic()
        self._take(events)
        if self._over_budget():
            self._finish("over_budget", self._budget_error())
        elif (timeout := self._timeout()) is not None:
            self._finish("timed_out", timeout)

    def _take(self, events: Iterable[Event]) -> None:
        events = list(events)
        self._write_log(events)
        for event in events:
            self._keep(event)
            if event.get("type") == "retry":
                self._last_retry = str(event.get("message", ""))
        self._ready.extend(events)

    def _write_log(self, events: Iterable[Event]) -> None:
        if self._log_file is None:
            return
        data = memoryview(b"".join(map(dump_event, events)))
        try:
            while data:
                data = data[self._log_file.write(data) :]
        except OSError as error:
            raise OpenCodeError(
                f"log_file {self._log_file.name!r}: {error.strerror}; the run was stopped",
                result=self._result,
            ) from error

    def _patience(self) -> float | None:
        """Seconds until the next limit; None where there is none."""
        limits, now = self._limits, time.monotonic()
        ends = []
        if limits.timeout_s is not None and self._started_at is not None:
            ends.append(self._started_at + limits.timeout_s)
        if limits.idle_timeout_s is not None:
            # Only our own waiting counts: a slow consumer does not make the run idle.
            self._heard_at = now
            ends.append(now + limits.idle_timeout_s)
        return max(0.0, min(ends) - now) if ends else None

    def _timeout(self) -> OpenCodeTimeoutError | None:
        now, elapsed = time.monotonic(), self._elapsed()
        for name, since in (("timeout_s", self._started_at), ("idle_timeout_s", self._heard_at)):
            limit = getattr(self._limits, name)
            if limit is None or since is None or now < since + limit:
                continue
            what = "nothing was heard for" if name == "idle_timeout_s" else "the run took over"
            retry = f"; the provider was being retried: {self._last_retry}" if self._last_retry else ""
            message = f"{what} {limit:g} s ({name}); stopped after {elapsed:.1f} s{retry}"
            return OpenCodeTimeoutError(message, limit=name, limit_s=limit, elapsed_s=elapsed)
        return None

    def _over_budget(self) -> bool:
        # A run whose last step has closed is done, and is not taken from the user for its price.
        limit, result = self._limits.max_cost, self._result
        is_done = result.finish_reason not in (None, "tool-calls")
        return limit is not None and result.total_cost > limit and not is_done

    def _budget_error(self) -> OpenCodeBudgetError:
        limit, spent = self._limits.max_cost, self._result.total_cost
        return OpenCodeBudgetError(
            f"max_cost of ${limit:g} passed: ${spent:g} spent after {self._result.turns} steps",
            limit=limit,
            spent=spent,
        )

    def _begin_attempt(self) -> None:
        result = self._result
        result.attempts += 1
        mark: OtherEvent = {"type": "attempt", "timestamp": time.time_ns() // 1_000_000}
        self._write_log([mark])
        self._source = self._open_source(self._cancelled.is_set)
        self._heard_at = time.monotonic()
        if self._started_at is None:
            self._started_at = self._heard_at
        _log.info("%s started, attempt %d", self._source.label, result.attempts)
        if self._cancelled.is_set():  # it came while the source was being opened
            self._source.stop()

    def _end_attempt(self) -> None:
        assert self._source is not None
        result, limits = self._result, self._limits
        error = self._source.settle(result)
        if self._cancelled.is_set():
            self._finish("cancelled", self._cancelled_error())
            return
        again = error is not None and result.attempts <= limits.max_retries
        if not again or not self._source.may_repeat(result):
            self._end(error)
            return
        _log.warning("%s failed to start, will be repeated: %s", self._source.label, error)
        self._source.close()
        self._source = None
        if self._cancelled.wait(min(limits.retry_delay_s, self._patience() or math.inf)):
            self._end(self._cancelled_error(), "cancelled")
        elif (timeout := self._timeout()) is not None:
            self._end(timeout, "timed_out")
        else:
            self._begin_attempt()

    def _cancelled_error(self) -> OpenCodeCancelledError | None:
        reason = self._cancel_reason
        return OpenCodeCancelledError(reason, result=self._result) if reason else None

    # -- the end, in whichever thread ----------------------------------------------------------

    def _stop(self, reason: str, error: OpenCodeError | None) -> None:
        if self._ended.is_set():
            return
        if os.getpid() != self._pid:  # a forked child owns none of this
            self._ended.set()
            return
        self._cancel_reason = self._cancel_reason or reason
        self._cancelled.set()
        source = self._source
        if source is not None:
            source.stop()
        # Whoever is advancing sees the source's end, and finishes; else it is up to us.
        if self._advancing.acquire(blocking=False):
            try:
                if not self._ended.is_set():
                    self._finish("cancelled", error)
                    self._ready.clear()
            finally:
                self._advancing.release()

    def _finish(
        self,
        status: Literal["timed_out", "cancelled", "over_budget"],
        error: OpenCodeError | None,
    ) -> None:
        """End from outside: stop the source, take what it had still written, and end."""
        source = self._source
        if source is not None:
            source.stop()
            deadline = time.monotonic() + DRAIN_S
            with contextlib.suppress(queue.Empty):
                while (events := source.receive(max(0.0, deadline - time.monotonic()))) is not None:
                    self._take(events)
            source.settle(self._result)
        self._end(error, status)

    def _end(
        self,
        error: OpenCodeError | None,
        status: Literal["timed_out", "cancelled", "over_budget"] | None = None,
    ) -> None:
        if status is not None:
            self._result.mark_stopped(status)
        if error is not None:
            error.result = self._result
        self._result.duration_s = self._elapsed()
        self._error = error
        label = self._source.label if self._source is not None else "run"
        _log.info("%s ended after %.1f s: %s", label, self._elapsed(), self._result.status)
        self._release()

    def _release(self) -> None:
        source, self._source = self._source, None
        try:
            if source is not None:
                source.close()
        finally:
            if self._log_file is not None:
                self._log_file.close()
            self._ended.set()
            _live.pop(id(self), None)
            if self._on_end is not None:
                self._on_end(self)

    def _elapsed(self) -> float:
        return 0.0 if self._started_at is None else time.monotonic() - self._started_at


def _open_log(path: str | os.PathLike[str] | None) -> BinaryIO | None:
    if path is None:
        return None
    try:
        # Unbuffered, so that each event is in the file before the next one is waited for.
        return open(Path(path).expanduser(), "wb", buffering=0)  # noqa: SIM115 - closed in _release
    except OSError as error:
        raise OpenCodeConfigError(f"log_file {os.fspath(path)!r}: {error.strerror}") from error


# Streams under way, ended at the interpreter's exit. A plain dict, whose single operations are
# atomic: a lock could be held by the very thread that a finaliser interrupts.
_live: dict[int, weakref.ref[RunStream]] = {}


def _stop_all() -> None:
    for ref in list(_live.values()):
        if (stream := ref()) is not None:
            stream.cancel("the interpreter is shutting down")


# concurrent.futures waits for its workers before atexit's own calls are made, and runs that they
# wait for have to end before that. These calls are made last registered first, hence the import
# of concurrent.futures.thread above. CPython has no public door to this list (bpo-39812).
getattr(threading, "_register_atexit", atexit.register)(_stop_all)
