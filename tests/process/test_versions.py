"""Which OpenCode is run: what a version says, how often a program is asked, what is refused."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    TESTED_VERSION,
    OpenCodeBinaryNotFoundError,
    OpenCodeCancelledError,
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeServer,
    RunConfig,
    RunResult,
)
from opencode_sync.core.request import Request
from opencode_sync.process import versions as _versions
from opencode_sync.process.versions import (
    binary_version,
    check_program_version,
    doubt_of,
    fault_of,
    warn_of_variant,
)
from tests import faults, serving
from tests.process import executable

WITHIN_S = 30
KNOWN = "(1.17 up to, not including, 2)"


# --- what a version says -------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.17.0", "v1.18.33", "1.99.0-beta.2"])
def test_a_known_version_is_used_without_a_word(version: str) -> None:
    assert (fault_of(version), doubt_of(version)) == ("", "")


@pytest.mark.parametrize("version", ["1.16.9", "0.15.31"])
def test_an_older_version_is_used_with_a_warning(version: str) -> None:
    assert (fault_of(version), doubt_of(version)) == ("", "older than 1.17, and may lose events")


@pytest.mark.parametrize("version", ["opencode v2.0.10", "2.0.0-beta.1", "10.1.0"])
def test_a_later_version_is_not_used(version: str) -> None:
    assert "is newer than the known versions" in fault_of(version)
    assert KNOWN in fault_of(version)


@pytest.mark.parametrize("version", ["local", "0.0.0-dev-202611260000", "1", ""])
def test_what_cannot_be_compared_is_not_used(version: str) -> None:
    assert fault_of(version) == (
        f"{version!r} is not a version of OpenCode (known: 1.17 up to, not including, 2)"
    )


# --- asking --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, version",
    [("  1.2.3 ", "1.2.3"), ("opencode v2.0.10", "2.0.10"), ("local", "local")],
    ids=["with space", "as OpenCode 2 does", "no version"],
)
def test_an_answer_is_given_without_what_stands_around_the_version(
    tmp_path: Path, answer: str, version: str
) -> None:
    program = executable(tmp_path / "opencode", f"echo; echo '{answer}'")

    assert binary_version(str(program)) == version


@pytest.mark.parametrize(
    "command, fault",
    [
        ("echo 'bad \033[31mCPU\033[0m' >&2; exit 4", "opencode exited with status 4\nbad CPU"),
        ("kill -SEGV $$", "opencode was ended by signal 11 (SIGSEGV)"),
        ("exit 0", "an empty answer to --version"),
        ("exec sleep 600", "no answer to --version within 0.2 s"),
    ],
    ids=["fails", "dies", "is silent", "hangs"],
)
def test_a_program_without_a_version_is_named_with_the_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    fault: str,
) -> None:
    if "sleep" in command:
        monkeypatch.setattr(_versions, "VERSION_TIMEOUT_S", 0.2)
    program = executable(tmp_path / "opencode", command)

    with pytest.raises(OpenCodeBinaryNotFoundError) as caught:
        check_program_version(str(program))

    assert str(caught.value) == (
        f"{program} does not run: {fault}\n"
        "Run 'opencode-sync install', or name another with binary= or OPENCODE_BINARY."
    )


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OpenCodeBinaryNotFoundError, match="nowhere does not run: No such file"):
        binary_version(tmp_path / "nowhere")


def test_a_program_is_asked_where_the_current_directory_has_vanished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = executable(tmp_path / "opencode", '[ "$(pwd)" = "$PWD" ] && cd . && echo 1.18.33')
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()

    assert binary_version(program) == "1.18.33"


def test_a_program_that_hangs_can_be_left(tmp_path: Path) -> None:
    program = executable(tmp_path / "opencode", "exec sleep 600")
    with OpenCodeClient(program) as client:
        future = client.submit("Explain", tmp_path)

        future.cancel()

        with pytest.raises(OpenCodeCancelledError):
            future.result(WITHIN_S)


# --- asking once ---------------------------------------------------------------------------------


class Program:
    """A program that answers to ``--version`` and keeps account of how often it was asked."""

    def __init__(self, directory: Path, version: str = TESTED_VERSION) -> None:
        self.path = str(directory / "opencode")
        self._calls = directory / "calls"
        self.becomes(version)

    def becomes(self, version: str) -> None:
        """Put another file in its place."""
        new = executable(
            Path(f"{self.path}.new"), f'echo "$*" >> "{self._calls}"; sleep 0.1; echo {version}'
        )
        new.replace(self.path)

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def check(self) -> list[str]:
        return check_program_version(self.path)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """With a cache of its own, and taken for a binary, whose answer may be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_versions, "SCRIPT_MARK", b"none")
    return Program(tmp_path)


