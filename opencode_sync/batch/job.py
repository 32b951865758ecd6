"""One job of a batch: what is to be done, where it is done, and what came of it.

    in our own thread:     Work(task) ----------------------------------+
    in another process:    Work --pickled--> RemoteWork(task) --+       |
                                    a copy of the runner, one   |       |
                                    for each worker process     v       v
                                            carry_out() --> runner.begin() ---> RunStream
                                                 |
                                                 +--> Outcome: a result, or an error in its place

Whatever goes wrong with a job is its outcome, and no other job's. A worker process ends its jobs
when their batch is closed or dead, perhaps on another machine: see Liveness. Of executors this
module knows only how Dask tells of dropped tasks.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from ..core.config import RunConfig
from ..core.errors import (
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeOutputError,
)
from ..core.fallback import LONG_WAIT_S
from ..core.limits import Spent
from ..core.reading import Tried, ended_well, mapping, tried_in
from ..core.request import RunSettings
from ..core.result import ErrorInfo, RunResult
from ..core.stream import RunStream, cancel_together
from ..process.data_dirs import temporary_prefix
from .fingerprint import Identity
from .throttle import is_rate_limit, retry_after_s

POLL_S = 0.2  # how soon a worker process notices that its batch is closed

End = RunResult | OpenCodeError


class JobRunner(Protocol):
    """What a batch uses of a runner, which is pickled for jobs in other processes."""

    def begin(
        self,
        prompt: str,
        workspace: str,
        settings: RunSettings,
        *,
        on_begin: Callable[[RunStream], None],
    ) -> RunStream: ...

    def prepare(self, cfg: RunConfig) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Task:
    """A job with everything decided, and its place in the batch."""

    index: int
    prompt: str
    workspace: str
    settings: RunSettings = field(default_factory=RunSettings)
    key: str | None = None
    metadata: Any = None
    saved_as: str = ""  # its key in the checkpoint, which needs one for each job
    identity: Identity | None = None  # where there is a checkpoint
    tries: int = 1
    failures: int = 0  # so far, after which it was tried again


@dataclass
class Outcome:
    """What came of a job.

    Attributes:
        end: Its result, or the error in its place.
        refusals: How often a provider refused it for too many requests.
        busy_s: Seconds that it took.
        retry_after_s: Seconds that the provider asked to wait with its last refusal; None where it
            did not say, or has answered since.
        is_remote: It comes from another process, whose refusals nobody has heard of yet.
        is_final: It ended by itself: neither cancelled, nor lost with its worker, nor refused
            before anything was started.
    """

    end: End
    refusals: int = 0
    busy_s: float = 0.0
    retry_after_s: float | None = None
    is_remote: bool = False
    is_final: bool = True

    def __post_init__(self) -> None:
        was_refused = isinstance(self.end, OpenCodeConfigError) and self.end.result is None
        if was_refused or isinstance(self.end, OpenCodeCancelledError):
            self.is_final = False

    @property
    def result(self) -> RunResult | None:
        """The result, or the partial result of an error."""
        return self.end.result if isinstance(self.end, OpenCodeError) else self.end

    @property
    def was_refused(self) -> bool:
        """Whether it failed for too many requests before it did anything, so may be repeated."""
        if not isinstance(self.end, OpenCodeError) or self.end.result is None:
            return False
        result = self.end.result
        is_untouched = not result.tool_calls and not result.turns
        if result.tried and (result.tried[-1].retry_after_s or 0.0) > LONG_WAIT_S:
            return False
        info = result.error
        return is_untouched and info is not None and is_rate_limit(info.status_code, info.message)


class Listener:
    """Gets reports on running jobs, from their threads; ignores them by default."""

    def refused(self, index: int, retry_after_s: float | None) -> None:
        """A provider refused a request of job *index*, which waits to ask again."""

    def recovered(self, index: int) -> None:
        """Job *index* goes on."""

    def spent(self) -> None:
        """A job has ended a step, which may have cost something."""

    def left(self, task: Task, tried: Tried) -> None:
        """The run of *task* has left a model, which is out."""


def carry_out(
    runner: JobRunner,
    task: Task,
    on_begin: Callable[[RunStream], None],
    listener: Listener,
) -> Outcome:
    """Run *task* to its end. What is raised becomes its outcome, with what the run has spent."""
    began = time.monotonic()
    begun: list[RunStream] = []

    def remember(stream: RunStream) -> None:
        begun.append(stream)
        on_begin(stream)

    refusals, is_waiting, wait_s = 0, False, None
    end: End
    try:
        with runner.begin(task.prompt, task.workspace, task.settings, on_begin=remember) as stream:
            for event in stream:
                if event.get("type") == "step_finish":
                    listener.spent()
                elif event.get("type") == "fallback" and (tried := tried_in(event)).was_asked:
                    listener.left(task, tried)
                if _is_refusal(event):
                    refusals, is_waiting, wait_s = refusals + 1, True, retry_after_s(event)
                    listener.refused(task.index, wait_s)
                elif is_waiting:
                    is_waiting, wait_s = False, None
                    listener.recovered(task.index)
        end = stream.result
    except OpenCodeError as error:
        # Without tracebacks, whose frames would keep the stream of each failed job in memory.
        end = error.with_traceback(None)
        if end.__cause__ is not None:
            end.__cause__ = end.__cause__.with_traceback(None)
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends this job and no other
        end = OpenCodeError(f"{type(error).__name__}: {error}")
        end.__cause__ = error
    except (KeyboardInterrupt, SystemExit) as error:  # a callback that exits; Ctrl-C in a worker
        end = _interrupted(error)
    if isinstance(end, OpenCodeError) and end.result is None and begun:
        end.result = begun[0].result
    return Outcome(end, refusals, time.monotonic() - began, wait_s)


def _is_refusal(event: Mapping[str, Any]) -> bool:
    """Whether it tells of too many requests: retried by OpenCode, or given up."""
    if event.get("type") == "retry":
        return is_rate_limit(event.get("statusCode"), event.get("message"))
    data = mapping(mapping(event.get("error")).get("data"))
    return event.get("type") == "error" and is_rate_limit(data.get("statusCode"), None)


def outcome_of(future: Future[Outcome]) -> Outcome:
    """The outcome of a job that an executor is done with, also where it lost the job."""
    if future.cancelled():
        return Outcome(OpenCodeCancelledError("the job was cancelled"))
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, (CancelledError, KeyboardInterrupt, SystemExit)):
        return Outcome(_interrupted(error))
    what = "worker was lost" if isinstance(error, BrokenExecutor) else "executor gave it up"
    lost = OpenCodeError(f"the job's {what}: {type(error).__name__}: {error}")
    lost.__cause__ = error
    return Outcome(lost, is_final=False)


def _interrupted(error: BaseException) -> OpenCodeCancelledError:
    return OpenCodeCancelledError(f"the job's worker was interrupted: {error!r}")


# --- in threads of this process -------------------------------------------------------------------


class Work:
    """The jobs of a batch under way in threads of this process; what an executor is to call.

    Pickled, it becomes a RemoteWork, which :meth:`stop` reaches too.
    """

    # Without a __dict__: Parsl wraps what it is to call with functools.wraps, which would put a
    # copy of it, locks included, into the wrapper that is pickled.
    __slots__ = ("_listener", "_remote", "_runner", "_stop_reason", "_streams")

    def __init__(self, runner: JobRunner, listener: Listener) -> None:
        self._runner = runner
        self._listener = listener
        self._streams: dict[int, RunStream] = {}
        self._stop_reason: str | None = None
        self._remote: RemoteWork | None = None

    def __repr__(self) -> str:
        return "opencode job"  # Dask shows it as the name of its task

    def __call__(self, task: Task | bytes) -> Outcome:
        assert isinstance(task, Task)  # bytes are for other processes

        def on_begin(stream: RunStream) -> None:
            self._streams[task.index] = stream
            # stop() looks for streams after it has set the reason: one of the two sees the other.
            if self._stop_reason is not None:
                stream.cancel(self._stop_reason)

        try:
            return carry_out(self._runner, task, on_begin, self._listener)
        finally:
            self._streams.pop(task.index, None)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._remote is None:
            self._remote = RemoteWork(pickle.dumps(self._runner), Liveness.begin())
            if self._stop_reason is not None:  # by now: executors pickle in threads of their own
                self._remote.liveness.end()
        remote = self._remote
        return RemoteWork, (remote.runner, remote.liveness)

    def spent(self) -> dict[int, Spent]:
        """What the jobs under way in this process have spent so far, by index."""
        streams = list(self._streams.copy().items())
        return {index: Spent.on(stream.result) for index, stream in streams}

    def result_of(self, index: int) -> RunResult | None:
        """The partial result of a job under way in this process."""
        stream = self._streams.get(index)
        return None if stream is None else stream.result

    def stop(self, reason: str, *, spare_done: bool = False) -> None:
        """Stop what is under way, wherever it is, and what begins later.

        Args:
            spare_done: Let a job in this process finish whose last step has ended well.
        """
        self._stop_reason = reason
        if self._remote is not None:
            self._remote.liveness.end()
        streams = [
            stream
            for stream in list(self._streams.values())
            if not (spare_done and ended_well(stream.result.finish_reason, was_denied=False))
        ]
        cancel_together(streams, reason)


# --- in another process ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteWork:
    """What Work becomes in another process, where it carries out one job a call."""

    runner: bytes
    liveness: Liveness

    def __call__(self, task: Task | bytes) -> Outcome:
        is_over = self.liveness.watch()
        if is_over():
            return Outcome(OpenCodeCancelledError("the batch was closed before the run began"))
        if isinstance(task, bytes):
            try:
                task = cast(Task, pickle.loads(task))
            except Exception as error:  # noqa: BLE001 - a class of the user's may raise anything
                return Outcome(_unknown_here(error), is_remote=True)
        done = threading.Event()

        def cancel_when_over(stream: RunStream) -> None:
            while not done.wait(POLL_S):
                if is_over():
                    stream.cancel("the batch was closed")
                    return

        def on_begin(stream: RunStream) -> None:
            threading.Thread(
                target=cancel_when_over, args=(stream,), name="opencode-batch-watch", daemon=True
            ).start()

        try:
            with _runner_of(self.runner) as runner:
                outcome = carry_out(runner, task, on_begin, Listener())
            return replace(outcome, end=_sendable(outcome.end), is_remote=True)
        finally:
            done.set()


def packed(task: Task, executor: Executor) -> Task | bytes:
    """*task* as it is passed to *executor*.

    A pool of processes breaks as a whole, and the standard library's does not say why, if a worker
    cannot unpickle what it is sent, such as a class of a notebook. Bytes always arrive.
    """
    pools = [kind for kind in type(executor).__mro__ if kind.__name__ == "ProcessPoolExecutor"]
    if not pools:
        return task
    return pickle.dumps(task) if pools[-1] is _standard_pool() else _dumps(task)


def _standard_pool() -> type[Executor] | None:
    return getattr(sys.modules.get("concurrent.futures.process"), "ProcessPoolExecutor", None)


def _dumps(value: Any) -> bytes:
    # Dask and loky send more than pickle can: what cloudpickle pickles by value.
    dumps: Callable[[Any], bytes] = getattr(sys.modules.get("cloudpickle"), "dumps", pickle.dumps)
    return dumps(value)


def _unknown_here(error: Exception) -> OpenCodeConfigError:
    return OpenCodeConfigError(
        f"the job cannot be unpickled in its worker process: {type(error).__name__}: {error}; "
        "define the classes that it uses in a module, or use threads"
    )


def _sendable(end: End) -> End:
    """*end*, or an error where its ``parsed`` value cannot be pickled.

    An executor that cannot send a result back would lose it, with all that it has cost.
    """
    if not isinstance(end, RunResult) or end.parsed is None:
        return end
    try:
        pickle.loads(_dumps(end.parsed))
        return end
    except Exception as error:  # noqa: BLE001 - a class of the user's may raise anything
        message = (
            f"the parsed value cannot be brought back from its worker process: "
            f"{type(error).__name__}: {error}; use threads, or a class that can be pickled"
        )
    end.parsed = end._json = None
    end.error = ErrorInfo("PicklingError", message)
    return OpenCodeOutputError(message, text=end.answer, result=end)


@dataclass(frozen=True)
class Liveness:
    """Tells worker processes whether the batch that they work for still goes on.

    It does not when its file is gone, or its process, as far as that can be seen: on the same
    machine. On any machine it is over for a job whose task Dask has dropped.
    """

    path: str
    pid: int
    started: float
    machine: tuple[str, ...]

    @classmethod
    def begin(cls) -> Liveness:
        """One for a batch of this process."""
        import psutil

        descriptor, path = tempfile.mkstemp(prefix=f"{temporary_prefix()}batch-")
        os.close(descriptor)
        return cls(path, os.getpid(), psutil.Process().create_time(), _this_machine())

    def end(self) -> None:
        """End the jobs in worker processes. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def watch(self) -> Callable[[], bool]:
        """Return what tells whether it is over; called in the thread that carries out a job."""
        # Another machine's process may have the same number, and another's files are not ours.
        is_here = self.machine == _this_machine()
        is_dropped = _dropped_by_dask()

        def is_over() -> bool:
            if is_dropped is not None and is_dropped():
                return True
            if is_here and not self._is_process_alive():
                self.end()  # nobody else will remove the file
            return is_here and not os.path.exists(self.path)

        return is_over

    def _is_process_alive(self) -> bool:
        import psutil

        try:
            batch = psutil.Process(self.pid)
            # Two processes may read the start of one a little differently.
            is_same = abs(batch.create_time() - self.started) < 2.0
            return is_same and batch.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def _this_machine() -> tuple[str, ...]:
    """Equal in processes that see the same processes and files."""
    names = [os.uname().nodename]
    with contextlib.suppress(OSError):  # only Linux has these
        names += [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "mnt")]
        with open("/proc/sys/kernel/random/boot_id") as file:
            names.append(file.read())
    return tuple(names)


