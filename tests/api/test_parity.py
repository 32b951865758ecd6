"""A script for py-opencode-wrapper works here, once `await` and `async_` are taken out of it.

Names, parameters and their order; the rules behind them are tested with their rooms.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import opencode_sync
from opencode_sync import (
    OpenCodeBinaryNotFoundError,
    OpenCodeCancelledError,
    OpenCodeClient,
    OpenCodeError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    RunConfig,
    RunResult,
    TokenUsage,
    aggregate_run_result,
    build_argv,
    build_env,
    iter_parse_lines,
    parse_event_line,
    resolve_binary,
    run_result_fuzzy_text,
    validate_config_for_run,
    validate_permission_actions,
)

NAMES = [
    "OpenCodeClient",
    "RunConfig",
    "RunResult",
    "TokenUsage",
    "resolve_binary",
    "build_argv",
    "build_env",
    "validate_config_for_run",
    "validate_permission_actions",
    "parse_event_line",
    "iter_parse_lines",
    "aggregate_run_result",
    "run_result_fuzzy_text",
    "OpenCodeError",
    "OpenCodeBinaryNotFoundError",
    "OpenCodeProcessError",
    "OpenCodeTimeoutError",
    "OpenCodeCancelledError",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_wrapper_is_exported(name: str) -> None:
    assert name in opencode_sync.__all__
    assert hasattr(opencode_sync, name)


def test_all_that_is_exported_exists() -> None:
    assert [name for name in opencode_sync.__all__ if not hasattr(opencode_sync, name)] == []


# --- parameters ----------------------------------------------------------------------------------


def parameters(function: Any) -> dict[str, Any]:
    signature = inspect.signature(function)
    return {name: p.default for name, p in signature.parameters.items() if name != "self"}


@pytest.mark.parametrize(
    "function, expected",
    [
        (
            OpenCodeClient,
            {
                "binary": "opencode",
                "startup_concurrency": 1,
                "startup_delay_s": 0.3,
                "isolate_db": True,
            },
        ),
        (
            OpenCodeClient.run,
            {
                "run_cfg": None,
                "timeout_s": None,
                "log_file": None,
                "max_retries": 2,
                "retry_delay_s": 1.0,
            },
        ),
        (OpenCodeClient.stream, {"run_cfg": None, "timeout_s": None, "log_file": None}),
        (build_env, {"base": None}),
    ],
    ids=["client", "run", "stream", "build_env"],
)
def test_parameters_have_the_wrappers_names_and_defaults(
    function: Any, expected: dict[str, Any]
) -> None:
    assert expected.items() <= parameters(function).items()


@pytest.mark.parametrize(
    "function, names",
    [
        (OpenCodeClient, ["binary", "startup_concurrency", "startup_delay_s", "isolate_db"]),
        (OpenCodeClient.run, ["prompt", "workspace"]),
        (OpenCodeClient.stream, ["prompt", "workspace"]),
        (OpenCodeProcessError, ["exit_code", "stderr", "events", "raw_stdout_lines"]),
        (build_argv, ["binary_resolved", "prompt", "run_cfg"]),
        (build_env, ["run_cfg", "base"]),
        (resolve_binary, ["binary"]),
        (parse_event_line, ["line"]),
        (run_result_fuzzy_text, ["result"]),
        (validate_config_for_run, ["cfg"]),
        (RunResult.append_event, ["event"]),
        (TokenUsage, ["total", "input", "output", "reasoning", "cache_read", "cache_write"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_positional_parameters_have_the_wrappers_order(function: Any, names: list[str]) -> None:
    assert list(parameters(function))[: len(names)] == names


def test_the_fields_of_a_config_have_the_wrappers_order_and_defaults() -> None:
    names = [
        *("agent", "model", "files", "title", "command", "continue_session", "session_id", "fork"),
        *("share", "attach", "password", "remote_dir", "port", "variant", "thinking"),
        *("print_logs", "log_level", "disable_autoupdate", "extra_env", "permission", "mcp"),
        *("tools", "config_overrides"),
    ]
    set_to_something = {"files": (), "continue_session": False, "fork": False}

    fields = dataclasses.fields(RunConfig)[: len(names)]

    assert [field.name for field in fields] == names
    assert {f.name: f.default for f in fields if f.default is not None} == {
        **set_to_something,
        "disable_autoupdate": True,
    }


def test_the_fields_of_a_result_have_the_wrappers_order() -> None:
    usage = TokenUsage(total=3)

    result = RunResult([], "text", [], 0, "stderr", ["line"], usage, 0.5, 2)

    assert (result.final_text, result.exit_code, result.stderr) == ("text", 0, "stderr")
    assert (result.raw_stdout_lines, result.token_usage) == (["line"], usage)
    assert (result.total_cost, result.turns) == (0.5, 2)


# --- what a ported script does -------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, standard",
    [
        (OpenCodeBinaryNotFoundError, FileNotFoundError),
        (OpenCodeProcessError, Exception),
        (OpenCodeTimeoutError, TimeoutError),
        (OpenCodeCancelledError, Exception),
    ],
    ids=lambda value: value.__name__,
)
def test_every_error_is_caught_as_an_opencode_error(
    error: type[Exception], standard: type[Exception]
) -> None:
    assert issubclass(error, OpenCodeError)
    assert issubclass(error, standard)


def test_a_bad_permission_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"'edit\.\*\.py'"):
        validate_permission_actions({"edit": {"*.py": "ask"}})


def test_a_log_is_read_and_summed_up() -> None:
    lines = [
        '{"type": "step_start", "sessionID": "ses_1"}',
        '{"type": "text", "part": {"text": "Hello"}}',
        "",
        "no json",
        "[1]",
        '{"type": "tool_use", "part": {"tool": "bash"}}',
        '{"type": "step_finish", "part": {"reason": "stop", "cost": 0.5, "tokens": {"total": 7}}}',
    ]

    result = aggregate_run_result(
        events=list(iter_parse_lines(lines)), raw_stdout_lines=lines, exit_code=0, stderr=""
    )

    kinds = [event.get("kind") for event in result.events if event["type"] == "diagnostic"]
    assert kinds == ["empty_line", "json_decode_error", "non_object_json"]
    assert result.final_text == run_result_fuzzy_text(result) == "Hello"
    assert [call["type"] for call in result.tool_calls] == ["tool_use"]
    assert (result.turns, result.total_cost, result.token_usage.total) == (1, 0.5, 7)
    assert result.raw_stdout_lines == lines


def test_settings_become_arguments_and_environment() -> None:
    cfg = RunConfig(model="a/b", thinking=True, permission={"bash": "deny"}, extra_env={"X": "1"})

    validate_config_for_run(cfg)

    assert build_argv("oc", "hi", cfg)[1:] == [
        *("run", "--format", "json", "-m", "a/b", "--thinking", "--", "hi")
    ]
    assert build_env(cfg, {"PATH": "/bin"}) == {
        "PATH": "/bin",
        "X": "1",
        "OPENCODE_CONFIG_CONTENT": cfg.opencode_config_content_json(),
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
    }
