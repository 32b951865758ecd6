"""One run: its attempts, its limits, and its life as the caller sees it.

    the caller's thread -- next(), wait() --> RunStream --> events, result
    any thread ----------- cancel(), close() --> stops the source, which wakes the caller

    start an attempt --> Source --receive()--> events --> result, log file, caller
      ^   ^                +--settle()--> error, or an answer
      |   +-- another attempt, where the failed one did nothing yet
      |   +-- the next model, where this one is out (Fallback)
      +------ a repair round, where the answer does not fit its schema (SchemaReview)

The caller's thread is the only one that waits here. A stream ends in one of three ways: all events
given, an error raised, or closed. In each of them the source, its tools and the log file are gone.
Knows events, limits and threads; whether events come from a process or a server is the source's
matter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol

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
from .events import ErrorBody, ErrorEvent, Event, EventLog, WarningEvent, error_event
from .fallback import Fallback
from .lifetime import REASON, CancelScope, Flag, Pinned, UnderWay
from .limits import Meter
from .reading import error_info
from .request import Request, RunSettings, SchemaReview, Source
from .result import RunResult, Stopped, is_cut_off
from .secrets import Secrets

_log = logging.getLogger("opencode_sync")
_log.addHandler(logging.NullHandler())  # or warnings would go to stderr unasked

DRAIN_S = 2.0  # bound on reading what a stopped source had still written
LOCK_S = 8.0  # bound on waiting for the advancing thread, which after a stop takes 5 s at most
CANCEL_S = 8.0  # bound on waiting for a cancelled run to end; stopping one takes 5 s at most


class Opener(Protocol):
    """What runs are started on: a client, with a process per run, or a server."""

    def _open(self, request: Request, scope: CancelScope, keep_raw: bool) -> Source:
        """Start one attempt at *request*; everything that waits in it ends with *scope*."""

    def _counts_opening(self, request: Request) -> bool:
        """Whether the time that an attempt takes to open counts for the run's limits."""

    def _stream_begins(self, stream: RunStream) -> None:
        """Called before anything is started; what it raises keeps the run from starting."""

    def _stream_ended(self, stream: RunStream) -> None:
        """Called when the stream has ended, in the thread that ended it."""


