"""Where the end of a task is entered: on disk, in the report, and on the shelf.

    save() --> checkpoint
    enter() -> tally, throttle, shelf     after it: what is shown is on disk

Knows outcomes; nothing of executors and threads.
"""

from __future__ import annotations

from collections.abc import Iterable

from ._shelf import Shelf
from ._tally import Tally
from ._task import Outcome, Task
from ._throttle import Throttle
from .checkpoint import Checkpoint, Entry
from .core.errors import OpenCodeCancelledError, OpenCodeError
from .core.request import Spent, is_of_batch
from .core.result import RunResult


class Ledger:
    """Enters ends of tasks, in the order of their coming."""

    def __init__(
        self, tally: Tally, throttle: Throttle, shelf: Shelf, checkpoint: Checkpoint | None
    ) -> None:
        self._tally = tally
        self._throttle = throttle
        self._shelf = shelf
        self._checkpoint = checkpoint

    def save(self, ended: Iterable[tuple[Task, Outcome]]) -> None:
        """Put on disk what has ended by itself, and what was ended when it had cost something.

        Raises:
            OpenCodeError: If the disk does not take it.
        """
        if self._checkpoint is None:
            return
        entries = [
            Entry(task.key or "", task.fingerprint, outcome.end)
            for task, outcome in ended
            if _is_to_save(outcome)
        ]
        if entries:
            self._checkpoint.write(entries)

    def enter_refusals(self, task: Task, outcome: Outcome, in_flight: int) -> None:
        """Count the refusals by the provider that only now are known."""
        self._throttle.recovered(task.index)
        # A run in this process has told of each as it came.
        for _ in range(outcome.refusals if outcome.is_remote else 0):
            self._throttle.refused(in_flight, retry_after_s=outcome.retry_after_s)

    def enter(self, task: Task, outcome: Outcome, *, was_stopped: bool) -> None:
        """Count an end, and put it up to be taken.

        Args:
            was_stopped: The batch was: whoever waits hears of that, not of each job that it ended.
        """
        end = outcome.end
        if was_stopped and isinstance(end, OpenCodeCancelledError):
            self._tally.spend(outcome.result)
            self._tally.count("not_run")
            return
        self._shelf.put(task.index, end)
        is_saved = self._checkpoint is not None and _is_to_save(outcome)
        if isinstance(end, OpenCodeError) and is_of_batch(end):
            self._tally.cut_short(end, is_saved=is_saved)
            return
        self._tally.finish(
            task.index, task.prompt, task.key, end, outcome.busy_s, is_saved=is_saved
        )
        if isinstance(end, RunResult):
            self._throttle.succeeded()
        if outcome.result is not None and outcome.result.attempts > 1:
            self._tally.count("retried")


def _is_to_save(outcome: Outcome) -> bool:
    """Whether it belongs in the checkpoint: an end, or what was spent until it was ended."""
    return outcome.is_final or bool(Spent.on(outcome.result))
