"""A small process that cleans up when we cannot: after we have been killed.

    this process                                 the watchdog's process, in a session of its own
      guard() ---------- starts it, once ------>   reads its end of a socket pair
      add_directory(), discard_directory() ---->   keeps the list
      (SIGKILL, out of memory, a crash, or         at end of file: stops all with our token,
       just our end)                               removes the directories, ends

One serves all runs of a Python process; a forked child has its own. It is not a child of ours (its
starter ends at once), so no wait() of the program meets it. Only end-of-file and SIGKILL end it: a
SIGTERM that a service manager or a shell sends to all of us must not end it before its work, which
takes LIFE_S after end-of-file at most. If it is killed, the next guard() starts another.

On Linux with Python 3.11 it costs 7 MB (4 MB of it unshared), 20 ms before the first run, no time
while it waits, and some 60 ms of CPU after our end. Until then it loads almost nothing, hence the
late imports here. Where there is no Python to run it (a frozen program, an embedded interpreter),
runs go on without it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress

START_S = 10.0  # bound on its start
SEND_S = 1.0  # bound on telling it something
LIFE_S = 60  # bound on its work: large directories take a while
SETTLE_S = 0.1
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # some Pythons do not start without


class Watchdog:
    """This process's side: what is to be cleaned up, and the connection to the watchdog's process.

    Nothing here raises if that process is gone or cannot be started: runs go on without it. The
    lock is reentrant, since a finaliser may discard a directory at any point.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._channel: int | None = None
        self._pid: int | None = None
        self._is_unavailable = False
        self._entries: set[bytes] = set()

    def guard(self) -> None:
        """Start the watchdog if there is none. Call it before each start of a process."""
        with self._lock:
            if not self._send(b"\n") and not self._is_unavailable:
                self._start()

    def add_directory(self, path: str | os.PathLike[str]) -> None:
        """Have *path* removed after our end, unless it is discarded first."""
        self._add(_directory_entry(path))

    def discard_directory(self, path: str | os.PathLike[str]) -> None:
        """Leave *path* alone: it has been removed, or is to stay."""
        entry = _directory_entry(path)
        with self._lock:
            self._entries.discard(entry)
            self._send(b"-%b\n" % entry)

    def spare(self, token: str) -> None:
        """After our end, leave the processes with the run's *token* alone."""
        self._add(b"spare " + token.encode())

    def _add(self, entry: bytes) -> None:
        with self._lock:
            self._entries.add(entry)
            self._send(b"+%b\n" % entry)

    def pid(self) -> int | None:
        """Its process id; None if none was started, or its end has been noticed."""
        return self._pid

    def descriptors(self) -> list[int]:
        """File descriptors that are kept until the interpreter ends."""
        return [] if self._channel is None else [self._channel]

    def _send(self, data: bytes) -> bool:
        """Send *data*; False if there is no watchdog to read it."""
        import socket

        if self._channel is None:
            return False
        is_told = False
        # A socket and not a pipe, so that a program with SIGPIPE at its default survives it. The
        # bare descriptor is kept, since nothing closes it before the very end of the interpreter.
        try:
            channel = socket.socket(fileno=self._channel)
            try:
                channel.settimeout(SEND_S)
                channel.sendall(data, getattr(socket, "MSG_NOSIGNAL", 0))
                is_told = True
            finally:
                channel.detach()
        except ConnectionError:
            os.close(self._channel)
        except OSError:
            # The watchdog is suspended, or somebody has closed our end. It is not closed here: once
            # the watchdog wakes, it would take that for our death.
            pass
        finally:
            if not is_told:
                self._channel = self._pid = None
        return is_told

    def _start(self) -> None:
        import logging

        from . import tree

        log = logging.getLogger("opencode_sync")
        if reason := _why_not():
            self._is_unavailable = True
            log.debug("no watchdog process: %s", reason)
            return
        try:
            self._channel, self._pid = _launch(tree.process_token(), self._entries.copy())
        except (OSError, ValueError) as error:
            # No further wait for one that says nothing; a lack of processes may pass.
            self._is_unavailable = isinstance(error, (TimeoutError, ValueError))
            log.debug("no watchdog process: %s: %s", type(error).__name__, error)
        else:
            log.debug("watchdog process %d started", self._pid)

    def before_fork(self) -> None:
        """Wait until no thread is starting one: the child would hold its connection open."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Close the parent's line, or its end would not be noticed; the child starts its own."""
        if self._channel is not None:
            os.close(self._channel)
        self._reset()