class RunStream(Pinned, Iterator[Event]):
    """The events of a run as they come, and its result.

    An iterator and a context manager. Leaving the block, or losing the last reference, ends the
    run with its tools. Iterating raises, after the last event, the OpenCodeError that the run
    ended with. One thread iterates; :meth:`cancel` and :meth:`close` may come from any.

    Limits are checked while the stream is iterated: if a run passes its ``timeout_s`` while the
    consumer does something else, it is stopped when the consumer comes back.
    """

    def __init__(
        self,
        runner: Opener,
        request: Request,
        settings: RunSettings,
        *,
        on_begin: Callable[[RunStream], None] | None = None,
        on_end: Callable[[RunStream], None] | None = None,
    ) -> None:
        """Start the first attempt.

        Args:
            on_begin: Called before anything is started; from then on the stream can be cancelled.
            on_end: Called once, in the thread that ends the stream.
        """
        self._runner = runner
        self._request = request  # of the current round: the prompt, then each repair
        self._keep_raw = settings.keep_raw
        self._result = RunResult(prompt=request.prompt, workspace=str(request.workspace))
        self._keep = self._result.append_event if settings.keep_events else self._result.fold
        self._meter = Meter(settings.limits)
        self._review = SchemaReview(request, settings.limits.max_repairs)
        self._secrets = request.secrets or Secrets()
        self._tripwire = Tripwire(request.cfg)
        self._fallback = Fallback(request.cfg, settings.passed_over)
        self._log_file = None if settings.log_file is None else EventLog(settings.log_file)
        self._on_end = on_end

        self._scope = CancelScope()  # of everything that the source waits for
        self._source: Source | None = None
        self._tries = 0  # attempts at the current round
        self._earlier_stderr = ""  # from the rounds before
        self._earlier_lines: list[str] = []
        self._has_secrets = False  # an event had some, so its raw line has too
        self._ready: deque[Event] = deque()
        self._error: OpenCodeError | None = None
        self._cancel_reason = ""

        # Reentrant, since a signal's handler may cancel the stream that it interrupted.
        self._lock = threading.RLock()
        self._advancing: int | None = None  # the thread that does, by its ident
        self._waiting: list[int] = []  # threads in next() or wait(); its operations are atomic
        self._pid = os.getpid()
        self._cancelled = Flag()  # set by any thread
        self._ended = Flag()  # set last, when the source, its tools and the log file are gone
        with self._lock:
            try:
                self._advancing = threading.get_ident()
                _live.add(self)
                runner._stream_begins(self)
                if on_begin is not None:
                    on_begin(self)
                if passed_over := self._fallback.pass_over():
                    self._take(passed_over)
                    self._ask(self._fallback.model)
                self._start_attempt()
            except BaseException as error:
                self._stop(self._status_of(error), None)
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
        # Asked for and taken in one step: a close() in another thread empties it.
        with contextlib.suppress(IndexError):
            return self._ready.popleft()
        self._waiting.append(threading.get_ident())
        try:
            while self._advance():
                with contextlib.suppress(IndexError):
                    return self._ready.popleft()
            raise StopIteration
        finally:
            self._waiting.pop()

    def wait(self) -> RunResult:
        """Let the run end, and return its result; events not yet taken are skipped.

        Raises:
            OpenCodeError: As iterating does.
        """
        self._waiting.append(threading.get_ident())
        try:
            while self._advance():
                self._ready.clear()
            return self._result
        finally:
            self._waiting.pop()

    def wait_ended(self, timeout: float | None = None) -> bool:
        """Whether the run has ended, after at most *timeout* seconds; takes no events.

        In a signal's handler that interrupted the thread which advances the stream, this returns
        at once.
        """
        if self._advancing == threading.get_ident():
            return self._ended.is_set()
        return self._ended.wait(timeout)

    def cancel(self, reason: str = "the run was cancelled") -> None:
        """End the run with its tools; the thread that waits for it gets OpenCodeCancelledError.

        Returns when the tools are gone. Without effect on a run that has ended.
        """
        self._cancel(reason, OpenCodeCancelledError(reason, result=self._result))

    def close(self) -> None:
        """End the run with its tools, if it is under way; iteration then just ends.

        A thread that is waiting for it meanwhile gets OpenCodeCancelledError.
        """
        self._cancel("the stream was closed", None)

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

    # -- the loop, in the caller's thread ------------------------------------------------------

    def _advance(self) -> bool:
        """Take the next events; False at the end. Raises the error that the run ended with."""
        if os.getpid() != self._pid:
            raise OpenCodeConfigError("this stream belongs to the process that was forked from")
        if self._advancing is not None:
            raise OpenCodeConfigError("this stream is being iterated already: one at a time")
        with self._lock:
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
                    self._stop("cancelled", None)
                raise
            finally:
                self._advancing = None
            return True

    def _receive(self) -> None:
        """Wait for events, and do what they or their absence call for."""
        source, meter = self._source, self._meter
        assert source is not None
        refusal: ErrorBody | None = None
        try:
            events = source.receive(meter.patience())
        except queue.Empty:
            events = ()  # only the clock is left to look at
        else:
            if events is None:
                self._end_attempt(source)
                return
            # A source that has ended by itself may have had its answer since.
            events, refusal = self._fallback.read(events, may_leave=not source.is_over)
            self._take(events)
        if (broken := self._tripwire.broken(events)) is not None:
            self._take([error_event(broken)])
            self._stop(None, broken)
        elif (overspent := meter.overspent(self._result)) is not None:
            self._stop("over_budget", overspent)
        elif (endless := meter.endless()) is not None:
            self._stop("incomplete", endless)
        # A source that has ended by itself was in time, however late we are to read it.
        elif (timeout := meter.timeout()) is not None and not source.is_over:
            self._stop("timed_out", timeout)
        elif refusal is not None:
            self._abandon(source, refusal)

    def _take(self, events: Sequence[Event]) -> None:
        """Keep *events* in the result, for the caller and in the log file."""
        cleaned = self._secrets.clean_events(events)
        self._has_secrets |= cleaned is not events
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

    def _start_attempt(self) -> None:
        result, meter, request = self._result, self._meter, self._request
        result.model = request.cfg.model
        self._tries += 1
        if not request.is_repair:
            result.attempts += 1
            if self._log_file is not None:
                self._log_file.mark_attempt()
        if self._runner._counts_opening(request):
            meter.start(time.monotonic())
            self._scope.deadline = meter.idle_deadline()
        try:
            self._source = source = self._runner._open(request, self._scope, self._keep_raw)
        except OpenCodeError as error:
            self._secrets.clean_error(error)
            if (instead := self._instead_of(error)) is None:
                raise
            raise instead from error
        meter.start(source.started_at)
        if source.session_id is not None:
            result.session_id = source.session_id
        self._scope.deadline = meter.deadline()
        if result.started_at is None:
            result.started_at = time.time() - (time.monotonic() - source.started_at)
        _log.info("%s started, attempt %d", source.label, self._tries)
        if self._cancelled.is_set():  # while the source was being opened
            source.stop()

    def _instead_of(self, error: OpenCodeError) -> OpenCodeError | None:
        """The cancellation or the limit that made an opening fail with *error*, if one did.

        A request that we cut short ourselves says only that the server did not answer.
        """
        is_answer = getattr(error, "status_code", None) is not None
        if is_answer or not isinstance(error, (OpenCodeServerError, OpenCodeCancelledError)):
            return None
        return self._cancelled_error() if self._cancelled.is_set() else self._meter.timeout()

    def _end_attempt(self, source: Source) -> None:
        """Go on after a source has ended: end the run, send a repair, or try again."""
        result, limits = self._result, self._meter.limits
        error = self._settle(source)
        if self._cancelled.is_set():
            self._end("cancelled", self._cancelled_error())
        elif self._has_answer(error):
            self._end_round(source)
        elif self._tries <= limits.startup_retries and source.may_repeat(result):
            delay_s = min(limits.startup_retry_delay_s, self._meter.left(), threading.TIMEOUT_MAX)
            # Without the error's text, which is the child's.
            _log.warning(
                "%s failed to start (exit status %s), once more in %.1f s",
                source.label,
                result.exit_code,
                delay_s,
            )
            self._start_another(source, delay_s)
        elif error is not None and (reason := self._fallback.blame(result.error, error)):
            self._fall_back(source, reason, error)
        else:
            self._end(None, error)

    def _has_answer(self, error: OpenCodeError | None) -> bool:
        """Whether the round ended well; a cut answer is one too where a schema can judge it."""
        if error is None:
            return True
        is_cut = is_cut_off(self._result) and not self._result.truncated
        is_only_cut = is_cut and isinstance(error, OpenCodeIncompleteError)
        return is_only_cut and self._request.output is not None

    def _end_round(self, source: Source) -> None:
        """End the run with its answer, or send the answer back where it does not fit."""
        try:
            repair = self._review.repair(self._result)
        except OpenCodeError as error:
            self._end(None, error)
            return
        if repair is None:
            self._end(None, None)
            return
        self._request, self._tries = repair, 0
        self._ask(self._fallback.model)
        self._earlier_stderr = self._result.stderr
        self._earlier_lines = self._result.raw_stdout_lines
        self._result._begin_turn()
        if (overspent := self._meter.overspent(self._result)) is not None:
            self._end("over_budget", overspent)
        else:
            self._start_another(source)

    def _abandon(self, source: Source, refusal: ErrorBody) -> None:
        """End an attempt whose model OpenCode would ask again, in vain or for long."""
        source.stop()
        self._drain(source)
        self._settle(source)
        if self._cancelled.is_set():
            self._end("cancelled", self._cancelled_error())
            return
        if not self._fallback.has_next:
            self._take([ErrorEvent(type="error", error=refusal)])
        error = OpenCodeProcessError(None, reason=str(error_info(refusal)))
        self._secrets.clean_error(error)
        self._fall_back(source, refusal, error)

    def _fall_back(self, source: Source, reason: ErrorBody, error: OpenCodeError) -> None:
        """Start anew with the next model, or end the run with *error* where none is left."""
        has_next, result = self._fallback.has_next, self._result
        self._take(self._fallback.leave(reason))
        if not has_next:
            self._end(None, error)
        elif (overspent := self._meter.overspent(result)) is not None:
            self._end("over_budget", overspent)
        else:
            _log.warning("%s is out; %s is asked", result.tried[-1].model, self._fallback.model)
            result.exit_code = None
            result.attempts += self._request.is_repair  # which is not counted otherwise
            self._tries = 0
            try:
                self._ask(self._fallback.model, source.take_back())
            except OpenCodeError as unusable:  # by now: a file to attach may have gone
                self._end("error", unusable)
            else:
                self._start_another(source)

    def _ask(self, model: str | None, session_id: str | None = None) -> None:
        """Have the next attempt ask *model*, in the session that the prompt was taken out of."""
        cfg = self._request.cfg.replace(model=model)
        if session_id is not None:
            cfg = cfg.replace(session_id=session_id, continue_session=False, fork=False)
        self._request = dataclasses.replace(self._request, cfg=cfg)

    def _start_another(self, source: Source, delay_s: float = 0.0) -> None:
        """Start the next attempt, in the place of *source*."""
        self._source = None
        source.close()
        if self._cancelled.wait(delay_s):
            self._end("cancelled", self._cancelled_error())
        elif self._meter.left() <= 0:
            self._end("timed_out", self._meter.timeout())
        else:
            try:
                self._start_attempt()
            except OpenCodeError as error:
                self._end(self._status_of(error), error)

    # -- the end, in any thread ----------------------------------------------------------------

    def _cancel(self, reason: str, error: OpenCodeError | None) -> None:
        if self._ended.is_set():
            return
        if os.getpid() != self._pid:  # a forked child does not own it
            self._ended.set()
            return
        self._cancel_reason = self._cancel_reason or reason
        self._cancelled.set()
        self._scope.cancel()
        source = self._source
        if source is not None:
            _log.info("%s is stopped: %s", source.label, reason)
            source.stop()
        # A thread that is advancing sees the source's end, and ends the run; else it is up to us.
        if self._lock.acquire(timeout=LOCK_S):
            try:
                if self._advancing is None and not self._ended.is_set():
                    # One that waits may be between two events, and not advancing.
                    waited_for = self._cancelled_error() if self._waiting else None
                    self._stop("cancelled", error or waited_for)
                    self._ready.clear()
            finally:
                self._lock.release()

    def _stop(self, status: Stopped | None, error: OpenCodeError | None) -> None:
        """Stop the source, take what it had still written, and end the run."""
        source = self._source
        try:
            if source is not None:
                source.stop()
                self._drain(source)
                self._settle(source)
        finally:
            self._end(status, error)

    def _drain(self, source: Source) -> None:
        deadline = time.monotonic() + DRAIN_S
        with contextlib.suppress(queue.Empty):
            while (left_s := deadline - time.monotonic()) > 0:
                if (events := source.receive(left_s)) is None:
                    return
                self._take(self._fallback.read(events)[0])

    def _settle(self, source: Source) -> OpenCodeError | None:
        """Complete the result after the end of *source*, and return what went wrong."""
        result = self._result
        # The output of failed attempts at this round is dropped; that of earlier rounds stays.
        result.stderr, result.raw_stdout_lines = "", list(self._earlier_lines)
        error = source.settle(result)
        self._fallback.asked(result.model)
        if error is not None:
            self._secrets.clean_error(error)
        if self._has_secrets:
            lines = self._secrets.clean_lines(result.raw_stdout_lines)
            result.raw_stdout_lines = lines
            if isinstance(error, OpenCodeProcessError):
                error.raw_stdout_lines = list(lines)
        result.stderr = self._earlier_stderr + result.stderr
        return error

    def _end(self, status: Stopped | None, error: OpenCodeError | None) -> None:
        """Complete the result, and give everything back.

        Args:
            status: None for the one that the events tell.
            error: Raised where the run is waited for.
        """
        result = self._result
        if status is None and error is not None and result.status in ("ok", "denied"):
            status = "error"  # its answer is there, and was lost on the way to the caller
        if status is not None:
            result.mark_stopped(status)
        if error is not None:
            error.result = result
        result.duration_s = elapsed = self._meter.elapsed()
        self._error = error
        label = self._source.label if self._source is not None else "run"
        # Without the error's text, which may quote the child.
        limit = getattr(error, "limit", None) if status == "timed_out" else None
        outcome = f"{result.status} ({limit})" if limit else result.status
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
            _live.discard(self)
            self._runner._stream_ended(self)
            if self._on_end is not None:
                self._on_end(self)
            # Last, so that what a Ctrl-C has cut short here is done again by close().
            self._ended.set()

    def _status_of(self, error: BaseException) -> Stopped:
        """The status of a run whose opening failed with *error*."""
        if isinstance(error, OpenCodeTimeoutError):
            return "timed_out"
        is_failure = isinstance(error, OpenCodeError) and not self._cancelled.is_set()
        if is_failure and not isinstance(error, OpenCodeCancelledError):
            return "error"
        return "cancelled"  # a Ctrl-C too

    def _cancelled_error(self) -> OpenCodeCancelledError:
        return OpenCodeCancelledError(self._cancel_reason)


_live: UnderWay[RunStream] = UnderWay(lambda stream: stream.cancel(REASON))


def cancel_together(streams: Sequence[RunStream], reason: str) -> None:
    """End runs at the same time, not one after the other; returns when all have ended."""
    if not streams:
        return
    first, *others = streams
    threads = []
    for stream in others:
        thread = threading.Thread(
            target=stream.cancel, args=(reason,), name="opencode-cancel", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # too many threads; in 3.12.0 and .1 also at the interpreter's exit
            stream.cancel(reason)
        else:
            threads.append(thread)
    first.cancel(reason)
    for thread in threads:
        thread.join(CANCEL_S)
