"""Drive the OpenCode coding agent from ordinary, threaded Python.

A first script::

    from opencode_sync import OpenCodeClient

    result = OpenCodeClient().run("Explain this repo", ".")
    print(result.final_text, result.total_cost)
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .api.client import OpenCodeClient
from .api.runner import RunFuture
from .core.config import Job, RunConfig, validate_config_for_run, validate_permission_actions
from .core.errors import (
    OpenCodeBinaryNotFoundError,
    OpenCodeBudgetError,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeOutputError,
    OpenCodePermissionError,
    OpenCodeProcessError,
    OpenCodeServerError,
    OpenCodeTimeoutError,
)
from .core.events import Event, iter_parse_lines, parse_event_line
from .core.limits import Retry
from .core.result import (
    ErrorInfo,
    RunResult,
    SubAgent,
    TokenUsage,
    Tried,
    aggregate_run_result,
    run_result_fuzzy_text,
)
from .core.stream import RunStream
from .process.command import TESTED_VERSION, build_argv, build_env, resolve_binary

if TYPE_CHECKING:  # loaded when first asked for, see __getattr__
    from .api.permissions import (
        PermissionRequest,
        QuestionRequest,
        allow_all,
        allow_reads,
        ask_in_terminal,
    )
    from .api.server import OpenCodeServer
    from .api.session import Session
    from .batch.batch import BatchRun
    from .batch.table import read_jobs
    from .batch.tally import BatchReport
    from .core.records import results_to_frame, results_to_records
    from .display.report import checkpoint_to_html, results_to_html
    from .server.sessions import SessionInfo

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
    "OpenCodePermissionError",
    "OpenCodeProcessError",
    "OpenCodeServer",
    "OpenCodeServerError",
    "OpenCodeTimeoutError",
    "PermissionRequest",
    "QuestionRequest",
    "Retry",
    "RunConfig",
    "RunFuture",
    "RunResult",
    "RunStream",
    "Session",
    "SessionInfo",
    "SubAgent",
    "TokenUsage",
    "Tried",
    "__version__",
    "aggregate_run_result",
    "allow_all",
    "allow_reads",
    "ask_in_terminal",
    "build_argv",
    "build_env",
    "checkpoint_to_html",
    "iter_parse_lines",
    "parse_event_line",
    "read_jobs",
    "resolve_binary",
    "results_to_frame",
    "results_to_html",
    "results_to_records",
    "run_result_fuzzy_text",
    "validate_config_for_run",
    "validate_permission_actions",
]

# What most scripts never use; loading all of it would take as long again as the rest.
_LOADED_LATER = {
    "BatchReport": "batch.tally",
    "BatchRun": "batch.batch",
    "OpenCodeServer": "api.server",
    "PermissionRequest": "api.permissions",
    "QuestionRequest": "api.permissions",
    "Session": "api.session",
    "SessionInfo": "server.sessions",
    "allow_all": "api.permissions",
    "allow_reads": "api.permissions",
    "ask_in_terminal": "api.permissions",
    "checkpoint_to_html": "display.report",
    "read_jobs": "batch.table",
    "results_to_frame": "core.records",
    "results_to_html": "display.report",
    "results_to_records": "core.records",
}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LOADED_LATER[name]}", __name__), name)


def load_ipython_extension(ipython: Any) -> None:
    """``%load_ext opencode_sync``: adds the cell magic ``%%opencode``."""
    from .notebook import load

    load(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """``%unload_ext opencode_sync``: stops what its cells have started."""
    from .notebook import unload

    unload(ipython)
