"""What crashed programs have left on this machine.

    Leftovers.find() --> processes, paths --> remove()

A run's processes and its temporary directories are marked with the pid of its Python process. If
that process has ended, they are leftovers. The watchdog, where it works, leaves none.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.text import one_line
from .command import managed_root
from .data_dirs import TEMPORARY_PREFIX, pid_space
from .install import SCRATCH_PREFIX
from .tree import MARKER

if TYPE_CHECKING:
    import psutil

GRACE_S = 2.0  # between asking a process to end and killing it

_TEMPORARY = re.compile(re.escape(TEMPORARY_PREFIX) + r"(?P<pid>\d+)-(?P<space>\w+)-")


@dataclass
class Leftovers:
    """What belongs to a Python process that has ended.

    Attributes:
        processes: Tools and OpenCode itself; also those that ``keep_background`` left on purpose.
        paths: Temporary directories and files, and interrupted installs.
    """

    processes: list[psutil.Process] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)

    @classmethod
    def find(cls) -> Leftovers:
        return cls(list(_processes()), [*_temporary(), *_installs()])

    def __bool__(self) -> bool:
        return bool(self.processes or self.paths)

    def __str__(self) -> str:
        things = [f"process {process.pid} ({_name(process)})" for process in self.processes]
        return one_line(", ".join([*things, *map(str, self.paths)]), 1_000)

    def remove(self) -> None:
        """End the processes and remove the directories, as far as that can be done."""
        import psutil

        left = self.processes
        for signal in (psutil.Process.terminate, psutil.Process.kill):
            for process in left:
                with suppress(psutil.Error):  # ended by itself, or another user's
                    signal(process)
            left = psutil.wait_procs(left, timeout=GRACE_S)[1]
        for path in self.paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):  # gone by now, or not to be removed
                    path.unlink()


def _name(process: psutil.Process) -> str:
    import psutil

    try:
        return process.name()  # the command line could tell a secret
    except psutil.Error:
        return "ended by now"


def _processes() -> Iterator[psutil.Process]:
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error, PermissionError):  # ended by now, or another user's
            # A run in a run has the outer one's token first; that one would stop it too.
            owner = process.environ().get(MARKER, "").partition("/")[0].partition("-")[0]
            is_ours = owner.isdigit() and process.pid != os.getpid() and _counts_as_we(process.pid)
            if is_ours and not _lived_at(int(owner), process.create_time()):
                yield process


def _counts_as_we(pid: int) -> bool:
    """Whether *pid* is in our pid namespace: in another one, an owner's pid means nothing here."""
    if not os.path.isdir("/proc/self/ns"):
        return True
    return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")


def _temporary() -> Iterator[Path]:
    for path in Path(tempfile.gettempdir()).glob(f"{TEMPORARY_PREFIX}*"):
        name = _TEMPORARY.match(path.name)
        with suppress(FileNotFoundError):
            there = path.lstat()
            # Another user's are not our business.
            is_ours = there.st_uid == os.getuid()
            # A container that shares the directory has its own processes, with the same pids.
            is_ours = is_ours and name is not None and name["space"] == pid_space()
            if name and is_ours and not _lived_at(int(name["pid"]), there.st_mtime):
                yield path


def _installs() -> Iterator[Path]:
    from filelock import FileLock, Timeout

    root = managed_root()
    if not (found := list(root.glob(f"{SCRATCH_PREFIX}*"))):
        return
    with suppress(Timeout), FileLock(root / ".lock", timeout=0):
        yield from found


def _lived_at(pid: int, instant: float) -> bool:
    """Whether the process that has *pid* now had it already at *instant*, seconds since 1970."""
    import psutil

    try:
        return psutil.Process(pid).create_time() <= instant + 1  # clocks tick coarsely
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
