"""The verbs of a client and a server, and the runs under way.

    run(), stream() ---------------------------> begin() ---> Request --> RunStream
    submit() --> RunFuture, in a thread ------------^                       |
    map() -----> BatchRun, which begins each job ---^         _open() of the subclass
    session() -> Session, which begins each prompt -^

A subclass says how one request becomes a source of events; everything else is the same for a
process per run and for a server.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from ..core.config import Job, RunConfig, checked_count, validate_config_for_run
from ..core.errors import OpenCodeCancelledError, OpenCodeConfigError, OpenCodeError
from ..core.lifetime import CancelScope, Pinned, UnderWay
from ..core.request import (
    BATCH_DEFAULTS,
    NO_ANSWERS,
    Answers,
    BatchOptions,
    OnError,
    Request,
    RunOptions,
    RunSettings,
    Source,
    StreamOptions,
    StrPath,
    absolute,
    check_keywords,
    checked_config,
    directory,
    shows,
)
from ..core.result import RunResult
from ..core.secrets import Secrets
from ..core.stream import CANCEL_S, RunStream, cancel_together
from ..process.capacity import workers_for_processes

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..batch.batch import BatchRun
    from ..server.sessions import Sessions
    from .permissions import OnPermission, OnQuestion
    from .session import Session
else:
    # What they are, for typing.get_type_hints(): their modules are loaded when they are used.
    BatchRun, Session, OnPermission, OnQuestion = Iterator, Pinned, Callable, Callable

_NEEDS_SERVER = (
    "needs a server: a process per turn asks nobody, and ends with its turn; use a session of "
    "OpenCodeServer"
)
_CLOSED = "the runner was closed"

_R = TypeVar("_R", bound="Runner")


class Runner(abc.ABC):
    """What a client and a server have in common.

    Safe to share between threads. A context manager; :meth:`close` ends the runs under way.
    """

    # Whether sessions can be asked about, and ask in turn.
    _keeps_sessions = False

    def __init__(self, run_cfg: RunConfig | None = None, max_workers: int | None = None) -> None:
        self._run_cfg = checked_config(run_cfg, RunConfig())
        self._max_workers: int | None = checked_count("max_workers", max_workers, 1)
        # Plain dicts, whose single operations are atomic: see UnderWay.
        # By the process that began them: a forked child does not own its parent's.
        self._streams: dict[tuple[int, int], weakref.ref[RunStream]] = {}
        self._futures: dict[int, RunFuture] = {}
        self._batches: dict[int, weakref.ref[BatchRun[Any]]] = {}
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # with the process it belongs to
        self._pool_lock = threading.Lock()
        self._closed = False

    @shows(RunOptions)
    def run(
        self, prompt: str, workspace: StrPath = ".", **options: Unpack[RunOptions]
    ) -> RunResult:
        """Run one prompt to its end, and return its result.

        However the run ends, nothing that it started keeps running, and you keep its output.

        Args:
            prompt: Reaches the model byte for byte.
            workspace: The directory that OpenCode works in.
            run_cfg: Settings, in place of this runner's own as a whole.
            timeout_s: Seconds from the start of the process, over all attempts. On a server: from
                the call, including the server's own start if it is not running yet.
            idle_timeout_s: Seconds without an event or a log line.
            max_cost: US dollars. A run that exceeds it is stopped at that step, even if it is a
                step of a sub-agent.
            max_steps: Steps of the model, not counting those of sub-agents. A run that has taken
                them and is not done is stopped; the model is not told beforehand.
            max_tokens: Tokens of all kinds: input, output, reasoning, and what the cache read and
                wrote. Checked like *max_cost*, and binds even where prices are unknown.
            startup_retries: Further attempts where OpenCode fails to start, before it has asked
                the model. What fails later is not repeated: see *retries* of :meth:`map`.
            startup_retry_delay_s: Seconds between these attempts.
            max_retries, retry_delay_s: Former names of these two.
            schema: What the answer has to look like; it is validated and given as ``parsed``. A
                pydantic model class, a dataclass, a ``TypedDict`` or another type, or a JSON
                Schema as a mapping. The value is the last fenced block of the answer, else the
                whole answer, else the one value in it that fits.
            max_repairs: How often an answer that does not fit *schema* is sent back in the same
                session, with the validator's words. Limits and costs include these rounds.
            log_file: A file that gets each event as a line of JSON as it comes, and a line for
                each attempt. Truncated at the start of the run.

        Raises:
            OpenCodeConfigError: Refused before anything was started.
            OpenCodeTimeoutError: *timeout_s* or *idle_timeout_s* passed.
            OpenCodeBudgetError: *max_cost*, *max_steps* or *max_tokens* was exceeded.
            OpenCodeOutputError: No answer fitted *schema*.
            OpenCodeCancelledError: Cancelled from another thread, or the runner was closed.
            OpenCodeError: Its other subclasses, for a run that failed. Partial output is in the
                error's ``.result``. A denied tool raises nothing: see ``status`` and
                ``denied_tools`` of the result.
        """
        check_keywords(Runner.run, options)
        self._check_open()
        with self.begin(prompt, workspace, RunSettings.of(options)) as stream:
            return stream.wait()

    @shows(StreamOptions)
    def stream(
        self, prompt: str, workspace: StrPath = ".", **options: Unpack[StreamOptions]
    ) -> RunStream:
        """Start one prompt, and give its events as they come; arguments as for :meth:`run`.

        Args:
            keep_events: Keep the events in ``.result`` too.
            keep_raw: Keep the raw lines in ``.result`` too.

        Raises:
            OpenCodeConfigError: Refused before anything was started. Later errors are raised by
                the iteration, after the last event.
        """
        check_keywords(Runner.stream, options)
        self._check_open()
        return self.begin(prompt, workspace, RunSettings.of(options))

    @shows(RunOptions)
    def submit(
        self, prompt: str, workspace: StrPath = ".", **options: Unpack[RunOptions]
    ) -> RunFuture:
        """Run one prompt in a thread; arguments as for :meth:`run`.

        At most *max_workers* of this runner are under way at a time, the others wait. At the
        interpreter's exit all are cancelled, since nobody would see their results.

        Returns:
            A ``concurrent.futures.Future`` of the result, for ``wait`` and ``as_completed``. Its
            ``cancel()`` also ends a run that is under way.
        """
        check_keywords(Runner.submit, options)
        self._check_open()
        settings = RunSettings.of(options)
        begin = functools.partial(self.begin, prompt, absolute(workspace), settings)
        future = RunFuture()
        self._futures[id(future)] = future
        future.add_done_callback(self._forget_future)
        try:
            self._threads().submit(future.work, begin)
        except RuntimeError as error:  # too many threads, or the interpreter exits
            self._forget_future(future)
            raise OpenCodeError(f"no thread can be started for it: {error}") from error
        except BaseException:
            self._forget_future(future)
            raise
        if self._closed:  # in the meantime
            future.cancel(_CLOSED)
        return future

    @overload
    def map(
        self,
        jobs: Iterable[str | Job],
        workspace: StrPath = ".",
        *,
        on_error: Literal["return"],
        **options: Unpack[BatchOptions],
    ) -> BatchRun[RunResult | OpenCodeError]: ...

    @overload
    def map(
        self,
        jobs: Iterable[str | Job],
        workspace: StrPath = ".",
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[BatchOptions],
    ) -> BatchRun[RunResult]: ...

    @shows(BatchOptions)
    def map(
        self,
        jobs: Iterable[str | Job],
        workspace: StrPath = ".",
        *,
        on_error: OnError = "raise",
        **options: Unpack[BatchOptions],
    ) -> BatchRun[Any]:
        """Run many prompts, several at a time, and give their results one by one.

        Nothing starts before the first result is asked for. The input is read only as far as jobs
        can start soon, in the thread that iterates, so it may be endless. Leaving the loop or the
        block ends what is under way. Arguments that are not explained here are those of
        :meth:`run`, for each job.

        Args:
            jobs: Prompts, or a Job for each that has settings of its own, or a pandas DataFrame
                that ``read_jobs`` finds prompts in.
            on_error: ``"raise"`` the first error in its place, which ends the batch; or
                ``"return"`` the error object in the result's place, with ``index``, ``key``,
                ``prompt``, ``metadata`` and the partial ``result``. A job that cannot be begun,
                such as one whose prompt is blank or not a text, is an error like any other.
            timeout_s: For each job, from its own start.
            max_cost, max_steps, max_tokens: For each job.
            max_total_cost: US dollars for all jobs together, including what *checkpoint* records.
                Once they are spent, no further job is started, and those under way are stopped.
                Each has an OpenCodeBudgetError in its place, with its partial result; a batch with
                a larger budget and the same checkpoint runs them again. What a job in another
                process costs is known at its end: there each job may spend what is left at its
                start.
            max_total_tokens: The same for tokens, counted as for *max_tokens*.
            max_workers: How many jobs at a time; None for as many workers as *executor* has, else
                what this runner was made with, else what the machine carries: for a process per
                run two for each core, as far as memory allows (0.55 GiB each), and at most 32.
            buffersize: How many jobs may be drawn and not yet given; None for twice *max_workers*.
            ordered: Give results in the order of the input, else as they come.
            progress: Show a bar where stderr is a terminal or a notebook. Elsewhere, as in the log
                of a service or of a CI, print a line every *progress_interval_s* seconds while the
                batch is iterated, and one at its end. ``"always"`` shows the bar there too.
            progress_interval_s: Seconds between two such lines.
            checkpoint: A file of finished jobs, a line of JSON each, on disk before the result is
                given. Jobs found in it are not run again: their results come from the file.
            retries: How often a job that has failed is tried again in this batch, or a
                :class:`Retry` that also says after which errors, and how many seconds later. Each
                try costs; its result is the last one's.
            retry_failed: Run those again that an earlier batch has left in *checkpoint* as failed;
                False gives their errors.
            on_mismatch: What to do with a job whose prompt, workspace, content of *files*, schema,
                model, agent, permissions, tools or another setting that changes what is asked is
                not that of the checkpoint: ``"raise"`` an OpenCodeConfigError in its place, which
                says what differs; ``"rerun"`` the job; or ``"keep"`` what the checkpoint has. A job
                without a key whose prompt, workspace or files have changed is another job.
            executor: Where to run: a ``concurrent.futures`` executor of threads or processes, or
                a Dask cluster's ``Client.get_executor()``. It is not shut down.
            adaptive: Run fewer jobs at a time while the provider answers "too many requests".
            keep_events, keep_raw: Keep events and raw lines in the results. Without them results
                are small, and so is the checkpoint.

        Raises:
            OpenCodeConfigError: A setting was refused. Errors of jobs are raised by the iteration.
        """
        from ..batch.batch import BatchRun, Options

        check_keywords(Runner.map, options)
        self._check_open()
        settings = RunSettings.of(options)
        of_batch = {name: options.get(name, default) for name, default in BATCH_DEFAULTS.items()}
        batch: BatchRun[Any] = BatchRun(
            self,
            jobs,
            Options(
                workspace=workspace,
                settings=dataclasses.replace(settings, run_cfg=self._checked(settings.run_cfg)),
                default_workers=self._workers,
                on_error=on_error,
                **of_batch,  # type: ignore[arg-type]
            ),
        )
        self._batches[id(batch)] = weakref.ref(batch)
        weakref.finalize(batch, self._batches.pop, id(batch), None).atexit = False
        return batch

    def session(
        self,
        workspace: StrPath = ".",
        *,
        session_id: str | None = None,
        title: str | None = None,
        run_cfg: RunConfig | None = None,
        on_permission: OnPermission | None = None,
        on_question: OnQuestion | None = None,
        timeout_s: float | None = None,
        delete: bool = False,
    ) -> Session:
        """Begin or resume a conversation: each prompt is sent with what was said before.

        The settings may say ``"ask"`` for a permission here. What needs a server is refused by a
        client: a process per prompt asks nobody, and cannot look into a session.

        Args:
            workspace: The directory that the session works in.
            session_id: The session to resume; None for a new one.
            title: The session's title; None for the beginning of its first prompt.
            run_cfg: Settings of its turns, in place of this runner's own as a whole.
            on_permission: Called with a PermissionRequest for each tool that needs permission, a
                sub-agent's too, in the thread that waits for the turn. Returns ``"once"``,
                ``"always"``, ``"reject"``, or ``("reject", message)``, where the model gets the
                message and goes on. An exception rejects the request, ends the turn, and is raised
                where the turn is waited for. Without it every request is rejected, and the tool
                stands in ``denied_tools``. Needs a server.
            on_question: Called with a QuestionRequest in the same way. Returns the chosen labels
                for each question, or None to decline. Without it the model cannot ask. Needs a
                server.
            timeout_s: Seconds for each turn that has no limit of its own.
            delete: Delete the session from the server at :meth:`.Session.close`.
        """
        from .session import Session

        self._check_open()
        needs = {"on_permission": on_permission, "on_question": on_question, "delete": delete}
        for name, value in needs.items():
            if value and not self._keeps_sessions:
                raise OpenCodeConfigError(f"{name} {_NEEDS_SERVER}")
        return Session(
            self,
            workspace,
            session_id=session_id,
            title=title,
            run_cfg=run_cfg,
            on_permission=on_permission,
            on_question=on_question,
            timeout_s=timeout_s,
            delete=delete,
        )

    def close(self) -> None:
        """End the runs under way; their callers get OpenCodeCancelledError. Idempotent."""
        self._closed = True
        for ref in list(self._batches.values()):
            if (batch := ref()) is not None:
                batch.cancel(_CLOSED)
        futures = list(self._futures.values())
        for future in futures:
            future.cancel_waiting()
        streams = self._under_way()
        cancel_together(streams, _CLOSED)
        for stream in streams:
            stream.wait_ended(CANCEL_S)
        if self._pool is not None and self._pool[0] == os.getpid():
            wait(futures, CANCEL_S)
            self._pool[1].shutdown(wait=False)

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

    # -- for a batch and a session -------------------------------------------------------------

    def begin(
        self,
        prompt: str,
        workspace: StrPath,
        settings: RunSettings,
        *,
        answers: Answers = NO_ANSWERS,
        on_begin: Callable[[RunStream], None] | None = None,
        on_end: Callable[[RunStream], None] | None = None,
    ) -> RunStream:
        """Start one prompt, whose options are checked.

        Args:
            answers: To what is asked in the meantime.
            on_begin: Gets the stream before anything is started.
            on_end: Called with it when it has ended, in any thread.
        """
        cfg = self._config(settings.run_cfg)
        warnings = self._check(cfg, may_ask=answers is not NO_ANSWERS)
        request = Request(
            prompt,
            directory(workspace),
            cfg,
            settings.output,
            answers,
            secrets=Secrets(self._run_cfg, cfg),
            warnings=warnings,
        )
        return RunStream(self, request, settings, on_begin=on_begin, on_end=on_end)

    def prepare(self, cfg: RunConfig) -> None:  # noqa: B027 - mostly nothing
        """Start what a batch of runs with *cfg* needs, or raise what would fail all of them."""

    # -- for a stream --------------------------------------------------------------------------

    @abc.abstractmethod
    def _open(self, request: Request, scope: CancelScope, keep_raw: bool) -> Source:
        """Start one attempt at *request*; everything that waits in it ends with *scope*."""

    def _counts_opening(self, request: Request) -> bool:
        """Whether the time that an attempt takes to open counts for the run's limits."""
        return False

    def _stream_begins(self, stream: RunStream) -> None:
        self._streams[os.getpid(), id(stream)] = weakref.ref(stream)
        if self._closed:  # close() looks for streams after it has set this
            raise OpenCodeCancelledError(_CLOSED)

    def _stream_ended(self, stream: RunStream) -> None:
        self._streams.pop((os.getpid(), id(stream)), None)

    def _under_way(self) -> list[RunStream]:
        """The streams that this process has begun, and that have not ended."""
        items = list(self._streams.copy().items())  # atomic: a finaliser may remove one
        return [stream for (pid, _), ref in items if pid == os.getpid() and (stream := ref())]

    # -- settings ------------------------------------------------------------------------------

    def _kept_sessions(self, cfg: RunConfig) -> Sessions:
        """What answers questions about sessions; OpenCodeConfigError without a server."""
        raise OpenCodeConfigError(f"this {_NEEDS_SERVER}")

    def _config(self, run_cfg: RunConfig | None) -> RunConfig:
        """The settings of a run that is given *run_cfg*."""
        return checked_config(run_cfg, self._run_cfg)

    def _check(self, cfg: RunConfig, *, may_ask: bool = False) -> list[str]:
        """Refuse settings that this kind of runner cannot follow; returns warnings of others."""
        # A run on a server has the MCP servers that it was started with.
        servers = self._run_cfg.build_opencode_config_dict().get("mcp") or ()
        return validate_config_for_run(cfg, may_ask=may_ask, mcp_servers=servers)

    def _checked(self, run_cfg: RunConfig | None, *, may_ask: bool = False) -> RunConfig:
        cfg = self._config(run_cfg)
        self._check(cfg, may_ask=may_ask)
        return cfg

    def _check_open(self) -> None:
        if self._closed:
            raise OpenCodeConfigError(f"this {type(self).__name__} is closed: make a new one")

    # -- threads -------------------------------------------------------------------------------

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


class RunFuture(Pinned, Future[RunResult]):
    """The result of a run that another thread waits for.

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
        """End the run, or keep it from beginning; returns when its tools are gone.

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
        """Keep the run from beginning; without effect on one that has begun."""
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
        """Run to the end in the calling thread, unless it was cancelled before."""
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


def _as_ours(error: CancelledError) -> OpenCodeCancelledError:
    if isinstance(error, OpenCodeCancelledError):
        return error
    return OpenCodeCancelledError("the run was cancelled before it began")
