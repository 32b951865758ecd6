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

from opencode_sync.process import tree
from tests.process import is_alive

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


def session_of(pid: int) -> int:
    with suppress(OSError):
        return os.getsid(pid)
    return 0


@pytest.fixture
def token() -> str:
    return tree.run_token()


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
            env={**os.environ, tree.MARKER: mark},
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


def root_of(child: Tool) -> tree.Seen:
    """The child as a root, without the limit of the token that is stopped."""
    root = tree.mark(child.process.pid, tree.run_token())
    assert root is not None
    return root


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark, token, expected",
    [
        pytest.param("7-ab.1", "7-ab.1", True, id="the run itself"),
        pytest.param("7-ab.1/9-cd.4", "7-ab.1", True, id="inside the run"),
        pytest.param(tree.chain("9-cd.4", {tree.MARKER: "7-ab.1"}), "9-cd.4", True, id="inner"),
        pytest.param("7-ab.10", "7-ab.1", False, id="another run that begins alike"),
        pytest.param("7-ab.1", "7-ab", True, id="a run of the process"),
        pytest.param("7-abc.1", "7-ab", False, id="another process that begins alike"),
        pytest.param("", "7-ab.1", False, id="no mark"),
    ],
)
def test_a_mark_belongs_to_each_run_in_its_chain(mark: str, token: str, expected: bool) -> None:
    assert tree.belongs(mark, token) is expected


