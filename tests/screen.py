"""A program on a terminal of its own: what its screen shows, and what is typed into it."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from opencode_sync.core.text import strip_ansi

WITHIN_S = 30.0
ROWS, COLUMNS = 24, 120
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"

# Makes the terminal the program's controlling one: only then does a Ctrl-C typed into it interrupt.
_ON_TERMINAL = """\
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Screen:
    """A running program; a context manager that ends it."""

    def __init__(self, argv: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ON_TERMINAL, *argv],
            cwd=cwd,
            env={**os.environ, "TERM": "xterm", **env},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._data = b""
        self._has_ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def text(self) -> str:
        """What is on the screen, and what has scrolled out of it."""
        data = strip_ansi(self._data.decode("utf-8", "replace"))
        return "\n".join(map(_seen, data.replace("\r\n", "\n").split("\n")))

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())

    def wait_for(self, words: str) -> None:
        """Wait until the screen shows *words*."""
        deadline = time.monotonic() + WITHIN_S
        with self._changed:
            while words not in self.text:
                left_s = deadline - time.monotonic()
                assert left_s > 0, f"no {words!r} on the screen:\n{self.text}"
                assert not self._has_ended, f"ended without {words!r} on the screen:\n{self.text}"
                self._changed.wait(left_s)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait for what the program does unseen."""
        deadline = time.monotonic() + WITHIN_S
        while not is_so():
            assert time.monotonic() < deadline, f"in vain, and the screen:\n{self.text}"
            assert not self._has_ended, f"it ended, and the screen:\n{self.text}"
            time.sleep(0.01)

    def end(self) -> int:
        """Wait for the program's end; its exit status."""
        status = self.process.wait(WITHIN_S)
        self._reader.join(WITHIN_S)
        return status

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(WITHIN_S)
        os.close(self._ours)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 65_536)
            except OSError:  # nobody has the other end open any more
                data = b""
            with self._changed:
                self._data += data
                self._has_ended = not data
                self._changed.notify_all()
            if not data:
                return


def _seen(line: str) -> str:
    """What a line shows, whose cursor went back in it."""
    cells: list[str] = []
    at = 0
    for character in line:
        if character == "\r":
            at = 0
        elif character == "\b":
            at = max(0, at - 1)
        elif character >= " ":
            cells[at : at + 1] = [character]
            at += 1
    return "".join(cells)
