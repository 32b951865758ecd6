"""Marked processes are found and ended, whatever they do to be missed; nothing else is touched."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from opencode_sync.process import tree as _proctable
from opencode_sync.process import tree as _tree

BOUND_S = 5.0
ROOT = Path(__file__).parents[2]

# Ends as soon as it has a child to go on, and so has never lived long when it is looked for.
HOPPING = """
import os, time
print(os.getpid(), flush=True)
end = time.monotonic() + 300  # where the tests are killed, nobody else ends it
while time.monotonic() < end:
    if os.fork():
        os._exit(0)
    os.setsid()
    time.sleep(0.02)
"""


@dataclass
class Tool:
    """A child of ours, and the processes that it told of."""

    process: subprocess.Popen[bytes]
    pids: list[int]

    def living(self) -> list[int]:
        """Of these, and of the sessions that they began."""
        told = {self.process.pid, *self.pids}
        return [pid for pid in psutil.pids() if {pid, session_of(pid)} & told and is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def session_of(pid: int) -> int:
    with suppress(OSError):
        return os.getsid(pid)
    return 0


@pytest.fixture
def token() -> str:
    return _tree.run_token()


@pytest.fixture
def tool(token: str) -> Iterator[Callable[..., Tool]]:
    """Start a marked shell script that writes the pids of *count* processes of its own."""
    tools: list[Tool] = []

    def start(
        script: str, count: int, *, mark: str = token, shell: tuple[str, ...] = ("sh", "-c")
    ) -> Tool:
        process = subprocess.Popen(
            [*shell, script],
            stdout=subprocess.PIPE,
            env={**os.environ, _tree.MARKER: mark},
            start_new_session=True,
        )
        tools.append(Tool(process, []))
        assert process.stdout
        tools[-1].pids += [int(process.stdout.readline()) for _ in range(count)]
        return tools[-1]

    yield start
    for started in tools:
        for pid in started.living():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        started.process.wait()
        if started.process.stdout:
            started.process.stdout.close()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each look at the processes, the pids that it was about."""
    taken: list[list[int]] = []

    def counted() -> list[int]:
        taken.append(_proctable.pids())
        return taken[-1]

    monkeypatch.setattr(_tree, "pids", counted)
    return taken


# --- tokens --------------------------------------------------------------------------------------


def test_each_run_has_a_token_of_its_own() -> None:
    assert _tree.run_token() != _tree.run_token()


def test_all_runs_of_a_process_belong_to_its_token() -> None:
    assert _tree.belongs(_tree.run_token(), _tree.process_token())


@pytest.mark.parametrize(
    "mark, token, expected",
    [
        pytest.param("7-ab.1", "7-ab.1", True, id="the run itself"),
        pytest.param("7-ab.1/9-cd.4", "7-ab.1", True, id="inside the run"),
        pytest.param("7-ab.1/9-cd.4", "9-cd.4", True, id="the inner run"),
        pytest.param("7-ab.10", "7-ab.1", False, id="another run that begins alike"),
        pytest.param("7-ab.1", "7-ab", True, id="a run of the process"),
        pytest.param("7-abc.1", "7-ab", False, id="another process that begins alike"),
        pytest.param("", "7-ab.1", False, id="no mark"),
    ],
)
def test_a_mark_belongs_to_each_run_in_its_chain(mark: str, token: str, expected: bool) -> None:
    assert _tree.belongs(mark, token) is expected


def test_a_run_inside_a_run_is_marked_with_both() -> None:
    mark = _tree.chain("9-cd.4", {_tree.MARKER: _tree.chain("7-ab.1", {})})

    assert mark == "7-ab.1/9-cd.4"


def test_a_forked_child_has_a_process_token_of_its_own() -> None:
    program = """
import os
from opencode_sync.process import tree as _tree
print(_tree.process_token(), flush=True)
if not os.fork():
    print(_tree.process_token(), flush=True)
    os._exit(0)
os.wait()
"""

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )

    parent, child = done.stdout.split()
    assert parent != child


# --- finding -------------------------------------------------------------------------------------


