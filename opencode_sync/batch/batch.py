"""Many jobs, drawn lazily, run at the same time, and their results one by one.

    jobs --draw--> Task --put--> Dispatch --take--> result or error --> the caller's loop
            |                      ^
            +-- found in the checkpoint: ready at once

The caller's thread is the only one that touches the input, the progress, and what is given out;
everything between is the dispatch's. Knows nothing of OpenCode: a job becomes a stream by the
runner's ``begin``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar, cast

from ..core.config import (
    Job,
    RunConfig,
    check_flag,
    checked_count,
    checked_number,
    checked_path,
)
from ..core.errors import OpenCodeCancelledError, OpenCodeConfigError, OpenCodeError
from ..core.lifetime import REASON, Pinned, UnderWay
from ..core.limits import LIMITS_OF_A_JOB, Budget, Retry
from ..core.records import end_of, jsonable, own_key, records_in, result_of, results_to_frame
from ..core.request import OnError, OnMismatch, RunSettings, absolute
from ..core.result import RunResult
from .checkpoint import Checkpoint
from .dispatch import Dispatch, label
from .fingerprint import Identities
from .job import End, JobRunner, Task
from .table import is_frame, read_jobs
from .tally import BatchReport, Progress, Tally
from .throttle import Throttle

_log = logging.getLogger("opencode_sync")

_NOT_ITERATED = (
    "no job of this batch has run, since nobody asked for a result: iterate over what map() "
    "returns, or use list()"
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a batch, checked when made; they mean what they mean for ``map``.

    Attributes:
        settings: Those of a job that has none of its own.
        default_workers: Gives the number of jobs at a time where neither *max_workers* nor the
            executor does.
    """

    workspace: str | os.PathLike[str]
    settings: RunSettings
    max_total_cost: float | None
    max_total_tokens: int | None
    max_workers: int | None
    default_workers: Callable[[], int]
    buffersize: int | None
    ordered: bool
    on_error: OnError
    progress: bool | Literal["always"]
    progress_interval_s: float
    checkpoint: str | os.PathLike[str] | None
    retries: int | Retry
    retry_failed: bool
    on_mismatch: OnMismatch
    executor: Executor | None
    adaptive: bool

    def workers(self) -> int:
        """How many jobs at a time."""
        return self.max_workers or _workers_of(self.executor) or self.default_workers()

    @property
    def retry(self) -> Retry:
        """How failed jobs are tried again."""
        return self.retries if isinstance(self.retries, Retry) else Retry(self.retries)

    @property
    def cost_limit(self) -> str | None:
        """Name of the limit in dollars that is set, or None."""
        if self.max_total_cost is not None:
            return "max_total_cost"
        return None if self.settings.limits.max_cost is None else "max_cost"

    def __post_init__(self) -> None:
        for name in ("max_workers", "buffersize"):
            self._set(name, checked_count(name, getattr(self, name), 1))
        for name in ("ordered", "retry_failed", "adaptive"):
            check_flag(name, getattr(self, name))
        _ = self.retry  # raises for what makes no sense
        interval = checked_number("progress_interval_s", self.progress_interval_s, positive=True)
        self._set("progress_interval_s", interval)
        cost = checked_number("max_total_cost", self.max_total_cost, optional=True)
        self._set("max_total_cost", cost)
        self._set("max_total_tokens", checked_count("max_total_tokens", self.max_total_tokens, 0))
        if self.checkpoint is not None:
            self._set("checkpoint", checked_path("checkpoint", self.checkpoint))
        _check_choice("on_error", self.on_error, "raise", "return")
        _check_choice("on_mismatch", self.on_mismatch, "raise", "rerun", "keep")
        _check_choice("progress", self.progress, False, True, "always")
        if self.executor is not None and not isinstance(self.executor, Executor):
            kind = type(self.executor).__name__
            raise OpenCodeConfigError(f"executor is {kind}: use a concurrent.futures.Executor")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _settings_of(job: object, default: RunSettings) -> RunSettings:
    """The settings of *job*, with those of *default* where it has none of its own.

    Raises:
        OpenCodeConfigError: It is not a job, or has a setting that cannot be used.
    """
    if not isinstance(job, Job):
        raise OpenCodeConfigError(f"the job is {type(job).__name__}: use a str or a Job")
    if job.prompt is None:
        raise OpenCodeConfigError("the job has no prompt: was a cell empty that it is made from?")
    for name, kind in (("prompt", str), ("run_cfg", RunConfig), ("key", str)):
        value = getattr(job, name)
        if not isinstance(value, kind) and (value is not None or name == "prompt"):
            raise OpenCodeConfigError(
                f"the job's {name} is of type {type(value).__name__}: use a {kind.__name__}"
            )
    own = {name: getattr(job, name) for name in LIMITS_OF_A_JOB}
    limits = {name: limit for name, limit in own.items() if limit is not None}
    if not limits and job.run_cfg is None:
        return default
    return replace(
        default,
        limits=replace(default.limits, **limits),
        run_cfg=default.run_cfg if job.run_cfg is None else job.run_cfg,
    )


