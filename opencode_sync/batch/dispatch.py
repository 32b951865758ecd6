"""Tasks onto an executor: as many at a time as may be, their ends saved before they are shown.

    put() --> pending --+                      +--> in flight --done--> completed --+
    (consumer's thread) |  dispatching thread  |   (executor)                       |
                        +--> may one start? ---+              _ledger, _throttle <--+
    take() <-- _shelf <------------------------------------------------------------ +

One thread of its own starts tasks and takes in their ends, so that work goes on while the consumer
is busy. A task counts as in flight until its end is on disk: what a killed batch does twice is at
most what was in flight. Knows tasks and outcomes; nothing of the input, and of order the index.

Ends of tasks, from the thread that puts them up to the one that takes them down.

    put() --> ready, by index --> take()   the consumer's thread waits: for a place, or for anything
    ring() ---------------------> on_change(), while it waits

From any thread; under the lock that it shares with whoever fills it. Knows indexes and what failed,
nothing of how an end came about.

Where the end of a task is entered: on disk, in the report, and on the shelf.

    save() --> checkpoint
    enter() -> tally, throttle, shelf     after it: what is shown is on disk

Knows outcomes; nothing of executors and threads.
"""

from __future__ import annotations

import bisect
import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import replace
from operator import attrgetter

from ..core.errors import OpenCodeCancelledError, OpenCodeError
from ..core.request import NO_BUDGET, Budget, Spent, is_of_batch
from ..core.result import RunResult
from .checkpoint import Checkpoint, Entry, Saved
from .job import (
    End,
    Outcome,
    Settings,
    Streams,
    Task,
    Work,
    executor_error,
    of_task,
    outcome_of,
    unforeseen,
)
from .tally import BatchReport, Tally
from .throttle import Throttle


