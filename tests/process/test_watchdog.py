"""However a program ends, its tools and temporary directories are gone soon after.

Every program here is a process of its own: a watchdog that is left alone cleans up.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from opencode_sync.process import tree
from opencode_sync.process import watchdog as _watchdog
from tests.process import is_alive

BOUND_S = 5.0
ROOT = Path(__file__).parents[2]

PRELUDE = """
import json, os, signal, subprocess, sys, threading
from opencode_sync.process import tree
from opencode_sync.process import watchdog as _watchdog

def tool(script, count=1):
    token = tree.run_token()
    process = subprocess.Popen(
        ["sh", "-c", script],
        env={**os.environ, tree.MARKER: tree.chain(token, os.environ)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    process.returncode = 0  # what becomes of it is not this program's business
    with process.stdout:
        return token, [int(process.stdout.readline()) for _ in range(count)]

def say(**facts):
    print(json.dumps({**facts, "watchdog": _watchdog.watchdog_pid()}), flush=True)

def wait():
    sys.stdin.readline()

"""
TOOLS = """
(setsid sh -c 'sleep 931 & echo $!; sleep 932 & echo $!; wait' &)
trap '' TERM; echo $$; while :; do sleep 933; done
"""


class Program:
    """A Python program that uses the watchdog, and tells on stdout what it has started."""

    def __init__(self, source: str, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error", "-c", PRELUDE + source]
            + [str(argument) for argument in arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.pid = self._process.pid
        self.told: set[int] = set()

    def facts(self) -> dict[str, Any]:
        """What it says next."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, self._stderr()
        facts: dict[str, Any] = json.loads(line)
        self.told.update(facts.get("pids", ()))
        if facts["watchdog"]:
            self.told.add(facts["watchdog"])
        return facts

    def go_on(self) -> None:
        """Let its wait() return."""
        assert self._process.stdin
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> str:
        """Let it end by itself; what it has written to stderr."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        return self._stderr()

    def clean_up(self) -> None:
        self._process.kill()
        for pid in self.told:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream:
                stream.close()

    def _stderr(self) -> str:
        assert self._process.stderr
        return self._process.stderr.read().decode()


@pytest.fixture
def program() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def start(source: str, *arguments: object) -> Program:
        programs.append(Program(source, *arguments))
        return programs[-1]

    yield start
    for started in programs:
        started.clean_up()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """One that is not empty."""
    path = tmp_path / ("odd\nname \udcff" if sys.platform.startswith("linux") else "odd\nname")
    (path / "below").mkdir(parents=True)
    (path / "below" / "file").touch()
    return path


def becomes_true(condition: Callable[[], bool]) -> bool:
    """Whether it does within the bound."""
    deadline = time.monotonic() + BOUND_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# --- the end of a program ------------------------------------------------------------------------

BUSY = f"""
_watchdog.guard()
_watchdog.add_directory(os.fsdecode(bytes.fromhex(sys.argv[1])))
token, pids = tool({TOOLS!r}, 3)
say(pids=pids)
wait()
"""


def test_a_program_that_is_killed_leaves_no_tools_and_no_directories(
    program: Callable[..., Program], directory: Path
) -> None:
    killed = program(BUSY, os.fsencode(directory).hex())
    facts = killed.facts()

    killed.kill()

    assert becomes_true(lambda: not any(map(is_alive, facts["pids"])))
    assert becomes_true(lambda: not directory.exists())
    assert becomes_true(lambda: not is_alive(facts["watchdog"]))


def test_a_program_that_ends_by_itself_leaves_nothing_and_says_nothing(
    program: Callable[..., Program], directory: Path
) -> None:
    ended = program(BUSY, os.fsencode(directory).hex())
    facts = ended.facts()

    said = ended.end()

    assert said == ""
    assert becomes_true(lambda: not any(map(is_alive, [*facts["pids"], facts["watchdog"]])))
    assert not directory.exists()


def test_a_directory_that_was_discarded_stays(
    program: Callable[..., Program], tmp_path: Path
) -> None:
    kept, removed = tmp_path / "kept", tmp_path / "removed"
    kept.mkdir()
    removed.mkdir()
    killed = program(
        """
_watchdog.add_directory(sys.argv[1])
_watchdog.guard()
_watchdog.add_directory(sys.argv[2])
_watchdog.discard_directory(sys.argv[1])
say()
wait()
""",
        kept,
        removed,
    )
    killed.facts()

    killed.kill()

    assert becomes_true(lambda: not removed.exists())
    assert kept.exists()


def test_links_are_removed_and_what_they_point_to_stays(
    program: Callable[..., Program], directory: Path, tmp_path: Path
) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "auth.json").touch()
    (directory / "link").symlink_to(credentials)
    (directory / "auth.json").symlink_to(credentials / "auth.json")
    (directory / "below").chmod(0o500)
    killed = program(BUSY, os.fsencode(directory).hex())
    killed.facts()

    killed.kill()

    assert becomes_true(lambda: not directory.exists())
    assert (credentials / "auth.json").exists()


def test_a_run_that_was_spared_goes_on(program: Callable[..., Program]) -> None:
    ended = program("""
_watchdog.guard()
token, spared = tool("echo $$; exec sleep 934")
_watchdog.spare(token)
_, stopped = tool("echo $$; exec sleep 935")
say(pids=spared + stopped)
wait()
""")
    facts = ended.facts()
    spared, stopped = facts["pids"]

    ended.kill()

    assert becomes_true(lambda: not is_alive(facts["watchdog"]))
    assert is_alive(spared)
    assert not is_alive(stopped)


# --- the watchdog itself -------------------------------------------------------------------------


def test_threads_share_one_watchdog(program: Callable[..., Program]) -> None:
    threaded = program("""
pids = set()
barrier = threading.Barrier(8)

def run():
    barrier.wait()
    _watchdog.guard()
    pids.add(_watchdog.watchdog_pid())

threads = [threading.Thread(target=run) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
say(pids=list(pids))
""")

    assert len(threaded.facts()["pids"]) == 1


def test_it_is_nobody_s_child_and_knows_no_secret(
    program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SECRET", "sesame")
    guarded = program("_watchdog.guard(); say(); wait()")

    watchdog = psutil.Process(guarded.facts()["watchdog"])

    assert psutil.Process(guarded.pid).children(recursive=True) == []
    assert set(watchdog.environ()) <= {*_watchdog._KEPT_VARIABLES, "LC_CTYPE"}
    assert watchdog.cwd() == "/"
    assert os.getsid(watchdog.pid) != os.getsid(guarded.pid)


def test_a_signal_to_all_does_not_take_it_before_its_work(
    program: Callable[..., Program], directory: Path
) -> None:
    guarded = program(BUSY, os.fsencode(directory).hex())
    facts = guarded.facts()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        os.kill(facts["watchdog"], number)
    guarded.kill()

    assert becomes_true(lambda: not directory.exists())
    assert not any(map(is_alive, facts["pids"]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's resource limits")
def test_an_outer_run_does_not_end_it_before_its_work(program: Callable[..., Program]) -> None:
    outer = tree.run_token()
    guarded = program(
        "tree.mark(os.getpid(), sys.argv[1]); _watchdog.guard(); say(); wait()", outer
    )
    guarded.facts()

    found = [process.pid for process in tree.find(outer)]

    assert found == [guarded.pid]


def test_a_killed_watchdog_is_replaced_and_the_new_one_knows_all(
    program: Callable[..., Program], directory: Path
) -> None:
    guarded = program(
        """
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
_watchdog.guard()
_watchdog.add_directory(os.fsdecode(bytes.fromhex(sys.argv[1])))
say()
wait()
_watchdog.guard()
say()
wait()
""",
        os.fsencode(directory).hex(),
    )
    first = guarded.facts()["watchdog"]
    os.kill(first, signal.SIGKILL)
    assert becomes_true(lambda: not is_alive(first))
    guarded.go_on()
    second = guarded.facts()["watchdog"]

    guarded.kill()

    assert second not in (None, first)
    assert becomes_true(lambda: not directory.exists())


def test_a_suspended_watchdog_holds_nobody_up(program: Callable[..., Program]) -> None:
    guarded = program("""
_watchdog.SEND_S = 0.1
_watchdog.guard()
token, pids = tool("echo $$; exec sleep 936")
say(pids=pids)
os.kill(_watchdog.watchdog_pid(), signal.SIGSTOP)
number = 0
while _watchdog.watchdog_pid():
    number += 1
    _watchdog.add_directory(f"/nowhere/{number}")
_watchdog.guard()
say()
wait()
""")
    facts = guarded.facts()
    replacement = guarded.facts()["watchdog"]

    os.kill(facts["watchdog"], signal.SIGCONT)

    assert replacement not in (None, facts["watchdog"])
    assert is_alive(facts["pids"][0])


def test_a_forked_child_does_not_hide_the_end_of_its_parent(
    program: Callable[..., Program], directory: Path
) -> None:
    forking = program(
        """
_watchdog.guard()
_watchdog.add_directory(os.fsdecode(bytes.fromhex(sys.argv[1])))
child = os.fork()
if not child:
    signal.pause()
say(pids=[child])
signal.pause()
""",
        os.fsencode(directory).hex(),
    )
    facts = forking.facts()

    forking.kill()

    assert becomes_true(lambda: not directory.exists())
    assert becomes_true(lambda: not is_alive(facts["watchdog"]))
    assert is_alive(facts["pids"][0])


def test_a_forked_child_has_a_watchdog_of_its_own(program: Callable[..., Program]) -> None:
    forking = program("""
_watchdog.guard()
_, parents = tool("echo $$; exec sleep 937")
say(pids=parents)
child = os.fork()
if child:
    os.waitpid(child, 0)
    say()
    wait()
else:
    _watchdog.guard()
    _, children = tool("echo $$; exec sleep 938")
    say(pids=children)
    os._exit(0)
""")
    parent = forking.facts()
    child = forking.facts()

    forking.facts()

    assert child["watchdog"] != parent["watchdog"]
    assert becomes_true(lambda: not any(map(is_alive, [*child["pids"], child["watchdog"]])))
    assert all(map(is_alive, [*parent["pids"], parent["watchdog"]]))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param("sys.executable = None", id="embedded"),
        pytest.param("sys.executable = '/bin/sh'", id="another program"),
        pytest.param("sys.executable = '/nowhere/python'", id="removed"),
        pytest.param("sys.frozen = True", id="frozen"),
    ],
)
def test_where_it_cannot_run_runs_go_on_without(
    program: Callable[..., Program], spoil: str, tmp_path: Path
) -> None:
    unguarded = program(
        f"""
import logging
logging.basicConfig(level=logging.DEBUG)
{spoil}
for _ in range(2):
    _watchdog.guard()
    _watchdog.add_directory(sys.argv[1])
    _watchdog.discard_directory(sys.argv[1])
say()
""",
        tmp_path,
    )

    assert unguarded.facts()["watchdog"] is None
    assert unguarded.end().count("no watchdog process") == 1


# --- its own end ---------------------------------------------------------------------------------


@pytest.fixture
def tool() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "940"], env={**os.environ, tree.MARKER: "7-ab.1"})
    with process:
        yield process
        process.kill()


def test_one_that_was_never_told_anything_ends_without_touching_anything(
    tool: subprocess.Popen[bytes],
) -> None:
    site = Path(psutil.__file__).parents[1]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        subprocess.run(
            [sys.executable, "-I", "-S", _watchdog.__file__, "7-ab", os.fspath(site)],
            stdin=theirs.fileno(),
            check=True,
        )
        watchdog = int(ours.recv(32))

    assert becomes_true(lambda: not is_alive(watchdog))
    assert tool.poll() is None


# As the watchdog's process runs it, with a directory that psutil may be in, and a bound.
CLEAN_UP = """
import sys
sys.path.append(sys.argv[1])
import watchdog as _watchdog
_watchdog.LIFE_S = float(sys.argv[2])
_watchdog._clean_up("7-ab", sys.argv[3], {_watchdog._directory_entry(sys.argv[4])})
"""


def clean_up(site: Path, directory: Path, life_s: float = 60.0) -> int:
    package = os.path.dirname(_watchdog.__file__)
    arguments = [package, str(life_s), os.fspath(site), os.fspath(directory)]
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", CLEAN_UP, *arguments],
        stderr=subprocess.DEVNULL,
        timeout=30,
        check=False,
    ).returncode


@pytest.mark.usefixtures("tool")
def test_where_psutil_has_gone_directories_are_removed_all_the_same(
    tmp_path: Path, directory: Path
) -> None:
    assert clean_up(tmp_path, directory) == 0
    assert not directory.exists()


@pytest.mark.usefixtures("tool")
def test_work_that_hangs_is_given_up(tmp_path: Path, directory: Path) -> None:
    (tmp_path / "psutil.py").write_text("import time; time.sleep(60)")

    assert clean_up(tmp_path, directory, life_s=0.5) != 0
