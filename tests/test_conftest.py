"""Sessions of pytest within the session, which stand on the same conftest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LEAKY = """
import os, subprocess, sys, tempfile, threading
import pytest
from tests import leaks

leaks.SETTLE_S = 0.1
kept = []

def start_thread(end):
    thread = threading.Thread(target=end.wait, daemon=True)
    thread.start()
    return thread

@pytest.fixture(scope="session")
def shared():
    end = threading.Event()
    thread = start_thread(end)
    yield
    end.set()
    thread.join()

@pytest.fixture
def own():
    end = threading.Event()
    thread = start_thread(end)
    yield
    end.set()
    thread.join()

@pytest.fixture(scope="session")
def shared_and_forgotten():
    start_thread(threading.Event())

def test_nothing():
    pass

def test_with_something_of_its_own(own):
    pass

def test_with_something_shared(own, shared):
    pass

def test_thread():
    start_thread(threading.Event())

def test_child():
    kept.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))

def test_descriptor():
    kept.append(os.open(os.devnull, os.O_RDONLY))

def test_directory():
    tempfile.mkdtemp(prefix="opencode-sync-")

def test_after_them():
    pass

def test_with_something_shared_and_forgotten(shared_and_forgotten):
    pass
"""

ENVIRONMENT = """
import os, tempfile
from pathlib import Path

def test_the_home_has_nothing_but_what_opencode_installs():
    names = [path.name for path in Path.home().rglob("*")]
    assert sorted(names) == [".config", "node_modules", "opencode", "package-lock.json"]

def test_temporary_files_go_where_no_others_are():
    assert os.listdir(tempfile.gettempdir()) == []

def test_settings_and_keys_of_the_developer_are_gone():
    names = {"OPENCODE_CONFIG", "XDG_DATA_HOME", "SOME_API_KEY"}
    assert not names & os.environ.keys()

def test_the_chosen_binary_stays():
    assert os.environ["OPENCODE_BINARY"] == "/chosen/opencode"

def test_the_developers_npm_settings_hold():
    assert Path(os.environ["NPM_CONFIG_USERCONFIG"]).read_text() == "registry=here"
"""


def session(directory: Path, source: str, **env: str) -> dict[str, str]:
    """Run *source* as a module of tests; what pytest's summary says of each of them."""
    (directory / "test_it.py").write_text(source)
    inherited = {name: value for name, value in os.environ.items() if "CONFIG" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-rA", "test_it.py"],
        cwd=directory,
        env={**inherited, "PYTHONPATH": str(ROOT), "COLUMNS": "1000", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout
    _, _, summary = done.stdout.partition("short test summary info")
    lines = [line for line in summary.splitlines() if "test_it.py" in line]
    # "ERROR test_it.py::test_x - Failed: ..." outweighs the "PASSED test_it.py::test_x" of a test
    # whose teardown it was.
    return {line.partition("::")[2].partition(" ")[0]: line for line in sorted(lines, reverse=True)}


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return session(tmp_path_factory.mktemp("leaky"), LEAKY)


@pytest.mark.parametrize(
    "name",
    [
        "test_nothing",
        "test_with_something_of_its_own",
        "test_with_something_shared",
        "test_after_them",
    ],
)
def test_a_test_that_leaves_nothing_behind_passes(leaky: dict[str, str], name: str) -> None:
    assert leaky[name].startswith("PASSED")


@pytest.mark.parametrize("kind", ["thread", "child", "descriptor", "directory"])
def test_a_test_that_leaves_something_behind_does_not_pass(
    leaky: dict[str, str], kind: str
) -> None:
    assert leaky[f"test_{kind}"].startswith("ERROR")
    assert f"test_{kind} left behind" in leaky[f"test_{kind}"]


def test_what_a_shared_fixture_forgets_is_noticed_at_the_end(leaky: dict[str, str]) -> None:
    assert "the tests left behind" in leaky["test_with_something_shared_and_forgotten"]


def test_the_tests_see_nothing_of_the_developers_environment(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".npmrc").write_text("registry=here")

    report = session(
        tmp_path,
        ENVIRONMENT,
        HOME=str(home),
        OPENCODE_BINARY="/chosen/opencode",
        OPENCODE_CONFIG="x",
        XDG_DATA_HOME="x",
        SOME_API_KEY="x",
    )

    assert len(report) == 5
    assert not [line for line in report.values() if not line.startswith("PASSED")]


@pytest.mark.parametrize("ci, outcome", [("", "SKIPPED"), ("true", "ERROR")])
def test_without_a_binary_to_test_with_a_test_is_skipped_and_in_ci_fails(
    tmp_path: Path, ci: str, outcome: str
) -> None:
    source = "def test_live(opencode_binary): pass"

    report = session(tmp_path, source, CI=ci, OPENCODE_BINARY="/no/such/opencode")

    (line,) = report.values()
    assert line.startswith(outcome)
    assert "/no/such/opencode" in line
