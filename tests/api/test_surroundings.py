"""What can be wrong around a client: homes, disks, locales, paths, interpreters.

Each ends in a right result, or in an error of ours that says what to do. What an interpreter has
from its start on is tried in a child.
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opencode_sync import (
    OpenCodeBinaryNotFoundError,
    OpenCodeCancelledError,
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeError,
    RunConfig,
)
from tests.faults import standin_client, write_standin

ROOT = Path(__file__).parents[2]
WITHIN_S = 60.0
ODD_NAME = "-a 'b' \"c\"\n$d ü*"
ASCII_ALONE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

_CHILD = """
import atexit, os, sys
from opencode_sync import OpenCodeClient, OpenCodeConfigError, OpenCodeError, RunConfig
from opencode_sync.display import stream as display

client = OpenCodeClient(sys.argv[1])

def tell(use):
    try:
        print(ascii(use()))
    except OpenCodeError as error:
        print(type(error).__name__, ascii(str(error)))

"""

Child = Callable[..., str]


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory."""
    path = tmp_path / "workspace"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def client(tmp_path: Path) -> Iterator[OpenCodeClient]:
    """A client of the stand-in, whose prompts say what it does."""
    with standin_client(tmp_path) as client:
        yield client


@pytest.fixture
def child(tmp_path: Path, workspace: Path) -> Child:
    """Runs code in another Python, with *client* and *tell* at hand; gives what it printed."""

    def child(code: str, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD + code, write_standin(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
            cwd=workspace,
            capture_output=True,
            encoding="utf-8",
            timeout=WITHIN_S,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return child


# --- homes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", [None, "", "/dev/null", "/proc/none", "no/slash"], ids=repr)
def test_a_home_that_is_missing_or_cannot_be_written_keeps_no_run_from_its_end(
    client: OpenCodeClient, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    if home is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", home)

    assert client.run("well").status == "ok"


@pytest.mark.parametrize(
    "words, remedy",
    [
        (
            "ENOTDIR: not a directory, mkdir '/dev/null/.config/opencode'",  # of OpenCode 1.18.33
            "it cannot make '/dev/null/.config/opencode': set HOME, or",
        ),
        (
            'error: preload not found "/hidden/preload.js"',
            'set extra_env={"BUN_INSPECT_PRELOAD": ""}',
        ),
        (
            "error: invalid JSC environment variable BUN_JSC_x=1",
            "does not know BUN_JSC_x: set lean=False",
        ),
    ],
    ids=["no home to write", "a wrapper that hides our files", "a Bun without an option of ours"],
)
def test_what_opencode_or_bun_refuses_is_told_with_what_to_set(
    client: OpenCodeClient, words: str, remedy: str
) -> None:
    with pytest.raises(OpenCodeError) as caught:
        client.run(f"fail 1 {words}")

    assert remedy in str(caught.value)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """We are a user that the system does not know, as in a container, without a HOME."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("nobody")
def test_a_user_whom_the_system_does_not_know_can_run_and_has_no_managed_binary(
    client: OpenCodeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.run("well").status == "ok"

    monkeypatch.setenv("PATH", "/none")
    with OpenCodeClient() as managed, pytest.raises(OpenCodeBinaryNotFoundError, match="on PATH"):
        managed.run("well")


# --- directories ---------------------------------------------------------------------------------


def test_a_temporary_directory_that_cannot_be_written_is_told(
    client: OpenCodeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")

    with pytest.raises(OpenCodeError, match="set TMPDIR to one that can be written"):
        client.run("well")


@pytest.mark.parametrize("below", ["/dev/null/data", "/proc/none"])
def test_a_data_directory_that_cannot_be_made_is_told(tmp_path: Path, below: str) -> None:
    with (
        standin_client(tmp_path, data_dir=below) as client,
        pytest.raises(OpenCodeConfigError, match=f"data_dir '{below}': N"),
    ):
        client.run("well")


@pytest.mark.parametrize("verb", ["run", "stream", "submit", "session"])
def test_a_current_directory_that_has_vanished_is_told(
    client: OpenCodeClient, workspace: Path, verb: str
) -> None:
    workspace.rmdir()

    with pytest.raises(OpenCodeConfigError, match="vanished: use an absolute path"):
        getattr(client, verb)(*([] if verb == "session" else ["well"]))


def test_without_a_current_directory_an_absolute_one_will_do(
    client: OpenCodeClient, workspace: Path, tmp_path: Path
) -> None:
    workspace.rmdir()

    assert [result.status for result in client.map(["well"], tmp_path)] == ["ok"]


# --- paths ---------------------------------------------------------------------------------------


def test_spaces_quotes_and_newlines_may_stand_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / place / ODD_NAME for place in ("work", "data", "tmp", "binary")]
    for place in places:
        place.mkdir(parents=True)
    workspace, data_dir, temporary, binary = places
    (workspace / ODD_NAME).write_text("x")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    cfg = RunConfig(files=(ODD_NAME,), title=ODD_NAME, inherit_user_config=False)

    with standin_client(binary, data_dir=data_dir, run_cfg=cfg) as client:
        (result,) = client.map(["look_around"], workspace, checkpoint=workspace / "a b\nc.jsonl")

    assert result.workspace == str(workspace)
    assert f"PWD={workspace}" in str(result.answer.encode().decode("unicode_escape", "replace"))
    assert (workspace / "a b\nc.jsonl").exists()


def test_a_relative_binary_is_found_from_wherever_its_run_works(
    tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_standin(tmp_path)
    monkeypatch.chdir(tmp_path)

    with OpenCodeClient("./opencode-standin") as client:
        assert client.run("well", workspace).status == "ok"
        monkeypatch.chdir("/")
        assert client.run("well", workspace).status == "ok"


# --- environments --------------------------------------------------------------------------------


def test_an_environment_of_bytes_without_an_encoding_alone_will_do(
    client: OpenCodeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    monkeypatch.setenv("ODD", os.fsdecode(b"\xff\xfe"))

    assert client.run("well").status == "ok"


# --- locales -------------------------------------------------------------------------------------


def test_where_all_is_ascii_prompts_answers_and_settings_are_whole(child: Child) -> None:
    output = child(
        "cfg = RunConfig(config_overrides={'theme': 'h\\xe9'})\n"
        "tell(lambda: client.run('echo h\\xe9llo', run_cfg=cfg).answer)",
        **ASCII_ALONE,
    )

    assert output == "'h\\xe9llo'\n"


@pytest.mark.parametrize(
    "arguments",
    ["workspace='h\\xe9'", "checkpoint='h\\xe9'", "run_cfg=RunConfig(title='h\\xe9')"],
    ids=["workspace", "checkpoint", "title"],
)
def test_where_all_is_ascii_what_the_system_cannot_be_told_is_refused(
    child: Child, arguments: str
) -> None:
    output = child(f"tell(lambda: list(client.map(['well'], {arguments})))", **ASCII_ALONE)

    assert output.startswith("OpenCodeConfigError")
    assert "run Python with PYTHONUTF8=1, or in a UTF-8 locale" in output


def test_what_a_terminal_has_no_characters_for_is_shown_in_part(child: Child) -> None:
    output = child("display.live(client.stream('echo h\\xe9llo'))", PYTHONIOENCODING="ascii")

    assert output == "h?llo\n"


# --- interpreters --------------------------------------------------------------------------------


def test_without_assertions_and_docstrings_all_is_as_before(child: Child) -> None:
    output = child(
        "batch = client.map(['echo 1', 'echo 2'], checkpoint='kept.jsonl')\n"
        "tell(lambda: [result.answer for result in batch])\n"
        "tell(lambda: client.submit('echo 3').result().answer)\n"
        "tell(lambda: client.run('fall_silent', timeout_s=0.1))\n"
        "tell(lambda: client.run('well', run_cfg=RunConfig(permission='ask')))\n",
        PYTHONOPTIMIZE="2",
    )

    words = [line.split(maxsplit=1)[0] for line in output.splitlines()]
    assert words == ["['1',", "'3'", "OpenCodeTimeoutError", "OpenCodeConfigError"]


def test_without_standard_streams_all_is_as_before(child: Child, workspace: Path) -> None:
    child(
        "for descriptor in range(3): os.close(descriptor)\n"
        "sys.stdin = sys.stdout = sys.stderr = None\n"
        "one = display.live(client.stream('echo 1')).answer\n"
        "two, = client.map(['echo 2'], progress='always')\n"
        "client.close()\n"
        "open('output', 'w').write(one + two.answer)"
    )

    assert (workspace / "output").read_text() == "12"


def test_a_program_that_ignores_the_ends_of_its_children_gets_its_result(
    client: OpenCodeClient,
) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert client.run("well").status == "ok"
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize(
    "use",
    ["client.submit('echo 1').result().answer", "[r.answer for r in client.map(['echo 1'])]"],
    ids=["submit", "map"],
)
def test_at_the_interpreter_s_exit_threads_are_refused(child: Child, use: str) -> None:
    output = child(f"atexit.register(tell, lambda: {use})")

    assert output.startswith("OpenCodeError")
    assert "shutdown" in output


def test_a_signal_s_handler_may_run_a_prompt_in_the_midst_of_another(
    client: OpenCodeClient,
) -> None:
    answers = []

    def on_alarm(number: int, frame: object) -> None:
        answers.append(client.run("echo inner").answer)
        stream.cancel("enough")

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        with client.stream("fall_silent") as stream:
            next(stream)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(OpenCodeCancelledError, match="enough"):
                list(stream)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert answers == ["inner"]
