"""One child process, its output read by threads.

    prompt --> unnamed file --> child stdin
    child stdout --> unnamed file <-- reader thread --+
    child stderr --> unnamed file <-- reader thread --+--> queue --> receive()  (our caller)

OpenCode exits without flushing what it wrote to a pipe, so the child writes regular files, which
are whole at its exit, and a thread for each reads it as it grows. A file never fills up as a pipe
does: a slow consumer costs disk alone. The files have no names: nothing is left of them, however we
end. The end is the child's exit and both files read to their end; a grandchild that holds them open
delays nothing.

The readers are daemons, hold no reference to the Process, and take no lock: a finaliser may run in
them. What goes wrong in them is raised where the caller waits. Knows bytes, nothing of OpenCode.
"""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Literal

from ..core import lifetime
from . import tree

Channel = Literal["stdout", "stderr"]
Block = tuple[Channel, bytes]

BLOCK_BYTES = 256 * 1024
BACKLOG = 32  # blocks in the queue; a reader that is so far ahead leaves the rest on disk
# How long a new line, or the exit, can go unseen: a twentieth of the time waited so far, between
# these bounds. Most of a run is spent waiting for a model, which takes 0.5 % of a core per run.
FIRST_PAUSE_S = 0.001
LONGEST_PAUSE_S = {"stdout": 0.008, "stderr": 0.02}
LOOK_S = 0.01  # how soon a wait for the start notices its end
REAP_S = 2.0  # bound on waiting for a child that has been killed
JOIN_S = 2.0  # bound on waiting for a reader that has been told to end


class Process:
    """A child in a session of its own, marked so that all it starts can be found.

    One thread receives; stop() may be called in any. One that is lost before close() is stopped.

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
        self._outputs: dict[Channel, Output] = {}
        self._queue: lifetime.Queue[Block | BaseException] = lifetime.Queue()
        self._readers: dict[Channel, threading.Thread] = {}
        self._popen: subprocess.Popen[bytes] | None = None
        self._root: tree.Seen | None = None
        try:
            with lifetime.deferred(), tempfile.TemporaryFile() as prompt:
                self._outputs["stdout"] = stdout = Output()
                self._outputs["stderr"] = stderr = Output()
                prompt.write(stdin)
                prompt.seek(0)
                self._popen = subprocess.Popen(
                    argv,
                    stdin=prompt,
                    stdout=stdout.file,
                    stderr=stderr.file,
                    cwd=cwd,
                    # OpenCode takes $PWD for its working directory, whatever the real one is.
                    env={**env, "PWD": cwd, tree.MARKER: tree.chain(self._token, env)},
                    start_new_session=True,  # or a Ctrl-C in the terminal would reach it too
                )
                self.pid = self._popen.pid
                self._root = tree.mark(self.pid, self._token)
                self.started_at = time.monotonic()
                self._start_readers(self._popen)
                self._unread = set(self._readers)
        except BaseException:
            self.close()
            raise

    def _start_readers(self, popen: subprocess.Popen[bytes]) -> None:
        for channel, output in self._outputs.items():
            reader = threading.Thread(
                target=_read,
                args=(channel, output, popen, self._queue),
                name=f"opencode-{popen.pid}-{channel}",
                daemon=True,
            )
            try:
                reader.start()
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, f"no thread to read its output: {error}") from error
            self._readers[channel] = reader

    def __del__(self) -> None:
        # An exception such as Ctrl-C can come between any two steps of our owner, before it has us.
        if not getattr(self, "_is_closed", True):
            with suppress(Exception):  # a finaliser has nobody to raise to
                self.close()

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self._popen is None:
            return None
        with lifetime.deferred():  # or a Ctrl-C could leave Popen's own lock locked for ever
            return self._popen.poll()

    def wait(self, timeout: float | None) -> None:
        """Return when there is something to receive. An interrupt here loses no output.

        Raises:
            queue.Empty: If nothing came for *timeout* seconds.
        """
        if self._unread:
            self._queue.wait(timeout)

    def receive(self, timeout: float | None) -> Block | None:
        """The next block of output, or None once the child has ended and all of it was given.

        Raises:
            queue.Empty: If nothing came for *timeout* seconds.
        """
        while self._unread:
            self._queue.wait(timeout)
            item = self._queue.get_nowait()
            if isinstance(item, BaseException):
                raise item
            channel, block = item
            if block:
                return item
            self._unread.discard(channel)
        return None

    def has_written(self, channel: Channel, words: bytes) -> bool:
        """Whether the child has written *words* so far, received or not."""
        file = self._outputs[channel].file.fileno()
        return words in os.pread(file, os.fstat(file).st_size, 0)

    def wait_started(self, timeout: float, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Return at the first output or the end, when cancelled, or after *timeout* seconds."""
        deadline = time.monotonic() + timeout
        while self._queue.empty() and not cancelled() and time.monotonic() < deadline:
            time.sleep(LOOK_S)

    def stop(self) -> bool:
        """End the child and all that it started: ask, wait a short grace, kill; then reap.

        Bounded in time, idempotent, from any thread. Output that was written stays readable.
        Returns whether there was anything to end.
        """
        assert self._popen is not None
        stopped = tree.stop(self._token, root=self._root)
        deadline = time.monotonic() + REAP_S
        while self.returncode is None and time.monotonic() < deadline:
            time.sleep(FIRST_PAUSE_S)
        return bool(stopped.asked)

    def close(self) -> None:
        """Give files and threads back; a child that still runs is stopped."""
        if self._is_closed:
            return
        try:
            if os.getpid() != self._owner_pid:
                pass  # in a forked child of ours: it is our parent's child
            elif self._popen is None:
                self._stop_unknown()
            elif self.returncode is None:
                self.stop()
        finally:
            self._is_closed = True
            for output in self._outputs.values():
                output.is_wanted = False
            for reader in self._readers.values():
                if reader is not threading.current_thread():  # a finaliser runs in any thread
                    reader.join(JOIN_S)
            for output in self._outputs.values():
                output.file.close()

    def _stop_unknown(self) -> None:
        """End a child that was started, perhaps, without our getting a Popen for it.

        A signal handler that raises (SystemExit, say) can do so in the middle of Popen.
        """
        with suppress(OSError):  # where there is no descriptor left, no child was started
            pids = [process.pid for process in tree.find(self._token)]
            tree.stop(self._token)
            for pid in pids:
                with suppress(ChildProcessError):  # a child's child
                    os.waitpid(pid, os.WNOHANG)


