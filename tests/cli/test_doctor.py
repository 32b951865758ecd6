"""What the doctor finds on machines where something is missing, and what it removes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from opencode_sync.cli import doctor, main
from opencode_sync.cli.doctor import Finding, examine
from opencode_sync.process import leftovers
from opencode_sync.process.command import TESTED_VERSION, managed_path, managed_root
from opencode_sync.process.data_dirs import pid_space
from opencode_sync.process.leftovers import Leftovers
from opencode_sync.process.tree import MARKER, process_token
from tests.standin import write_standin

WITHIN_S = 30


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: empty PATH, home and temporary directory, and no processes."""
    monkeypatch.setattr(psutil, "process_iter", lambda: iter(()))
    for name, variable in (("bin", "PATH"), ("home", "HOME"), ("tmp", "TMPDIR")):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("OPENCODE_BINARY", raising=False)
    return tmp_path


def finding(point: str) -> Finding:
    return next(each for each in examine() if each.point == point)


# --- opencode ------------------------------------------------------------------------------------


def has_opencode(machine: Path, version: str = TESTED_VERSION) -> Path:
    program = write_standin(machine / "bin" / "opencode")
    program.write_text(program.read_text().replace(TESTED_VERSION, version))
    return program


def test_a_missing_opencode_is_bad_with_how_to_get_it() -> None:
    found = finding("opencode")

    assert found.state == "bad"
    assert "no 'opencode' on PATH: run 'opencode-sync install'" in found.text


