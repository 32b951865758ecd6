"""The command line with the real opencode: two runs of a session, and the demo.

The README's blocks are run too, see tests/test_readme.py: they show map and chat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from opencode_sync.cli import main
from opencode_sync.testing import Reply, ScriptedModel, tool_call

Scripted = Callable[..., ScriptedModel]
Shell = Callable[..., tuple[int, str, str]]
Options = Callable[[ScriptedModel], list[str]]


@pytest.fixture
def shell(
    opencode_binary: str,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Shell:
    """Runs a command line in the workspace; returns the exit status, stdout and stderr."""
    monkeypatch.setenv("OPENCODE_BINARY", opencode_binary)
    monkeypatch.chdir(workspace)

    def run(*words: str) -> tuple[int, str, str]:
        return main.main(words), *capfd.readouterr()

    return run


@pytest.fixture
def asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """The options that make a command ask a scripted model."""

    def options(model: ScriptedModel) -> list[str]:
        cfg = model.run_config()
        for name, value in (cfg.extra_env or {}).items():
            monkeypatch.setenv(name, value)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(cfg.build_opencode_config_dict()))
        return ["--config", str(path), "--model", str(cfg.model)]

    return options


def test_a_run_prints_the_answer_and_the_next_one_goes_on_with_its_session(
    shell: Shell, scripted: Scripted, asking: Options
) -> None:
    look = tool_call("bash", command="ls", description="List files")
    model = scripted(["Your name is Bob.", Reply.calls(look, text="I look."), "Bob."])

    status, out, err = shell("run", "My name is Bob.", *asking(model))
    session = err.rpartition("session ")[2].strip()
    again = shell("run", "Who am I?", "--stream", *asking(model), "--session", session)

    assert (status, out) == (0, "Your name is Bob.\n")
    assert again[:2] == (0, "I look.\n\nBob.\n")
    assert again[2].splitlines()[0] == "[bash] ls"
    assert "My name is Bob." in json.dumps(model.requests[1].messages)


def test_the_demo_works_and_says_what_it_cost(shell: Shell) -> None:
    status, out, err = shell("demo")

    assert (status, err) == (0, "")
    assert "hello.txt now holds 'Hello, world!\\n'" in out
    assert "Name the capital of Kenya.  Nairobi." in out
    assert re.search(r"^together +9 +1,080 +0\.0027 +\d+\.\d$", out, re.MULTILINE)
    assert out.endswith("Everything worked.\n")
