"""The verbs of both runners: run and stream for one prompt, submit and map for many.

    submit(prompt, ...) --> a stream in a thread of the pool --> RunFuture
    map(jobs, ...) -------> BatchRun: a stream for each job, on an executor

A subclass says how one request becomes a source of events; see the room of the runs.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Literal, overload

from ._runs import CLOSE_S, Runs
from .core.config import Job, RunConfig, check_count
from .core.errors import OpenCodeError
from .core.future import RunFuture
from .core.lifetime import UnderWay
from .core.request import Request, StrPath, absolute
from .core.result import RunResult
from .core.schema import output_schema
from .core.stream import Limits
from .process.capacity import workers_for_processes

if TYPE_CHECKING:
    from ._options import OnError
    from .batch import BatchRun

__all__ = ["Request", "Runner", "StrPath"]


class Runner(Runs):
    """What a client and a server have in common.

    Safe to share between threads. A context manager; :meth:`close` ends the runs under way.
    """

    def __init__(self, run_cfg: RunConfig | None = None, max_workers: int | None = None) -> None:
        super().__init__(run_cfg)
        check_count("max_workers", max_workers, 1)
        self._max_workers = max_workers
        # Plain dicts, whose single operations are atomic: see UnderWay.
        self._futures: dict[int, RunFuture] = {}
        self._batches: dict[int, weakref.ref[BatchRun[Any]]] = {}
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # with the process it is of
        self._pool_lock = threading.Lock()

    def submit(
        self,
        prompt: str,
        workspace: StrPath = ".",
        *,
        run_cfg: RunConfig | None = None,
        timeout_s: float | None = None,
        idle_timeout_s: float | None = None,
        max_cost: float | None = None,
        max_steps: int | None = None,
        max_tokens: int | None = None,
        log_file: StrPath | None = None,
        max_retries: int = 2,
        retry_delay_s: float = 1.0,
        schema: Any = None,
        max_repairs: int = 1,
    ) -> RunFuture:
        """Run one prompt in a thread; arguments as for :meth:`run`.

        At most *max_workers* of this runner are under way at a time, the others wait for their
        turn. At the interpreter's exit all are ended, for nobody would see what they bring.

        Returns:
            A ``concurrent.futures.Future`` of the result, for ``wait`` and ``as_completed``; its
            ``cancel()`` ends the run also when it is under way.
        """
        self._check_open()
        limits = Limits(
            timeout_s=timeout_s,
            idle_timeout_s=idle_timeout_s,
            max_cost=max_cost,
            max_steps=max_steps,
            max_tokens=max_tokens,
            max_retries=max_retries,
            retry_delay_s=retry_delay_s,
            max_repairs=max_repairs,
        )
        begin = functools.partial(
            self._begin,
            prompt,
            absolute(workspace),
            limits,
            run_cfg=run_cfg,
            output=output_schema(schema),
            log_file=log_file,
        )
        future = RunFuture()
        self._futures[id(future)] = future
        future.add_done_callback(self._forget_future)
        try:
            self._threads().submit(future.work, begin)
        except RuntimeError as error:  # no thread to be had, or the interpreter is at its end
            self._forget_future(future)
            raise OpenCodeError(f"there is no thread to run it: {error}") from error
        except BaseException:
            self._forget_future(future)
            raise
        if self._closed:  # in the meantime
            future.cancel("the runner was closed")
        return future

    @overload
    def map(
        self,
        jobs: Iterable[str | Job],
        workspace: StrPath = ".",
        *,
        run_cfg: RunConfig | None = None,
        timeout_s: float | None = None,
        idle_timeout_s: float | None = None,
        max_cost: float | None = None,
        max_steps: int | None = None,
        max_tokens: int | None = None,
        max_total_cost: float | None = None,
        max_total_tokens: int | None = None,
        max_workers: int | None = None,
        buffersize: int | None = None,
        ordered: bool = True,
        on_error: Literal["return"],
        progress: bool | Literal["always"] = False,
        checkpoint: StrPath | None = None,
        retry_failed: bool = True,
        executor: Executor | None = None,
        adaptive: bool = True,
        max_retries: int = 2,
        retry_delay_s: float = 1.0,
        schema: Any = None,
        max_repairs: int = 1,
        keep_events: bool = True,
        keep_raw: bool = True,
    ) -> BatchRun[RunResult | OpenCodeError]: ...

    @overload
    def map(
        self,
        jobs: Iterable[str | Job],
        workspace: StrPath = ".",
        *,
        run_cfg: RunConfig | None = None,
        timeout_s: float | None = None,
        idle_timeout_s: float | None = None,
        max_cost: float | None = None,
        max_steps: int | None = None,
        max_tokens: int | None = None,
        max_total_cost: float | None = None,
        max_total_tokens: int | None = None,
        max_workers: int | None = None,
        buffersize: int | None = None,
        ordered: bool = True,
        on_error: Literal["raise"] = "raise",
        progress: bool | Literal["always"] = False,
        checkpoint: StrPath | None = None,
        retry_failed: bool = True,
        executor: Executor | None = None,
        adaptive: bool = True,
        max_retries: int = 2,
        retry_delay_s: float = 1.0,
        schema: Any = None,
        max_repairs: int = 1,
        keep_events: bool = True,
        keep_raw: bool = True,
    ) -> BatchRun[RunResult]: ...

    def map(
        self,
        jobs: Iterable[str | Job],
        workspace: StrPath = ".",
        *,
        run_cfg: RunConfig | None = None,
        timeout_s: float | None = None,
        idle_timeout_s: float | None = None,
        max_cost: float | None = None,
        max_steps: int | None = None,
        max_tokens: int | None = None,
        max_total_cost: float | None = None,
        max_total_tokens: int | None = None,
        max_workers: int | None = None,
        buffersize: int | None = None,
        ordered: bool = True,
        on_error: OnError = "raise",
        progress: bool | Literal["always"] = False,
        checkpoint: StrPath | None = None,
        retry_failed: bool = True,
        executor: Executor | None = None,
        adaptive: bool = True,
        max_retries: int = 2,
        retry_delay_s: float = 1.0,
        schema: Any = None,
        max_repairs: int = 1,
        keep_events: bool = True,
        keep_raw: bool = True,
    ) -> BatchRun[Any]:
        """Run many prompts, several at a time, and give their results one by one.

        Nothing starts before the first result is asked for. The input is drawn as room comes, in
        the thread that iterates, so it may be endless. Leaving the loop or the block ends what is
        under way. Arguments that are not explained here are those of :meth:`run`, for each job.

        Args:
            jobs: Prompts, or a Job for each that has settings of its own.
            timeout_s: For each job, from its own start.
            max_cost, max_steps, max_tokens: For each job.
            max_total_cost: US dollars for all jobs together, with what *checkpoint* has spent. Once
                they are spent, no job is started any more, and those under way are stopped. Each
                has an OpenCodeBudgetError in its place, with its partial result; a batch with a
                larger budget and the same checkpoint runs them again. What a job in another process
                costs is seen at its end: there each job may spend what remains at its start.
            max_total_tokens: The same for tokens, counted as for *max_tokens*.
            max_workers: How many jobs at a time; None for as many workers as *executor* has, else
                what this runner was made with, else what the machine carries: for a process per
                run two for each core, as far as memory goes (0.55 GiB each), and 32 at most.
            buffersize: How many jobs are drawn and not yet given, at most; None for twice as many
                as *max_workers*.
            ordered: Give results in the order of the input, else as they come.
            on_error: ``"raise"`` the first error in its place, which ends the batch; or
                ``"return"`` the error object in the result's place, with ``index``, ``key``,
                ``prompt`` and the partial ``result``.
            progress: Show a bar where stderr is a terminal or a notebook; ``"always"`` anywhere.
            checkpoint: A file of finished jobs, a line of JSON each, on disk before the result is
                given. Those in it are not run again: their results come from the file.
            retry_failed: Run those again that failed in the checkpoint, or give their errors.
            executor: Where to run: a ``concurrent.futures`` executor of threads or processes, or
                a Dask cluster's ``Client.get_executor()``. It is not shut down.
            adaptive: Have fewer jobs at a time while the provider refuses for too many requests.
            keep_events, keep_raw: Keep events and raw lines in the results. Without, they are
                small, and so is the checkpoint.

        Raises:
            OpenCodeConfigError: A setting was refused. Errors of jobs are raised by the iteration.
        """
        from ._options import Options
        from .batch import BatchRun

        self._check_open()
        options = Options(
            workspace=workspace,
            run_cfg=self._checked(run_cfg),
            limits=Limits(
                timeout_s=timeout_s,
                idle_timeout_s=idle_timeout_s,
                max_cost=max_cost,
                max_steps=max_steps,
                max_tokens=max_tokens,
                max_retries=max_retries,
                retry_delay_s=retry_delay_s,
                max_repairs=max_repairs,
            ),
            output=output_schema(schema),
            keep_events=keep_events,
            keep_raw=keep_raw,
            max_total_cost=max_total_cost,
            max_total_tokens=max_total_tokens,
            max_workers=max_workers,
            default_workers=self._workers,
            buffersize=buffersize,
            ordered=ordered,
            on_error=on_error,
            progress=progress,
            checkpoint=checkpoint,
            retry_failed=retry_failed,
            executor=executor,
            adaptive=adaptive,
        )
        run: BatchRun[Any] = BatchRun(self, jobs, options)
        self._batches[id(run)] = weakref.ref(run)
        weakref.finalize(run, self._batches.pop, id(run), None).atexit = False
        return run

    def close(self) -> None:
        """End the runs under way; their callers get OpenCodeCancelledError. Idempotent."""
        self._closed = True
        for ref in list(self._batches.values()):
            if (batch := ref()) is not None:
                batch.cancel("the runner was closed")
        futures = list(self._futures.values())
        for future in futures:
            future.cancel_waiting()
        super().close()
        if self._pool is not None and self._pool[0] == os.getpid():
            wait(futures, CLOSE_S)
            self._pool[1].shutdown(wait=False)

    def _default_workers(self) -> int:
        """How many runs of this kind the machine carries."""
        return workers_for_processes()

    def _workers(self) -> int:
        return self._max_workers or self._default_workers()

    def _threads(self) -> ThreadPoolExecutor:
        """The pool of submit(), made when first asked for; its threads end with this runner."""
        with self._pool_lock:
            if self._pool is None or self._pool[0] != os.getpid():  # a forked child has no threads
                pool = ThreadPoolExecutor(self._workers(), "opencode-submit")
                self._pool = os.getpid(), pool
                _submitting.add(self)
            return self._pool[1]

    def _forget_future(self, future: object) -> None:
        self._futures.pop(id(future), None)


# Runners that have a pool. What waits in one would be run at the interpreter's exit otherwise.
_submitting: UnderWay[Runner] = UnderWay(Runner.close)
