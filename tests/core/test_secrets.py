"""Secrets are where OpenCode needs them, and nowhere else."""

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


def test_secrets_are_in_the_child_s_environment_and_not_on_its_command_line(
    client: OpenCodeClient, workspace: Path
) -> None:
    seen = json.loads(client.run("look_around", workspace).answer)

    argv, environ = " ".join(seen["argv"]), "\n".join(seen["environ"])
    assert SECRET not in argv
    assert "look_around" not in argv  # nor is the prompt
    assert f"PROVIDER_API_KEY={SECRET}" in environ
    assert f'"apiKey": "{SECRET}"' in environ


def test_nothing_that_is_printed_shows_secrets(client: OpenCodeClient, workspace: Path) -> None:
    with client.stream("silent", workspace) as stream:
        for value in (client, stream, CONFIG, stream.result, *threading.enumerate()):
            assert SECRET not in repr(value)
            assert SECRET not in str(value)


def test_neither_an_error_nor_a_log_shows_secrets(
    client: OpenCodeClient, workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="opencode_sync")

    with pytest.raises(OpenCodeTimeoutError) as slow:
        client.run("with_tools", workspace, timeout_s=0.5, log_file=tmp_path / "log")
    with pytest.raises(OpenCodeProcessError) as failed:
        client.run("fail 1 database is locked", workspace, startup_retry_delay_s=0)
    os.unlink(client.resolved_binary())
    with pytest.raises(OpenCodeError) as missing:
        client.run("well", workspace)

    for caught in (slow, failed, missing):
        assert SECRET not in f"{caught.value} {caught.value!r} {caught.value.__cause__}"
        assert SECRET.encode() not in pickle.dumps(caught.value)
    assert caplog.records
    assert SECRET not in caplog.text
    assert SECRET not in (tmp_path / "log").read_text()


def test_what_a_run_writes_down_is_the_user_s_alone_and_holds_no_secret(
    client: OpenCodeClient, workspace: Path
) -> None:
    before = os.umask(0)
    try:
        with client.stream(f"echo {SECRET}", workspace) as stream:
            stream.wait()

            temporary = Path(tempfile.gettempdir())
            roots = list(temporary.glob("opencode-sync-*"))
            for root in (temporary, Path.home(), workspace):
                for path in root.rglob("*"):
                    assert not path.is_file() or SECRET.encode() not in path.read_bytes()
    finally:
        os.umask(before)

    ours = [root for root in roots if root.owner() == workspace.owner()]
    assert ours
    assert {stat.S_IMODE(root.stat().st_mode) for root in ours} == {0o700}


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
    ["ACME_API_KEY", "GITHUB_TOKEN", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY"],
)
def test_a_secret_of_the_environment_is_masked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, QUOTED)

    assert Secrets().cleaned(f"no: {QUOTED}!") == "no: ***!"


@pytest.mark.parametrize("value", ["two\nlines", 'sés"âme\\sésâme'])
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
def test_what_is_not_secret_stays(settings: dict[str, Any]) -> None:
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
def test_a_quoted_file_is_cut_out_also_where_only_its_beginning_or_end_is_there(kept: int) -> None:
    lines = WITHOUT_COMMA.splitlines()

    assert "unknown" not in without_quotes("\n".join(lines[:kept]))
    assert "unknown" not in without_quotes("\n".join(lines[-kept:]))


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


def test_what_a_child_repeats_on_stderr_is_masked(client: OpenCodeClient, workspace: Path) -> None:
    with pytest.raises(OpenCodeError) as caught:
        client.run(f"complain_long {SECRET}", workspace)

    error = caught.value
    assert error.result is not None
    assert "***" in str(error)
    assert SECRET[:9] not in str(error)  # it is masked before the beginning is cut off
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
