"""Tasks carried out in threads of this process; pickled, in worker processes.

Work(task) --> carry_out() --> stream, which stop() and spent() know
  +-- pickled --> RemoteWork(task), tied to us by a lifeline, which stop() cuts
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import Any

from ._remote import Lifeline, RemoteWork
from ._task import Listener, Outcome, Settings, Streams, Task, carry_out
from .core.future import cancel_together
from .core.reading import ended_well
from .core.request import Spent
from .core.result import RunResult
from .core.stream import RunStream


@dataclass(repr=False)
class Work:
    """Carries out tasks in threads of this process; pickled, in another one."""

    runner: Streams
    settings: Settings
    listener: Listener
    _streams: dict[int, RunStream] = field(default_factory=dict)
    _stop_reason: str | None = None
    _lifeline: Lifeline | None = None
    _remote: RemoteWork | None = None

    def __repr__(self) -> str:
        return "opencode job"  # Dask shows it as the name of its task

    def __call__(self, task: Task) -> Outcome:
        def on_begin(stream: RunStream) -> None:
            self._streams[task.index] = stream
            # stop() looks for streams after it has set the reason: one of the two sees the other.
            if self._stop_reason is not None:
                stream.cancel(self._stop_reason)

        try:
            return carry_out(self.runner, task, self.settings, on_begin, self.listener)
        finally:
            self._streams.pop(task.index, None)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._remote is None:
            self._lifeline = Lifeline.tie()
            self._remote = RemoteWork(pickle.dumps(self.runner), self.settings, self._lifeline)
            if self._stop_reason is not None:  # by now: executors pickle in threads of their own
                self._lifeline.cut()
        remote = self._remote
        return RemoteWork, (remote.runner, remote.settings, remote.lifeline)

    def spent(self) -> dict[int, Spent]:
        """What tasks under way in this process have spent so far, by index."""
        streams = list(self._streams.items())
        return {index: Spent.on(stream.result) for index, stream in streams}

    def result_of(self, index: int) -> RunResult | None:
        """What the task has produced by now that is under way in this process."""
        stream = self._streams.get(index)
        return None if stream is None else stream.result

    def stop(self, reason: str, *, spare_done: bool = False) -> None:
        """End what is under way, wherever it is; what begins later is ended too.

        Args:
            spare_done: Let those in this process end by themselves whose last step has ended well.
        """
        self._stop_reason = reason
        if self._lifeline is not None:
            self._lifeline.cut()
        streams = [
            s for s in list(self._streams.values()) if not (spare_done and _is_done(s.result))
        ]
        cancel_together(streams, reason)


def _is_done(result: RunResult) -> bool:
    return ended_well(result.finish_reason, was_denied=False)