def _metadata_of(job: Job) -> Any:
    try:
        return jsonable(job.metadata)
    except Exception as error:  # noqa: BLE001 - an object of the user's may raise anything
        raise OpenCodeConfigError(f"the job's metadata cannot be JSON: {error}") from None


def _fault(index: int, job: object, error: Exception) -> OpenCodeError:
    """*error* in the place of *job*, which was not begun."""
    if isinstance(error, OpenCodeError):
        fault = error.with_traceback(None)
    else:
        fault = OpenCodeConfigError(f"the job cannot be begun: {type(error).__name__}: {error}")
    fault.index = index
    if isinstance(job, Job):
        fault.key = job.key if isinstance(job.key, str) else None
        fault.prompt = job.prompt if isinstance(job.prompt, str) else None
        with contextlib.suppress(OpenCodeConfigError):
            fault.metadata = _metadata_of(job)
    return fault


def _check_choice(name: str, value: object, *choices: object) -> None:
    if value not in choices:
        raise OpenCodeConfigError(f"{name} is {value!r}: use {' or '.join(map(repr, choices))}")


def _workers_of(executor: Executor | None) -> int | None:
    """How many jobs *executor* carries out at a time, or None; executors say it privately."""
    most = getattr(executor, "_max_workers", None)
    if isinstance(most, int):
        return most
    cluster = getattr(executor, "_client", None)  # of Dask
    if callable(threads := getattr(cluster, "nthreads", None)):
        return max(1, int(sum(threads().values())))
    return None


T = TypeVar("T", bound=RunResult | OpenCodeError, covariant=True)


