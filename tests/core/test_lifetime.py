"""Ctrl-C, held back while something is made."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from opencode_sync import OpenCodeTimeoutError
from opencode_sync.core.lifetime import Flag, deferred
from opencode_sync.process.run import ProcessRun
from tests import leaks
from tests.faults import standin_client

INTERRUPTIONS = 150
LONG_S = 30.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    """Python's own, whatever the tests were started with."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_takes_effect_at_the_end_of_the_block() -> None:
    steps = []

    with pytest.raises(KeyboardInterrupt), deferred():
        signal.raise_signal(signal.SIGINT)
        steps.append("went on")

    assert steps == ["went on"]


def test_blocks_may_be_nested() -> None:
    steps = []

    with pytest.raises(KeyboardInterrupt), deferred():
        with deferred():
            signal.raise_signal(signal.SIGINT)
        steps.append("went on")

    assert steps == ["went on"]


def test_the_handler_is_as_before() -> None:
    with pytest.raises(ZeroDivisionError), deferred():
        raise ZeroDivisionError

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    with deferred():
        signal.raise_signal(signal.SIGINT)


def test_another_thread_is_left_alone() -> None:
    done = []

    def work() -> None:
        with deferred():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert done == [signal.default_int_handler]


def test_a_ctrl_c_in_the_delay_of_a_start_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ProcessRun, "wait_started", interrupted)
    before = psutil.Process().children()

    with standin_client(tmp_path, isolate_db=False) as client:
        with pytest.raises(KeyboardInterrupt) as caught:
            client.run("silent", tmp_path)

        # Though its traceback is kept, as a notebook does.
        assert psutil.Process().children() == before, caught


# --- a flag --------------------------------------------------------------------------------------


def test_a_flag_wakes_all_who_wait_for_it() -> None:
    flag = Flag()
    seen: list[bool] = []
    threads = [threading.Thread(target=lambda: seen.append(flag.wait(LONG_S))) for _ in range(3)]
    for thread in threads:
        thread.start()

    flag.set()
    for thread in threads:
        thread.join(LONG_S)

    assert seen == [True] * 3
    assert flag.wait(0)


def test_a_signal_that_another_thread_was_given_is_noticed_in_a_wait_without_end() -> None:
    flag, is_done = Flag(), threading.Event()
    other = threading.Thread(target=is_done.wait, args=[LONG_S])
    other.start()
    assert other.ident is not None
    before = signal.signal(signal.SIGALRM, lambda *_: flag.set())
    try:
        threading.Timer(0.05, signal.pthread_kill, [other.ident, signal.SIGALRM]).start()

        assert flag.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
        is_done.set()
        other.join()


def test_a_flag_that_is_not_set_is_waited_for_no_longer_than_asked() -> None:
    assert not Flag().wait(0.01)


def setting(flag: Flag, moment: int) -> Callable[..., Any]:
    """A trace function that sets *flag* before the line of that number, as a handler could."""
    lines = itertools.count()

    def trace(*_: object) -> Callable[..., Any]:
        if next(lines) == moment:
            flag.set()
        return trace

    return trace


def set_flags_in_handlers() -> None:
    """Set a flag at each moment of the waiting for it, and of its setting."""
    for moment in range(60):
        flag = Flag()
        sys.settrace(setting(flag, moment))
        flag.wait(0.001)
        flag.set()
        sys.settrace(None)
        assert flag.is_set()


def test_a_flag_is_set_in_a_handler_at_any_moment() -> None:
    # In a Python of its own, which can be ended if it hangs.
    script = "from tests.core.test_lifetime import set_flags_in_handlers as go; go()"

    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=LONG_S)

    assert done.returncode == 0


# --- whole runs ----------------------------------------------------------------------------------


def interrupt_runs(directory: Path) -> None:
    """Interrupt runs at random moments, and look at what is left each time."""
    workspace = directory / "workspace"
    workspace.mkdir()
    dice = random.Random(2026)
    prompts = [
        "well",
        "flood 1000",
        "with_tools",
        "fall_silent",
        "leave_tools",
        "fail 1 locking protocol",
    ]
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    interrupted = 0
    with standin_client(directory) as client:
        client.run("well", workspace)
        before = leaks.footprint()

        for _ in range(INTERRUPTIONS):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.0002, 0.05))
                    client.run(
                        dice.choice(prompts), workspace, timeout_s=0.1, startup_retry_delay_s=0
                    )
                finally:  # where it may come too
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except (KeyboardInterrupt, OpenCodeTimeoutError) as error:
                interrupted += isinstance(error, KeyboardInterrupt)

        assert interrupted > INTERRUPTIONS / 2
        left = leaks.left_behind(before, leaks.SETTLE_S)
        assert not left, str(left)
        assert "0 running" in repr(client)
        with client.stream("well", workspace) as stream:  # in the first of the directories
            assert stream._source._lease.path.name == "0"  # type: ignore[union-attr]


def test_a_ctrl_c_at_any_moment_of_a_run_leaves_nothing_behind(tmp_path: Path) -> None:
    # In a Python of its own: what comes in the middle of a finaliser, or of a library's callback,
    # Python tells of and drops, and pytest would take for a fault.
    script = "import sys, pathlib; from tests.core.test_lifetime import interrupt_runs as go; "
    script += "go(pathlib.Path(sys.argv[1]))"

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
