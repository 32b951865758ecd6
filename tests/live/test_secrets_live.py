"""No key of a configuration is in what is said about a failure, on either runner.

One broken configuration and one refusal by a provider are looked at everywhere that they are told:
in the error, its copy, the checkpoint, the page and the log file.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from opencode_sync import (
    OpenCodeError,
    OpenCodeProcessError,
    OpenCodeServer,
    RunConfig,
    RunResult,
)
from opencode_sync.api.runner import Runner
from opencode_sync.core.config import merged
from opencode_sync.display.report import checkpoint_to_html
from opencode_sync.testing import Reply, ScriptedModel
from tests.live.warm import MakeRunner, Script, config, shell

SECRET = "sk-live-0123456789abcdef"


@pytest.fixture(scope="module")
def cfg(model: ScriptedModel) -> RunConfig:
    """With a key."""
    cfg = config(model)
    options = {"provider": {"scripted": {"options": {"apiKey": SECRET}}}}
    return cfg.replace(config_overrides=merged(cfg.config_overrides or {}, options))


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    path = tmp_path / "workspace"
    path.mkdir()
    return path


def written_about(runner: Runner, workspace: Path, directory: Path) -> tuple[OpenCodeError, str]:
    """The error that a batch of one ends with, and all that was written about it."""
    checkpoint, page = directory / "batch.jsonl", directory / "page.html"
    [error] = runner.map(["hello"], workspace, checkpoint=checkpoint, on_error="return")
    assert isinstance(error, OpenCodeError)
    checkpoint_to_html(checkpoint, page)
    files = [checkpoint, page]
    if isinstance(runner, OpenCodeServer):  # a run costs little there
        files.append(directory / "log")
        with pytest.raises(OpenCodeError):
            runner.run("hello", workspace, log_file=files[-1])
    pieces = [*map(Path.read_bytes, files), pickle.dumps(error), repr(error.result).encode()]
    return error, b"\n".join(pieces).decode("utf-8", "replace")


_WITHOUT_COMMA = """\
{
  "provider": {"p": {"options": {
    "apiKey": "%s"
    "baseURL": "http://127.0.0.1:1"
  }}}
}
"""
_WRONG_TYPE = """\
{"mcp": {"x": {"type": "remote", "url": "http://127.0.0.1:1", "headers": ["Bearer %s"]}}}
"""


@pytest.mark.parametrize(
    "text, fault",
    [
        (_WITHOUT_COMMA, "CommaExpected at line 4, column 5"),
        pytest.param(
            *(_WRONG_TYPE, "Expected object | undefined"), marks=pytest.mark.only("server")
        ),
    ],
    ids=["a missing comma", "a wrong type"],
)
def test_a_broken_configuration_is_named_and_not_quoted(
    runner: Runner, workspace: Path, tmp_path: Path, text: str, fault: str
) -> None:
    (workspace / "opencode.json").write_text(text % SECRET)

    error, written = written_about(runner, workspace, tmp_path)

    assert SECRET not in written
    assert str(workspace / "opencode.json") in str(error)
    assert fault in str(error)
    assert ("mcp.x.headers" in str(error)) == (text is _WRONG_TYPE)


@pytest.mark.only("server")
def test_a_broken_configuration_of_the_user_s_own_is_not_quoted_either(
    make: MakeRunner, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server reads that one before it listens."""
    file = tmp_path / "config" / "opencode" / "opencode.json"
    file.parent.mkdir(parents=True)
    file.write_text(_WITHOUT_COMMA % SECRET + "\n" * 50)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    with pytest.raises(OpenCodeError) as caught:
        make(run_cfg=None).run("hello", workspace)

    assert SECRET not in str(caught.value)
    assert "CommaExpected at line 4, column 5" in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_key_that_the_provider_repeats_is_masked_and_what_a_tool_prints_is_kept(
    runner: Runner, workspace: Path, tmp_path: Path, script: Script
) -> None:
    refusal = Reply.failure(401, f"Incorrect API key provided: {SECRET}")
    script.to("hello", shell(f"echo {SECRET}"), refusal)

    error, written = written_about(runner, workspace, tmp_path)

    assert isinstance(error, OpenCodeProcessError)
    result = error.result
    assert isinstance(result, RunResult)
    assert "Incorrect API key provided: ***" in str(error)
    [tool] = result.tool_calls
    assert SECRET in json.dumps(tool)
    others = [event for event in result.events if event is not tool]
    assert SECRET not in json.dumps(others)
    assert SECRET not in str(error) + str(result.error) + error.stderr + str(error.reason)
    assert f"provided: {SECRET}" not in written
