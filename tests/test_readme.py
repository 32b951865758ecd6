"""The README's blocks, executed as they stand, with a scripted model behind OpenCode."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from opencode_sync import build_env
from opencode_sync.testing import ChatRequest, Reply, ScriptedModel, tool_call

README = Path(__file__).parent.parent / "README.rst"
BLOCK = re.compile(r"^\.\. code-block:: (\w+)\n\n((?:   .*\n|\n)+)", re.MULTILINE)
# By CI itself, in a fresh clone: they install the package.
COMMANDS = [
    "pip install -e . && opencode-sync demo",
    'pip install -e ".[test]" && pytest',
]
FINDING = {"file": "main.py", "line": 1, "text": "It greets nobody."}


def blocks(language: str) -> list[str]:
    text = README.read_text(encoding="utf-8")
    return [textwrap.dedent(code) for name, code in BLOCK.findall(text) if name == language]


def title(code: str) -> str:
    """The first word that tells blocks apart: what is called."""
    called = re.findall(r"\.(run|stream|map|session|Client)\(", code)
    return "-".join(dict.fromkeys(called)) or "commands"


def answer(request: ChatRequest) -> Reply:
    """Whatever the README asks for."""
    if "StructuredOutput" in request.tools:
        return Reply.calls(tool_call("StructuredOutput", **FINDING))
    if "JSON Schema" in request.prompt:
        return Reply(json.dumps(FINDING))
    return Reply(["As you ", "wish."])


@pytest.fixture(scope="module")
def environment(opencode_binary: str) -> Iterator[dict[str, str]]:
    """In which the user's OpenCode is set up with a model."""
    with ScriptedModel(answer) as model:
        env = build_env(model.run_config())
        yield env | {"OPENCODE_BINARY": opencode_binary, "PYTHONWARNINGS": "error"}


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """The directory that a reader is in."""
    (tmp_path / "README.md").write_text("# Hello\n\nPrints a greeting.\n")
    (tmp_path / "main.py").write_text("print('hello')\n")
    (tmp_path / "prompt.txt").write_text("Explain this repo")
    return tmp_path


@pytest.mark.parametrize("code", [pytest.param(code, id=title(code)) for code in blocks("python")])
def test_a_python_block_runs_as_it_stands(
    code: str, repo: Path, environment: dict[str, str]
) -> None:
    script = repo / "script.py"
    script.write_text(code)

    done = subprocess.run(
        [sys.executable, str(script)], cwd=repo, env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", [pytest.param(code, id=title(code)) for code in blocks("bash")])
def test_a_shell_block_runs_as_it_stands(
    code: str, repo: Path, environment: dict[str, str]
) -> None:
    here = Path(sys.executable).parent
    env = environment | {"PATH": f"{here}{os.pathsep}{environment['PATH']}"}

    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], cwd=repo, env=env, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert "As you wish." in done.stdout


def test_no_block_is_left_out() -> None:
    text = README.read_text(encoding="utf-8")

    assert len(blocks("python")) + len(blocks("bash")) == text.count(".. code-block::")
    for command in COMMANDS:
        assert f"\n\n   {command}\n" in text
