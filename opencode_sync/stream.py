"""One job's life, as its caller sees it.

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
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from ._course import Course
from ._denials import Tripwire
from ._exits import REASON, UnderWay
from ._limits import Limits
from ._pinned import Pinned
from ._secrets import Secrets
from ._source import OpenSource, Review, Source
from .errors import (
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeTimeoutError,
)
from .events import Event
from .result import RunResult

__all__ = ["Limits", "OpenSource", "RunStream", "Source"]

_log = logging.getLogger("opencode_sync")
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
