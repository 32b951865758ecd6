"""Jobs onto an executor: as many at a time as may be, and saved before their ends are shown.

    put() --> pending --+                                +--> in flight --done--> completed --+
                        |   may the next one start?      |    (executor)                      |
    (consumer's thread) +-- throttle, budget, failures --+                                    |
                                                                                              |
    take() <-- finished, by index <-- tally, throttle <-- checkpoint <-- repeat it? no -------+
               (consumer's thread)                    (dispatching thread)

One thread of its own starts jobs and takes in their ends, so that work goes on while the consumer
is busy. A job counts as in flight until its end is on disk, so a killed batch repeats no more than
the jobs in flight. Knows tasks and outcomes, and of their order only the index; nothing of the
input.
"""

from __future__ import annotations

import bisect
import heapq
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from typing import Any

from ..core.config import RunConfig
from ..core.errors import OpenCodeCancelledError, OpenCodeError
from ..core.lifetime import Flag
from ..core.limits import LONGEST_WAIT_S, NO_BUDGET, Budget, Retry, Spent, is_of_batch
from ..core.reading import Tried
from ..core.records import Entry
from ..core.result import RunResult
from .checkpoint import Checkpoint
from .job import End, JobRunner, Listener, Outcome, Task, Work, outcome_of, packed
from .tally import Tally
from .throttle import Outages, Throttle, is_rate_limit

STOP_S = 8.0  # bound on waiting for jobs that were told to stop; stopping one takes 5 s at most
TRIES = 4  # of a job that is refused for too many requests before it has done anything
NO_RETRY = Retry(0)
MAX_TAKEN = 10_000  # ends that are kept in memory
REPEAT_S = 2.0  # before the second try; doubled for each further one


class Taken:
    """The ends that the consumer has taken, to be had again.

    An end that the checkpoint has is not kept, only a hash of its key: 8 bytes for each job. Of the
    others, the last MAX_TAKEN are.
    """

    def __init__(self) -> None:
        self._ends: dict[int, End] = {}
        self._hashes = array("q")  # by index; 0 for none

    def add(self, index: int, end: End, saved_as: str) -> None:
        if saved_as:
            self._hashes.extend([0] * (index + 1 - len(self._hashes)))
            self._hashes[index] = hash(saved_as)
            return
        self._ends[index] = end
        if len(self._ends) > MAX_TAKEN:
            del self._ends[next(iter(self._ends))]

    def found(self) -> tuple[dict[int, End], dict[int, int]]:
        """The ends that are kept, by index; and of the others the index, by their key's hash."""
        places = {value: index for index, value in enumerate(self._hashes) if value}
        return self._ends.copy(), places