class Shelf:
    """What has ended and was not taken yet.

    Attributes:
        failed_at: The lowest index of a failure, None before the first.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self.failed_at: int | None = None
        self._lock = lock
        self._ready: dict[int, End | Saved] = {}  # in the order of coming
        self._bells: list[queue.SimpleQueue[None]] = []  # of consumers that wait

    def put(self, index: int, end: End | Saved) -> None:
        """Have *end* taken."""
        is_failure = isinstance(end, OpenCodeError) or (isinstance(end, Saved) and end.is_failure)
        with self._lock:
            self._ready[index] = end
            if is_failure:
                self.failed_at = index if self.failed_at is None else min(index, self.failed_at)

    def has(self, index: int | None) -> bool:
        """Whether there is something to take: what belongs at *index*, or anything."""
        return bool(self._ready) if index is None else index in self._ready

    def ring(self) -> None:
        """Wake who waits: something is ready, or a number has changed."""
        with self._lock:
            bells, self._bells = self._bells, []
        for bell in bells:
            bell.put(None)

    def take(
        self,
        index: int | None,
        on_change: Callable[[], None],
        hopeless: Callable[[], OpenCodeError | None],
    ) -> tuple[int, End | Saved]:
        """Wait for what belongs at *index*, or for anything, and take it.

        Args:
            on_change: Called in this thread, without the lock, after each ring.
            hopeless: Tells why nothing more will come, once nothing will; asked with the lock.

        Raises:
            OpenCodeError: What *hopeless* told.
        """
        while True:
            with self._lock:
                if self.has(index):
                    found = next(iter(self._ready)) if index is None else index
                    return found, self._ready.pop(found)
                if (error := hopeless()) is not None:
                    raise error
                bell: queue.SimpleQueue[None] = queue.SimpleQueue()
                self._bells.append(bell)
            bell.get()
            on_change()


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


STOP_S = 8.0  # bound on waiting for tasks that were told to end; stopping one takes 5 s at most
TRIES = 4  # of a task that fails of too many requests, with nothing done
REPEAT_S = 2.0  # before the second of them; doubled for each further one


class Dispatch:
    """The tasks of one batch, from :meth:`put` to :meth:`take`.

    Attributes:
        shelf: What can be taken; also for what needs no run.
    """

    def __init__(
        self,
        runner: Streams,
        settings: Settings,
        throttle: Throttle,
        tally: Tally,
        *,
        checkpoint: Checkpoint | None = None,
        budget: Budget = NO_BUDGET,
        stop_at_failure: bool = True,
    ) -> None:
        # Entered as it is, and not through the condition, which is Python's: a Ctrl-C could come
        # between its taking of the lock and the block, and the lock would never be given back.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # waited for by our thread alone
        self.shelf = Shelf(self._lock)
        self._work = Work(runner, settings, self)
        self._throttle = throttle
        self._tally = tally
        self._ledger = Ledger(tally, throttle, self.shelf, checkpoint)
        self._budget = budget
        self._earlier = Spent() if checkpoint is None else checkpoint.spent
        self._has_spent = False  # news of a step that has ended
        self._is_cut_short = False  # what is under way was stopped, since the budget is spent
        self._stop_at_failure = stop_at_failure
        self._pending: deque[Task] = deque()
        self._in_flight: dict[Future[Outcome], Task] = {}
        self._completed: deque[Future[Outcome]] = deque()
        self._fatal: OpenCodeError | None = None
        self._stop_by: float | None = None
        self._is_over = False
        self._executor: Executor | None = None
        self._thread = threading.Thread(target=self._loop, name="opencode-batch", daemon=True)

    @property
    def is_this_thread(self) -> bool:
        """Whether the calling thread is the dispatching one, which cannot end itself."""
        return self._thread is threading.current_thread()

    # -- the consumer's side ---------------------------------------------------------------------

    def begin(self, executor: Executor) -> None:
        """Start dispatching, onto *executor*."""
        self._executor = executor
        self._tally.begin()
        self._thread.start()

    def put(self, task: Task) -> None:
        """Have *task* run in its turn."""
        with self._lock:
            self._pending.append(task)
            self._tell()

    def take(self, index: int | None, on_change: Callable[[], None]) -> tuple[int, End | Saved]:
        """Wait for what belongs at *index*, or for anything, and take it.

        Args:
            on_change: Called in this thread whenever the report may have changed.

        Raises:
            OpenCodeError: If nothing more will come.
        """
        return self.shelf.take(index, on_change, self._why_no_more)

    def _why_no_more(self) -> OpenCodeError | None:
        is_last = not self._in_flight or self._stop_by is not None or self._is_over
        return self._fatal if is_last else None

    def report(self) -> BatchReport:
        """The batch as it stands."""
        return self._tally.report(
            running=len(self._in_flight),
            rate_limits=self._throttle.refusals,
            max_workers=self._throttle.most,
            lowest=self._throttle.lowest,
        )

    def refused(self, index: int, retry_after_s: float | None) -> None:
        """A provider refused a request of a task in flight; from any thread."""
        with self._lock:
            self._throttle.refused(len(self._in_flight), index, retry_after_s)
            self._tell()

    def recovered(self, index: int) -> None:
        """That task goes on; from any thread."""
        with self._lock:
            self._throttle.recovered(index)

    def spent(self) -> None:
        """A task in flight has ended a step; from any thread."""
        if self._budget:
            with self._lock:
                self._has_spent = True
                self._changed.notify_all()

    def stop(self, reason: str, error: OpenCodeError | None = None) -> None:
        """End what is in flight, and start nothing more; bounded, from any thread.

        What has finished by then is on disk when this returns.

        Args:
            error: For who waits in :meth:`take`.
        """
        with self._lock:
            self._fatal = self._fatal or error or OpenCodeCancelledError(reason)
            if self._stop_by is None:
                self._stop_by = time.monotonic() + STOP_S
                self._tally.count("not_run", len(self._pending))
                self._pending.clear()
            in_flight = list(self._in_flight)
            self._tell()
        for future in in_flight:
            future.cancel()
        self._work.stop(reason)
        if self._thread.is_alive() and not self.is_this_thread:
            self._thread.join(STOP_S)
        self._tally.end()

    # -- the dispatching thread ------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while self._await_work():
                self._take_in()
                self._cut_short()
                self._start()
        except BaseException as error:  # noqa: BLE001 - raised where the consumer waits
            self._is_over = True
            self._fail(unforeseen(error))
        finally:
            self._count_unended()

    def _await_work(self) -> bool:
        """Wait until there is something to do; False when all is done for good."""
        with self._lock:
            while not (self._completed or self._has_spent):
                timeout = None
                if self._stop_by is not None:
                    timeout = self._stop_by - time.monotonic()
                    if not self._in_flight or timeout <= 0:
                        return False
                elif self._may_start():
                    pause = self._throttle.pause_s()
                    if not pause:
                        return True
                    timeout = pause
                self._changed.wait(timeout)
            self._has_spent = False
            return True

    def _may_start(self) -> bool:
        """Whether the next task may start, but for a pause."""
        if not self._pending or self._fatal is not None:
            return False
        # In the order of the input, the tasks before a failure have their turn before it.
        failed_at = self.shelf.failed_at if self._stop_at_failure else None
        if failed_at is not None and self._pending[0].index > failed_at:
            return False
        if len(self._in_flight) >= self._throttle.limit:
            return False
        return not self._budget or self._is_affordable()

    def _is_affordable(self) -> bool:
        """Whether the budget allows one more; where it is spent, the pending tasks are refused."""
        spent = self._earlier + self._tally.spent
        if self._is_cut_short or self._budget.is_spent(spent):
            if self._in_flight:  # without order, the refusals would come before what they bring
                return False
            error = functools.partial(self._budget.error, spent, self._earlier)
            for task in self._pending:
                self.shelf.put(task.index, of_task(error("the job was not run"), task))
            self._tally.count("not_run", len(self._pending))
            self._pending.clear()
            self._tell()
            return False
        # What runs costs at least what it has cost by now, and as a rule what others did.
        so_far, mean = self._work.spent(), self._tally.mean
        for task in self._in_flight.values():
            own = so_far.get(task.index, Spent())
            spent += Spent(max(own.cost, mean.cost), max(own.tokens, mean.tokens))
        return not self._budget.is_spent(spent)

    def _spent_by_now(self) -> Spent:
        """What earlier batches, finished jobs and those under way in this process have spent."""
        under_way = self._work.spent()
        with self._lock:
            in_flight = {task.index for task in self._in_flight.values()}
            own = (spent for index, spent in under_way.items() if index in in_flight)
            return functools.reduce(Spent.__add__, own, self._earlier + self._tally.spent)

    def _cut_short(self) -> None:
        """Stop what is under way, once the budget is spent."""
        if not self._budget or self._stop_by is not None or not self._in_flight:
            return
        if self._is_cut_short or self._budget.is_spent(self._spent_by_now()):
            self._is_cut_short = True
            self._work.stop("the budget of the batch is spent", spare_done=True)

    def _for_budget(self, outcome: Outcome, just_spent: Spent) -> Outcome:
        """*outcome*, with a budget error as its end where the spent budget has ended the job.

        Args:
            just_spent: By what has completed and is not entered yet.
        """
        was_stopped = isinstance(outcome.end, OpenCodeCancelledError) and self._is_cut_short
        if self._stop_by is not None or not (was_stopped or is_of_batch(outcome.end)):
            return outcome
        spent = self._spent_by_now() + just_spent
        error = self._budget.error(spent, self._earlier, "the job was stopped")
        if (result := outcome.result) is not None:
            result.mark_stopped("over_budget")
            error.result = result
        return replace(outcome, end=error, is_final=False)

    def _start(self) -> None:
        assert self._executor is not None
        while True:
            with self._lock:
                if self._stop_by is not None or not self._may_start() or self._throttle.pause_s():
                    return
                task = self._pending.popleft()
            if self._budget:
                left = self._budget.left(self._spent_by_now())
                task = replace(task, limits={**task.limits, **left})
            # Not under our lock: an executor calls back with its own lock held.
            try:
                future = self._executor.submit(self._work, task)
            except Exception as error:  # noqa: BLE001 - broken, shut down, or unable to pickle
                with self._lock:
                    self._pending.appendleft(task)
                self._fail(executor_error(error))
                return
            with self._lock:
                self._in_flight[future] = task
                is_late = self._stop_by is not None
            future.add_done_callback(self._on_done)
            if is_late:
                future.cancel()

    def _on_done(self, future: Future[Outcome]) -> None:
        with self._lock:
            self._completed.append(future)
            self._tell()

    def _take_in(self) -> None:
        with self._lock:
            completed = [(f, self._in_flight[f], outcome_of(f)) for f in self._completed]
            self._completed.clear()
        spent = functools.reduce(
            Spent.__add__, (Spent.on(outcome.result) for *_, outcome in completed), Spent()
        )
        ended = []
        for future, task, outcome in completed:
            outcome = self._for_budget(outcome, spent)
            with self._lock:
                self._ledger.enter_refusals(task, outcome, len(self._in_flight))
            if self._is_to_repeat(task, outcome):
                self._repeat(future, task, outcome)
            else:
                end = of_task(outcome.end, task)
                ended.append((future, task, replace(outcome, end=end)))
        is_saved = True
        try:
            self._ledger.save((task, outcome) for _, task, outcome in ended)
        except Exception as error:  # noqa: BLE001 - the batch ends with it
            is_saved = False
            self._fail(error if isinstance(error, OpenCodeError) else unforeseen(error))
        with self._lock:
            for future, task, outcome in ended:
                del self._in_flight[future]
                if is_saved:
                    was_stopped = self._stop_by is not None
                    self._ledger.enter(task, outcome, was_stopped=was_stopped)
                else:
                    self._tally.spend(outcome.result)
            self._tell()

    def _count_unended(self) -> None:
        """Count what tasks have spent whose ends nobody waits for any longer."""
        with self._lock:
            for future, task in self._in_flight.items():
                result = outcome_of(future).result if future.done() else None
                self._tally.spend(result or self._work.result_of(task.index))

    def _is_to_repeat(self, task: Task, outcome: Outcome) -> bool:
        may_run = self._stop_by is None and self._fatal is None
        return self._throttle.is_adaptive and may_run and outcome.was_refused and task.tries < TRIES

    def _repeat(self, future: Future[Outcome], task: Task, outcome: Outcome) -> None:
        self._tally.spend(outcome.result)
        self._tally.count("retried")
        with self._lock:
            del self._in_flight[future]
            again = replace(task, tries=task.tries + 1)
            bisect.insort(self._pending, again, key=attrgetter("index"))
            self._throttle.pause(REPEAT_S * 2 ** (task.tries - 1))

    def _fail(self, error: OpenCodeError) -> None:
        with self._lock:
            self._fatal = self._fatal or error
            self._tell()

    def _tell(self) -> None:
        """Wake who waits; under our lock, when something is ready or a number has changed."""
        self._changed.notify_all()
        self.shelf.ring()
