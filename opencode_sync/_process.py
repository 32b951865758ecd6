"""One child process, its output read where it is waited for.

    prompt --> unnamed file --> child stdin
    child stdout --> unnamed file --+
    child stderr --> unnamed file --+--> receive()  (the caller's thread)
    child exit ---------------------+

OpenCode exits without flushing what it wrote to a pipe, so the child writes regular files, which
are whole at its exit. A file never fills up as a pipe does, so nobody has to empty it while the
child runs: there are no reader threads, and a slow reader costs disk alone. The files have no
names: nothing is left of them, however we end. The end is the child's exit and both files read to
their end; a grandchild that holds them open delays nothing.

Knows bytes, nothing of OpenCode.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Literal

from . import _interrupt, _tree

_log = logging.getLogger("opencode_sync")

BLOCK_BYTES = 256 * 1024
# How long a new line, or the exit, can go unseen: a twentieth of the time that was waited for it,
# at most the second. Most of a run is spent waiting for a model, at 0.5 % of a core per run.
FIRST_PAUSE_S = 0.001
LONGEST_PAUSE_S = 0.02
REAP_S = 2.0  # bound on waiting for a child that has been killed

Channel = Literal["stdout", "stderr"]
Block = tuple[Channel, bytes]


class Process:
    """A child in a session of its own, marked so that all it starts can be found.

    One thread receives; stop() may come from any. One that is lost before close() is stopped.

    Attributes:
        pid: The child's process id.
        started_at: When it was started, a ``time.monotonic()`` instant.
    """

    def __init__(
        self, argv: Sequence[str], *, cwd: str, env: Mapping[str, str], stdin: bytes, token: str
    ) -> None:
        """Start *argv* in *cwd*, with *stdin* to read.

        Args:
            token: Marks the child and what it starts, through the environment.

        Raises:
            OSError: As :class:`subprocess.Popen` does; nothing is left behind.
        """
        self._token = token
        self._owner_pid = os.getpid()
        self._is_closed = False
        self._outputs: dict[Channel, _Output] = {}
        self._popen: subprocess.Popen[bytes] | None = None
        try:
            with _interrupt.deferred():
                self._popen = self._start(argv, cwd, env, stdin)
                self.pid = self._popen.pid
                self.started_at = time.monotonic()
        except BaseException:
            self.close()
            raise

    def _start(
        self, argv: Sequence[str], cwd: str, env: Mapping[str, str], stdin: bytes
    ) -> subprocess.Popen[bytes]:
        self._outputs["stdout"] = stdout = _Output()
        self._outputs["stderr"] = stderr = _Output()
        with tempfile.TemporaryFile(buffering=0) as prompt:
            view = memoryview(stdin)
            while view:
                view = view[prompt.write(view) :]
            prompt.seek(0)
            # A session of its own, so that a Ctrl-C in the terminal reaches only us.
            return subprocess.Popen(
                argv,
                stdin=prompt,
                stdout=stdout.file,
                stderr=stderr.file,
                cwd=cwd,
                # OpenCode takes $PWD for its working directory, whatever the real one is.
                env={**env, "PWD": cwd, _tree.MARKER: _tree.chain(self._token, env)},
                start_new_session=True,
            )

    def __del__(self) -> None:
        # An exception such as Ctrl-C can come between any two steps of who was to keep us.
        if not getattr(self, "_is_closed", True):
            with suppress(Exception):  # a finaliser has nobody to raise to
                self.close()

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self._popen is None:
            return None
        if self._popen.returncode is None and _has_exited(self.pid):
            with _interrupt.deferred():  # or it could leave Popen's own lock locked for ever
                self._popen.poll()
        return self._popen.returncode

    def receive(self, timeout: float | None) -> Block | None:
        """The next block of output, or None once the child has ended and all of it was given.

        What is there already is given whatever the *timeout*.

        Raises:
            queue.Empty: If nothing came for *timeout* seconds.
        """
        begun = time.monotonic()
        while True:
            # Asked before the read, so that what was written before the exit is read after it.
            has_ended = self.returncode is not None
            for channel, output in self._outputs.items():
                if block := output.read():
                    return channel, block
            if has_ended:
                return None
            if not _pause(begun, timeout):
                raise queue.Empty

    def wait_started(self, timeout: float) -> None:
        """Return at the first output or the end, at the latest after *timeout* seconds."""
        begun = time.monotonic()
        while self.returncode is None and not any(map(_Output.has_more, self._outputs.values())):
            if not _pause(begun, timeout):
                return

    def has_left_something(self) -> bool:
        """Whether processes that it started live, after its own end."""
        return bool(_tree.find(self._token))

    def stop(self) -> None:
        """End the child and all that it started: ask, wait a short grace, kill; then reap.

        Bounded in time, idempotent, from any thread. Output that was written stays readable.
        """
        assert self._popen is not None
        _tree.stop(self._token, roots=() if self._popen.returncode is not None else (self.pid,))
        begun = time.monotonic()
        while self.returncode is None and _pause(begun, REAP_S):
            pass

    def close(self) -> None:
        """Give the files back; a child that still runs is stopped."""
        if self._is_closed:
            return
        try:
            # In a forked child of ours it is none of our children.
            is_ours = self._popen is not None and os.getpid() == self._owner_pid
            if is_ours and self.returncode is None:
                self.stop()
        finally:
            self._is_closed = True
            self._close_files()

    def _close_files(self) -> None:
        for output in self._outputs.values():
            output.file.close()


def _has_exited(pid: int) -> bool:
    """Whether our child *pid* has, for all we know; leaves it to be reaped."""
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return True
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # reaped by somebody else
        return True


def _pause(begun: float, timeout: float | None) -> bool:
    """Sleep a little, at most to the end of a wait since *begun*; False where that has come."""
    waited_s = time.monotonic() - begun
    pause_s = min(max(FIRST_PAUSE_S, waited_s / 20), LONGEST_PAUSE_S)
    if timeout is not None:
        if waited_s >= timeout:
            return False
        pause_s = min(pause_s, timeout - waited_s)
    time.sleep(pause_s)
    return True


class _Output:
    """A file that a child writes, read as it grows."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(buffering=0)
        self._offset = 0

    def has_more(self) -> bool:
        return os.fstat(self.file.fileno()).st_size > self._offset

    def read(self) -> bytes:
        """The next block of what is there; empty where there is nothing new."""
        if not self.has_more():
            return b""
        # The child's own position in the file is not touched.
        block = os.pread(self.file.fileno(), BLOCK_BYTES, self._offset)
        self._offset += len(block)
        return block


class LineSplitter:
    """Blocks of bytes in, whole lines out; only ``\\n`` ends a line."""

    def __init__(self) -> None:
        self._pending: list[bytes] = []

    def feed(self, block: bytes) -> list[bytes]:
        """The lines that *block* completes, without their newlines."""
        head, newline, tail = block.rpartition(b"\n")
        if not newline:
            self._pending.append(block)
            return []
        self._pending.append(head)
        lines = b"".join(self._pending).split(b"\n")
        self._pending = [tail] if tail else []
        return lines

    def rest(self) -> bytes:
        """What stands after the last newline; taken out."""
        rest, self._pending = b"".join(self._pending), []
        return rest
