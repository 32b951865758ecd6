"""One child process, its output read where it is waited for.

    prompt --> unnamed file --> child stdin
    child stdout --> unnamed file --+
    child stderr --> unnamed file --+--> receive()  (the caller's thread)
    child exit ---------------------+

OpenCode exits without flushing what it wrote to a pipe, so the child writes regular files, which are
whole at its exit. A file never fills up as a pipe does, so nobody has to empty it while the child
runs: there are no reader threads, and a slow reader costs disk alone. The files have no names:
nothing is left of them, however we end. The end is the child's exit and both files read to their
end; a grandchild that holds them open delays nothing.

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

from . import _tree

_log = logging.getLogger("opencode_sync")

BLOCK_BYTES = 256 * 1024
FIRST_PAUSE_S = 0.001
# How long a new line, or the exit, can go unseen. Most of a run is spent waiting for a model; a
# pause this short costs 0.4 % of a core per run.
PAUSE_S = 0.005
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
        self._is_closed = False
        self._outputs: dict[Channel, _Output] = {}
        self._popen: subprocess.Popen[bytes] | None = None
        try:
            self._popen = self._start(argv, cwd, env, stdin)
        except BaseException as error:
            self._is_closed = True
            if not isinstance(error, Exception):  # Ctrl-C, perhaps with the child already there
                _tree.stop(token)
            self._close_files()
            raise
        self.pid = self._popen.pid
        self.started_at = time.monotonic()

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
        return None if self._popen is None else self._popen.poll()

    def receive(self, timeout: float | None) -> Block | None:
        """The next block of output, or None once the child has ended and all of it was given.

        What is there already is given whatever the *timeout*.

        Raises:
            queue.Empty: If nothing came for *timeout* seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        pause_s = FIRST_PAUSE_S
        while True:
            # Asked before the read, so that what was written before the exit is read after it.
            has_ended = self.returncode is not None
            for channel, output in self._outputs.items():
                if block := output.read():
                    return channel, block
            if has_ended:
                return None
            if end is not None:
                left_s = end - time.monotonic()
                if left_s <= 0:
                    raise queue.Empty
                pause_s = min(pause_s, left_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S)

    def wait_started(self, timeout: float) -> None:
        """Return at the first output or the end, at the latest after *timeout* seconds."""
        end = time.monotonic() + timeout
        while self.returncode is None and not any(map(_Output.has_more, self._outputs.values())):
            left_s = end - time.monotonic()
            if left_s <= 0:
                return
            time.sleep(min(PAUSE_S, left_s))

    def has_left_something(self) -> bool:
        """Whether processes that it started live, after its own end."""
        return bool(_tree.find(self._token))

    def stop(self) -> None:
        """End the child and all that it started: ask, wait a short grace, kill; then reap.

        Bounded in time, idempotent, from any thread. Output that was written stays readable.
        """
        if self._popen is None:
            _tree.stop(self._token)
            return
        _tree.stop(self._token, roots=() if self._popen.returncode is not None else (self.pid,))
        with suppress(subprocess.TimeoutExpired):  # stop() has told of what cannot be ended
            self._popen.wait(REAP_S)

    def close(self) -> None:
        """Give the files back; a child that still runs is stopped."""
        if self._is_closed:
            return
        try:
            if self.returncode is None:
                self.stop()
        finally:
            self._is_closed = True
            self._close_files()

    def _close_files(self) -> None:
        for output in self._outputs.values():
            output.file.close()


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
