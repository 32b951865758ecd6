"""A script for py-opencode-wrapper works here, once `await` and `async_` are taken out of it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import opencode_sync
from opencode_sync import (
    OpenCodeClient,
    OpenCodeProcessError,
    RunConfig,
    RunResult,
    TokenUsage,
    build_argv,
    build_env,
    parse_event_line,
    resolve_binary,
    run_result_fuzzy_text,
    validate_config_for_run,
)

RUN = {"prompt": ..., "workspace": ".", "run_cfg": None, "timeout_s": None, "log_file": None}
# Each parameter with its default, ... for none; those before "*" in the wrapper's order.
PARAMETERS: list[tuple[Any, list[str], dict[str, Any]]] = [
    (
        OpenCodeClient,
        ["binary", "startup_concurrency", "startup_delay_s", "isolate_db"],
        {
            "binary": "opencode",
            "startup_concurrency": 1,
            "startup_delay_s": 0.3,
            "isolate_db": True,
        },
    ),
    (OpenCodeClient.run, ["prompt", "workspace"], {**RUN, "max_retries": 2, "retry_delay_s": 1.0}),
    (OpenCodeClient.stream, ["prompt", "workspace"], RUN),
    (OpenCodeProcessError, ["exit_code", "stderr", "events", "raw_stdout_lines"], {}),
    (build_argv, ["binary_resolved", "prompt", "run_cfg"], {}),
    (build_env, ["run_cfg", "base"], {"base": None}),
    (resolve_binary, ["binary"], {}),
    (parse_event_line, ["line"], {}),
    (run_result_fuzzy_text, ["result"], {}),
    (validate_config_for_run, ["cfg"], {}),
    (RunResult.append_event, ["event"], {}),
    (TokenUsage, ["total", "input", "output", "reasoning", "cache_read", "cache_write"], {}),
]


def test_every_name_of_the_wrapper_is_exported() -> None:
    names = {
        *("OpenCodeClient", "RunConfig", "RunResult", "TokenUsage", "resolve_binary"),
        *("build_argv", "build_env", "validate_config_for_run", "validate_permission_actions"),
        *("parse_event_line", "iter_parse_lines", "aggregate_run_result", "run_result_fuzzy_text"),
        *("OpenCodeError", "OpenCodeBinaryNotFoundError", "OpenCodeProcessError"),
        *("OpenCodeTimeoutError", "OpenCodeCancelledError"),
    }

    assert names <= set(opencode_sync.__all__)
    assert [name for name in opencode_sync.__all__ if not hasattr(opencode_sync, name)] == []


@pytest.mark.parametrize(
    "function, order, defaults", PARAMETERS, ids=[function.__name__ for function, *_ in PARAMETERS]
)
def test_parameters_have_the_wrappers_order_and_defaults(
    function: Any, order: list[str], defaults: dict[str, Any]
) -> None:
    found = dict(inspect.signature(function).parameters)
    found.pop("self", None)

    assert list(found)[: len(order)] == order
    for name, default in defaults.items():
        assert found[name].default == (inspect.Parameter.empty if default is ... else default)


def test_fields_have_the_wrappers_order_and_defaults() -> None:
    names = [
        *("agent", "model", "files", "title", "command", "continue_session", "session_id", "fork"),
        *("share", "attach", "password", "remote_dir", "port", "variant", "thinking"),
        *("print_logs", "log_level", "disable_autoupdate", "extra_env", "permission", "mcp"),
        *("tools", "config_overrides"),
    ]
    not_none = {"files": (), "continue_session": False, "fork": False, "disable_autoupdate": True}
    usage = TokenUsage(total=3)

    fields = dataclasses.fields(RunConfig)[: len(names)]
    result = RunResult([], "text", [], 0, "stderr", ["line"], usage, 0.5, 2)

    assert [field.name for field in fields] == names
    assert {f.name: f.default for f in fields if f.default is not None} == not_none
    assert (result.final_text, result.exit_code, result.stderr) == ("text", 0, "stderr")
    assert (result.raw_stdout_lines, result.token_usage) == (["line"], usage)
    assert (result.total_cost, result.turns) == (0.5, 2)
