"""The verbs of both runners: run and stream for one prompt, submit and map for many.

    submit(prompt, ...) --> a stream in a thread of the pool --> RunFuture
    map(jobs, ...) -------> BatchRun: a stream for each job, on an executor

A subclass says how one request becomes a source of events; see the room of the runs.

An answer held against its schema, and sent back where it does not fit.

    result --> SchemaReview --+--> it fits: result.parsed
                              +--> it does not: the request for a further turn of the session
                              +--> once too often: OpenCodeOutputError

Knows what to ask for; starts nothing.

Runs one at a time: the verbs run and stream, and the runs under way.

    run(prompt, ...) --------> stream(prompt, ...) --wait()--> RunResult
    stream(prompt, ...) --> Request --> _open() of the subclass --> RunStream
                               ^                                       |
                               +--- a further turn <--- SchemaReview --+

A subclass says how one request becomes a source of events; everything else is the same for a
process per run and for a server. The verbs for many runs are in the room of the runner.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from ..core.config import Job, RunConfig, check_count, validate_config_for_run
from ..core.denials import OUTPUT_TOOL, Tripwire, check_names
from ..core.errors import (
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeOutputError,
)
from ..core.future import RunFuture, cancel_together
from ..core.lifetime import CancelScope, UnderWay
from ..core.request import (
    NO_ANSWERS,
    Answers,
    Request,
    StrPath,
    absolute,
    checked_config,
    directory,
)
from ..core.result import ErrorInfo, RunResult, is_cut_off
from ..core.schema import Fit, OutputSchema, SchemaMismatch, output_schema
from ..core.secrets import Secrets
from ..core.stream import Limits, OpenSource, RunStream, Source
from ..process.capacity import workers_for_processes

if TYPE_CHECKING:
    from ..batch.batch import BatchRun, OnError
    from ..server.sessions import Sessions

_NAME = "StructuredOutputError"  # OpenCode's own word for it


class SchemaReview:
    """Of one run, whose answers come one after another."""

    def __init__(self, request: Request, max_repairs: int) -> None:
        self._request = request
        self._left = self._max_repairs = max_repairs

    def __call__(self, result: RunResult) -> Request | None:
        """Set *result*'s ``parsed``, or return what to ask for next.

        Raises:
            OpenCodeOutputError: If it does not fit, and nothing is to be asked any more.
        """
        schema = self._request.output
        if schema is None:
            return None
        is_cut = is_cut_off(result)
        found = _found(schema, result, is_cut)
        if isinstance(found, SchemaMismatch):
            return self._sent_back(result, found, is_cut)
        result.parsed, result._json = found
        if is_cut:
            result.finish_reason = "stop"  # the value is whole, whatever was to follow it
        return None

    def _sent_back(self, result: RunResult, mismatch: SchemaMismatch, is_cut: bool) -> Request:
        schema = self._request.output
        if schema is None or self._left <= 0 or result.session_id is None:
            raise self._misfit(result, mismatch, is_cut) from mismatch.__cause__
        self._left -= 1
        cfg = self._request.cfg.replace(
            session_id=result.session_id,
            continue_session=False,
            fork=False,
            command=None,
            files=(),
            title=None,
            share=None,
        )
        result._json = None
        prompt = schema.repair(mismatch.faults, is_cut=is_cut)
        return dataclasses.replace(self._request, prompt=prompt, cfg=cfg, is_repair=True)

    def _misfit(
        self, result: RunResult, mismatch: SchemaMismatch, is_cut: bool
    ) -> OpenCodeOutputError:
        arguments, result._json = result._json, None
        text = result.answer if arguments is None else json.dumps(arguments, ensure_ascii=False)
        repairs = self._max_repairs - self._left
        after = f" after {repairs} repair{'s' * (repairs > 1)}" if repairs else ""
        cut = ", and was cut off at the model's output limit" if is_cut else ""
        faults = mismatch.faults
        message = f"the answer does not fit its schema{after}{cut}: {faults[0]}"
        result.error = ErrorInfo(_NAME, message)
        return OpenCodeOutputError(message, errors=faults, text=text, result=result)


def _found(schema: OutputSchema, result: RunResult, is_cut: bool) -> Fit | SchemaMismatch:
    """The value of the answer, or what is wrong with it."""
    try:
        # What a server took down, if it did; a model may have put it into words all the same.
        if result._json is None:
            return schema.find(result.answer, is_cut=is_cut)
        if (n := _n_outputs(result)) > 1:
            raise SchemaMismatch([f"{OUTPUT_TOOL} was called with {n} different values at once"])
        return schema.take(result._json)  # the tool is called with whole JSON, or not at all
    except SchemaMismatch as mismatch:
        # Without the traceback, whose frames would keep the run's stream in memory.
        return mismatch.with_traceback(None)


def _n_outputs(result: RunResult) -> int:
    """How many different values the last answer gave to the tool; OpenCode keeps the last one."""
    message_id: object = None
    values: set[str] = set()
    for event in result.tool_calls:
        part = event.get("part")
        if not isinstance(part, Mapping) or part.get("tool") != OUTPUT_TOOL:
            continue
        state = part.get("state")
        if isinstance(state, Mapping) and state.get("status") == "completed":
            if part.get("messageID") != message_id:
                message_id, values = part.get("messageID"), set()
            values.add(json.dumps(state.get("input"), sort_keys=True))
    return len(values)


CLOSE_S = 8.0  # bound on waiting for other threads' runs to end; stopping one takes 5 s at most

NEEDS_SERVER = (
    "needs a server: a process per turn asks nobody, and ends with its turn; use a session of "
    "OpenCodeServer"
)
_CLOSED = "the runner was closed"

_R = TypeVar("_R", bound="Runs")


class Runs(abc.ABC):
    """What starts runs and knows those under way."""

    _keeps_sessions = False  # where they can be asked about

    def __init__(self, run_cfg: RunConfig | None = None) -> None:
        self._run_cfg = checked_config(run_cfg, RunConfig())
        # A plain dict, whose single operations are atomic: see UnderWay.
        self._streams: dict[int, weakref.ref[RunStream]] = {}
        self._closed = False

    def run(
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
    ) -> RunResult:
        """Run one prompt to its end.

        Args:
            prompt: Reaches the model byte for byte.
            workspace: The directory that OpenCode works in.
            run_cfg: Settings, in place of this runner's own as a whole.
            timeout_s: Seconds from the start of the process, over all attempts. On a server: from
                when the run is handed to it, its own start included if it has none yet.
            idle_timeout_s: Seconds without an event or a log line.
            max_cost: US dollars; a run that exceeds it is stopped at that step, also at a step of
                a sub-agent.
            max_steps: Steps of the model, those of sub-agents not among them. A run that has
                taken them and is not done is stopped; nobody tells the model beforehand.
            max_tokens: Tokens of all kinds: input, output, reasoning, and what the cache read and
                wrote. As for *max_cost*, and where no prices are known the one that binds.
            log_file: Gets each event as a line of JSON as it comes, and a line for each attempt.
                Truncated at the start of the run.
            max_retries: Further attempts after a start-up failure that is safe to repeat.
            retry_delay_s: Seconds between attempts.
            schema: What the answer has to look like, to be validated and given as ``parsed``: a
                pydantic model class, a dataclass, a ``TypedDict`` or another type, or a JSON
                Schema as a mapping. Its value is the last fenced block of the answer, else the
                whole answer, else the one value in it that fits.
            max_repairs: How often an answer that does not fit is sent back in the same session,
                with the validator's words. All that is counted is counted over all turns.

        Raises:
            OpenCodeConfigError: Refused before anything was started.
            OpenCodeOutputError: No answer did fit *schema*.
            OpenCodeError: One of its subclasses, with what was got as ``.result``. Whichever way
                it ends, the process and its tools are gone. A denied tool is no error: it stands
                in the result's ``status`` and ``denied_tools``.
        """
        with self.stream(
            prompt,
            workspace,
            run_cfg=run_cfg,
            timeout_s=timeout_s,
            idle_timeout_s=idle_timeout_s,
            max_cost=max_cost,
            max_steps=max_steps,
            max_tokens=max_tokens,
            log_file=log_file,
            max_retries=max_retries,
            retry_delay_s=retry_delay_s,
            schema=schema,
            max_repairs=max_repairs,
        ) as stream:
            return stream.wait()

    def stream(
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
        keep_events: bool = True,
        keep_raw: bool = True,
    ) -> RunStream:
        """Start one prompt, and give its events as they come; arguments as for :meth:`run`.

        Args:
            keep_events: Keep the events in ``.result`` too.
            keep_raw: Keep the raw lines in ``.result`` too.

        Raises:
            OpenCodeConfigError: Refused before anything was started. What goes wrong later is
                raised by the iteration, after the last event.
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
        return self.begin(
            prompt,
            workspace,
            limits,
            run_cfg=run_cfg,
            output=output_schema(schema),
            log_file=log_file,
            keep_events=keep_events,
            keep_raw=keep_raw,
        )

    def begin(
        self,
        prompt: str,
        workspace: StrPath,
        limits: Limits,
        *,
        run_cfg: RunConfig | None = None,
        output: OutputSchema | None = None,
        answers: Answers = NO_ANSWERS,
        log_file: StrPath | None = None,
        keep_events: bool = True,
        keep_raw: bool = True,
        on_begin: Callable[[RunStream], None] | None = None,
        on_end: Callable[[RunStream], None] | None = None,
    ) -> RunStream:
        """Start one prompt: the entry for a batch and a session, whose settings are checked by now.

        Args:
            answers: To what is asked in the meantime.
            on_begin: Gets the stream before anything is started.
            on_end: Gets it when it has ended, in whichever thread.
        """
        cfg = self._checked(run_cfg, may_ask=answers is not NO_ANSWERS)
        secrets = Secrets(self._run_cfg, cfg)
        warnings = check_names(cfg.build_opencode_config_dict(), self._mcp_servers())
        request = Request(
            prompt,
            directory(workspace),
            cfg,
            output,
            answers,
            secrets=secrets,
            warnings=warnings,
        )
        held_against_schema = SchemaReview(request, limits.max_repairs)

        def opening(request: Request) -> OpenSource:
            return lambda scope: self._open(request, scope, keep_raw)

        def review(result: RunResult) -> OpenSource | None:
            further = held_against_schema(result)
            return None if further is None else opening(further)

        def remember(stream: RunStream) -> None:
            self._streams[id(stream)] = weakref.ref(stream)
            if self._closed:  # close() looks for streams after it has said so
                raise OpenCodeCancelledError(_CLOSED)
            if on_begin is not None:
                on_begin(stream)

        def forget(stream: RunStream) -> None:
            self._streams.pop(id(stream), None)
            if on_end is not None:
                on_end(stream)

        return RunStream(
            opening(request),
            RunResult(prompt=prompt, workspace=str(request.workspace)),
            limits,
            counts_opening=self._counts_opening(cfg),
            log_file=log_file,
            keep_events=keep_events,
            review=None if output is None else review,
            secrets=secrets,
            tripwire=Tripwire(cfg),
            on_begin=remember,
            on_end=forget,
        )

    def close(self) -> None:
        """End the runs under way; their callers get OpenCodeCancelledError. Idempotent."""
        self._closed = True
        streams = [stream for ref in list(self._streams.values()) if (stream := ref())]
        cancel_together(streams, _CLOSED)
        for stream in streams:
            stream.wait_ended(CLOSE_S)

    def __enter__(self: _R) -> _R:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abc.abstractmethod
    def _open(self, request: Request, scope: CancelScope, keep_raw: bool) -> Source:
        """Start one attempt at *request*; what waits in it ends with *scope*."""

    def prepare(self, cfg: RunConfig) -> None:  # noqa: B027 - mostly nothing
        """Start what a batch of runs with *cfg* needs, or raise what would fail all of them."""

    def _counts_opening(self, cfg: RunConfig) -> bool:
        """Whether the time that a run takes to open counts for its limits."""
        return False

    def _kept_sessions(self, cfg: RunConfig) -> Sessions:
        """What is asked about sessions, besides prompts; OpenCodeConfigError where nobody is."""
        raise OpenCodeConfigError(f"this {NEEDS_SERVER}")

    def _check(self, cfg: RunConfig, *, may_ask: bool = False) -> None:
        """Refuse settings that this kind of runner cannot follow."""
        validate_config_for_run(cfg, may_ask=may_ask, mcp_servers=self._mcp_servers())

    def _mcp_servers(self) -> Iterable[str]:
        """Names of those that a run on a server has, since the server was started with them."""
        return self._run_cfg.build_opencode_config_dict().get("mcp") or ()

    def _checked(self, run_cfg: RunConfig | None, *, may_ask: bool = False) -> RunConfig:
        cfg = checked_config(run_cfg, self._run_cfg)
        self._check(cfg, may_ask=may_ask)
        return cfg

    def _check_open(self) -> None:
        if self._closed:
            raise OpenCodeConfigError(f"this {type(self).__name__} is closed: make a new one")


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
            self.begin,
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
        from ..batch.batch import BatchRun, Options

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
