"""The README's blocks, executed as they stand, with a scripted model behind OpenCode."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opencode_sync import build_env
from opencode_sync.process.command import without_user_config
from opencode_sync.process.data_dirs import DataDirectories
from opencode_sync.testing import ChatRequest, Reply, ScriptedModel, tool_call
from tests.kernel import Kernel

README = Path(__file__).parent.parent / "README.rst"
BLOCK = re.compile(r"^\.\. code-block:: (\w+)\n\n((?:   .*\n|\n)+)", re.MULTILINE)
# What differs from run to run.
VARIES = [(r"ses_\w+|\b[0-9a-f]{32}\b", "ID"), (r"\d+(\.\d+)?", "N"), (r" +", " ")]
# By CI itself, in a fresh clone: they install the package.
COMMANDS = [
    "pip install -e . && opencode-sync demo",
    'pip install -e ".[test]" && pytest',
]
ANSWERS = {
    "Explain this repo in one sentence.": "A script that prints a greeting.",
    "My name is Bob.": "Hello, Bob.",
    "What is my name?": "Your name is Bob.",
}
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
    return Reply(ANSWERS.get(request.prompt, ["As you ", "wish."]))


@pytest.fixture(scope="module")
def environment(
    opencode_binary: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """In which the user's OpenCode is set up with a model."""
    used = DataDirectories(tmp_path_factory.mktemp("used")).empty_config()
    with ScriptedModel(answer) as model:
        provider = {
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": model.base_url, "apiKey": "none"},
            "models": {"gpt-5.2": {"tool_call": True}},
        }
        cfg = model.run_config(config_overrides={"provider": {"openai": provider}})
        # A home that OpenCode was at work in before: into an empty one it would install by npm.
        env = without_user_config(build_env(cfg), cfg, used)
        yield env | {"OPENCODE_BINARY": opencode_binary, "PYTHONWARNINGS": "error"}


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """The directory that a reader is in."""
    (tmp_path / "README.md").write_text("# Hello\n\nPrints a greeting.\n")
    (tmp_path / "main.py").write_text("print('hello')\n")
    (tmp_path / "prompt.txt").write_text("Explain this repo")
    (tmp_path / "prompts.txt").write_text("".join(f"Say the number {n}.\n" for n in (1, 2, 3)))
    (tmp_path / "bugs.csv").write_text("id;file;error\n7;main.py;E1\n8;main.py;E2\n")
    (tmp_path / "finding.json").write_text(json.dumps({"type": "object"}))
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


@pytest.fixture
def shell(repo: Path, environment: dict[str, str]) -> Callable[[str], str]:
    """Runs a command line as the reader would, and gives what it prints."""
    here = Path(sys.executable).parent
    env = environment | {"PATH": f"{here}{os.pathsep}{environment['PATH']}"}

    def run(code: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=repo,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


@pytest.mark.parametrize("code", blocks("bash"), ids=range(len(blocks("bash"))))
def test_a_shell_block_runs_as_it_stands(code: str, shell: Callable[[str], str]) -> None:
    assert "usage: opencode-sync" in shell(code)


@pytest.mark.parametrize("code", blocks("console"), ids=range(len(blocks("console"))))
def test_a_console_block_shows_what_its_commands_print(
    code: str, shell: Callable[[str], str]
) -> None:
    first, *examples = code.split("$ ")

    assert first == ""
    for example in examples:
        command, _, shown = example.partition("\n")
        assert settled(shell(command)) == settled(shown)


def settled(text: str) -> list[str]:
    """The lines of *text* without what differs from run to run."""
    for varies, name in VARIES:
        text = re.sub(varies, name, text)
    # Where a batch takes long, it says how far it is.
    lines = text.strip().splitlines()
    return sorted(line for line in lines if not line.startswith("opencode-sync: N done"))


def test_the_notebook_s_cells_show_what_the_readme_says(
    repo: Path, environment: dict[str, str]
) -> None:
    [code], [shown] = blocks("ipython"), blocks("text")

    with Kernel.started(repo, environment) as kernel:
        for cell in code.strip().split("\n\n"):
            outputs = kernel.run(cell)
        kernel.run("%unload_ext opencode_sync")

    markdown = html.unescape(outputs[-1]["data"]["text/markdown"]).replace("*", "")
    assert settled(markdown) == settled(shown)


def test_no_block_is_left_out() -> None:
    text = README.read_text(encoding="utf-8")
    languages = ("python", "bash", "console", "ipython", "text")

    assert sum(len(blocks(name)) for name in languages) == text.count(".. code-block::")
    for command in COMMANDS:
        assert f"\n\n   {command}\n" in text


def test_no_figure_is_still_to_be_filled_in() -> None:
    assert not re.findall(r"@\w+@", README.read_text(encoding="utf-8"))
