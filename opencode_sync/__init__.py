"""Drive the OpenCode coding agent from ordinary, threaded Python.

A first script::

    from opencode_sync import OpenCodeClient

    result = OpenCodeClient().run("Explain this repo", ".")
    print(result.final_text, result.total_cost)
"""

from typing import TYPE_CHECKING, Any

from ._command import TESTED_VERSION, build_argv, build_env, resolve_binary
from ._frame import results_to_frame, results_to_records
from ._futures import RunFuture
from ._tally import BatchReport
from ._version import __version__
from .batch import BatchRun
from .client import OpenCodeClient
from .config import Job, RunConfig, validate_config_for_run, validate_permission_actions
from .errors import (
    OpenCodeBinaryNotFoundError,
    OpenCodeBudgetError,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeOutputError,
    OpenCodeProcessError,
    OpenCodeServerError,
    OpenCodeTimeoutError,
)
from .events import Event, iter_parse_lines, parse_event_line
from .result import (
    ErrorInfo,
    RunResult,
    TokenUsage,
    aggregate_run_result,
    run_result_fuzzy_text,
)
from .stream import RunStream

if TYPE_CHECKING:  # loaded when first asked for, see __getattr__
    from .server import OpenCodeServer

__all__ = [
    "TESTED_VERSION",
    "BatchReport",
    "BatchRun",
    "ErrorInfo",
    "Event",
    "Job",
    "OpenCodeBinaryNotFoundError",
    "OpenCodeBudgetError",
    "OpenCodeCancelledError",
    "OpenCodeClient",
    "OpenCodeConfigError",
    "OpenCodeError",
    "OpenCodeIncompleteError",
    "OpenCodeOutputError",
    "OpenCodeProcessError",
    "OpenCodeServer",
    "OpenCodeServerError",
    "OpenCodeTimeoutError",
    "RunConfig",
    "RunFuture",
    "RunResult",
    "RunStream",
    "TokenUsage",
    "__version__",
    "aggregate_run_result",
    "build_argv",
    "build_env",
    "iter_parse_lines",
    "parse_event_line",
    "resolve_binary",
    "results_to_frame",
    "results_to_records",
    "run_result_fuzzy_text",
    "validate_config_for_run",
    "validate_permission_actions",
]

# What most scripts never use; loading all of it would take as long again as the rest.
_LOADED_LATER = {"OpenCodeServer": "server"}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LOADED_LATER[name]}", __name__), name)


def load_ipython_extension(ipython: Any) -> None:
    """``%load_ext opencode_sync``: adds the cell magic ``%%opencode``."""
    from ._notebook import load

    load(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """``%unload_ext opencode_sync``: ends what its cells have started."""
    from ._notebook import unload

    unload(ipython)
