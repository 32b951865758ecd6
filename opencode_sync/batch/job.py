"""One job of a batch: what is to be done, and what came of it.

    Task --carry_out()--> a runner's stream --> Outcome: a result, or an error in its place
    Future of an Outcome --outcome_of()------------^   also where an executor lost it

Nothing is raised here: whatever goes wrong with a task is its end, and no other's.

A task in a worker process, perhaps on another machine.

    RemoteWork(task) --> this process's runner --> stream --> Outcome
                         one, made of the pickled    ^
    Lifeline, Dask: is it still wanted? --no--cancel-+

A worker process keeps one runner, and watches the batch that it works for: it ends its runs when
the batch is closed or dead. Knows of executors only what Dask says of dropped tasks.

Tasks carried out in threads of this process; pickled, in worker processes.

Work(task) --> carry_out() --> stream, which stop() and spent() know
  +-- pickled --> RemoteWork(task), tied to us by a lifeline, which stop() cuts
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..core.config import RunConfig
from ..core.errors import OpenCodeCancelledError, OpenCodeError, OpenCodeOutputError
from ..core.reading import ended_well
from ..core.request import RunSettings, Spent
from ..core.result import ErrorInfo, RunResult
from ..core.schema import OutputSchema
from ..core.stream import Limits, RunStream, cancel_together
from ..process.data_dirs import temporary_prefix
from .throttle import is_rate_limit, retry_after_s

End = RunResult | OpenCodeError


class Streams(Protocol):
    """What jobs are run on, a runner; picklable, if they are to run in other processes."""

    @property
    def begin(self) -> Callable[..., RunStream]: ...

    def prepare(self, cfg: RunConfig) -> None: ...

    def close(self) -> None: ...


class Listener(Protocol):
    """Who hears of refusals for too many requests as they come; from any thread."""

    def refused(self, index: int, retry_after_s: float | None) -> None:
        """The provider refused a request of the task, which waits to ask again."""

    def recovered(self, index: int) -> None:
        """The task goes on."""

    def spent(self) -> None:
        """A task has ended a step, which may have cost something."""


@dataclass(frozen=True)
class Task:
    """A job with everything decided, and its place in the batch."""

    index: int
    prompt: str
    workspace: str
    key: str | None = None
    run_cfg: RunConfig | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)  # its own, over those of the batch
    fingerprint: str = ""
    tries: int = 1


@dataclass(frozen=True)
class Settings:
    """What all tasks of a batch have in common."""

    limits: Limits
    output: OutputSchema | None = None
    keep_events: bool = True
    keep_raw: bool = True


@dataclass
class Outcome:
    """How a task ended.

    Attributes:
        end: Its result, or the error in its place.
        refusals: How often a provider refused for too many requests.
        retry_after_s: How long the provider wants to be left alone that refused it last; None where
            it does not say, or has answered since.
        busy_s: Seconds that it took.
        is_remote: It comes from another process, so its refusals are news.
        is_final: It ended by itself, not because somebody or something ended it.
    """

    end: RunResult | OpenCodeError
    refusals: int = 0
    busy_s: float = 0.0
    retry_after_s: float | None = None
    is_remote: bool = False
    is_final: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.end, OpenCodeCancelledError):
            self.is_final = False

    @property
    def result(self) -> RunResult | None:
        """What was got, also where it failed."""
        return self.end.result if isinstance(self.end, OpenCodeError) else self.end

    @property
    def was_refused(self) -> bool:
        """Whether it failed of too many requests, with nothing done that a new run would repeat."""
        if not isinstance(self.end, OpenCodeError) or self.end.result is None:
            return False
        result = self.end.result
        info = result.error
        is_untouched = not result.tool_calls and not result.turns
        return is_untouched and info is not None and is_rate_limit(info.status_code, info.message)


def carry_out(
    runner: Streams,
    task: Task,
    settings: Settings,
    on_begin: Callable[[RunStream], None],
    listener: Listener,
) -> Outcome:
    """Run *task* to its end. Whatever is raised becomes its end, with what the run has spent."""
    began = time.monotonic()
    begun: list[RunStream] = []

    def remember(stream: RunStream) -> None:
        begun.append(stream)
        on_begin(stream)

    refusals, is_waiting, wait_s = 0, False, None
    end: RunResult | OpenCodeError
    try:
        limits = replace(settings.limits, **task.limits)
        with runner.begin(
            task.prompt,
            task.workspace,
            RunSettings(
                limits=limits,
                run_cfg=task.run_cfg,
                output=settings.output,
                keep_events=settings.keep_events,
                keep_raw=settings.keep_raw,
            ),
            on_begin=remember,
        ) as stream:
            for event in stream:
                if event.get("type") == "step_finish":
                    listener.spent()
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
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this job's and no other's
        end = OpenCodeError(f"{type(error).__name__}: {error}")
        end.__cause__ = error
    except (KeyboardInterrupt, SystemExit) as error:  # a callback that exits; Ctrl-C in a worker
        end = interrupted(error)
    if isinstance(end, OpenCodeError) and end.result is None and begun:
        end.result = begun[0].result
    return Outcome(end, refusals, time.monotonic() - began, wait_s)


def _is_refusal(event: Mapping[str, Any]) -> bool:
    """Whether it tells of too many requests: tried again by OpenCode, or given up."""
    if event.get("type") == "retry":
        return is_rate_limit(event.get("statusCode"), event.get("message"))
    error = event.get("error") if event.get("type") == "error" else None
    data = error.get("data") if isinstance(error, Mapping) else None
    return isinstance(data, Mapping) and is_rate_limit(data.get("statusCode"), None)


def outcome_of(future: Future[Outcome]) -> Outcome:
    """What came of it; what is wrong with the executor becomes an error too."""
    if future.cancelled():
        return Outcome(OpenCodeCancelledError("the job was cancelled"))
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, (CancelledError, KeyboardInterrupt, SystemExit)):
        return Outcome(interrupted(error))
    what = "worker was lost" if isinstance(error, BrokenExecutor) else "executor gave it up"
    lost = OpenCodeError(f"the job's {what}: {type(error).__name__}: {error}")
    lost.__cause__ = error
    return Outcome(lost, is_final=False)


def interrupted(error: BaseException) -> OpenCodeCancelledError:
    return OpenCodeCancelledError(f"the job's worker was interrupted: {error!r}")


def of_task(end: End, task: Task) -> End:
    """*end*, which says whose it is."""
    end.index, end.key, end.prompt = task.index, task.key, task.prompt
    if isinstance(end, OpenCodeError) and end.result is not None:
        end.result.index, end.result.key = task.index, task.key
    return end


def executor_error(error: Exception) -> OpenCodeError:
    is_gone = isinstance(error, (BrokenExecutor, RuntimeError))
    what = "takes no more jobs" if is_gone else "cannot take the job"
    ours = OpenCodeError(f"the executor {what}: {type(error).__name__}: {error}")
    ours.__cause__ = error
    return ours


def unforeseen(error: BaseException) -> OpenCodeError:
    ours = OpenCodeError(f"the batch broke off: {type(error).__name__}: {error}")
    ours.__cause__ = error
    return ours


POLL_S = 0.2  # how soon a worker process notices that its batch is closed


@dataclass(frozen=True)
class RemoteWork:
    """What a Work becomes in another process."""

    runner: bytes
    settings: Settings
    lifeline: Lifeline

    def __call__(self, task: Task) -> Outcome:
        is_cut = self.lifeline.watch()
        if is_cut():
            return Outcome(OpenCodeCancelledError("the batch was closed before the run began"))
        done = threading.Event()

        def on_begin(stream: RunStream) -> None:
            threading.Thread(
                target=_cancel_when,
                args=(is_cut, stream, done),
                name="opencode-lifeline",
                daemon=True,
            ).start()

        try:
            with _runner_of(self.runner) as runner:
                outcome = carry_out(runner, task, self.settings, on_begin, _Nobody())
            return replace(outcome, end=_sendable(outcome.end), is_remote=True)
        finally:
            done.set()


def _sendable(end: End) -> End:
    """*end*, or an error in its place where the user's value in it cannot be pickled.

    What the executor cannot bring back would be lost with all that it has cost.
    """
    if not isinstance(end, RunResult) or end.parsed is None:
        return end
    # Dask and its like send more than pickle can: what these pickle by value.
    dumps = getattr(sys.modules.get("cloudpickle"), "dumps", pickle.dumps)
    try:
        pickle.loads(dumps(end.parsed))
        return end
    except Exception as error:  # noqa: BLE001 - a class of the user's may raise anything
        message = (
            f"the parsed value cannot be brought back from its worker process: "
            f"{type(error).__name__}: {error}; use threads, or a class that can be pickled"
        )
    end.parsed = end._json = None
    end.error = ErrorInfo("PicklingError", message)
    return OpenCodeOutputError(message, text=end.answer, result=end)


def _cancel_when(is_cut: Callable[[], bool], stream: RunStream, done: threading.Event) -> None:
    while not done.wait(POLL_S):
        if is_cut():
            stream.cancel("the batch was closed")
            return


class _Nobody:
    """The batch learns of refusals and costs from the outcome."""

    def refused(self, index: int, retry_after_s: float | None) -> None:
        pass

    def recovered(self, index: int) -> None:
        pass

    def spent(self) -> None:
        pass


@dataclass(frozen=True)
class Lifeline:
    """Ties runs in worker processes to the batch that they are for.

    It is cut when its file is gone or the batch's process is, as seen on the same machine; and
    where Dask has dropped the task, on whichever.
    """

    path: str
    pid: int
    started: float
    place: tuple[str, ...]

    @classmethod
    def tie(cls) -> Lifeline:
        """A new one, of this process."""
        import psutil

        descriptor, path = tempfile.mkstemp(prefix=f"{temporary_prefix()}batch-")
        os.close(descriptor)
        return cls(path, os.getpid(), psutil.Process().create_time(), _place())

    def cut(self) -> None:
        """End what holds on to it. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def watch(self) -> Callable[[], bool]:
        """For the thread that a task runs in: tells whether the task is wanted no longer."""
        # Another machine's process may have the same number, and another's files are not ours.
        is_here = self.place == _place()
        is_dropped = _dask_task()

        def is_cut() -> bool:
            if is_dropped is not None and is_dropped():
                return True
            if is_here and not self._is_alive():
                self.cut()  # nobody else will
            return is_here and not os.path.exists(self.path)

        return is_cut

    def _is_alive(self) -> bool:
        import psutil

        try:
            batch = psutil.Process(self.pid)
            # Two processes may read the start of one a little differently.
            is_it = abs(batch.create_time() - self.started) < 2.0
            return is_it and batch.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def _place() -> tuple[str, ...]:
    """What processes have in common that see the same processes and files."""
    names = [os.uname().nodename]
    with contextlib.suppress(OSError):  # all but Linux
        names += [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "mnt")]
        with open("/proc/sys/kernel/random/boot_id") as file:
            names.append(file.read())
    return tuple(names)


def _dask_task() -> Callable[[], bool] | None:
    """Tells whether the Dask task of this thread was dropped; None where there is no such task."""
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


_runners: dict[bytes, Streams] = {}
_users: dict[bytes, int] = {}
_runners_lock = threading.Lock()


@contextmanager
def _runner_of(pickled: bytes) -> Iterator[Streams]:
    """This process's runner for *pickled*; of others, those that nobody uses are closed."""
    idle: list[Streams] = []
    with _runners_lock:
        if pickled not in _runners:
            idle = [_runners.pop(other) for other in list(_runners) if not _users.get(other)]
            _runners[pickled] = pickle.loads(pickled)
        runner = _runners[pickled]
        _users[pickled] = _users.get(pickled, 0) + 1
    try:
        for other in idle:
            other.close()
        yield runner
    finally:
        with _runners_lock:
            _users[pickled] -= 1
            if not _users[pickled]:
                del _users[pickled]


def _close_runners() -> None:
    for runner in list(_runners.values()):
        runner.close()


# A worker process that was forked ends without atexit's calls, but with these. At the interpreter's
# end, when this may be loaded too, there is none to be one any more.
with contextlib.suppress(RuntimeError):
    getattr(threading, "_register_atexit", atexit.register)(_close_runners)


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