def _dropped_by_dask() -> Callable[[], bool] | None:
    """What tells whether Dask has dropped this thread's task; None outside of a Dask task."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        worker = distributed.get_worker()
        key = worker.get_current_task()
    except (ValueError, AttributeError):  # a thread of ours, in a process that uses Dask
        return None

    def is_dropped() -> bool:
        task = worker.state.tasks.get(key)
        return task is None or task.state == "cancelled"

    return is_dropped


# This process's runners by their pickled form, and how many jobs use each.
_runners: dict[bytes, JobRunner] = {}
_n_users: Counter[bytes] = Counter()
_runners_lock = threading.Lock()


@contextmanager
def _runner_of(pickled: bytes) -> Iterator[JobRunner]:
    """This process's runner for *pickled*; others that no job uses are closed."""
    unused: list[JobRunner] = []
    with _runners_lock:
        if pickled not in _runners:
            unused = [_runners.pop(other) for other in list(_runners) if not _n_users[other]]
            _runners[pickled] = pickle.loads(pickled)
        runner = _runners[pickled]
        _n_users[pickled] += 1
    try:
        for other in unused:
            other.close()
        yield runner
    finally:
        with _runners_lock:
            _n_users[pickled] -= 1


def _close_runners() -> None:
    for runner in list(_runners.values()):
        runner.close()


# A forked worker process ends without atexit's calls, but with these. At the interpreter's end,
# where this module may be loaded too, no more can be registered, and none is needed.
with contextlib.suppress(RuntimeError):
    getattr(threading, "_register_atexit", atexit.register)(_close_runners)
