"""Secrets stand where OpenCode needs them, and nowhere else."""

from __future__ import annotations

import json
import logging
import os
import pickle
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeClient,
    OpenCodeError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    RunConfig,
    build_argv,
)
from opencode_sync.core.events import Event, parse_event_line
from opencode_sync.core.result import ErrorInfo
from opencode_sync.core.secrets import Secrets, config_refusal, without_quotes
from tests.faults import standin_client

SECRET = "s3cr3t-in-no-text"

CONFIG = RunConfig(
    extra_env={"PROVIDER_API_KEY": SECRET},
    mcp={"server": {"type": "local", "command": ["x"], "environment": {"TOKEN": SECRET}}},
    config_overrides={"provider": {"p": {"options": {"apiKey": SECRET}}}},
)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[OpenCodeClient]:
    with standin_client(tmp_path, run_cfg=CONFIG) as client:
        yield client


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    return workspace


def seen_by_the_child(client: OpenCodeClient, workspace: Path) -> dict[str, Any]:
    return json.loads(client.run("look_around", workspace).answer)  # type: ignore[no-any-return]


def test_secrets_and_prompts_are_not_on_the_command_line(
    client: OpenCodeClient, workspace: Path
) -> None:
    argv = seen_by_the_child(client, workspace)["argv"]

    assert SECRET not in " ".join(argv)
    assert "look_around" not in " ".join(argv)


def test_the_child_gets_them_in_its_environment(client: OpenCodeClient, workspace: Path) -> None:
    environ = "\n".join(seen_by_the_child(client, workspace)["environ"])

    assert f"PROVIDER_API_KEY={SECRET}" in environ
    assert f'"apiKey": "{SECRET}"' in environ


def test_a_server_s_password_is_not_on_the_command_line() -> None:
    argv = build_argv("opencode", None, RunConfig(attach="http://x", password=SECRET))

    assert SECRET not in " ".join(argv)


def test_nothing_that_is_printed_shows_them(client: OpenCodeClient, workspace: Path) -> None:
    with client.stream("silent", workspace) as stream:
        for value in (client, stream, stream._source, CONFIG, stream.result):
            assert SECRET not in repr(value)
            assert SECRET not in str(value)


@pytest.mark.parametrize(
    "prompt, options",
    [
        ("silent", {"timeout_s": 0.1}),
        ("fail 1 no reason", {}),
        ("cut_line", {}),
        ("steps 3 1", {"max_cost": 0.1}),
    ],
    ids=["timeout", "exit", "incomplete", "budget"],
)
def test_no_error_shows_them(
    client: OpenCodeClient, workspace: Path, prompt: str, options: dict[str, Any]
) -> None:
    with pytest.raises(OpenCodeError) as caught:
        client.run(prompt, workspace, **options)

    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)
    assert SECRET.encode() not in pickle.dumps(caught.value)


def test_an_error_before_the_start_shows_none(client: OpenCodeClient, workspace: Path) -> None:
    os.unlink(client.resolved_binary())

    with pytest.raises(OpenCodeError) as caught:
        client.run("well", workspace)

    assert SECRET not in str(caught.value)
    assert SECRET not in str(caught.value.__cause__)


def test_neither_logging_nor_the_log_file_has_them(
    client: OpenCodeClient, workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="opencode_sync")

    with pytest.raises(OpenCodeTimeoutError):
        client.run("with_tools", workspace, timeout_s=0.5, log_file=tmp_path / "log")
    with pytest.raises(OpenCodeProcessError):
        client.run("fail 1 database is locked", workspace, retry_delay_s=0)

    assert caplog.records
    assert SECRET not in caplog.text
    assert SECRET not in (tmp_path / "log").read_text()


def test_temporary_directories_are_the_user_s_alone(
    client: OpenCodeClient, workspace: Path
) -> None:
    before = os.umask(0)
    try:
        client.run("well", workspace)
    finally:
        os.umask(before)

    roots = list(Path(tempfile.gettempdir()).glob("opencode-sync-*"))
    assert roots
    for path in [root for root in roots if root.owner() == Path(workspace).owner()]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_no_file_holds_the_prompt_or_the_configuration(
    client: OpenCodeClient, workspace: Path
) -> None:
    with client.stream(f"echo {SECRET}", workspace) as stream:
        stream.wait()

        for root in (Path(tempfile.gettempdir()), Path.home(), workspace):
            for path in root.rglob("*"):
                if path.is_file():
                    assert SECRET.encode() not in path.read_bytes()