def test_a_good_opencode_is_named_with_where_it_was_found(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_standin(managed_path(TESTED_VERSION))
    managed = finding("opencode")
    program = has_opencode(machine)
    on_path = finding("opencode")
    monkeypatch.setenv("OPENCODE_BINARY", str(program))
    chosen = finding("opencode")

    assert on_path == Finding("opencode", "good", f"{TESTED_VERSION}, on PATH: {program}")
    assert managed.text.startswith(f"{TESTED_VERSION}, the managed copy: ")
    assert chosen.text.startswith(f"{TESTED_VERSION}, from OPENCODE_BINARY: ")


@pytest.mark.parametrize(
    "version, state, advice",
    [
        ("1.15.13", "bad", "older than 1.17, and may lose events; run 'opencode upgrade 1.18.33'"),
        ("1.17.0", "note", "1.18.33 is the tested one; run 'opencode upgrade 1.18.33'"),
        ("1.19.0", "note", "newer than 1.18.33"),
        (
            "2.0.10",
            "bad",
            "newer than the known versions (1.17 up to, not including, 2); run 'open",
        ),
    ],
    ids=["not known any more", "older", "of a later series", "not known yet"],
)
def test_another_version_is_held_against_the_tested_one(
    machine: Path, version: str, state: str, advice: str
) -> None:
    has_opencode(machine, version)

    found = finding("opencode")

    assert (found.state, found.text.partition(",")[0]) == (state, version)
    assert advice in found.advice
    assert "'opencode upgrade'" not in found.advice  # which would bring OpenCode 2


def test_a_broken_program_is_named_with_its_fault(machine: Path) -> None:
    has_opencode(machine).write_text("#!/bin/sh\nexit 7\n")

    found = finding("opencode")

    assert found.state == "bad"
    assert "does not run: opencode exited with status 7" in found.text


# --- the rest of the machine ---------------------------------------------------------------------


def test_npm_is_found_on_the_path_and_a_missing_one_is_only_a_note(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    without = finding("npm")
    npm = machine / "bin" / "npm"
    npm.touch(0o755)

    assert without.state == "note"
    assert "opencode-sync-sdk[opencode]" in without.advice
    assert finding("npm") == Finding("npm", "good", str(npm))


def test_providers_are_named_without_their_keys(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = finding("credentials")
    file = machine / "home" / ".local/share/opencode/auth.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"anthropic": {"type": "api", "key": "sk-secret"}}')
    monkeypatch.setenv("MISTRAL_API_KEY", "sk-secret")

    assert finding("credentials") == Finding("credentials", "good", "anthropic, MISTRAL_API_KEY")
    assert (without.state, without.text) == ("note", "none")
    assert "free models" in without.advice


def test_credentials_that_are_not_json_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCODE_AUTH_CONTENT", "{")

    found = finding("credentials")

    assert (found.state, found.text) == ("bad", "OPENCODE_AUTH_CONTENT is not valid JSON")


def test_a_directory_that_cannot_be_written_is_named(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "a-file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(machine / "a-file"))

    found = finding("directories")

    assert found.state == "bad"
    assert str(machine / "a-file") in found.text


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=5 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    found = finding("directories")

    assert found.state == "bad"
    assert "has 5 MB left" in found.text


def test_a_closed_loopback_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **settings: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_connection", refuse)

    found = finding("ports")

    assert found.state == "bad"
    assert "Permission denied" in found.text


def test_memory_says_how_many_runs_go_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_memory", lambda: 3 * 2**30)
    monkeypatch.setattr(doctor, "available_cores", lambda: 2)
    monkeypatch.setattr(doctor, "workers_for_processes", lambda: 4)

    found = finding("memory")

    assert found.text == "3.0 GB free, 2 cores: 4 runs at a time by default"
    assert found.state == "good"


# --- leftovers -----------------------------------------------------------------------------------


@pytest.fixture
def crashed() -> int:
    """The pid of a Python that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(WITHIN_S)
    return process.pid


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], psutil.Process]]:
    """Starts a tool of the run that a mark names."""
    seen: list[psutil.Process] = []
    monkeypatch.setattr(psutil, "process_iter", lambda: iter(seen))
    children = []

    def start(mark: str) -> psutil.Process:
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"],
            env={**os.environ, MARKER: mark},
            stdout=subprocess.PIPE,
        )
        children.append(child)
        assert child.stdout
        child.stdout.readline()
        seen.append(psutil.Process(child.pid))
        return seen[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("inner", ["", "/{crashed}-abc.1"], ids=["a run", "a run in a run"])
def test_a_tool_whose_outer_run_is_alive_is_not_a_leftover(
    tool: Callable[[str], psutil.Process], crashed: int, inner: str
) -> None:
    tool(f"{process_token()}.1{inner.format(crashed=crashed)}")

    assert not Leftovers.find()


def test_a_pid_that_is_another_process_by_now_counts_as_gone(machine: Path) -> None:
    directory = machine / "tmp" / f"opencode-sync-{os.getpid()}-{pid_space()}-old"
    directory.mkdir()
    long_ago = psutil.Process().create_time() - 3600
    os.utime(directory, (long_ago, long_ago))

    assert Leftovers.find().paths == [directory]


def test_temporary_directories_are_judged_by_their_owner(machine: Path, crashed: int) -> None:
    here = pid_space()
    gone, living, in_a_container, unknown = (
        machine / "tmp" / f"opencode-sync-{name}"
        for name in (f"{crashed}-{here}-a", f"{os.getpid()}-{here}-a", f"{crashed}-0badcafe-a", "x")
    )
    for directory in (gone, living, in_a_container, unknown):
        directory.mkdir()

    assert Leftovers.find().paths == [gone]


def test_another_users_directory_is_not_ours_to_judge(
    machine: Path, crashed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "tmp" / f"opencode-sync-{crashed}-{pid_space()}-a").mkdir()
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)

    assert not Leftovers.find()


def test_an_install_that_was_cut_off_is_a_leftover() -> None:
    scratch = managed_root() / ".installing-x"
    scratch.mkdir(parents=True)

    assert Leftovers.find().paths == [scratch]


def test_an_install_that_is_at_work_is_not_a_leftover() -> None:
    from filelock import FileLock

    (managed_root() / ".installing-x").mkdir(parents=True)

    with FileLock(managed_root() / ".lock"):
        assert not Leftovers.find()


def test_fix_ends_processes_and_removes_directories(
    machine: Path,
    crashed: int,
    tool: Callable[[str], psutil.Process],
    capsys: pytest.CaptureFixture[str],
) -> None:
    process = tool(f"{crashed}-abc.1")
    directory = machine / "tmp" / f"opencode-sync-{crashed}-{pid_space()}-a"
    directory.mkdir()
    has_opencode(machine)
    before = finding("leftovers")

    status = main.main(["doctor", "--fix"])

    assert (before.state, before.advice) == ("bad", "run 'opencode-sync doctor --fix'")
    assert status == 0
    assert not process.is_running()
    assert not directory.exists()
    assert f"removed process {process.pid} (" in capsys.readouterr().out


def test_fix_kills_what_does_not_end_when_asked(
    crashed: int, tool: Callable[[str], psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "GRACE_S", 0.1)
    process = tool(f"{crashed}-abc.1")
    process.suspend()  # a stopped process does not see the asking

    Leftovers.find().remove()

    assert process.wait(WITHIN_S) is not None or not process.is_running()


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_a_line_for_each_point_and_exits_with_1_if_one_is_bad(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_opencode = main.main(["doctor"])
    capsys.readouterr()
    has_opencode(machine)

    status = main.main(["doctor"])

    lines = capsys.readouterr().out.splitlines()
    assert (without_opencode, status) == (1, 0)
    assert [line.split()[1] for line in lines] == [each.point for each in examine()]


def test_the_command_prints_json(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = has_opencode(machine)

    main.main(["doctor", "--json"])

    told = json.loads(capsys.readouterr().out)
    assert told["removed"] == ""
    assert told["findings"][0] == {
        "point": "opencode",
        "state": "good",
        "text": f"{TESTED_VERSION}, on PATH: {program}",
        "advice": "",
    }