@pytest.fixture
def next_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has what this process remembers forgotten."""
    return lambda: monkeypatch.setattr(_versions, "_known", {})


def records(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_threads_that_start_at_once_ask_once(program: Program) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: program.check(), range(8)))

    assert answers == [[]] * 8
    assert program.calls == ["--version"]


def test_the_next_process_does_not_ask(program: Program, next_process: Callable[[], None]) -> None:
    program.check()
    next_process()

    program.check()

    assert program.calls == ["--version"]


def test_another_file_in_the_place_of_a_program_is_asked(
    program: Program, next_process: Callable[[], None]
) -> None:
    program.check()
    program.becomes("2.0.10")

    for forget in (lambda: None, next_process):
        forget()
        with pytest.raises(OpenCodeConfigError, match=r"OpenCode 2\.0\.10"):
            program.check()


def test_a_script_is_asked_by_each_process_since_it_may_start_another_program(
    program: Program,
    next_process: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_versions, "SCRIPT_MARK", b"#!")
    program.check()
    program.check()
    next_process()

    program.check()

    assert program.calls == ["--version"] * 2
    assert records(tmp_path) == []


def test_a_version_manager_s_program_is_asked_by_each_process(
    program: Program, next_process: Callable[[], None], tmp_path: Path
) -> None:
    manager = Path(program.path).rename(tmp_path / "manager")
    Path(program.path).symlink_to(manager)
    program.check()
    next_process()

    program.check()

    assert program.calls == ["--version"] * 2
    assert records(tmp_path) == []


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"file": 1}'])
def test_a_damaged_record_is_written_anew(
    program: Program, next_process: Callable[[], None], tmp_path: Path, damage: bytes
) -> None:
    program.check()
    (record,) = records(tmp_path)
    whole = record.read_bytes()
    record.write_bytes(damage)
    next_process()

    program.check()

    assert program.calls == ["--version"] * 2
    assert record.read_bytes() == whole


def test_a_cache_that_cannot_be_written_stands_in_nobodys_way(
    program: Program, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file in the place of the directory")

    assert program.check() == []


def test_a_machine_without_a_home_has_no_cache(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")

    assert program.check() == []
    assert not Path("not").exists()


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture(params=["process", "server"])
def runner_of(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes a runner of either kind."""
    made: list[OpenCodeClient | OpenCodeServer] = []

    def make(binary: str, **settings: Any) -> OpenCodeClient | OpenCodeServer:
        kind = OpenCodeClient if request.param == "process" else OpenCodeServer
        made.append(kind(binary, **settings))
        return made[-1]

    yield make
    for runner in made:
        runner.close()


def test_an_opencode_that_is_not_known_is_asked_and_not_started(
    runner_of: Callable[..., Any], program: Program, tmp_path: Path
) -> None:
    program.becomes("opencode v2.0.10")

    with pytest.raises(OpenCodeConfigError) as caught:
        runner_of(program.path).run("Explain", tmp_path)

    assert program.calls == ["--version"]
    assert str(caught.value).startswith(
        f"'{program.path}' was not started: OpenCode 2.0.10 is newer than the known versions "
        f"{KNOWN}: run 'opencode-sync install' and set OPENCODE_BINARY=/"
    )


def test_at_ones_own_risk_a_program_is_started_unasked(
    runner_of: Callable[..., Any], program: Program, tmp_path: Path
) -> None:
    program.becomes("2.0.10")

    with pytest.raises(Exception, match="opencode"):  # for it is no OpenCode
        runner_of(program.path, any_version=True).run("Explain", tmp_path)

    assert program.calls
    assert "--version" not in program.calls


def of_version(path: Path, version: str, command: str) -> str:
    return str(executable(path, f'[ "$1" = --version ] && {{ echo {version}; exit; }}\n{command}'))


def test_an_older_opencode_is_told_in_each_result_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    binary = of_version(
        tmp_path / "old", "1.15.13", f'exec "{sys.executable}" -S -E "{faults.STANDIN}" "$@"'
    )
    caplog.set_level(logging.WARNING, "opencode_sync")

    with OpenCodeClient(binary) as client:
        results = [client.run("well", tmp_path) for _ in range(2)]

    warning = (
        f"{binary} is OpenCode 1.15.13, older than 1.17, and may lose events: "
        "run 'opencode upgrade 1.18.33'."
    )
    assert [result.warnings for result in results] == [[warning]] * 2
    assert [result.events[0]["type"] for result in results] == ["warning"] * 2
    assert [record.getMessage() for record in caplog.records] == [warning]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], OpenCodeServer]]:
    """Starts a server that says that it is of a version."""
    made: list[OpenCodeServer] = []

    def start(version: str) -> OpenCodeServer:
        command = f'exec "{sys.executable}" "{serving.__file__}" "$@"'
        binary = of_version(tmp_path / f"opencode-{version}", version, command)
        cfg = RunConfig(extra_env={"SERVING_VERSION": version})
        settings = {"run_cfg": cfg, "data_dir": tmp_path / "data"}
        made.append(OpenCodeServer(binary, any_version=version.startswith("2"), **settings))
        return made[-1]

    yield start
    for server in made:
        server.close()