def test_threads_and_processes_bear_no_secret_names(
    client: OpenCodeClient, workspace: Path
) -> None:
    with client.stream("silent", workspace):
        assert not any(SECRET in thread.name for thread in threading.enumerate())


# --- what is quoted by others --------------------------------------------------------------------

QUOTED = "hunter22hunter22"


def secrets_of(**settings: Any) -> Secrets:
    return Secrets(RunConfig(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"password": QUOTED},
        {"extra_env": {"ANYTHING": QUOTED}},
        {"extra_env": {"OPENCODE_CONFIG_CONTENT": json.dumps({"x": {"apiKey": QUOTED}})}},
        {"extra_env": {"OPENCODE_AUTH_CONTENT": json.dumps({"p": {"access": QUOTED}})}},
        {"mcp": {"x": {"environment": {"ANYTHING": QUOTED}}}},
        {"mcp": {"x": {"headers": {"Authorization": f"Bearer {QUOTED}"}}}},
        {"mcp": {"x": {"command": ["server", "--api-key", QUOTED]}}},
        {"mcp": {"x": {"command": ["server", f"--token={QUOTED}"]}}},
        {"mcp": {"x": {"url": f"https://me:{QUOTED}@host/"}}},
        {"config_overrides": {"provider": {"p": {"options": {"apiKey": QUOTED}}}}},
        {"config_overrides": {"mcp": {"auth": {"headers": {"X-Any": QUOTED}}}}},
        {"attach": f"http://me:{QUOTED}@127.0.0.1:1"},
    ],
)
def test_a_secret_of_the_settings_is_masked(settings: dict[str, Any]) -> None:
    assert secrets_of(**settings).cleaned(f"no: {QUOTED}!") == "no: ***!"


@pytest.mark.parametrize(
    "name",
    ["ACME_API_KEY", "GITHUB_TOKEN", "CLIENT_SECRET", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY"],
)
def test_a_secret_of_the_environment_is_masked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, QUOTED)

    assert Secrets().cleaned(f"no: {QUOTED}!") == "no: ***!"


@pytest.mark.parametrize("value", ['quo"ted\\value', "two\nlines", 'sés"âme-sésâme'])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_a_secret_is_masked_as_it_is_and_as_it_stands_in_json(value: str, is_ascii: bool) -> None:
    secrets = secrets_of(password=value)
    quoted = json.dumps([value], ensure_ascii=is_ascii)

    assert secrets.cleaned(f"{value} and {quoted}") == '*** and ["***"]'


def test_a_secret_that_is_a_part_of_another_one_leaves_nothing_of_it() -> None:
    secrets = secrets_of(extra_env={"A_KEY": QUOTED, "B_KEY": f"{QUOTED}-long"})

    assert secrets.cleaned(f"{QUOTED}-long") == "***"


def test_a_short_value_is_masked_where_its_name_says_that_it_is_secret() -> None:
    secrets = secrets_of(extra_env={"A_KEY": "abcd", "LEVEL": "debug", "B_TOKEN": "1"})

    assert secrets.cleaned("abcd, abcdef, debug, 1") == "***, abcdef, debug, 1"


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "anthropic/claude"},
        {"config_overrides": {"model": "anthropic/claude"}},
        {"mcp": {"x": {"command": ["anthropic/claude"]}}},
        {"extra_env": {"HOME": "/home/anthropic/claude"}},
        {"extra_env": {"BASE_URL": "http://anthropic/claude"}},
        {"config_overrides": {"agent": {"key-finder": {"model": "anthropic/claude"}}}},
        {"mcp": {"auth": {"type": "remote", "url": "anthropic/claude"}}},
    ],
)
def test_what_is_no_secret_stays(settings: dict[str, Any]) -> None:
    text = "no anthropic/claude in /home/anthropic/claude, http://anthropic/claude"

    assert secrets_of(**settings).cleaned(text) == text


WITHOUT_COMMA = """\
Error: Config file at /w/opencode.json is not valid JSON(C):
--- JSONC Input ---
{"apiKey": "unknown"
 "a": "--- Errors ---", "b": "--- End ---"}
--- Errors ---
CommaExpected at line 2, column 2
   Line 2:  "apiKey": "unknown"
            ^
ValueExpected at line 2, column 9
   Line 2:  "apiKey": "unknown"
                   ^
--- End ---
"""


def test_a_file_that_is_quoted_is_cut_out_and_what_is_wrong_with_it_stays() -> None:
    assert without_quotes(WITHOUT_COMMA) == (
        "Error: Config file at /w/opencode.json is not valid JSON(C):\n"
        "CommaExpected at line 2, column 2, ValueExpected at line 2, column 9\n"
    )


