"""A task in a worker process, perhaps on another machine.

    RemoteWork(task) --> this process's runner --> stream --> Outcome
                         one, made of the pickled    ^
    Lifeline, Dask: is it still wanted? --no--cancel-+

A worker process keeps one runner, and watches the batch that it works for: it ends its runs when
the batch is closed or dead. Knows of executors only what Dask says of dropped tasks.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ._task import End, Outcome, Settings, Streams, Task, carry_out
from .core.errors import OpenCodeCancelledError, OpenCodeOutputError
from .core.result import ErrorInfo, RunResult
from .core.stream import RunStream
from .process.data_dirs import temporary_prefix

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