def _read(
    channel: Channel,
    output: Output,
    popen: subprocess.Popen[bytes],
    put: lifetime.Queue[Block | BaseException],
) -> None:
    """Hand over what a child writes, block by block, and an empty block at the end."""
    longest_s, begun = LONGEST_PAUSE_S[channel], time.monotonic()
    try:
        while output.is_wanted:
            # Asked before the read, so that what was written before the exit is read after it.
            has_ended = popen.poll() is not None
            if block := output.read():
                put.put((channel, block))
                begun = time.monotonic()
                while put.qsize() > BACKLOG and output.is_wanted:
                    time.sleep(FIRST_PAUSE_S)
            elif has_ended:
                break
            else:
                waited_s = time.monotonic() - begun
                time.sleep(min(max(FIRST_PAUSE_S, waited_s / 20), longest_s))
    except BaseException as error:  # noqa: BLE001 - raised where the caller waits
        if output.is_wanted:
            put.put(error)
    put.put((channel, b""))


class Output:
    """An unnamed file that a child writes, read as it grows.

    Attributes:
        is_wanted: Whether anybody still reads it. A plain flag, since a lock could be held by the
            very thread that a finaliser interrupts.
    """

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(buffering=0)
        self.is_wanted = True
        self._offset = 0

    def read(self) -> bytes:
        """The next block of what is there; empty where there is nothing new."""
        # The child's own position in the file is not touched.
        block = os.pread(self.file.fileno(), BLOCK_BYTES, self._offset)
        self._offset += len(block)
        return block


class LineSplitter:
    """Blocks of bytes in, whole lines out; only ``\\n`` ends a line."""

    def __init__(self) -> None:
        self._pending: list[bytes] = []

    def feed(self, block: bytes) -> bytes | None:
        """The lines that *block* completes, in one piece without the last newline; or None."""
        head, newline, tail = block.rpartition(b"\n")
        if not newline:
            self._pending.append(block)
            return None
        self._pending.append(head)
        lines = b"".join(self._pending)
        self._pending = [tail] if tail else []
        return lines

    def rest(self) -> bytes:
        """Take out what is after the last newline."""
        rest, self._pending = b"".join(self._pending), []
        return rest
