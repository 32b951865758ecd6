"""The command line with the real opencode: every shape of a run, and the demo."""

from __future__ import annotations

import io
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


def test_a_map_runs_the_lines_of_a_file(
    shell: Shell, scripted: Scripted, asking: Options, workspace: Path
) -> None:
    (workspace / "in.csv").write_text("key,prompt\na,one\nb,two\n")
    model = scripted(lambda request: f"You said {request.prompt}.")
    command = ("map", "in.csv", "--output", "out.jsonl", "--server", *asking(model))

    statuses = [shell(*command)[0], shell(*command)[0]]

    lines = map(json.loads, (workspace / "out.jsonl").read_text().splitlines())
    assert statuses == [0, 0]
    assert sorted((line["key"], line["answer"]) for line in lines) == [
        ("a", "You said one."),
        ("b", "You said two."),
    ]
    assert len(model.requests) == 2


def test_a_chat_knows_what_was_said_before(
    shell: Shell, scripted: Scripted, asking: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scripted(["Hello Bob.", "Bob.", "Still Bob."])
    options = asking(model)

    monkeypatch.setattr("sys.stdin", io.StringIO("My name is Bob.\nWhat is my name?\n"))
    first = shell("chat", *options)
    monkeypatch.setattr("sys.stdin", io.StringIO("And now?\n"))
    second = shell("chat", "--session", first[2].split()[-1], *options)

    assert first[:2] == (0, "Hello Bob.\nBob.\n")
    assert second[:2] == (0, "Still Bob.\n")
    assert "My name is Bob." in json.dumps(model.requests[-1].messages)


def test_the_demo_works_and_says_what_it_cost(shell: Shell) -> None:
    status, out, err = shell("demo")

    assert (status, err) == (0, "")
    assert "hello.txt now holds 'Hello, world!\\n'" in out
    assert "Name the capital of Kenya.  Nairobi." in out
    assert re.search(r"^together +9 +1,080 +0\.0027 +\d+\.\d$", out, re.MULTILINE)
    assert out.endswith("Everything worked.\n")
