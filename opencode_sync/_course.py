"""One job's course: attempts, deadlines, limits, from the first process to the result.

    open_source(scope) ------> Source --receive()--> events --+--> log_file
       ^                         |                            +--> RunResult
       +--- again, where safe ---+--settle()--> error         +--> ready
       +--- a further turn ------+--review()

Whoever holds the stream's turn takes the steps, and waits in the first of them alone. At its end,
whichever that is, the source and its tools are gone. Knows events and limits; whether they come
from a process or a server is the source's matter.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Literal

from ._attempts import Attempts
from ._denials import Tripwire, error_event
from ._eventlog import EventLog
from ._interrupt import CancelScope, Flag
from ._limits import Limits, Meter
from ._secrets import Secrets
from ._source import OpenSource, Review, Source
from .errors import (
    OpenCodeCancelledError,
    OpenCodeError,
    OpenCodeServerError,
    OpenCodeTimeoutError,
)
from .events import Event, WarningEvent
from .result import RunResult

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
            self._take([error_event(type(broken).__name__, str(broken))])
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
