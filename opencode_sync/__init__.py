"""Drive the OpenCode coding agent from ordinary, threaded Python.

from opencode_sync import OpenCodeClient

result = OpenCodeClient().run("Explain this repo", ".")
print(result.final_text, result.total_cost)
"""

from ._command import TESTED_VERSION, build_argv, build_env, resolve_binary
from ._version import __version__
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

__all__ = [
    "TESTED_VERSION",
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
    "OpenCodeServerError",
    "OpenCodeTimeoutError",
    "RunConfig",
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
    "run_result_fuzzy_text",
    "validate_config_for_run",
    "validate_permission_actions",
]
