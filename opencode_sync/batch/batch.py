"""Many jobs, drawn lazily, run at the same time, and their results one by one.

    jobs --draw--> Task --put--> Dispatch --take--> result or error --> the caller's loop
            |                      ^
            +-- found in the checkpoint: ready at once

The caller's thread is the only one that touches the input, the progress bar, and what is given out;
what happens in between is the dispatch's. Knows nothing of OpenCode: a job is what a stream is made
of.

How a batch is to go: values, checked before anything is drawn.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar, cast

from ..core.config import Job, RunConfig, check_count, check_number, checked_path
from ..core.errors import OpenCodeCancelledError, OpenCodeConfigError, OpenCodeError
from ..core.lifetime import REASON, Pinned, UnderWay
from ..core.request import LIMITS_OF_A_JOB, Budget, absolute
from ..core.result import RunResult
from ..core.schema import OutputSchema
from ..core.stream import Limits
from ..process.capacity import workers_for_processes
from .checkpoint import Checkpoint, Saved, job_fingerprint, settings_fingerprint
from .dispatch import Dispatch
from .job import End, Settings, Streams, Task
from .tally import BatchReport, Progress, Tally
from .throttle import Throttle

OnError = Literal["raise", "return"]


@dataclass(frozen=True)
class Options:
    """How a batch is to go; checked when made. Meanings as for ``map``.

    Attributes:
        default_workers: How many jobs at a time, where neither user nor executor say.
    """

    workspace: str | os.PathLike[str] = "."
    run_cfg: RunConfig = field(default_factory=RunConfig)
    limits: Limits = field(default_factory=Limits)
    output: OutputSchema | None = None
    keep_events: bool = True
    keep_raw: bool = True
    max_total_cost: float | None = None
    max_total_tokens: int | None = None
    max_workers: int | None = None
    default_workers: Callable[[], int] = workers_for_processes
    buffersize: int | None = None
    ordered: bool = True
    on_error: OnError = "raise"
    progress: bool | Literal["always"] = False
    checkpoint: str | os.PathLike[str] | None = None
    retry_failed: bool = True
    executor: Executor | None = None
    adaptive: bool = True

    def workers(self) -> int:
        """How many jobs at a time."""
        own = self.default_workers
        return self.max_workers or _workers_of(self.executor) or own()

    @property
    def cost_limit(self) -> str | None:
        """Name of the limit of dollars that there is; None where there is none."""
        if self.max_total_cost is not None:
            return "max_total_cost"
        return None if self.limits.max_cost is None else "max_cost"

    def __post_init__(self) -> None:
        for name in ("max_workers", "buffersize"):
            check_count(name, getattr(self, name), 1)
        check_number("max_total_cost", self.max_total_cost, optional=True)
        check_count("max_total_tokens", self.max_total_tokens, 0)
        if self.checkpoint is not None:
            path = checked_path("checkpoint", self.checkpoint)
            object.__setattr__(self, "checkpoint", path)
        _check_choice("on_error", self.on_error, "raise", "return")
        _check_choice("progress", self.progress, False, True, "always")
        if self.executor is not None and not isinstance(self.executor, Executor):
            kind = type(self.executor).__name__
            raise OpenCodeConfigError(f"executor is {kind}: use a concurrent.futures.Executor")


def fault_of(job: object) -> str | None:
    """What makes it no job that could be told from others, or None."""
    if not isinstance(job, Job):
        return f"is {type(job).__name__}: use a str or a Job"
    if not isinstance(job.run_cfg, (RunConfig, type(None))):
        return f"has a run_cfg of type {type(job.run_cfg).__name__}: use a RunConfig"
    if not isinstance(job.key, (str, type(None))):
        return f"has a key of type {type(job.key).__name__}: use a str"
    return None


def _check_choice(name: str, value: object, *choices: object) -> None:
    if value not in choices:
        raise OpenCodeConfigError(f"{name} is {value!r}: use {' or '.join(map(repr, choices))}")


def _workers_of(executor: Executor | None) -> int | None:
    """How many jobs *executor* carries out at a time, where it says so; in no public words."""
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
    reference, ends the runs under way with their tools, within seconds; finished ones are in the
    checkpoint by then. One thread iterates; :meth:`close` and ``report`` may come from any.
    """

    def __init__(self, runner: Streams, jobs: Iterable[str | Job], options: Options) -> None:
        self._is_ended = True  # nothing to close, should one of the next lines raise
        if isinstance(jobs, (str, bytes, Job, Mapping)) or not isinstance(jobs, Iterable):
            raise OpenCodeConfigError(f"jobs is {type(jobs).__name__}: use an iterable of prompts")
        self._jobs = iter(jobs)
        self._n_jobs = len(jobs) if isinstance(jobs, Sized) else None
        self._options = options
        self._most = options.workers()
        self._buffersize = options.buffersize or 2 * self._most
        self._runner = runner
        path = options.checkpoint
        self._tally = Tally(None if path is None else Path(path), options.cost_limit)
        self._dispatch: Dispatch | None = None
        self._checkpoint: Checkpoint | None = None
        self._own_executor: ThreadPoolExecutor | None = None
        self._is_prepared = False  # the runner, by the first job that is not in the checkpoint
        self._progress: Progress | None = None
        self._settings = ""
        self._drawn = self._given = 0
        self._has_input = True
        self._input_error: Exception | None = None
        self._error: OpenCodeError | None = None
        self._advancing, self._closing = threading.Lock(), threading.Lock()
        self._pid = os.getpid()
        self._is_ended = False

    @property
    def report(self) -> BatchReport:
        """The batch as it stands, during it and after its end."""
        if self._dispatch is not None:
            return self._dispatch.report()
        most = self._most
        return self._tally.report(running=0, rate_limits=0, max_workers=most, lowest=most)

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
        """End the runs under way with their tools; iteration then just ends. Idempotent."""
        self._stop("the batch was closed")

    def cancel(self, reason: str = "the batch was cancelled") -> None:
        """The same, but who iterates gets OpenCodeCancelledError."""
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
        with contextlib.suppress(Exception):  # a finaliser has nobody to raise to
            if self._dispatch is not None and self._dispatch.is_this_thread:
                # It was interrupted in the middle of anything, a write that holds its lock too.
                threading.Thread(
                    target=self.close, name="opencode-batch-close", daemon=True
                ).start()
            else:
                self.close()

    def __repr__(self) -> str:
        state = "ended" if self._is_ended else "open"
        return f"<BatchRun {state}, {self._drawn} drawn, {self._given} given>"

    def _next(self) -> End:
        dispatch = self._begin()
        self._draw(dispatch)
        if self._given == self._drawn:
            if self._input_error is not None:
                raise self._input_error
            raise StopIteration
        place = self._given if self._options.ordered else None
        try:
            index, end = dispatch.take(place, self._show_progress)
        except OpenCodeCancelledError:
            if self._is_ended and self._error is None:  # closed in another thread
                raise StopIteration from None
            self._error = None
            raise
        if isinstance(end, Saved):
            end = self._load(index, end)
        self._given += 1
        self._show_progress()
        if isinstance(end, OpenCodeError) and self._options.on_error == "raise":
            raise end
        return end

    # -- the input -------------------------------------------------------------------------------

    def _draw(self, dispatch: Dispatch) -> None:
        """Draw jobs until the buffer is full; only one where there is something to give."""
        place = self._given if self._options.ordered else None
        while self._has_input and self._drawn - self._given < self._buffersize:
            is_ready = dispatch.shelf.has(place)
            try:
                job = next(self._jobs)
            except StopIteration:
                self._has_input = False
                return
            except Exception as error:  # noqa: BLE001 - raised in its place, after what was drawn
                self._has_input, self._input_error = False, error
                return
            self._add(dispatch, self._drawn, job)
            self._drawn += 1
            if is_ready:
                return

    def _add(self, dispatch: Dispatch, index: int, job: str | Job) -> None:
        task = self._task(index, job)
        if isinstance(task, OpenCodeError):
            task.index = index
            dispatch.shelf.put(index, task)
            self._tally.finish(index, str(job), None, task, 0.0)
            return
        if self._checkpoint is not None and task.key is not None:
            wanted = not self._options.retry_failed
            saved = self._checkpoint.find(task.key, task.fingerprint, failures=wanted)
            if saved is not None:
                self._tally.count("cached")
                dispatch.shelf.put(index, saved)
                return
            self._tally.count("retried", int(self._checkpoint.has_failed(task.key)))
        if not self._is_prepared and self._options.executor is None:
            self._runner.prepare(self._options.run_cfg)
        self._is_prepared = True
        dispatch.put(task)

    def _task(self, index: int, job: str | Job) -> Task | OpenCodeConfigError:
        """*job* with the batch's settings where it has none; or what is wrong with it."""
        if isinstance(job, str):
            job = Job(job)
        if fault := fault_of(job):
            return OpenCodeConfigError(f"job {index} {fault}")
        options = self._options
        cfg = options.run_cfg if job.run_cfg is None else job.run_cfg
        workspace = absolute(options.workspace if job.workspace is None else job.workspace)
        own = {name: getattr(job, name) for name in LIMITS_OF_A_JOB}
        limits = {name: limit for name, limit in own.items() if limit is not None}
        key, fingerprint = job.key, ""
        if self._checkpoint is not None:
            settings = self._settings if job.run_cfg is None else self._fingerprint(cfg)
            fingerprint = job_fingerprint(job.prompt, workspace, settings)
            key = self._checkpoint.take_key(key, fingerprint)
        return Task(index, job.prompt, workspace, key, cfg, limits, fingerprint)

    def _load(self, index: int, saved: Saved) -> End:
        assert self._checkpoint is not None
        end = self._checkpoint.load(saved)
        end.index = index
        if isinstance(end, OpenCodeError) and end.result is not None:
            end.prompt, end.key, end.result.index = end.result.prompt, end.result.key, index
        return end

    def _fingerprint(self, cfg: RunConfig) -> str:
        output = self._options.output
        return settings_fingerprint(cfg, None if output is None else output.json_schema)

    # -- beginning and end -----------------------------------------------------------------------

    def _begin(self) -> Dispatch:
        if self._dispatch is not None:
            return self._dispatch
        options = self._options
        self._settings = self._fingerprint(options.run_cfg)
        if options.checkpoint is not None:
            self._checkpoint = Checkpoint(options.checkpoint, self._settings, options.output)
        if options.progress:
            self._progress = Progress(self._n_jobs, always=options.progress == "always")
        # Nothing that its thread holds may lead back here, or dropping the batch would not end it.
        self._dispatch = Dispatch(
            self._runner,
            Settings(options.limits, options.output, options.keep_events, options.keep_raw),
            Throttle(self._most, adaptive=options.adaptive),
            self._tally,
            checkpoint=self._checkpoint,
            budget=Budget(options.max_total_cost, options.max_total_tokens),
            stop_at_failure=options.on_error == "raise",
        )
        executor = options.executor
        if executor is None:
            executor = self._own_executor = ThreadPoolExecutor(self._most, "opencode-batch")
        _open.add(self)
        try:
            _open.register()
            self._dispatch.begin(executor)
        except RuntimeError as error:  # no thread to be had, or the interpreter is at its end
            raise OpenCodeError(f"the batch cannot be started: {error}") from error
        return self._dispatch

    def _show_progress(self) -> None:
        if self._progress is not None:
            self._progress.show(self.report)

    def _stop(self, reason: str, error: OpenCodeError | None = None) -> None:
        if os.getpid() != self._pid:  # a forked child owns none of this
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
        if self._progress is not None:
            self._show_progress()
            self._progress.close()
        if self._checkpoint is not None:
            self._checkpoint.close()


_open: UnderWay[BatchRun[Any]] = UnderWay(lambda batch: batch.cancel(REASON), is_registered=False)
