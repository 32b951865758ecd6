"""Ways for a run to end while its tools are at work, on whichever opencode.

Tools       the processes that a run's tools are, found by the directory that they work in
sleeping()  the same, found by how long they sleep
script()    a Python program that runs a prompt, to be interrupted or killed
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from opencode_sync import RunConfig
from tests import leaks

# One has a parent in another session, one has no parent at all, one is a plain child.
COMMAND = "(setsid sh -c 'sleep 901 & sleep 902' &); sleep 903"
COUNT = 3
START_S = 100.0  # bound on the tools' start: a loaded machine takes its time
GONE_S = 5.0  # what may pass after the end of a script that could do nothing itself

_ROOT = Path(__file__).parent.parent
_PROGRAM = """
import pickle, sys
from opencode_sync import OpenCodeClient

binary, workspace, prompt = sys.argv[1:]
run_cfg = pickle.load(sys.stdin.buffer)
client = OpenCodeClient(binary)
stream = client.stream(prompt, workspace, run_cfg=run_cfg)
if sys.stdin.buffer.read() == b"exit":  # until the test closes it
    sys.exit()
try:
    with stream:
        print("waiting", flush=True)
        stream.wait()
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.stdin.close()
    sys.exit(130)
"""


class Tools:
    """The sleeping processes of one workspace."""

    def __init__(self, workspace: Path) -> None:
        self._workspace = str(workspace.resolve())

    def living(self) -> list[int]:
        pids = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.name() == "sleep" and process.cwd() == self._workspace:
                    pids.append(process.pid)
        return pids

    def wait_until_started(self) -> None:
        self._wait_for(COUNT, START_S)

    def wait_until_gone(self) -> None:
        self._wait_for(0, GONE_S)

    def _wait_for(self, count: int, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while len(living := self.living()) != count:
            assert time.monotonic() < deadline, f"{len(living)} of {count} tools after {within_s} s"
            time.sleep(0.01)  # nobody tells of a process that comes or goes


def sleeping(*seconds: int) -> list[psutil.Process]:
    """The processes that sleep for one of *seconds*, started by these tests and not by others."""
    commands = [["sleep", str(number)] for number in seconds]
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cmdline() in commands:
                mark = process.environ().get(leaks.SESSION, "")
                found += [process] if mark.startswith(leaks.MARK) else []
    return found


class Script:
    """A program under way that runs a prompt."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.pid = process.pid

    @property
    def _stdin(self) -> IO[bytes]:
        assert self.process.stdin
        return self.process.stdin

    def line(self) -> bytes:
        assert self.process.stdout
        return self.process.stdout.readline()

    def wait_for_the_run(self) -> None:
        """Have it wait for its run; returns when it does."""
        self._stdin.close()
        assert self.line() == b"waiting\n"

    def exit(self) -> None:
        """Have it end, as a program does that forgets its stream."""
        self._stdin.write(b"exit")
        self._stdin.close()


@contextmanager
def script(
    binary: str, workspace: Path, prompt: str, run_cfg: RunConfig | None = None
) -> Iterator[Script]:
    """Start a program that runs *prompt*; killed where the block leaves it running."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, binary, str(workspace), prompt],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            assert process.stdin
            process.stdin.write(pickle.dumps(run_cfg))
            process.stdin.flush()
            yield Script(process)
        finally:
            process.kill()
