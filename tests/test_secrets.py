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