class Dispatch(Listener):
    """The jobs of one batch, from :meth:`put` to :meth:`take`; one thread takes."""

    def __init__(
        self,
        runner: JobRunner,
        throttle: Throttle,
        tally: Tally,
        *,
        checkpoint: Checkpoint | None = None,
        budget: Budget = NO_BUDGET,
        stop_at_failure: bool = True,
        retry: Retry = NO_RETRY,
    ) -> None:
        # Entered as it is, and not through the condition, whose __enter__ is Python: a Ctrl-C could
        # come between its taking of the lock and the block, and the lock would stay locked.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # waited for by our thread alone
        self._waiter: Flag | None = None  # wakes the consumer in take()
        self._work = Work(runner, self)
        self._throttle = throttle
        self._outages = Outages()
        self._tally = tally
        self._checkpoint = checkpoint
        self._budget = budget
        self._earlier = Spent() if checkpoint is None else checkpoint.spent
        self._stop_at_failure = stop_at_failure
        self._retry = retry
        self._resting: list[tuple[float, int, Task]] = []  # a heap: when, index, what to try again
        self._failures: dict[int, tuple[Task, Outcome]] = {}  # of those, also while pending again
        # A job goes through these from left to right.
        self._pending: deque[Task] = deque()
        self._in_flight: dict[Future[Outcome], Task] = {}
        self._completed: deque[Future[Outcome]] = deque()  # in flight too, until they are saved
        # By index, in the order of their ends; with the key where the checkpoint has them.
        self._finished: dict[int, tuple[End, str]] = {}
        self._taken = Taken()
        self._failed_at: int | None = None  # the lowest index of a failure
        self._has_spent = False  # a step has ended since the budget was last looked at
        self._is_cut_short = False  # what was under way was stopped, since the budget is spent
        self._fatal: OpenCodeError | None = None  # why nothing more is started
        self._stop_by: float | None = None  # a time.monotonic() instant, once stop() was called
        self._has_crashed = False
        self._executor: Executor | None = None
        self._thread = threading.Thread(target=self._loop, name="opencode-batch", daemon=True)

    # -- the consumer's side ---------------------------------------------------------------------

    def start(self, executor: Executor) -> None:
        """Start dispatching, onto *executor*."""
        self._executor = executor
        self._tally.begin()
        self._thread.start()

    def put(self, task: Task) -> None:
        """Have *task* carried out, after those that were put before."""
        with self._lock:
            self._pending.append(task)
            self._notify()

    def offer(self, index: int, end: End, saved_as: str = "") -> None:
        """Let the consumer take *end* as that of job *index*.

        Args:
            saved_as: Its key in the checkpoint, if it is in there.
        """
        with self._lock:
            self._finished[index] = end, saved_as
            if isinstance(end, OpenCodeError):
                self._failed_at = min(index, index if self._failed_at is None else self._failed_at)

    def has_finished(self, index: int | None) -> bool:
        """Whether job *index* can be taken, or any job for None."""
        return bool(self._finished) if index is None else index in self._finished

    def take(
        self,
        index: int | None,
        on_change: Callable[[], None],
        wait_s: Callable[[], float | None] = lambda: None,
    ) -> tuple[int, End]:
        """Wait for job *index*, or any job for None, and take its index and its end.

        Args:
            on_change: Called in this thread, without a lock, when the report may have changed, and
                after *wait_s* seconds without a change.

        Raises:
            OpenCodeError: Why nothing more will come.
        """
        while True:
            with self._lock:
                if self.has_finished(index):
                    found = next(iter(self._finished)) if index is None else index
                    end, saved_as = self._finished[found]
                    # In this order, so that a Ctrl-C between the two loses nothing.
                    self._taken.add(found, end, saved_as)
                    del self._finished[found]
                    return found, end
                is_last = not self._in_flight or self._stop_by is not None or self._has_crashed
                if self._fatal is not None and is_last:
                    raise self._fatal
                waiter = self._waiter = Flag()
            waiter.wait(wait_s())
            on_change()

    def ends(self) -> tuple[dict[int, End], dict[int, int]]:
        """The ends so far, taken or not: in memory by index, or the index by their key's hash."""
        with self._lock:
            ends, places = self._taken.found()
            for index, (end, saved_as) in self._finished.items():
                if saved_as:
                    places[hash(saved_as)] = index
                else:
                    ends[index] = end
            return ends, places

    @property
    def running(self) -> int:
        """How many jobs are in flight."""
        return len(self._in_flight)

    @property
    def is_this_thread(self) -> bool:
        """Whether the calling thread is the dispatching one, which cannot wait for itself."""
        return self._thread is threading.current_thread()

    def stop(self, reason: str) -> None:
        """Stop what is in flight, and start nothing more; bounded, from any thread.

        What has finished by then is on disk when this returns.
        """
        with self._lock:
            self._fatal = self._fatal or OpenCodeCancelledError(reason)
            if self._stop_by is None:
                self._stop_by = time.monotonic() + STOP_S
                self._end_retries()
                self._tally.count("not_run", len(self._pending))
                self._pending.clear()
            in_flight = list(self._in_flight)
            self._notify()
        for future in in_flight:
            _cancel(future)
        self._work.stop(reason)
        if self._thread.is_alive() and not self.is_this_thread:
            self._thread.join(STOP_S)
        self._tally.end()

    # -- reported by running jobs, in their threads ------------------------------------------------

    def refused(self, index: int, retry_after_s: float | None) -> None:
        with self._lock:
            self._throttle.refused(len(self._in_flight), index, retry_after_s)
            self._notify()

    def recovered(self, index: int) -> None:
        with self._lock:
            self._throttle.recovered(index)

    def left(self, task: Task, tried: Tried) -> None:
        cfg = task.settings.run_cfg or RunConfig()
        is_refusal = is_rate_limit(tried.error.status_code, tried.error.message)
        with self._lock:
            self._outages.left(cfg, tried)
            # The last model's is also the run's error, which is counted as such.
            if tried.model not in cfg.fallback_models[-1:]:
                self._throttle.refusals += is_refusal

    def spent(self) -> None:
        if self._budget:
            with self._lock:
                self._has_spent = True
                self._changed.notify_all()

    def _on_done(self, future: Future[Outcome]) -> None:
        with self._lock:
            self._completed.append(future)
            self._notify()

    def _notify(self) -> None:
        """Wake both threads; with the lock, when a job has moved on or a number has changed."""
        self._changed.notify_all()
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.set()

    # -- the dispatching thread ------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while self._await_work():
                self._take_in()
                self._enforce_budget()
                self._start_pending()
        except BaseException as error:  # noqa: BLE001 - raised where the consumer waits
            self._has_crashed = True
            self._fail(_broken_off(error))
        finally:
            self._count_abandoned()

    def _await_work(self) -> bool:
        """Wait until there is something to do; False once nothing more will be."""
        with self._lock:
            while not (self._completed or self._has_spent):
                timeout = self._wake_resting()
                if self._stop_by is not None:
                    timeout = self._stop_by - time.monotonic()
                    if not self._in_flight or timeout <= 0:
                        return False
                elif self._may_start():
                    pause_s = self._throttle.pause_s()
                    if not pause_s:
                        return True
                    timeout = min(timeout, pause_s)
                self._changed.wait(timeout)
            self._has_spent = False
            return True

    # -- starting jobs

    def _may_start(self) -> bool:
        """Whether the next pending job may start, but for a pause of the throttle."""
        if not self._pending or self._fatal is not None:
            return False
        # Jobs before a failure, in the order of the input, still run: their results come before it.
        failed_at = self._failed_at if self._stop_at_failure else None
        if failed_at is not None and self._pending[0].index > failed_at:
            return False
        if len(self._in_flight) >= self._throttle.limit:
            return False
        return not self._budget or self._is_affordable()

    def _start_pending(self) -> None:
        assert self._executor is not None
        while True:
            with self._lock:
                if self._stop_by is not None or not self._may_start() or self._throttle.pause_s():
                    return
                task = self._pending.popleft()
                if (cfg := task.settings.run_cfg) is not None and cfg.fallback_models:
                    with suppress(TypeError, ValueError):  # the run will refuse such settings
                        out = self._outages.passed_over(task.index, cfg)
                        task = replace(task, settings=replace(task.settings, passed_over=out))
            if self._budget:
                left: dict[str, Any] = self._budget.left(self._spent_by_now())
                limits = replace(task.settings.limits, **left)
                task = replace(task, settings=replace(task.settings, limits=limits))
            # Not under our lock: an executor calls back with its own lock held.
            try:
                future = self._executor.submit(self._work, packed(task, self._executor))
            except Exception as error:  # noqa: BLE001 - broken, shut down, or unable to pickle
                with self._lock:
                    self._pending.appendleft(task)
                self._fail(_refused_by_executor(error))
                return
            with self._lock:
                self._in_flight[future] = task
                if self._failures.pop(task.index, None) is not None:
                    self._tally.count("retried")
                is_late = self._stop_by is not None
            future.add_done_callback(self._on_done)
            if is_late:
                _cancel(future)

    # -- taking in their ends

    def _take_in(self) -> None:
        """Save, count and offer the jobs that have completed; repeat those that were refused."""
        with self._lock:
            completed = [(f, self._in_flight[f], outcome_of(f)) for f in self._completed]
            self._completed.clear()
        spent = sum((Spent.on(outcome.result) for *_, outcome in completed), Spent())
        ended = []
        for future, task, outcome in completed:
            outcome = self._as_over_budget(outcome, spent)
            with self._lock:
                self._throttle.recovered(task.index)
                if outcome.is_remote and outcome.result is not None:
                    for tried in filter(attrgetter("was_asked"), outcome.result.tried):
                        self.left(task, tried)
                self._outages.ended(task.index, outcome.result)
                # A job in this process has reported each refusal as it came.
                for _ in range(outcome.refusals if outcome.is_remote else 0):
                    n_in_flight = len(self._in_flight)
                    self._throttle.refused(n_in_flight, retry_after_s=outcome.retry_after_s)
            if self._is_to_repeat(task, outcome):
                self._repeat(future, task, outcome)
            else:
                label(outcome.end, task)
                ended.append((future, task, outcome))
        is_saved = self._save([(task, outcome) for _, task, outcome in ended])
        with self._lock:
            for future, task, outcome in ended:
                del self._in_flight[future]
                if not is_saved:
                    self._tally.spend(outcome.result)
                elif self._is_to_retry(task, outcome):
                    self._rest(task, outcome)
                else:
                    self._finish(task, outcome)
            self._notify()

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

    def _is_to_retry(self, task: Task, outcome: Outcome) -> bool:
        may_run = self._stop_by is None and self._fatal is None
        if not may_run or task.failures >= self._retry.count:
            return False
        if not isinstance(outcome.end, OpenCodeError) or not self._retry.applies_to(outcome.end):
            return False
        return not self._budget.is_spent(self._spent_by_now() + Spent.on(outcome.result))

    def _rest(self, task: Task, outcome: Outcome) -> None:
        """Try *task* again later; its failure is on disk, and stands if that does not happen."""
        self._tally.spend(outcome.result, outcome.busy_s)
        self._failures[task.index] = task, outcome
        again = replace(task, failures=task.failures + 1, tries=1)
        at = time.monotonic() + self._retry.delay_s
        heapq.heappush(self._resting, (at, task.index, again))

    def _wake_resting(self) -> float:
        """Move what has rested to the pending jobs; return for how long the next one rests."""
        while self._resting:
            left_s = self._resting[0][0] - time.monotonic()
            if left_s > 0:
                return min(left_s, LONGEST_WAIT_S)
            *_, again = heapq.heappop(self._resting)
            bisect.insort(self._pending, again, key=attrgetter("index"))
        return LONGEST_WAIT_S

    def _end_retries(self) -> None:
        """Let the failures of the jobs stand that wait to be tried again; with the lock."""
        failures, self._failures = self._failures, {}
        self._resting.clear()
        self._pending = deque(task for task in self._pending if task.index not in failures)
        for task, outcome in failures.values():
            self._finish(task, outcome, is_spent=True)

    def _save(self, ended: Sequence[tuple[Task, Outcome]]) -> bool:
        """Put on disk what belongs there; False where that went wrong, which ends the batch."""
        if self._checkpoint is None:
            return True
        entries = [
            Entry(task.saved_as, task.identity.fingerprint, outcome.end, task.identity.facts)
            for task, outcome in ended
            if task.identity is not None and _is_to_save(outcome)
        ]
        try:
            if entries:
                self._checkpoint.write(entries)
        except Exception as error:  # noqa: BLE001 - raised where the consumer waits
            self._fail(error if isinstance(error, OpenCodeError) else _broken_off(error))
            return False
        return True

    def _finish(self, task: Task, outcome: Outcome, *, is_spent: bool = False) -> None:
        """Count a job whose end is on disk, and let it be taken; with the lock."""
        end = outcome.end
        if self._stop_by is not None and isinstance(end, OpenCodeCancelledError):
            # The consumer hears that the batch was stopped, not of each job that this has stopped.
            self._tally.spend(outcome.result)
            self._tally.count("not_run")
            return
        is_saved = self._checkpoint is not None and _is_to_save(outcome)
        self.offer(task.index, end, task.saved_as if is_saved else "")
        if isinstance(end, OpenCodeError) and is_of_batch(end):
            self._tally.cut_short(end, is_saved=is_saved)
            return
        self._tally.finish(end, outcome.busy_s, is_saved=is_saved, is_spent=is_spent)
        if isinstance(end, RunResult):
            self._throttle.succeeded()
        if outcome.result is not None and outcome.result.attempts > 1:
            self._tally.count("retried")

    def _count_abandoned(self) -> None:
        """Count what jobs have spent whose ends nobody waits for any longer."""
        with self._lock:
            for future, task in self._in_flight.items():
                result = outcome_of(future).result if future.done() else None
                self._tally.spend(result or self._work.result_of(task.index))

    def _fail(self, error: OpenCodeError) -> None:
        """Start nothing more, and have the consumer get *error* after what is in flight."""
        with self._lock:
            self._fatal = self._fatal or error
            self._end_retries()
            self._notify()

    # -- the budget of the batch

    def _is_affordable(self) -> bool:
        """Whether the budget allows one job more; once it is spent, what is pending is refused."""
        spent = self._earlier + self._tally.spent
        if self._is_cut_short or self._budget.is_spent(spent):
            if not self._in_flight:  # or, without order, the refusals would come before their ends
                self._refuse_pending(spent)
            return False
        # A job in flight costs at least what it has cost by now, and as a rule what others did.
        so_far, mean = self._work.spent(), self._tally.mean
        for task in self._in_flight.values():
            own = so_far.get(task.index, Spent())
            spent += Spent(max(own.cost, mean.cost), max(own.tokens, mean.tokens))
        return not self._budget.is_spent(spent)

    def _refuse_pending(self, spent: Spent) -> None:
        self._end_retries()
        for task in self._pending:
            error = self._budget.error(spent, self._earlier, "the job was not run")
            label(error, task)
            self.offer(task.index, error)
        self._tally.count("not_run", len(self._pending))
        self._pending.clear()
        self._notify()

    def _spent_by_now(self) -> Spent:
        """What earlier batches, finished jobs and those under way in this process have spent."""
        under_way = self._work.spent()
        with self._lock:
            in_flight = {task.index for task in self._in_flight.values()}
            own = (spent for index, spent in under_way.items() if index in in_flight)
            return sum(own, self._earlier + self._tally.spent)

    def _enforce_budget(self) -> None:
        """Stop what is under way, once the budget is spent."""
        if not self._budget or self._stop_by is not None or not self._in_flight:
            return
        if self._is_cut_short or self._budget.is_spent(self._spent_by_now()):
            self._is_cut_short = True
            self._work.stop("the budget of the batch is spent", spare_done=True)

    def _as_over_budget(self, outcome: Outcome, just_spent: Spent) -> Outcome:
        """*outcome*, with a budget error as its end where the spent budget has stopped the job.

        Args:
            just_spent: By the jobs that have completed and are not counted yet.
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


def label(end: End, task: Task) -> None:
    """Have *end* say which job it is of."""
    for each in (end, end.result if isinstance(end, OpenCodeError) else None):
        if each is not None:
            each.index, each.key, each.prompt = task.index, task.key, task.prompt
            each.metadata = task.metadata


def _is_to_save(outcome: Outcome) -> bool:
    """Whether it belongs in the checkpoint: it ended by itself, or has spent something."""
    return outcome.is_final or bool(Spent.on(outcome.result))


def _cancel(future: Future[Outcome]) -> None:
    # Parsl's futures raise NotImplementedError. A job that begins nevertheless finds that its
    # batch is over.
    with suppress(Exception):
        future.cancel()


def _refused_by_executor(error: Exception) -> OpenCodeError:
    is_gone = isinstance(error, (BrokenExecutor, RuntimeError))
    what = "takes no more jobs" if is_gone else "cannot take the job"
    ours = OpenCodeError(f"the executor {what}: {type(error).__name__}: {error}")
    ours.__cause__ = error
    return ours


def _broken_off(error: BaseException) -> OpenCodeError:
    ours = OpenCodeError(f"the batch broke off: {type(error).__name__}: {error}")
    ours.__cause__ = error
    return ours