def test_a_forked_child_has_a_process_token_of_its_own() -> None:
    program = """
import os
from opencode_sync.process import tree
print(tree.process_token(), flush=True)
if not os.fork():
    print(tree.process_token(), flush=True)
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
    tool("sleep 912 & echo $!; wait", 1, mark=tree.run_token())

    found = tree.find(token)

    assert sorted(process.pid for process in found) == sorted([marked.process.pid, *marked.pids])


def test_a_zombie_is_not_found(tool: Callable[..., Tool], token: str) -> None:
    ended = tool("echo $$; exit", 1)
    while is_alive(ended.process.pid):
        time.sleep(0.01)

    assert tree.find(token) == []


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
        pytest.param("sleep 909 & kill -STOP $!; echo $!; kill -STOP $$", 1, id="suspended"),
        pytest.param(
            "trap 'sleep 910 & exit' TERM; echo $$; sleep 911 & wait", 1, id="forks when asked"
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

    left = tree.stop(token).left

    assert left == []
    assert started.living() == []
    assert tree.find(token) == []
    assert time.monotonic() - begun < BOUND_S


def test_what_forks_and_ends_again_and_again_is_caught(
    tool: Callable[..., Tool], token: str
) -> None:
    tool(HOPPING, 1, shell=(sys.executable, "-c"))

    tree.stop(token)

    assert tree.find(token) == []


@pytest.mark.parametrize("state", ["running", "suspended"])
def test_what_is_asked_may_use_the_grace(tool: Callable[..., Tool], token: str, state: str) -> None:
    polite = tool("trap 'echo tidied; exit' TERM; echo $$; while :; do sleep 0.01; done", 1)
    if state == "suspended":
        polite.process.send_signal(signal.SIGSTOP)
        os.waitpid(polite.process.pid, os.WUNTRACED)

    tree.stop(token)

    assert polite.process.stdout
    assert polite.process.stdout.readline() == b"tidied\n"


def test_a_root_is_stopped_with_its_descendants_whatever_their_environment(
    tool: Callable[..., Tool], token: str
) -> None:
    unmarked = tool("sleep 913 & echo $!; wait", 1, mark="")
    root = root_of(unmarked)

    tree.stop(token, root=root)

    assert unmarked.living() == []


def test_what_a_root_left_in_its_session_is_stopped(tool: Callable[..., Tool], token: str) -> None:
    unmarked = tool("sleep 914 & echo $!; read go", 1, mark="")
    root = root_of(unmarked)
    unmarked.process.kill()
    unmarked.process.wait()

    tree.stop(token, root=root)

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
    tree.mark(shell.pid, token)
    pid = int(shell.communicate(b"go\n")[0].split()[0])
    yield pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's resource limits")
class TestOfWhatHasNoOtherMarkThanItsLimit:
    def test_it_is_found_and_stopped(self, limited: int, token: str) -> None:
        found = [process.pid for process in tree.find(token)]

        tree.stop(token)

        assert found == [limited]
        assert not is_alive(limited)

    def test_all_runs_of_a_process_take_it_along(self, limited: int) -> None:
        tree.stop(tree.process_token())

        assert not is_alive(limited)

    def test_another_run_leaves_it_alone(self, limited: int) -> None:
        tree.stop(tree.run_token())

        assert is_alive(limited)

    def test_it_can_be_spared(self, limited: int, token: str) -> None:
        tree.stop(tree.process_token(), spare=[token])

        assert is_alive(limited)

    def test_as_a_stray_it_is_told_from_what_bears_the_mark_too(
        self, limited: int, tool: Callable[..., Tool], token: str
    ) -> None:
        marked = tool("echo $$; exec sleep 935", 1)
        tree.mark(marked.process.pid, token)

        tree.stop_strays(token)

        assert not is_alive(limited)
        assert marked.living()

    def test_a_limit_that_is_there_already_stays(self, limited: int, token: str) -> None:
        tree.mark(limited, tree.run_token())

        assert [process.pid for process in tree.find(token)] == [limited]


def test_what_was_seen_once_is_stopped_when_nothing_shows_any_more_whose_it_is(
    tool: Callable[..., Tool], token: str
) -> None:
    shell = tool("env -i setsid sleep 936 & echo $!; wait", 1)
    found = tree.Tree.of(token)
    shell.process.kill()
    shell.process.wait()

    found.stop()

    assert not is_alive(shell.pids[0])


def test_another_process_with_the_pid_of_the_root_is_left_alone(
    tool: Callable[..., Tool], token: str
) -> None:
    stranger = tool("echo $$; exec sleep 915", 1, mark="")
    root = root_of(stranger)

    tree.stop(token, root=root._replace(started=root.started - 1))

    assert stranger.living() == stranger.pids


def test_a_shell_is_ended_before_its_command_and_begins_no_other_one(
    tool: Callable[..., Tool], token: str, tmp_path: Path
) -> None:
    tool(f"echo $$; for n in 1 2 3 4; do sleep 934; touch {tmp_path}/begun; done", 1)

    tree.stop(token)

    assert list(tmp_path.iterdir()) == []


def test_an_outer_run_takes_its_inner_runs_along(tool: Callable[..., Tool], token: str) -> None:
    inner = tool("echo $$; exec sleep 916", 1, mark=f"{token}/7-ab.1")

    tree.stop(token)

    assert inner.living() == []


def test_a_run_can_be_spared(tool: Callable[..., Tool]) -> None:
    spared = tool("echo $$; exec sleep 919", 1, mark="7-ab.1")
    stopped = tool("echo $$; exec sleep 920", 1, mark="7-ab.2")

    tree.stop("7-ab", spare=["7-ab.1"])

    assert spared.living()
    assert not stopped.living()


@pytest.mark.parametrize("is_root", [True, False])
def test_what_a_process_forked_after_the_list_was_made_and_before_it_ended_is_stopped(
    is_root: bool, tool: Callable[..., Tool], token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tool("trap 'setsid sleep 931 & exit' TERM; echo $$; while :; do sleep 0.01; done", 1)
    root = tree.mark(child.process.pid, token)
    pids, terminate = tree._pids, psutil.Process.terminate
    others = {*pids()} - {child.process.pid}  # what zombies there are would ask for another look

    def terminate_and_reap(process: psutil.Process) -> None:
        terminate(process)
        if process.pid == child.process.pid:
            child.process.wait()  # so the look that lists it ends when it is gone

    monkeypatch.setattr(psutil.Process, "terminate", terminate_and_reap)
    monkeypatch.setattr(tree, "_pids", lambda: [pid for pid in pids() if pid not in others])

    tree.stop(token, root=root if is_root else None)

    assert tree.find(token) == []


def test_our_child_s_exit_status_stays_ours(tool: Callable[..., Tool], token: str) -> None:
    child = tool("echo $$; exec sleep 921", 1)

    tree.stop(token)

    assert child.process.wait() == -signal.SIGTERM


# The signal may come between the opening of a file and the block that closes it: its end closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_stop_still_leaves_nothing_alive(
    tool: Callable[..., Tool], token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "GRACE_S", 60.0)
    monkeypatch.setattr(tree, "BOUND_S", 60.0)
    deaf = tool("trap '' TERM; echo $$; while :; do sleep 922; done", 1)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)

    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            tree.stop(token)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert deaf.living() == []


def test_with_no_file_descriptor_left_tools_are_stopped_all_the_same() -> None:
    program = """
import os, subprocess, sys
from opencode_sync.process import tree
token = tree.run_token()
env = {**os.environ, tree.MARKER: token}
child = subprocess.Popen(["sh", "-c", "sleep 923 & sleep 923"], env=env, start_new_session=True)
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        os.dup(1)
except OSError:
    pass
left = tree.stop(token).left
sys.exit(f"{left} {child.wait()}" if left or child.wait() != -15 else 0)
"""

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)

    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs two users")
def test_what_we_may_not_end_is_returned_without_waiting() -> None:
    program = """
import os, subprocess, sys
from opencode_sync.process import tree
token = tree.run_token()
child = subprocess.Popen(["sleep", "924"])
root = tree.mark(child.pid, token)
os.setresuid(65534, 65534, 0)
left = tree.stop(token, root=root, grace_s=60, bound_s=60).left
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

    tree.stop(token)

    assert f"{secretive.process.pid} (sh)" in caplog.text
    assert "sesame" not in caplog.text
