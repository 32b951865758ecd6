"""A script for py-opencode-wrapper works here, once `await` and `async_` are taken out of it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import opencode_sync
from opencode_sync import (
    OpenCodeBinaryNotFoundError,
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


def test_errors_are_caught_as_before() -> None:
    for error in (OpenCodeBinaryNotFoundError, OpenCodeProcessError, OpenCodeTimeoutError):
        assert issubclass(error, OpenCodeError)
    assert issubclass(OpenCodeBinaryNotFoundError, FileNotFoundError)
    assert issubclass(OpenCodeTimeoutError, TimeoutError)
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
