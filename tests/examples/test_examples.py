"""The examples, run as they stand, with a scripted model behind OpenCode."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest

from opencode_sync import build_env
from opencode_sync.process.command import without_user_config
from opencode_sync.process.data_dirs import DataDirectories
from opencode_sync.testing import ChatRequest, Reply, ScriptedModel, tool_call

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
OURS = {"__init__.py", "conftest.py", "test_examples.py"}
EXAMPLES = [path for path in sorted(HERE.glob("*.*")) if path.name not in OURS]
CITIES = [f"City {letter}" for letter in "ABCDEFGHIJ"]
FINDING = {"line": 1, "severity": "high", "text": "It greets nobody."}

# Each is a whole program that starts an OpenCode, which a busy machine takes its time for.
pytestmark = pytest.mark.timeout(300)

Run = Callable[..., str]


def answer(request: ChatRequest) -> Reply:
    """Whatever the examples ask for."""
    if "StructuredOutput" in request.tools:
        plan = {"cities": CITIES} if "cities" in request.prompt else {"findings": [FINDING]}
        return Reply.calls(tool_call("StructuredOutput", **plan))
    if "packing list" in request.prompt:
        return Reply(f"An umbrella, for {request.prompt.count('Rain')} cities.")
    return Reply("Rain in places.")


@pytest.fixture(scope="module")
def model(opencode_binary: str) -> Iterator[ScriptedModel]:
    with ScriptedModel(answer) as model:
        yield model


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """The directory that a user is in."""
    repo = tmp_path / "repo"
    (repo / "package").mkdir(parents=True)
    (repo / "main.py").write_text("print('hello')\n")
    (repo / "package/greet.py").write_text("def greet(): ...\n")
    (repo / "tasks.txt").write_text("Say one.\nSay two.\n\nSay one.\n")
    return repo


@pytest.fixture
def run(model: ScriptedModel, opencode_binary: str, repo: Path, tmp_path: Path) -> Run:
    """Runs a command as a user would whose OpenCode is set up with a model; gives its output."""
    cfg = model.run_config()
    # A home that OpenCode was at work in before: into an empty one it would install by npm.
    used = DataDirectories(tmp_path / "used").empty_config()
    env = without_user_config(build_env(cfg), cfg, used)
    env |= {"OPENCODE_BINARY": opencode_binary, "PYTHONPATH": str(ROOT)}

    def run(*command: str, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=repo,
            env=env | variables,
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def example(name: str) -> str:
    return str(HERE / name)


def test_a_repository_is_reviewed_file_by_file(run: Run, repo: Path) -> None:
    run(example("review_repository.py"), PYTHONWARNINGS="error")

    with open(repo / "review.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["file", "line", "severity", "finding"],
        ["main.py", "1", "high", "It greets nobody."],
        ["package/greet.py", "1", "high", "It greets nobody."],
    ]


def test_a_nightly_batch_does_nothing_a_second_time(run: Run, model: ScriptedModel) -> None:
    asked = len(model.requests)

    first = run(example("nightly_batch.py"), PYTHONWARNINGS="error")
    asked_in_the_first_night = len(model.requests) - asked
    second = run(example("nightly_batch.py"), PYTHONWARNINGS="error")

    assert asked_in_the_first_night == 2
    assert len(model.requests) == asked + 2
    assert "done: Say two. - Rain in places." in first
    assert [line for line in first.splitlines() if line.startswith("done:")] == [
        line for line in second.splitlines() if line.startswith("done:")
    ]


def test_a_table_gets_answers_and_costs_nothing_a_second_time(
    run: Run, model: ScriptedModel, repo: Path
) -> None:
    asked = len(model.requests)
    rows = 'id;file;error\r\n7;"a;b.py";"KeyError:\n1"\r\n8;c.py;\r\n9;d.py;E3\r\n'
    (repo / "bugs.csv").write_text(rows, encoding="utf-8-sig", newline="")

    tables = []
    for _ in range(2):
        run(example("table.py"), PYTHONWARNINGS="error")
        with open(repo / "answers.csv", newline="") as file:
            tables.append(list(csv.reader(file)))

    requests = [request.prompt for request in model.requests[asked:]]
    assert sorted(requests) == ["Explain a;b.py: KeyError:\n1", "Explain d.py: E3"]
    assert tables[0] == tables[1]
    assert tables[0][1] == ["7", "a;b.py", "KeyError:\n1", "Rain in places.", ""]
    assert tables[0][2][:4] == ["8", "c.py", "", ""]
    assert tables[0][3] == ["9", "d.py", "E3", "Rain in places.", ""]


def test_agents_pass_on_what_they_found(run: Run) -> None:
    output = run(example("ten_cities.py"), "by", "train", PYTHONWARNINGS="error")

    assert output.startswith(" - ".join(CITIES))
    assert "An umbrella, for 10 cities." in output
    assert "12 runs, $0.0" in output


def test_the_notebook_shows_the_answer_the_results_and_the_report(run: Run, repo: Path) -> None:
    target = repo / "shown.ipynb"

    run("-m", "jupyter", "execute", example("explore.ipynb"), f"--output={target}")

    notebook = nbformat.read(target, as_version=4)  # type: ignore[no-untyped-call]
    shown = [
        output["data"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "data" in output
    ]
    overview, first_result, report = [data for data in shown if "widget" not in json.dumps(data)]
    assert overview["text/markdown"].startswith("Rain in places.")
    assert first_result["text/markdown"].startswith("Rain in places.")
    assert "<table" in report["text/html"]


def test_a_users_own_tests_run_as_a_session_of_their_own(run: Run, repo: Path) -> None:
    code = Path(example("test_pipeline.py")).read_text(encoding="utf-8")
    (repo / "test_pipeline.py").write_text(code, encoding="utf-8")

    output = run("-m", "pytest", "-W", "error", "-q", "test_pipeline.py")

    assert "2 passed" in output


def test_no_example_is_left_out() -> None:
    run_here = set(re.findall(r'example\("([\w.]+)"\)', Path(__file__).read_text("utf-8")))

    assert {path.name for path in EXAMPLES} == run_here


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.name) for path in EXAMPLES if path.suffix == ".py"]
)
def test_a_script_is_short_and_says_how_to_run_it(path: Path) -> None:
    code = path.read_text(encoding="utf-8")

    assert len(code.splitlines()) < 60
    assert re.match(r'"""[^\n]+\n\nRun it [^\n]+\n"""\n', code)
