"""How a batch is to go: values, checked before anything is drawn."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Literal

from .core.config import Job, RunConfig, check_count, check_number, checked_path
from .core.errors import OpenCodeConfigError
from .core.schema import OutputSchema
from .core.stream import Limits
from .process.capacity import workers_for_processes

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
