"""The system's processes, as one look shows them: parent, session, age, and one variable.

    pids() --> is_older(pid, since)? --> look_at(pid) --> Seen
                                         variable(pid, name, part) --> its value, "" or None
                                         limit_of(pid) --> a number that it was given, or 0

Knows processes; nothing of runs, their marks, or signals. Also loaded without the package, by the
watchdog's process.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from contextlib import suppress
from typing import NamedTuple

# How long it is remembered when a process was started: a pid is not given away again so soon.
KNOWN_S = 1.0
_MOST_KNOWN = 10_000

_known: dict[int, tuple[int, float]] = {}  # pid -> when it was started, until when that is known

# A look opens files, and a program that has no descriptor left to do it with is just the one whose
# runs must be stopped: one is set aside.
_reserve: list[int] = []  # at most one, but for two threads at once


class Seen(NamedTuple):
    """A process in the table.

    Attributes:
        parent, session: Their pids.
        started: When it was, in the system's ticks; 0 where that is not known. A child's is never
            less than its parent's.
        is_alive: False for a zombie.
    """

    parent: int
    session: int
    started: int
    is_alive: bool


def set_aside() -> None:
    """Keep a descriptor for looks to come, and what they import."""
    import psutil  # noqa: F401

    if not _reserve:
        with suppress(OSError):
            _reserve.append(os.open(os.devnull, os.O_RDONLY))


def descriptors() -> list[int]:
    """File descriptors that are kept until the interpreter ends."""
    return list(_reserve)


def is_older(pid: int, since: int) -> bool:
    """Whether it is known, without a look, that *pid* was started before the tick *since*.

    False says nothing: it was not looked at, or longer than ``KNOWN_S`` seconds ago.
    """
    started, known_until = _known.get(pid, (since, 0.0))
    return started < since and time.monotonic() < known_until


if sys.platform.startswith("linux"):
    import resource

    # psutil takes 40 microseconds for what a read takes 10, and all processes are looked at many
    # times. Pids go round, so none is given away again between a look and what follows from it.

    _BLOCK_BYTES = 65_536

    def pids() -> list[int]:
        """Of all processes, but what is started meanwhile with a pid that had gone by."""
        try:
            names = os.listdir("/proc")
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            with suppress(IndexError):  # another thread has taken it
                os.close(_reserve.pop())
            names = os.listdir("/proc")
        return [int(name) for name in names if name.isdigit()]

    def look_at(pid: int) -> Seen | None:
        """None for what is no longer there, or not for us to see."""
        # "PID (NAME) STATE PARENT GROUP SESSION ...", and a name may have ")" and spaces; the time
        # of the start is the 22nd field.
        try:
            fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split(None, 20)
        except PermissionError:  # hidden from us
            return None
        if len(fields) < 20:
            return None
        seen = Seen(int(fields[1]), int(fields[3]), int(fields[19]), fields[0] not in (b"Z", b"X"))
        if len(_known) > _MOST_KNOWN:
            _known.clear()
        _known[pid] = (seen.started, time.monotonic() + KNOWN_S)
        return seen

    def variable(pid: int, name: str, part: str) -> str | None:
        """The variable *name* of its environment; "" where it has none with *part* in it.

        None where there is no environment: it is just starting another program, has ended, or is
        none of a user's.
        """
        try:
            environ = _read(f"/proc/{pid}/environ")
        except PermissionError:  # another user's, and so it stays
            return ""
        if part.encode() in environ:  # rarely
            for setting in environ.split(b"\0"):
                key, _, value = setting.partition(b"=")
                if key == name.encode():
                    return value.decode(errors="replace")
        return "" if environ else None

    def limit_of(pid: int) -> int:
        """The hard limit that :func:`set_limit` sets; 0 where it cannot be seen."""
        try:
            return resource.prlimit(pid, resource.RLIMIT_RTTIME)[1]
        except (OSError, ValueError):  # it has ended, or is another user's
            return 0

    def set_limit(pid: int, value: int) -> None:
        """Give *pid* a limit of *value*, if it has none."""
        with suppress(OSError, ValueError):  # it has ended, or the system refuses
            if resource.prlimit(pid, resource.RLIMIT_RTTIME)[1] == resource.RLIM_INFINITY:
                resource.prlimit(pid, resource.RLIMIT_RTTIME, (value, value))

    def _read(path: str) -> bytes:
        """All of it; empty for a process that has ended."""
        # "Too many open files", say, does not mean that there is none. A file object, since a bare
        # descriptor could be left open by a Ctrl-C.
        with suppress(FileNotFoundError, ProcessLookupError), io.FileIO(path) as file:
            data = block = file.read(_BLOCK_BYTES)
            while len(block) == _BLOCK_BYTES:  # less is the end
                block = file.read(_BLOCK_BYTES)
                data += block
            return data
        return b""

else:

    def pids() -> list[int]:
        import psutil

        return psutil.pids()

    def look_at(pid: int) -> Seen | None:
        import psutil

        with suppress(psutil.Error, ProcessLookupError, PermissionError):
            process = psutil.Process(pid)
            parent = process.parent()  # None where the pid is a later process's by now
            session = os.getsid(pid) if hasattr(os, "getsid") else pid
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            return Seen(parent.pid if parent else 0, session, 0, is_alive)
        return None

    def variable(pid: int, name: str, part: str) -> str | None:
        import psutil

        with suppress(psutil.Error):  # ended, or another user's
            return psutil.Process(pid).environ().get(name, "")
        return None

    def limit_of(pid: int) -> int:
        return 0

    def set_limit(pid: int, value: int) -> None:
        pass
