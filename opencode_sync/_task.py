"""One job of a batch: what is to be done, and what came of it.

    Task --carry_out()--> a runner's stream --> Outcome: a result, or an error in its place
    Future of an Outcome --outcome_of()------------^   also where an executor lost it

Nothing is raised here: whatever goes wrong with a task is its end, and no other's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ._throttle import is_rate_limit, retry_after_s
from .core.config import RunConfig
from .core.errors import OpenCodeCancelledError, OpenCodeError
from .core.result import RunResult
from .core.schema import OutputSchema
from .core.stream import Limits, RunStream

End = RunResult | OpenCodeError


class Streams(Protocol):
    """What jobs are run on, a runner; picklable, if they are to run in other processes."""

    @property
    def _begin(self) -> Callable[..., RunStream]: ...

    def _prepare(self, cfg: RunConfig) -> None: ...

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
        with runner._begin(
            task.prompt,
            task.workspace,
            limits,
            run_cfg=task.run_cfg,
            output=settings.output,
            keep_events=settings.keep_events,
            keep_raw=settings.keep_raw,
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
