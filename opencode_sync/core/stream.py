"""One job's course: attempts, deadlines, limits, from the first process to the result.

    open_source(scope) ------> Source --receive()--> events --+--> log_file
       ^                         |                            +--> RunResult
       +--- again, where safe ---+--settle()--> error         +--> ready
       +--- a further turn ------+--review()

Whoever holds the stream's turn takes the steps, and waits in the first of them alone. At its end,
whichever that is, the source and its tools are gone. Knows events and limits; whether they come
from a process or a server is the source's matter.

The sources of one run, one after another.

    open_source --> attempt, attempt, ... --> the turn ended well --review--> further turn, ...

What several have in common is put together in the result: attempts are counted, and what further
turns leave is added to what there was. Decides nothing; waits for nothing.

One job's life, as its caller sees it.

    the caller's thread -- next(), wait() --> the turn --> a step of the course --> events, result
    any thread ----------- cancel(), close() --> the source ends, and so who waits for it wakes

The caller's thread is the only one that waits here. A stream ends in one way of these: all events
given, an error raised, or closed. In each of them the source and its tools are gone. Knows threads
and their turns; what a step does is the course's matter.
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

from .denials import Tripwire
from .errors import (
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeProcessError,
    OpenCodeServerError,
    OpenCodeTimeoutError,
)
from .events import Event, EventLog, WarningEvent, error_event
from .lifetime import REASON, CancelScope, Flag, Pinned, UnderWay
from .request import Limits, Meter, OpenSource, Review, Source
from .result import RunResult, is_cut_off
from .secrets import Secrets


class Attempts:
    """Of one run.

    Attributes:
        tries: How many sources were opened for the turn under way.
        is_further: It is not the run's first turn.
        has_quoted: Secrets stood in an event, and so in its raw line.
    """

    def __init__(
        self,
        open_source: OpenSource,
        result: RunResult,
        review: Review | None,
        secrets: Secrets,
    ) -> None:
        self.tries = 0
        self.is_further = self.has_quoted = False
        self._open_source = open_source
        self._result = result
        self._review = review
        self._secrets = secrets
        self._stderr = ""  # of turns before
        self._lines: list[str] = []

    def open(self, scope: CancelScope) -> Source:
        """Start the next attempt at the turn; raises what keeps it from starting."""
        self.tries += 1
        if not self.is_further:
            self._result.attempts += 1
        try:
            return self._open_source(scope)
        except OpenCodeError as error:
            self._secrets.clean_error(error)
            raise

    def settle(self, source: Source) -> OpenCodeError | None:
        """Complete the result after the end of *source*, and say what went wrong."""
        result = self._result
        # Of attempts before, at this turn, nothing stays.
        result.stderr, result.raw_stdout_lines = "", self._lines
        error = source.settle(result)
        if error is not None:
            self._secrets.clean_error(error)
        if self.has_quoted:
            lines = self._secrets.clean_lines(result.raw_stdout_lines)
            result.raw_stdout_lines = lines
            if isinstance(error, OpenCodeProcessError):
                error.raw_stdout_lines = list(lines)
        result.stderr = self._stderr + result.stderr
        return error

    def may_be_reviewed(self, error: OpenCodeError | None) -> bool:
        """Whether the turn has an answer: it ended well, or was cut, and a schema tells how much is
        missing.

        Args:
            error: What went wrong with it.
        """
        is_cut = is_cut_off(self._result) and not self._result.truncated
        is_only_cut = is_cut and isinstance(error, OpenCodeIncompleteError)
        return error is None or (is_only_cut and self._review is not None)

    def has_further(self) -> bool:
        """Whether another turn follows one that has an answer; if so, it is the next to open.

        Raises:
            OpenCodeError: What the run is to end with.
        """
        further = None if self._review is None else self._review(self._result)
        if further is None:
            return False
        self._open_source, self.tries, self.is_further = further, 0, True
        self._stderr, self._lines = self._result.stderr, self._result.raw_stdout_lines
        self._result._begin_turn()
        return True


_log = logging.getLogger("opencode_sync")

DRAIN_S = 2.0  # bound on reading what a stopped source had still written

Stopped = Literal["timed_out", "cancelled", "over_budget", "incomplete", "error"]


class Course:
    """The steps of a stream, and the state that they share with it.

    Its methods are for who holds the stream's turn; of the state, ``_cancelled`` may be set by any
    thread, and ``_ended`` is set last, when the source, its tools and the log file are gone.
    """

    def __init__(
        self,
        open_source: OpenSource,
        result: RunResult,
        limits: Limits,
        *,
        log_file: str | os.PathLike[str] | None,
        keep_events: bool,
        review: Review | None,
        secrets: Secrets | None,
        tripwire: Tripwire | None,
        counts_opening: bool = False,
    ) -> None:
        self._ended, self._cancelled = Flag(), Flag()
        self._cancel_reason = ""
        self._scope = CancelScope()  # of all that the source waits for
        self._counts_opening = counts_opening
        self._secrets = secrets or Secrets()
        self._attempts = Attempts(open_source, result, review, self._secrets)
        self._source: Source | None = None
        self._result = result
        self._meter = Meter(limits)
        self._tripwire = tripwire
        self._keep = result.append_event if keep_events else result.fold
        self._ready: deque[Event] = deque()
        self._error: OpenCodeError | None = None
        self._log_file = None if log_file is None else EventLog(log_file)

    # -- under way ---------------------------------------------------------------------------------

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
        broken = None if self._tripwire is None else self._tripwire.broken(events)
        if broken is not None:
            self._take([error_event(broken)])
            self._finish(None, broken)
        elif (overspent := self._meter.overspent(self._result)) is not None:
            self._finish("over_budget", overspent)
        elif (endless := self._meter.endless()) is not None:
            self._finish("incomplete", endless)
        else:
            self._check_time(self._source)

    def _check_time(self, source: Source) -> None:
        timeout = self._meter.timeout()
        # What has ended by itself was in time, however late we are to read it.
        if timeout is not None and not source.is_over:
            self._finish("timed_out", timeout)

    def _take(self, events: Sequence[Event]) -> None:
        cleaned = self._secrets.clean_events(events)
        self._attempts.has_quoted |= cleaned is not events
        events = cleaned
        self._meter.heard(events)
        for event in events:
            self._keep(event)
        if (warning := self._meter.warning(self._result)) is not None:
            ours = WarningEvent(type="warning", message=warning)
            self._keep(ours)
            events = [*events, ours]
        self._ready.extend(events)
        if self._log_file is not None:
            self._log_file.write(events)

    def _begin_attempt(self) -> None:
        if self._log_file is not None and not self._attempts.is_further:
            self._log_file.mark_attempt()
        if self._counts_opening:
            self._meter.start(time.monotonic())
            self._scope.deadline = self._meter.idle_deadline()
        try:
            self._source = source = self._attempts.open(self._scope)
        except (OpenCodeServerError, OpenCodeCancelledError) as error:
            # A request that was cut says that the server did not answer.
            is_refusal = getattr(error, "status_code", None) is not None
            if is_refusal or (instead := self._ended_by()) is None:
                raise
            raise instead from error
        self._meter.start(source.started_at)
        if source.session_id is not None:
            self._result.session_id = source.session_id
        self._scope.deadline = self._meter.deadline()
        if self._result.started_at is None:
            self._result.started_at = time.time() - (time.monotonic() - source.started_at)
        _log.info("%s started, attempt %d", source.label, self._attempts.tries)
        if self._cancelled.is_set():  # it came while the source was being opened
            source.stop()

    def _ended_by(self) -> OpenCodeError | None:
        """The error for what has ended the run, a cancellation or a limit; None for neither."""
        return self._cancelled_error() if self._cancelled.is_set() else self._meter.timeout()

    def _end_attempt(self, source: Source) -> None:
        result, limits = self._result, self._meter.limits
        error = self._attempts.settle(source)
        if self._cancelled.is_set():
            self._end(self._cancelled_error(), "cancelled")
            return
        if self._attempts.may_be_reviewed(error):
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
        """It has an answer, which is the end of the run, unless there is to be a further turn."""
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
                self._end(cause, self._status_of(cause))

    def _status_of(self, error: BaseException) -> Stopped | None:
        """The status of a run whose opening failed with *error*; None for that of its events."""
        if isinstance(error, OpenCodeTimeoutError):
            return "timed_out"
        return "cancelled" if self._cancelled.is_set() else None

    def _cancelled_error(self) -> OpenCodeCancelledError:
        return OpenCodeCancelledError(self._cancel_reason)

    # -- the end, in whichever thread ----------------------------------------------------------

    def _finish(self, status: Stopped | None, error: OpenCodeError | None) -> None:
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
        if status is None and error is not None and self._result.status in ("ok", "denied"):
            status = "error"  # its answer is there, and was lost on the way to the caller
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
        is_loud = status in ("timed_out", "over_budget", "incomplete")
        level = logging.WARNING if is_loud else logging.INFO
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
            self._let_go()
            # Last, so that what a Ctrl-C has cut short here is done again by close().
            self._ended.set()

    def _let_go(self) -> None:
        """Called once all is given back, in whichever thread ends the course."""


__all__ = ["Limits", "OpenSource", "RunStream", "Source"]

_log.addHandler(logging.NullHandler())  # or warnings would go to stderr unasked

TURN_S = 8.0  # bound on waiting for another thread's step, which after a stop takes 5 s at most


class RunStream(Course, Pinned, Iterator[Event]):
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
        secrets: Secrets | None = None,
        tripwire: Tripwire | None = None,
        counts_opening: bool = False,
        on_begin: Callable[[RunStream], None] | None = None,
        on_end: Callable[[RunStream], None] | None = None,
    ) -> None:
        """Start the first attempt.

        Args:
            review: Asked whether there is to be a further turn, with each that ended well.
            secrets: What no error may tell; None for those of the environment.
            tripwire: Asked whether a denied tool has run, with all events.
            counts_opening: The limits count from before the first attempt is opened.
            on_begin: Called before anything is started; from then on the stream can be cancelled.
            on_end: Called once, in whichever thread ends the stream.
        """
        super().__init__(
            open_source,
            result,
            limits,
            log_file=log_file,
            keep_events=keep_events,
            review=review,
            secrets=secrets,
            tripwire=tripwire,
            counts_opening=counts_opening,
        )
        # Reentrant, since a signal's handler may cancel the stream that it interrupted.
        self._turn = threading.RLock()
        self._advancing: int | None = None  # the thread that does, by its ident
        self._pid = os.getpid()
        self._on_end = on_end
        with self._turn:
            try:
                self._advancing = threading.get_ident()
                _live.add(self)
                if on_begin is not None:
                    on_begin(self)
                self._begin_attempt()
            except BaseException as error:
                self._finish(self._status_of(error) or "cancelled", None)
                if isinstance(error, OpenCodeTimeoutError):
                    error.result = self._result
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

    # -- the end, in whichever thread ----------------------------------------------------------

    def _stop(self, reason: str, error: OpenCodeError | None) -> None:
        if self._ended.is_set():
            return
        if os.getpid() != self._pid:  # a forked child owns none of this
            self._ended.set()
            return
        self._cancel_reason = self._cancel_reason or reason
        self._cancelled.set()
        self._scope.cancel()
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

    def _let_go(self) -> None:
        _live.discard(self)
        if self._on_end is not None:
            self._on_end(self)


_live: UnderWay[RunStream] = UnderWay(lambda stream: stream.cancel(REASON))
