"""One job's life: attempts, deadlines, limits, from the first process to the result.

    open_source(cancelled) --> Source --receive()--> events --+--> log_file
       ^                         |                            +--> RunResult
       +--- again, where safe ---+--settle()--> error         +--> the caller's loop
       +--- a further turn ------+--review()

The caller's thread is the only one that waits here; cancel() comes from any thread, ends the
source, and so wakes the one that waits. A stream ends in one way of these: all events given, an
error raised, or closed. In each of them the source and its tools are gone. Knows events and limits;
whether they come from a process or a server is the source's matter.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Literal

from ._attempts import Attempts
from ._eventlog import EventLog
from ._exits import REASON, UnderWay
from ._interrupt import Flag
from ._limits import Limits, Meter
from ._pinned import Pinned
from ._source import OpenSource, Review, Source
from .errors import OpenCodeCancelledError, OpenCodeConfigError, OpenCodeError
from .events import Event
from .result import RunResult

__all__ = ["Limits", "OpenSource", "RunStream", "Source"]

_log = logging.getLogger("opencode_sync")
_log.addHandler(logging.NullHandler())  # or warnings would go to stderr unasked

DRAIN_S = 2.0  # bound on reading what a stopped source had still written
TURN_S = 8.0  # bound on waiting for another thread's step, which after a stop takes 5 s at most

Stopped = Literal["timed_out", "cancelled", "over_budget"]


class RunStream(Pinned, Iterator[Event]):
    """The events of a run as they come, and its result.

    An iterator and a context manager. Leaving the block, or losing the last reference, ends the
    run with its tools. Iterating raises, after the last event, the OpenCodeError that the run
    ended with. One thread iterates; :meth:`cancel` and :meth:`close` may come from any.

    Limits are looked at while the stream is iterated: a consumer that stays away from it for an
    hour finds a run that passed its ``timeout_s`` in that hour stopped when it comes back.
    """

    def __init__(
        self,
        open_source: OpenSource,
        result: RunResult,
        limits: Limits,
        *,
        log_file: str | os.PathLike[str] | None = None,
        keep_events: bool = True,
        review: Review | None = None,
        on_begin: Callable[[RunStream], None] | None = None,
        on_end: Callable[[RunStream], None] | None = None,
    ) -> None:
        """Start the first attempt.

        Args:
            review: Asked whether there is to be a further turn, with each that ended well.
            on_begin: Called before anything is started; from then on the stream can be cancelled.
            on_end: Called once, in whichever thread ends the stream.
        """
        self._ended, self._cancelled = Flag(), Flag()
        self._cancel_reason = ""
        # Reentrant, since a signal's handler may cancel the stream that it interrupted.
        self._turn = threading.RLock()
        self._advancing: int | None = None  # the thread that does, by its ident
        self._pid = os.getpid()
        self._attempts = Attempts(open_source, result, review)
        self._source: Source | None = None
        self._result = result
        self._meter = Meter(limits)
        self._keep = result.append_event if keep_events else result.fold
        self._ready: deque[Event] = deque()
        self._error: OpenCodeError | None = None
        self._on_end = on_end
        self._log_file = None if log_file is None else EventLog(log_file)
        with self._turn:
            try:
                self._advancing = threading.get_ident()
                _live.add(self)
                if on_begin is not None:
                    on_begin(self)
                self._begin_attempt()
            except BaseException:
                self._finish("cancelled", None)
                raise
            finally:
                self._advancing = None

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
        while True:
            # Asked for and taken in one step: a close() in another thread empties it.
            with contextlib.suppress(IndexError):
                return self._ready.popleft()
            if not self._advance():
                raise StopIteration

    def wait(self) -> RunResult:
        """Let the run end, and return its result; events not yet taken are skipped.

        Raises:
            OpenCodeError: As iterating does.
        """
        while self._advance():
            self._ready.clear()
        return self._result

    def wait_ended(self, timeout: float | None = None) -> bool:
        """Whether the run has ended, after at most *timeout* seconds; takes no events.

        In a signal's handler that interrupted who is to end it, this waits for nothing.
        """
        if self._advancing == threading.get_ident():
            return self._ended.is_set()
        return self._ended.wait(timeout)

    def cancel(self, reason: str = "the run was cancelled") -> None:
        """End the run with its tools; who waits for it gets OpenCodeCancelledError.

        Returns when the tools are gone. Without effect on a run that has ended.
        """
        self._stop(reason, OpenCodeCancelledError(reason, result=self._result))

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
        if os.getpid() != self._pid:
            raise OpenCodeConfigError("this stream belongs to the process that was forked from")
        if self._advancing is not None:
            raise OpenCodeConfigError("this stream is being iterated already: one at a time")
        with self._turn:
            if self._ended.is_set():
                error, self._error = self._error, None
                if error is not None:
                    raise error
                return False
            try:
                self._advancing = threading.get_ident()
                self._receive()
            except BaseException as error:  # Ctrl-C, or a fault
                if isinstance(error, OpenCodeError):
                    error.result = self._result
                if not self._ended.is_set():
                    self._finish("cancelled", None)
                raise
            finally:
                self._advancing = None
            return True

    def _receive(self) -> None:
        assert self._source is not None
        try:
            events = self._source.receive(self._meter.patience())
        except queue.Empty:
            self._check_time(self._source)
            return
        if events is None:
            self._end_attempt(self._source)
            return
        self._take(events)
        if (overspent := self._meter.overspent(self._result)) is not None:
            self._finish("over_budget", overspent)
        else:
            self._check_time(self._source)

    def _check_time(self, source: Source) -> None:
        timeout = self._meter.timeout()
        # What has ended by itself was in time, however late we are to read it.
        if timeout is not None and not source.is_over:
            self._finish("timed_out", timeout)

    def _take(self, events: Sequence[Event]) -> None:
        self._meter.heard(events)
        for event in events:
            self._keep(event)
        self._ready.extend(events)
        if self._log_file is not None:
            self._log_file.write(events)

    def _begin_attempt(self) -> None:
        if self._log_file is not None and not self._attempts.is_further:
            self._log_file.mark_attempt()
        self._source = source = self._attempts.open(self._cancelled.is_set)
        self._meter.start(source.started_at)
        if self._result.started_at is None:
            self._result.started_at = time.time() - (time.monotonic() - source.started_at)
        _log.info("%s started, attempt %d", source.label, self._attempts.tries)
        if self._cancelled.is_set():  # it came while the source was being opened
            source.stop()

    def _end_attempt(self, source: Source) -> None:
        result, limits = self._result, self._meter.limits
        error = self._attempts.settle(source)
        if self._cancelled.is_set():
            self._end(self._cancelled_error(), "cancelled")
            return
        if error is None:
            self._end_turn(source)
            return
        if self._attempts.tries > limits.max_retries or not source.may_repeat(result):
            self._end(error)
            return
        delay_s = min(limits.retry_delay_s, self._meter.left(), threading.TIMEOUT_MAX)
        # Without the error's text, which is the child's.
        _log.warning(
            "%s failed to start (exit status %s), once more in %.1f s",
            source.label,
            result.exit_code,
            delay_s,
        )
        self._begin_another(source, delay_s)

    def _end_turn(self, source: Source) -> None:
        """It ended well, which is the end of the run, unless there is to be a further turn."""
        try:
            has_further = self._attempts.has_further()
        except OpenCodeError as error:
            self._end(error)
            return
        if not has_further:
            self._end(None)
        elif (overspent := self._meter.overspent(self._result)) is not None:
            self._end(overspent, "over_budget")
        else:
            self._begin_another(source)

    def _begin_another(self, source: Source, delay_s: float = 0.0) -> None:
        self._source = None
        source.close()
        if self._cancelled.wait(delay_s):
            self._end(self._cancelled_error(), "cancelled")
        elif self._meter.left() <= 0:
            self._end(self._meter.timeout(), "timed_out")
        else:
            try:
                self._begin_attempt()
            except OpenCodeError as cause:
                self._end(cause, "cancelled" if self._cancelled.is_set() else None)

    def _cancelled_error(self) -> OpenCodeCancelledError:
        return OpenCodeCancelledError(self._cancel_reason)

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
            _log.info("%s is stopped: %s", source.label, reason)
            source.stop()
        # Whoever is advancing sees the source's end, and finishes; else it is up to us.
        if self._turn.acquire(timeout=TURN_S):
            try:
                if self._advancing is None and not self._ended.is_set():
                    self._finish("cancelled", error)
                    self._ready.clear()
            finally:
                self._turn.release()

    def _finish(self, status: Stopped, error: OpenCodeError | None) -> None:
        """End from outside: stop the source, take what it had still written, and end."""
        source = self._source
        try:
            if source is not None:
                source.stop()
                self._drain(source)
                self._attempts.settle(source)
        finally:
            self._end(error, status)

    def _drain(self, source: Source) -> None:
        deadline = time.monotonic() + DRAIN_S
        with contextlib.suppress(queue.Empty):
            while (left_s := deadline - time.monotonic()) > 0:
                if (events := source.receive(left_s)) is None:
                    return
                self._take(events)

    def _end(self, error: OpenCodeError | None, status: Stopped | None = None) -> None:
        if status is not None:
            self._result.mark_stopped(status)
        if error is not None:
            error.result = self._result
        self._result.duration_s = elapsed = self._meter.elapsed()
        self._error = error
        label = self._source.label if self._source is not None else "run"
        # Of the error no text: it quotes the child.
        limit = getattr(error, "limit", None) if status == "timed_out" else None
        outcome = f"{self._result.status} ({limit})" if limit else self._result.status
        level = logging.WARNING if status in ("timed_out", "over_budget") else logging.INFO
        _log.log(level, "%s ended after %.1f s: %s", label, elapsed, outcome)
        self._release()

    def _release(self) -> None:
        source, self._source = self._source, None
        try:
            if source is not None:
                source.close()
        finally:
            if self._log_file is not None:
                self._log_file.close()
            _live.discard(self)
            if self._on_end is not None:
                self._on_end(self)
            # Last, so that what a Ctrl-C has cut short here is done again by close().
            self._ended.set()


_live: UnderWay[RunStream] = UnderWay(lambda stream: stream.cancel(REASON))