def _why_not() -> str | None:
    if getattr(sys, "frozen", False) or not os.path.isfile(__file__):
        return "this program is not a Python that runs files"
    # In a program that embeds Python, sys.executable may be that program.
    program = sys.executable or ""
    if "py" not in os.path.basename(program).lower() or not os.path.isfile(program):
        return f"sys.executable is {sys.executable!r}"
    return None


def _launch(token: str, entries: Iterable[bytes]) -> tuple[int, int]:
    """Start the process; return our end of the socket pair, and its pid.

    Raises:
        OSError: If the system gives no process or descriptor; TimeoutError, if it says nothing.
        ValueError: If it ends at once.
    """
    import socket
    import subprocess

    import psutil

    site = os.path.dirname(os.path.dirname(psutil.__file__))
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            starter = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, token, site],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
                start_new_session=True,
            )
        try:
            ours.settimeout(START_S)
            pid = int(ours.recv(32))
        finally:
            starter.kill()  # it has done its part, or never will
            starter.wait()
        if sys.platform == "darwin":
            ours.setsockopt(socket.SOL_SOCKET, 0x1022, 1)  # SO_NOSIGPIPE
        ours.sendall(b"\n" + b"".join(b"+%b\n" % entry for entry in entries))
        return ours.detach(), pid


# In hexadecimal, since a path may hold a newline.
def _directory_entry(path: str | os.PathLike[str]) -> bytes:
    return b"directory " + os.fsencode(os.path.abspath(path)).hex().encode()


# --- the watchdog's process ----------------------------------------------------------------------


def main(token: str, site: str) -> None:
    """Wait for the end of the process at the other end of stdin, then clean up after it.

    Args:
        token: Of the processes to stop.
        site: The directory that psutil is in.
    """
    for ignored in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    _drop_mark()
    if os.fork():
        os._exit(0)
    os.write(0, b"%d" % os.getpid())
    entries = _listen()
    if entries is not None:
        _clean_up(token, site, entries)


def _drop_mark() -> None:
    """Drop the resource limit of an outer run (see ``tree.mark``): if our program is one of its
    tools, we clean up after its end, and must not be stopped with it.

    A limit can only be lowered, here to one that belongs to no run and has no effect.
    """
    if sys.platform.startswith("linux"):
        import resource

        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_RTTIME, (_NO_MARK, _NO_MARK))


_NO_MARK = 1 << 61  # microseconds; all of the marks are larger


def _listen() -> set[bytes] | None:
    """What to clean up, once the socket is closed; None if it said nothing at all."""
    entries: set[bytes] = set()
    rest = b""
    begun = False
    with suppress(OSError):  # closed in the middle of our first word
        while block := os.read(0, 65536):
            begun = True
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                if line.startswith(b"+"):
                    entries.add(line[1:])
                else:
                    entries.discard(line[1:])
    return entries if begun else None


def _clean_up(token: str, site: str, entries: Iterable[bytes]) -> None:
    import faulthandler
    import importlib
    import time
    import types

    # A thread in C, which ends us whatever we hang in.
    faulthandler.dump_traceback_later(LIFE_S, exit=True)
    sys.path.append(site)
    package = types.ModuleType("opencode_sync")  # without what its __init__ imports
    package.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules[package.__name__] = package
    words = [entry.split(b" ", 1) for entry in entries]
    spared = [word.decode() for kind, word in words if kind == b"spare"]
    # Twice: a process that was being started when our program died bore no mark yet.
    for _ in range(2):
        with suppress(Exception):  # the files may have gone with an upgrade; go on with the rest
            tree = importlib.import_module("opencode_sync.process.tree")
            if tree.find(token):
                tree.stop(token, spare=spared)
        for kind, word in words:
            if kind == b"directory":
                _remove(bytes.fromhex(word.decode()))
        time.sleep(SETTLE_S)


def _remove(directory: bytes) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)
    if os.path.isdir(directory):
        # A tool left directories in it that cannot be written, as Go's module cache does.
        for parent, names, _ in os.walk(directory):
            for path in (parent, *(os.path.join(parent, name) for name in names)):
                if not os.path.islink(path):
                    with suppress(OSError):
                        os.chmod(path, 0o700)
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
else:
    _watchdog = Watchdog()
    guard = _watchdog.guard
    add_directory = _watchdog.add_directory
    discard_directory = _watchdog.discard_directory
    spare = _watchdog.spare
    watchdog_pid = _watchdog.pid
    descriptors = _watchdog.descriptors
    os.register_at_fork(
        before=_watchdog.before_fork,
        after_in_parent=_watchdog.after_fork_in_parent,
        after_in_child=_watchdog.after_fork_in_child,
    )
