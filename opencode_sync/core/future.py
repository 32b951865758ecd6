"""A Future whose cancel() also ends a run that is under way.

    submit() --> RunFuture --work() in a pool's thread--> RunStream --wait()--> result or error
    cancel() ------------------------------------------------^

Knows streams and futures; nothing of runners.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait

from .errors import OpenCodeCancelledError
from .lifetime import Pinned
from .result import RunResult
from .stream import RunStream

CANCEL_S = 8.0  # bound on waiting for a run to end that was told to; stopping one takes 5 s at most

_NOT_BEGUN = "the run was cancelled before it began"


class RunFuture(Pinned, Future[RunResult]):
    """The result of a run that another thread sees to.

    A ``concurrent.futures.Future`` in every respect, except that :meth:`cancel` also ends a run
    that is under way. A cancelled one raises OpenCodeCancelledError, which is a CancelledError
    too and has the partial result as ``.result``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stream: RunStream | None = None
        self._reason: str | None = None
        self._was_stopped = False

    def cancel(self, reason: str = "the future was cancelled") -> bool:
        """End the run, or see that it does not begin; returns when its tools are gone.

        Returns:
            False if it had ended before.
        """
        if super().cancel():
            return True
        self._reason = self._reason or reason
        # _watch() looks for the reason after it has set the stream: one of the two sees the other.
        if (stream := self._stream) is not None:
            stream.cancel(reason)
        wait([self], CANCEL_S)
        return self.cancelled() or not self.done()

    def cancel_waiting(self) -> bool:
        """See that it does not begin; without effect on one that has begun."""
        return super().cancel()

    def cancelled(self) -> bool:
        """Whether it was ended, or kept from beginning, by a cancellation."""
        return self._was_stopped or super().cancelled()

    def result(self, timeout: float | None = None) -> RunResult:
        """Wait for the run and return its result, or raise the error that it ended with.

        Raises:
            OpenCodeError: As ``run`` does.
            TimeoutError: After *timeout* seconds; the run goes on.
        """
        try:
            return super().result(timeout)
        except CancelledError as error:
            raise _as_ours(error) from None

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the run and return its error, or None; raises if it was cancelled."""
        try:
            error = super().exception(timeout)
        except CancelledError as cancelled:
            raise _as_ours(cancelled) from None
        if self._was_stopped and error is not None:
            raise error
        return error

    def work(self, begin: Callable[..., RunStream]) -> None:
        """Run to the end in the calling thread, unless it was cancelled by now."""
        if not self.set_running_or_notify_cancel():
            return
        try:
            with begin(on_begin=self._watch) as stream:
                result = stream.wait()
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            self._was_stopped = isinstance(error, OpenCodeCancelledError)
            self._stream = None
            self.set_exception(error)
            # As the standard library does: the error's traceback holds this frame.
            self = None  # type: ignore[assignment]
        else:
            self._stream = None
            self.set_result(result)

    def _watch(self, stream: RunStream) -> None:
        self._stream = stream
        if self._reason is not None:
            stream.cancel(self._reason)


def _as_ours(error: CancelledError) -> CancelledError:
    return (
        error if isinstance(error, OpenCodeCancelledError) else OpenCodeCancelledError(_NOT_BEGUN)
    )


def cancel_together(streams: Sequence[RunStream], reason: str) -> None:
    """End runs at the same time, not one after the other; returns when all are gone."""
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
        except RuntimeError:  # no more to be had; at the interpreter's exit none in 3.12.0 and .1
            stream.cancel(reason)
        else:
            threads.append(thread)
    first.cancel(reason)
    for thread in threads:
        thread.join(CANCEL_S)