def test_what_bears_the_token_is_found_and_nothing_else(
    tool: Callable[..., Tool], token: str
) -> None:
    marked = tool("sleep 911 & echo $!; wait", 1)
    tool("sleep 912 & echo $!; wait", 1, mark=_tree.run_token())

    found = _tree.find(token)

    assert sorted(process.pid for process in found) == sorted([marked.process.pid, *marked.pids])


def test_a_zombie_is_not_found(tool: Callable[..., Tool], token: str) -> None:
    ended = tool("echo $$; exit", 1)
    while is_alive(ended.process.pid):
        time.sleep(0.01)

    assert _tree.find(token) == []


# --- stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, count",
    [
        pytest.param(
            "(setsid sh -c 'sleep 901 & echo $!; sleep 902 & echo $!; wait' &);"
            "sleep 903 & echo $!; wait",
            3,
            id="other sessions",
        ),
        pytest.param(
            "env -i sh -c 'echo $$; sleep 904 & echo $!; wait'", 2, id="cleaned environment"
        ),
        pytest.param(
            "(env -i sleep 905 & echo $!); exec sleep 906",
            1,
            id="cleaned environment and no parent",
        ),
        pytest.param(
            "env -i setsid sh -c 'echo $$; sleep 907' & wait",
            1,
            id="cleaned environment and session",
        ),
        pytest.param(
            "trap '' TERM; sh -c 'echo $$; sleep 908; sleep 908'", 1, id="deaf to SIGTERM"
        ),
        pytest.param(
            """env -i setsid sh -c 'trap "" TERM; echo $$; sleep 926; sleep 926' & wait""",
            1,
            id="all of these",
        ),
        pytest.param("sleep 909 & kill -STOP $!; echo $!; kill -STOP $$", 1, id="suspended"),
        pytest.param(
            "trap 'sleep 910 & exit' TERM; echo $$; sleep 911 & wait", 1, id="forks when asked"
        ),
        pytest.param(
            "echo $$; while :; do sleep 912 & sleep 0.01; done", 1, id="forks all the time"
        ),
        pytest.param(
            "env -i setsid sh -c 'echo $$; while :; do sleep 927 & sleep 0.001; done' & wait",
            1,
            id="forks all the time with a cleaned environment",
        ),
    ],
)
def test_stopping_leaves_nothing_alive(
    tool: Callable[..., Tool], token: str, script: str, count: int
) -> None:
    started = tool(script, count)
    begun = time.monotonic()

    left = _tree.stop(token).left

    assert left == []
    assert started.living() == []
    assert _tree.find(token) == []
    assert time.monotonic() - begun < BOUND_S


def test_what_forks_and_ends_again_and_again_is_caught(
    tool: Callable[..., Tool], token: str
) -> None:
    tool(HOPPING, 1, shell=(sys.executable, "-c"))

    _tree.stop(token)

    assert _tree.find(token) == []


@pytest.mark.parametrize("state", ["running", "suspended"])
def test_what_is_asked_may_use_the_grace(tool: Callable[..., Tool], token: str, state: str) -> None:
    polite = tool("trap 'echo tidied; exit' TERM; echo $$; while :; do sleep 0.01; done", 1)
    if state == "suspended":
        polite.process.send_signal(signal.SIGSTOP)
        os.waitpid(polite.process.pid, os.WUNTRACED)

    _tree.stop(token)

    assert polite.process.stdout
    assert polite.process.stdout.readline() == b"tidied\n"


def test_a_root_is_stopped_with_its_descendants_whatever_their_environment(
    tool: Callable[..., Tool], token: str
) -> None:
    unmarked = tool("sleep 913 & echo $!; wait", 1, mark="")

    _tree.stop(token, roots=[unmarked.process.pid])

    assert unmarked.living() == []


def test_what_a_root_left_in_its_session_is_stopped(tool: Callable[..., Tool], token: str) -> None:
    unmarked = tool("sleep 914 & echo $!", 1, mark="")
    unmarked.process.wait()

    _tree.stop(token, roots=[unmarked.process.pid])

    assert unmarked.living() == []