class BatchRun(Pinned, Iterator[T], Generic[T]):
    """The results of a batch, and its report: an iterator and a context manager.

    Nothing starts before the first result is asked for. Leaving the block, or losing the last
    reference, stops the runs under way with their tools, within seconds; finished ones are in the
    checkpoint by then. One thread iterates; :meth:`close`, ``report`` and ``results`` may be used
    from any.
    """

    def __init__(self, runner: JobRunner, jobs: Iterable[str | Job], options: Options) -> None:
        self._is_ended = True  # nothing to close, should one of the next lines raise
        if is_frame(jobs):
            jobs = read_jobs(jobs, run_cfg=options.settings.run_cfg)
        if isinstance(jobs, (str, bytes, Job, Mapping)) or not isinstance(jobs, Iterable):
            kind = type(jobs).__name__
            hint = ", or read_jobs() for a file" if isinstance(jobs, (str, os.PathLike)) else ""
            raise OpenCodeConfigError(f"jobs is {kind}: use an iterable of prompts{hint}")
        self._runner = runner
        self._jobs = iter(jobs)
        self._n_jobs = len(jobs) if isinstance(jobs, Sized) else None
        self._options = options
        self._max_workers = options.workers()
        self._buffersize = options.buffersize or 2 * self._max_workers
        path = options.checkpoint
        self._tally = Tally(None if path is None else Path(path), options.cost_limit)
        self._throttle = Throttle(self._max_workers, adaptive=options.adaptive)
        # Made when the first result is asked for.
        self._dispatch: Dispatch | None = None
        self._checkpoint: Checkpoint | None = None
        self._own_executor: ThreadPoolExecutor | None = None
        self._progress: Progress | None = None
        self._workspace = ""
        self._identities: Identities | None = None  # of its jobs, in the checkpoint
        self._held: list[Task] = []  # not put yet, as nothing of the checkpoint has matched
        self._is_prepared = False  # the runner, for the first job that is not in the checkpoint
        self._drawn = self._given = 0
        self._metadata: dict[int, Any] = {}  # of jobs for which the checkpoint has another one
        self._has_input = True
        self._input_error: Exception | None = None
        self._error: OpenCodeError | None = None  # of cancel(), for who iterates
        self._advancing, self._closing = threading.Lock(), threading.Lock()
        self._pid = os.getpid()
        self._is_ended = False

    @property
    def report(self) -> BatchReport:
        """The state of the batch, during it and after its end."""
        running = 0 if self._dispatch is None else self._dispatch.running
        return self._tally.report(running, self._throttle)

    @property
    def results(self) -> list[RunResult | OpenCodeError]:
        """What has finished so far, in the order of the input, whether it was given or not.

        Errors stand in the places of their results, as with ``on_error="return"``. It is complete
        also after a Ctrl-C, a stop button or an error, and where a job hung that comes before.

        With a checkpoint all is read from its file; without one, the batch keeps the last 10,000
        that were given.

        Raises:
            OpenCodeConfigError: The checkpoint's file cannot be read any more.
        """
        ends, places = ({}, {}) if self._dispatch is None else self._dispatch.ends()
        if places:
            assert self._options.checkpoint is not None
            for record in records_in(self._options.checkpoint):
                if (index := places.get(hash(record["key"]))) is not None:
                    ends[index] = self._read(index, record)
        return [ends[index] for index in sorted(ends)]

    def to_frame(self) -> Any:
        """:attr:`results` as a ``pandas.DataFrame``, as ``results_to_frame`` makes it.

        Raises:
            ImportError: pandas is not installed; this package does not depend on it.
        """
        return results_to_frame(self.results)

    def _read(self, index: int, record: Mapping[str, Any]) -> End:
        """The end of job *index* from its line in the checkpoint."""
        end, output = end_of(record), self._options.settings.output
        if output is not None and isinstance(end, RunResult):
            end._json, end.parsed = end.parsed, output.validate(end.parsed)
        result = result_of(end)
        metadata = self._metadata.get(index, result.metadata)
        task = Task(index, result.prompt, "", key=own_key(record), metadata=metadata)
        label(end, task)
        return end

    def __iter__(self) -> BatchRun[T]:
        return self

    def __next__(self) -> T:
        if os.getpid() != self._pid:
            raise OpenCodeConfigError("this batch belongs to the process that was forked from")
        if not self._advancing.acquire(blocking=False):
            raise OpenCodeConfigError("this batch is being iterated already, here or in a thread")
        try:
            if self._is_ended:
                error, self._error = self._error, None
                raise error or StopIteration
            try:
                return cast(T, self._next())
            except BaseException:  # StopIteration and Ctrl-C too
                self.close()
                raise
        finally:
            self._advancing.release()

    def close(self) -> None:
        """Stop the runs under way with their tools; iteration then just ends. Idempotent."""
        self._stop("the batch was closed")

    def cancel(self, reason: str = "the batch was cancelled") -> None:
        """The same, but the thread that iterates gets OpenCodeCancelledError."""
        self._stop(reason, OpenCodeCancelledError(reason))

    def __enter__(self) -> BatchRun[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_is_ended", True):
            return
        with contextlib.suppress(Exception):  # nobody could catch it
            if self._dispatch is not None and self._dispatch.is_this_thread:
                # This finaliser has interrupted it anywhere, also in a write that holds a lock.
                threading.Thread(
                    target=self.close, name="opencode-batch-close", daemon=True
                ).start()
            else:
                self.close()
        if self._dispatch is None and os.getpid() == self._pid:
            warnings.warn(_NOT_ITERATED, ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        state = "ended" if self._is_ended else "open"
        return f"<BatchRun {state}, {self._drawn} drawn, {self._given} given>"

    def _next(self) -> End:
        dispatch = self._dispatch or self._begin()
        self._draw(dispatch)
        if self._given == self._drawn:
            if self._input_error is not None:
                raise self._input_error
            raise StopIteration
        place = self._given if self._options.ordered else None
        try:
            wait_s = (lambda: None) if self._progress is None else self._progress.wait_s
            _, end = dispatch.take(place, self._show_progress, wait_s)
        except OpenCodeCancelledError:
            if self._is_ended and self._error is None:  # closed in another thread
                raise StopIteration from None
            self._error = None
            raise
        self._given += 1
        self._show_progress()
        if isinstance(end, OpenCodeError) and self._options.on_error == "raise":
            raise end
        return end

    # -- the input -------------------------------------------------------------------------------

    def _draw(self, dispatch: Dispatch) -> None:
        """Draw jobs until the buffer is full; only one where a result can be given at once."""
        place = self._given if self._options.ordered else None
        while self._has_input and self._drawn - self._given < self._buffersize:
            is_ready = dispatch.has_finished(place)
            try:
                self._add(dispatch, self._drawn, next(self._jobs))
            except StopIteration:
                self._has_input = False
            except Exception as error:  # noqa: BLE001 - raised after the results of what was drawn
                self._has_input, self._input_error = False, error
            else:
                self._drawn += 1
                if is_ready:
                    break
        if self._held and self._checkpoint is not None:
            self._checkpoint.warn_unmatched(self._drawn)
            self._put_held(dispatch)

    def _add(self, dispatch: Dispatch, index: int, job: str | Job) -> None:
        """Have *job* run, unless it is invalid or the checkpoint has it.

        Raises:
            OpenCodeError: The checkpoint cannot be read any more.
        """
        if isinstance(job, str):
            job = Job(job)
        try:
            task = self._task(index, job)
            saved = self._saved(task)
        except Exception as error:
            if isinstance(error, OpenCodeError) and not isinstance(error, OpenCodeConfigError):
                raise
            fault = _fault(index, job, error)
            dispatch.offer(index, fault)
            self._tally.finish(fault)
            return
        if saved is None:
            self._held.append(task)
        else:
            before = result_of(saved).metadata
            if task.metadata is None and before is not None:  # what the job says now counts
                task = replace(task, metadata=before)
            elif task.metadata != before:
                self._metadata[index] = task.metadata
            label(saved, task)
            self._tally.count("cached")
            dispatch.offer(index, saved, task.saved_as)
        if self._checkpoint is None or self._checkpoint.has_matched:
            self._put_held(dispatch)

    def _put_held(self, dispatch: Dispatch) -> None:
        held, self._held = self._held, []
        if held and not self._is_prepared and self._options.executor is None:
            try:
                self._runner.prepare(self._options.settings.run_cfg or RunConfig())
            except BaseException:
                self._drawn = held[0].index  # no result of it, or of a later one, will come
                raise
            self._is_prepared = True
        for task in held:
            dispatch.put(task)

    def _task(self, index: int, job: Job) -> Task:
        """*job* with everything decided, or an error for what is wrong with it."""
        settings = _settings_of(job, self._options.settings)
        workspace = self._workspace if job.workspace is None else absolute(job.workspace)
        identity, saved_as = None, ""
        if self._checkpoint is not None and self._identities is not None:
            identity = self._identities.of(job.prompt, workspace, settings)
            saved_as = self._checkpoint.take_key(job.key, identity)
        metadata = _metadata_of(job)
        return Task(index, job.prompt, workspace, settings, job.key, metadata, saved_as, identity)

    def _saved(self, task: Task) -> End | None:
        """What the checkpoint has of *task*, or None if it is to be run."""
        if self._checkpoint is None or task.identity is None:
            return None
        end = self._checkpoint.find(task.saved_as, task.identity)
        if end is None:
            self._tally.count("retried", int(self._checkpoint.has_failed(task.saved_as)))
        return end

    # -- beginning and end -----------------------------------------------------------------------

    def _begin(self) -> Dispatch:
        """Open the checkpoint, show the progress, and start the dispatch."""
        options = self._options
        self._workspace = absolute(options.workspace)
        if options.checkpoint is not None:
            settings = options.settings
            self._checkpoint = Checkpoint(
                options.checkpoint,
                settings.output,
                options.on_mismatch,
                retry_failed=options.retry_failed,
            )
            with_earlier = self._checkpoint.is_of_earlier_version
            self._identities = Identities(settings, self._workspace, with_earlier=with_earlier)
        if options.progress:
            self._progress = self._new_progress()
        # Nothing that its thread holds may lead back here, or dropping the batch would not end it.
        self._dispatch = Dispatch(
            self._runner,
            self._throttle,
            self._tally,
            checkpoint=self._checkpoint,
            budget=Budget(options.max_total_cost, options.max_total_tokens),
            stop_at_failure=options.on_error == "raise",
            retry=options.retry,
        )
        executor = options.executor
        if executor is None:
            executor = ThreadPoolExecutor(self._max_workers, "opencode-batch")
            self._own_executor = executor
        _open.add(self)
        try:
            _open.register()
            self._dispatch.start(executor)
        except RuntimeError as error:  # no thread can be started, or the interpreter shuts down
            raise OpenCodeError(f"the batch cannot be started: {error}") from error
        return self._dispatch

    def _new_progress(self) -> Progress | None:
        always, interval_s = self._options.progress == "always", self._options.progress_interval_s
        try:
            return Progress(self._n_jobs, always=always, interval_s=interval_s)
        except Exception:  # noqa: BLE001 - a pipe that nobody reads, or a notebook's widgets
            _log.exception("the progress of the batch is not shown")
            return None

    def _show_progress(self, *, is_last: bool = False) -> None:
        if self._progress is not None and (is_last or self._progress.is_due):
            show = self._progress.close if is_last else self._progress.show
            try:
                show(self.report)
            except Exception:  # noqa: BLE001 - the work is worth more than the bar
                self._progress = None
                _log.exception("the progress of the batch is not shown any more")

    def _stop(self, reason: str, error: OpenCodeError | None = None) -> None:
        if os.getpid() != self._pid:  # all of it belongs to the process that forked this one
            self._is_ended = True
            return
        with self._closing:
            if self._is_ended:
                return
            self._error = error
            self._is_ended = True
            _open.discard(self)
            try:
                if self._dispatch is not None:
                    self._dispatch.stop(reason)
            finally:
                self._release()

    def _release(self) -> None:
        self._tally.end()
        if self._own_executor is not None:
            self._own_executor.shutdown(wait=False)
        self._show_progress(is_last=True)
        if self._checkpoint is not None:
            self._checkpoint.close()


_open: UnderWay[BatchRun[Any]] = UnderWay(lambda batch: batch.cancel(REASON), is_registered=False)