def test_an_older_server_is_told_in_each_result(
    serve: Callable[[str], OpenCodeServer], tmp_path: Path
) -> None:
    server = serve("1.15.13")

    results = [server.run("say hello", tmp_path) for _ in range(2)]

    assert [len(result.warnings) for result in results] == [1, 1]
    assert "opencode-1.15.13 is OpenCode 1.15.13, older than 1.17" in results[0].warnings[0]


def connected(there: OpenCodeServer, workspace: Path, **settings: Any) -> RunResult:
    with OpenCodeServer.connect(there.url, there.password, **settings) as server:
        return server.run("say hello", workspace)


def attached(there: OpenCodeServer, workspace: Path, **settings: Any) -> RunResult:
    cfg = RunConfig(attach=there.url, password=there.password)
    with OpenCodeClient(run_cfg=cfg, **settings) as client:
        return client.run("say hello", workspace)


@pytest.mark.parametrize("run_on", [connected, attached])
def test_a_server_elsewhere_that_is_not_known_gets_no_prompt(
    serve: Callable[[str], OpenCodeServer], tmp_path: Path, run_on: Callable[..., RunResult]
) -> None:
    there = serve("2.0.10")

    with pytest.raises(OpenCodeConfigError) as caught:
        run_on(there, tmp_path)

    assert str(caught.value) == (
        f"nothing was sent to the server {there.url}: OpenCode 2.0.10 is newer than the known "
        f"versions {KNOWN}: use another one, or any_version=True at your own risk"
    )
    assert not list(tmp_path.rglob("sessions.json"))
    assert run_on(there, tmp_path, any_version=True).final_text == "hello"
    assert list(tmp_path.rglob("sessions.json"))


# --- a model's variants --------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that lists models as OpenCode does, and notes in ``asked`` where it was asked."""
    monkeypatch.setattr(_versions, "_variants", {})
    listed = 'p/other\n{\n  "variants": {}\n}\np/m\n{\n  "variants": {"low": {}, "high": {}}\n}'
    return executable(tmp_path / "opencode", f"pwd >> {tmp_path}/asked\necho '{listed}'")


def variant_warnings(models: Path, variant: str, model: str, workspace: Path) -> list[str]:
    workspace.mkdir(exist_ok=True)
    request = Request("x", workspace, RunConfig(variant=variant, model=model))
    return warn_of_variant(str(models), request, os.environ)


def test_a_variant_that_the_model_has_is_asked_for_once(models: Path, tmp_path: Path) -> None:
    said = [variant_warnings(models, "high", "p/m", tmp_path / name) for name in "aba"]

    assert said == [[], [], []]
    assert (tmp_path / "asked").read_text().split() == [str(tmp_path / "a")]


def test_an_unknown_variant_is_asked_for_in_each_workspace(models: Path, tmp_path: Path) -> None:
    said = [variant_warnings(models, "top", "p/m", tmp_path / name) for name in "aba"]

    words = "The variant 'top' is unknown to the model 'p/m' (it has low, high), and was ignored."
    assert said == [[words]] * 3
    assert (tmp_path / "asked").read_text().split() == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_model_without_variants_has_none(models: Path, tmp_path: Path) -> None:
    (said,) = variant_warnings(models, "top", "p/other", tmp_path / "a")

    assert "unknown to the model 'p/other' (it has none)" in said


@pytest.mark.parametrize("listed", ["", "p/m\n{", "p/m\n[]"])
def test_where_the_program_does_not_tell_nothing_is_said(
    models: Path, tmp_path: Path, listed: str
) -> None:
    executable(models, f"echo '{listed}'")

    assert variant_warnings(models, "top", "p/m", tmp_path / "a") == []


def test_a_question_for_variants_ends_when_the_run_is_cancelled(
    models: Path, tmp_path: Path
) -> None:
    executable(models, "exec sleep 60")
    request = Request("x", tmp_path, RunConfig(variant="top", model="p/m"))

    with pytest.raises(OpenCodeCancelledError):
        warn_of_variant(str(models), request, os.environ, lambda: True)