@pytest.mark.parametrize("kept", range(1, 13))
def test_also_where_only_an_end_of_it_is_there(kept: int) -> None:
    lines = WITHOUT_COMMA.splitlines()

    assert "unknown" not in without_quotes("\n".join(lines[-kept:]))


@pytest.mark.parametrize("kept", range(1, 13))
def test_also_where_only_its_beginning_is_there(kept: int) -> None:
    lines = WITHOUT_COMMA.splitlines()

    assert "unknown" not in without_quotes("\n".join(lines[:kept]))


@pytest.mark.parametrize(
    "found, rest",
    [
        ('"unknown"', " mcp.x.headers"),
        ('["Bearer unknown", {"a": "b c"}]', " mcp.x.headers"),
        ("unknown unknown", ""),
        (r"[\"unknown\"]", ""),
    ],
)
def test_a_value_of_the_wrong_type_is_cut_out(found: str, rest: str) -> None:
    text = f"\u21b3 Expected string | undefined, got {found}{rest}\n\u21b3 Missing key mcp.x"

    assert without_quotes(text) == (
        f"\u21b3 Expected string | undefined{rest}\n\u21b3 Missing key mcp.x"
    )


def test_a_server_s_refusal_of_a_configuration_names_file_and_setting() -> None:
    issues = [
        {"path": ["mcp", "x"], "message": 'Expected string, got "unknown"'},
        {"path": ["mcp", "y"], "message": "Missing key"},
    ]
    body = {"name": "ConfigInvalidError", "data": {"path": "/w/opencode.json", "issues": issues}}

    assert config_refusal(body) == (
        "ConfigInvalidError at /w/opencode.json: mcp.x: Expected string; mcp.y: Missing key"
    )


def test_diagnostics_are_cleaned_in_events_and_raw_lines_and_nothing_else_is() -> None:
    events: list[Event] = [
        {"type": "error", "error": {"name": "E", "data": {"message": QUOTED}}},
        {"type": "retry", "message": QUOTED},
        {"type": "diagnostic", "kind": "json_decode_error", "raw": QUOTED},
        {"type": "text", "part": {"text": QUOTED}},
        {"type": "tool_use", "part": {"state": {"output": QUOTED}}},
    ]
    secrets = secrets_of(password=QUOTED)

    cleaned = secrets.clean_events(events)
    lines = secrets.clean_lines([*(json.dumps(event) for event in events), f"odd {QUOTED}"])

    assert [QUOTED in json.dumps(event) for event in cleaned] == [False, False, False, True, True]
    assert [QUOTED in line for line in lines] == [False, False, False, True, True, False]
    assert lines[3:5] == [json.dumps(event) for event in events[3:]]


def test_an_error_stays_one_where_a_secret_is_called_like_it() -> None:
    error = {"type": "error", "error": {"name": "APIError", "data": {"message": "an error"}}}
    secrets = secrets_of(password="error")

    [cleaned] = secrets.clean_events([parse_event_line(json.dumps(error))])
    [line] = secrets.clean_lines([json.dumps(error)])

    assert cleaned["type"] == json.loads(line)["type"] == "error"
    assert "an error" not in f"{cleaned}{line}"


def test_events_without_a_secret_are_given_as_they_are() -> None:
    events: list[Event] = [{"type": "error", "error": {}}, {"type": "retry"}]

    assert secrets_of(password=QUOTED).clean_events(events) is events


@pytest.mark.parametrize("prompt", [f"fail 1 {SECRET}", f"complain_long {SECRET}"])
def test_what_a_child_repeats_on_stderr_is_masked(
    client: OpenCodeClient, workspace: Path, prompt: str, tmp_path: Path
) -> None:
    with pytest.raises(OpenCodeError) as caught:
        client.run(prompt, workspace, log_file=tmp_path / "log")

    error = caught.value
    assert error.result is not None
    assert "***" in str(error)
    assert SECRET[:9] not in str(error)
    assert SECRET not in error.result.stderr


def test_what_a_child_repeats_on_stdout_is_masked(
    client: OpenCodeClient, workspace: Path, tmp_path: Path
) -> None:
    with pytest.raises(OpenCodeProcessError) as caught:
        client.run(f"refused_for {SECRET}", workspace, log_file=tmp_path / "log")

    error = caught.value
    assert error.result is not None
    assert error.result.error == ErrorInfo("APIError", "no: ***", 401)
    for told in (str(error), str(error.raw_stdout_lines), str(error.result.to_dict()["events"])):
        assert SECRET not in told
    assert SECRET not in (tmp_path / "log").read_text()
    assert "***" in str(error.result.raw_stdout_lines)