@pytest.fixture
def limited(token: str) -> Iterator[int]:
    """A process with an empty environment, whose parent and session's leader have ended."""
    shell = subprocess.Popen(
        ["sh", "-c", "read go; env -i setsid sleep 933 >/dev/null & echo $!"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    _tree.mark(shell.pid, token)
    pid = int(shell.communicate(b"go\n")[0].split()[0])
    yield pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's resource limits")
class TestOfWhatHasNoOtherMarkThanItsLimit:
    def test_it_is_found_and_stopped(self, limited: int, token: str) -> None:
        found = [process.pid for process in _tree.find(token)]

        _tree.stop(token)

        assert found == [limited]
        assert not is_alive(limited)

    def test_all_runs_of_a_process_take_it_along(self, limited: int) -> None:
        _tree.stop(_tree.process_token())

        assert not is_alive(limited)

    def test_another_run_leaves_it_alone(self, limited: int) -> None:
        _tree.stop(_tree.run_token())

        assert is_alive(limited)

    def test_it_can_be_spared(self, limited: int, token: str) -> None:
        _tree.stop(_tree.process_token(), spare=[token])

        assert is_alive(limited)

    def test_as_a_stray_it_is_told_from_what_bears_the_mark_too(
        self, limited: int, tool: Callable[..., Tool], token: str
    ) -> None:
        marked = tool("echo $$; exec sleep 935", 1)
        _tree.mark(marked.process.pid, token)

        _tree.stop_strays(token)

        assert not is_alive(limited)
        assert marked.living()

    def test_a_limit_that_is_there_already_stays(self, limited: int, token: str) -> None:
        _tree.mark(limited, _tree.run_token())

        assert [process.pid for process in _tree.find(token)] == [limited]


def test_what_was_seen_once_is_stopped_when_nothing_shows_any_more_whose_it_is(
    tool: Callable[..., Tool], token: str
) -> None:
    shell = tool("env -i setsid sleep 936 & echo $!; wait", 1)
    tree = _tree.Tree.of(token)
    shell.process.kill()
    shell.process.wait()

    tree.stop()

    assert not is_alive(shell.pids[0])


def test_a_root_that_is_not_our_child_is_another_process_by_now(
    tool: Callable[..., Tool], token: str
) -> None:
    stranger = tool("(sleep 915 & echo $!)", 1, mark="")

    _tree.stop(token, roots=stranger.pids)

    assert stranger.living() == stranger.pids


def test_a_shell_is_ended_before_its_command_and_begins_no_other_one(
    tool: Callable[..., Tool], token: str, tmp_path: Path
) -> None:
    tool(f"echo $$; for n in 1 2 3 4; do sleep 934; touch {tmp_path}/begun; done", 1)

    _tree.stop(token)

    assert list(tmp_path.iterdir()) == []


def test_an_outer_run_takes_its_inner_runs_along(tool: Callable[..., Tool], token: str) -> None:
    inner = tool("echo $$; exec sleep 916", 1, mark=f"{token}/7-ab.1")

    _tree.stop(token)

    assert inner.living() == []


def test_an_inner_run_is_stopped_alone(tool: Callable[..., Tool], token: str) -> None:
    outer = tool("echo $$; exec sleep 917", 1)
    tool("echo $$; exec sleep 918", 1, mark=f"{token}/7-ab.1")

    _tree.stop("7-ab.1")

    assert [process.pid for process in _tree.find(token)] == [outer.process.pid]


def test_a_run_can_be_spared(tool: Callable[..., Tool]) -> None:
    spared = tool("echo $$; exec sleep 919", 1, mark="7-ab.1")
    stopped = tool("echo $$; exec sleep 920", 1, mark="7-ab.2")

    _tree.stop("7-ab", spare=["7-ab.1"])

    assert spared.living()
    assert not stopped.living()


def test_how_many_were_found_is_told(tool: Callable[..., Tool], token: str) -> None:
    tool("sleep 928 & echo $!; wait", 1)

    first, second = _tree.stop(token), _tree.stop(token)

    assert (first.asked, second.asked) == (2, 0)


def test_what_is_younger_than_the_run_s_child_is_stopped(
    tool: Callable[..., Tool], token: str
) -> None:
    started = tool("(setsid sleep 929 & echo $!); sleep 930", 1)

    _tree.stop(token, since=_tree.born(started.process.pid))

    assert started.living() == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ages are known on Linux")
def test_what_is_older_than_the_run_s_child_is_not_looked_into(
    tool: Callable[..., Tool], token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_into: list[int] = []
    monkeypatch.setattr(_tree, "variable", lambda pid, *_: looked_into.append(pid) or "")
    older = tool("echo $$; exec sleep 931", 1, mark="")
    while _tree.born(older.process.pid) == _tree.born(_a_child(tool)):
        pass  # ticks are 10 ms long
    child = tool("echo $$; exec sleep 932", 1)

    _tree.stop(token, since=_tree.born(child.process.pid))

    assert child.process.pid in looked_into
    assert not {older.process.pid, os.getpid()} & set(looked_into)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ages are known on Linux")
def test_how_old_a_process_is_is_remembered_for_a_while(
    tool: Callable[..., Tool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_proctable, "KNOWN_S", 60.0)
    pid = _a_child(tool)
    seen = _proctable.look_at(pid)
    assert seen is not None

    assert _proctable.is_older(pid, seen.started + 1)
    assert not _proctable.is_older(pid, seen.started)
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert not _proctable.is_older(pid, seen.started + 1)


def _a_child(tool: Callable[..., Tool]) -> int:
    return tool("echo $$; exec sleep 933", 1, mark="").process.pid


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="psutil tells less")
def test_a_look_that_met_nothing_unclear_is_believed(
    token: str, looks: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tree, "variable", lambda *_: "")
    monkeypatch.setattr(_tree, "look_at", lambda pid: _proctable.Seen(1, pid, 0, True))

    _tree.stop(token)

    assert len(looks) == 1


@pytest.mark.parametrize(
    "name, seen",
    [
        pytest.param("variable", None, id="no environment to be seen"),
        pytest.param("look_at", None, id="gone since it was listed"),
        pytest.param("look_at", _proctable.Seen(1, 1, 0, is_alive=False), id="a zombie"),
    ],
)
def test_after_a_look_that_may_have_missed_something_another_is_taken(
    token: str, looks: list[list[int]], monkeypatch: pytest.MonkeyPatch, name: str, seen: object
) -> None:
    monkeypatch.setattr(_tree, name, lambda *_: seen)

    _tree.stop(token)

    assert len(looks) == 2


def test_our_child_s_exit_status_stays_ours(tool: Callable[..., Tool], token: str) -> None:
    child = tool("echo $$; exec sleep 921", 1)

    _tree.stop(token)

    assert child.process.wait() == -signal.SIGTERM


# The signal may come between the opening of a file and the block that closes it: its end closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_stop_still_leaves_nothing_alive(
    tool: Callable[..., Tool], token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tree, "GRACE_S", 60.0)
    monkeypatch.setattr(_tree, "BOUND_S", 60.0)
    deaf = tool("trap '' TERM; echo $$; while :; do sleep 922; done", 1)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)

    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            _tree.stop(token)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert deaf.living() == []


def test_with_no_file_descriptor_left_tools_are_stopped_all_the_same() -> None:
    program = """
import os, subprocess, sys
from opencode_sync.process import tree as _tree
token = _tree.run_token()
env = {**os.environ, _tree.MARKER: token}
child = subprocess.Popen(["sh", "-c", "sleep 923 & sleep 923"], env=env, start_new_session=True)
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        os.dup(1)
except OSError:
    pass
left = _tree.stop(token).left
sys.exit(f"{left} {child.wait()}" if left or child.wait() != -15 else 0)
"""

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)

    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs two users")
def test_what_we_may_not_end_is_returned_without_waiting() -> None:
    program = """
import os, subprocess, sys
from opencode_sync.process import tree as _tree
token = _tree.run_token()
child = subprocess.Popen(["sleep", "924"])
os.setresuid(65534, 65534, 0)
left = _tree.stop(token, roots=[child.pid], grace_s=60, bound_s=60).left
os.setresuid(0, 0, 0)
child.kill()
child.wait()
sys.exit(0 if [process.pid for process in left] == [child.pid] else repr(left))
"""

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, timeout=30
    )

    assert done.returncode == 0, done.stderr.decode()


def test_the_log_names_processes_but_not_their_arguments(
    tool: Callable[..., Tool], token: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="opencode_sync")
    secretive = tool("echo $$; : open sesame; while :; do sleep 0.01; done", 1)

    _tree.stop(token)

    assert f"{secretive.process.pid} (sh)" in caplog.text
    assert "sesame" not in caplog.text
