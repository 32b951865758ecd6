"""The processes of a run: marked when started, found by the mark, and stopped.

    opencode        OPENCODE_SYNC_RUN=A       set by us: chain()
      tool          OPENCODE_SYNC_RUN=A       inherited, through setsid and double forks too
        opencode    OPENCODE_SYNC_RUN=A/B     a tool that uses opencode_sync itself
      tool          a resource limit of A's   env -i: Linux passes it on, see mark()

When OpenCode ends, its tools do not: they have sessions of their own and go on below pid 1, where
a walk over parents does not find them; the mark does. A process with A's mark is stopped with A,
also if it belongs to a run inside of A. A token has the form PROCESS.N; PROCESS alone means all
runs of one Python process.

Out of reach is a tool that was handed to a service or a container, and one of another user unless
we are root. Where there are no such limits (all systems but Linux), also a tool that cleans its
environment (or overwrites it, as some daemons do to set their title) and outlives both its parent
and the leader of its session.

The watchdog's process loads it without the package, so it imports no other module of it.
"""

from __future__ import annotations

import errno
import io
import itertools
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import psutil

MARKER = "OPENCODE_SYNC_RUN"
GRACE_S = 1.0  # between asking and killing
BOUND_S = 4.5  # on a whole stop(); what is killed is gone within milliseconds
FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.1
# A process shows no environment for the moment in which it starts another program, and one that
# ends after it was listed may have forked before. A look that met nothing of the kind is believed;
# otherwise it takes two that find nothing, a pause apart.
QUIET_LOOKS = 2

_log = logging.getLogger("opencode_sync")

# --- tokens and marks ----------------------------------------------------------------------------


def process_token() -> str:
    """The token of all runs of this Python process; a forked child has its own."""
    return _process_token


def run_token() -> str:
    """A new token, for one run."""
    _set_aside()
    return f"{_process_token}.{next(_run_numbers)}"


def chain(token: str, env: Mapping[str, str]) -> str:
    """The value of the marker for a child whose environment would otherwise be *env*."""
    outer = env.get(MARKER)
    return f"{outer}/{token}" if outer else token


def belongs(mark: str, token: str) -> bool:
    """Whether *mark*, a value of the marker, says that its process is one of *token*'s."""
    return any(part == token or part.startswith(f"{token}.") for part in mark.split("/"))


def mark(pid: int, token: str) -> Seen | None:
    """Mark our child *pid*, just started, and all that it will start with *token* once more.

    Linux hands resource limits down through every fork and exec, whatever becomes of environment,
    parent and session. The one for real-time processes that do not sleep is unlimited nearly
    everywhere, almost nobody touches it, and a limit of 100,000 years changes nothing. A limit that
    is set already stays: it is an outer run's, or somebody's for a reason.

    Returns:
        The child, as the root of :func:`stop`; None if there is no descriptor left to look at it.
    """
    if sys.platform.startswith("linux"):
        import resource

        with suppress(OSError, ValueError):  # it has ended, or the system refuses
            if _limit_of(pid) == resource.RLIM_INFINITY:
                limit = _limits(token)[0]
                resource.prlimit(pid, resource.RLIMIT_RTTIME, (limit, limit))
    with suppress(OSError):
        return _look_at(pid)
    return None


def _limits(token: str) -> range:
    """The limits that processes of *token* may have; empty if it is not a token."""
    process, _, number = token.partition(".")
    with suppress(ValueError):
        first = _LEAST_LIMIT + (int(process.partition("-")[2][:10], 16) << _RUN_BITS)
        if not number:
            return range(first, first + (1 << _RUN_BITS))
        return range(limit := first + int(number) % (1 << _RUN_BITS), limit + 1)
    return range(0)


_LEAST_LIMIT = 1 << 62  # microseconds
_RUN_BITS = 20


def _renew() -> None:
    global _process_token, _run_numbers
    _process_token = f"{os.getpid()}-{os.urandom(8).hex()}"
    _run_numbers = itertools.count(1)


_process_token: str
_run_numbers: Iterator[int]
_renew()
os.register_at_fork(after_in_child=_renew)

# --- looking at processes ------------------------------------------------------------------------

# Looking opens files, and a program that has no descriptor left for it is just the one whose runs
# must be stopped: one is set aside.
_reserve: list[int] = []  # at most one, unless two threads add theirs at once


def _set_aside() -> None:
    """Keep a descriptor for later looks, and import what they need."""
    import psutil  # noqa: F401

    if not _reserve:
        with suppress(OSError):
            _reserve.append(os.open(os.devnull, os.O_RDONLY))


def descriptors() -> list[int]:
    """File descriptors that are kept until the interpreter ends."""
    return list(_reserve)


def _pids() -> list[int]:
    """Pids of all processes. One that starts during the scan may be missed."""
    import psutil

    try:
        return psutil.pids()
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        with suppress(IndexError):  # another thread has taken it
            os.close(_reserve.pop())
        return psutil.pids()


class Seen(NamedTuple):
    """A process at one moment.

    Attributes:
        parent, session: Their pids.
        started: The system's ticks at its start, 0 where they are unknown. A child's are never less
            than its parent's.
        is_alive: False for a zombie.
    """

    pid: int
    parent: int
    session: int
    started: int
    is_alive: bool


# What has ended, or is hidden from us. Other errors are raised: "too many open files", say, does
# not mean that there is no process.
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)

if sys.platform.startswith("linux"):

    def _look_at(pid: int) -> Seen | None:
        """None for what has ended, or is hidden from us."""
        # psutil would read this file three times, between which the process may change, and takes
        # five times as long, for all processes of the machine at each end of a run. Its start times
        # change with the machine's clock; ticks do not.
        with suppress(*_GONE), io.FileIO(f"/proc/{pid}/stat") as file:
            # "PID (NAME) STATE PARENT GROUP SESSION ...", and a name may have ")" and spaces; the
            # time of the start is the 22nd field.
            fields = file.read(4096).rpartition(b")")[2].split(None, 20)
            is_alive = fields[0] not in (b"Z", b"X")
            return Seen(pid, int(fields[1]), int(fields[3]), int(fields[19]), is_alive)
        return None

    def _environ_of(pid: int) -> dict[bytes, bytes]:
        # psutil takes six times as long, and ends at the first empty entry.
        with io.FileIO(f"/proc/{pid}/environ") as file:
            block = file.readall()
        entries = (entry.partition(b"=") for entry in block.split(b"\0")) if block else ()
        return {name: value for name, _, value in entries}

else:

    def _look_at(pid: int) -> Seen | None:
        import psutil

        with suppress(psutil.Error, *_GONE):
            process = psutil.Process(pid)
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            return Seen(pid, process.ppid(), os.getsid(pid), 0, is_alive)
        return None

    def _environ_of(pid: int) -> dict[bytes, bytes]:
        import psutil

        try:
            env = psutil.Process(pid).environ()
        except psutil.AccessDenied as error:
            raise PermissionError from error
        except psutil.Error as error:
            raise ProcessLookupError from error
        return {os.fsencode(name): os.fsencode(value) for name, value in env.items()}


def _marker_of(pid: int) -> str | None:
    """The value of the marker; "" where it is not set.

    None where there is no environment: the process is just starting another program, or has ended.
    """
    try:
        env = _environ_of(pid)
    except PermissionError:  # another user's, and it stays so
        return ""
    except (FileNotFoundError, ProcessLookupError):
        return None
    return os.fsdecode(env.get(MARKER.encode(), b"")) if env else None


def _limit_of(pid: int) -> int:
    """The hard limit that :func:`mark` sets; 0 where it cannot be seen."""
    if sys.platform.startswith("linux"):
        import resource

        with suppress(OSError, ValueError):  # it has ended, or is another user's
            return resource.prlimit(pid, resource.RLIMIT_RTTIME)[1]
    return 0


# --- finding and stopping ------------------------------------------------------------------------


class Stopped(NamedTuple):
    """What :func:`stop` did.

    Attributes:
        asked: How many processes it found.
        left: Those of them that could not be ended.
    """

    asked: int
    left: list[psutil.Process]


def find(token: str) -> list[psutil.Process]:
    """All living processes with *token*, except this one."""
    tree = Tree(token)
    bearing = [pid for pid in _pids() if pid != os.getpid() and tree.bears(pid)]
    seen = filter(None, map(_look_at, bearing))
    return [process for each in seen if each.is_alive and (process := _process(each.pid))]


def stop(
    token: str,
    *,
    root: Seen | None = None,
    spare: Collection[str] = (),
    grace_s: float | None = None,
    bound_s: float | None = None,
) -> Stopped:
    """Stop the processes with *token*, and all their descendants.

    All are asked (SIGTERM), and after the grace what is left is killed, until a look finds nothing
    more. An obedient tree takes some 20 ms. May be called in any thread, and in a finaliser; takes
    no lock. If it is interrupted (by a second Ctrl-C), it kills at once, then raises. Zombies count
    as gone: reaping them is up to their parents.

    Args:
        root: Our child that got the token first, as :func:`mark` returned it. Its
            descendants count whatever their environment; what is older than it is passed over. If
            it has ended, what it left in its session counts.
        spare: Tokens of runs under *token* to leave alone.
        grace_s: Seconds between asking and killing; None for ``GRACE_S``.
        bound_s: Seconds for all; None for ``BOUND_S``.
    """
    return Tree(token, root=root, spare=spare).stop(grace_s=grace_s, bound_s=bound_s)


def stop_strays(token: str) -> Stopped:
    """Stop what has lost its parent and all signs of *token* but the limit, with all descendants.

    Of a server's processes, these are the ones that cannot be assigned to a session: a tool cleaned
    their environment, and its shell has ended.
    """
    return Tree(token, only_strays=True).stop()


class Tree:
    """Processes with a token, and their descendants, as far as they have been seen.

    A process that was seen once is remembered: with its parent's death it may lose the only sign
    that it is ours. psutil knows it by pid and start time, so no other process gets its signal.
    """

    def __init__(
        self,
        token: str,
        *,
        root: Seen | None = None,
        spare: Collection[str] = (),
        only_strays: bool = False,
    ) -> None:
        """For *root* and *spare*, see :func:`stop`; for *only_strays*, :func:`stop_strays`."""
        self._token, self._spare, self._only_strays = token, spare, only_strays
        self._limits = _limits(token)
        self._is_clear = False  # whether the last look can have missed nothing
        self._root = root
        self._known: dict[int, psutil.Process] = {}
        self._denied: set[psutil.Process] = set()

    @classmethod
    def of(cls, token: str) -> Tree:
        """Find the processes with *token*, and remember them."""
        tree = cls(token)
        tree._look(on_sight=lambda process: None)
        return tree

    def bears(self, pid: int) -> bool | None:
        """Whether *pid* has the token and is not spared; None if that is unknown for now."""
        limit = _limit_of(pid)
        has_limit = limit in self._limits
        if self._only_strays:
            # An empty environment reads as one that is not there for the moment.
            seen = _look_at(pid) if has_limit else None
            return (
                seen is not None
                and _limit_of(seen.parent) not in self._limits
                and not belongs(_marker_of(pid) or "", self._token)
            )
        if has_limit:
            return not any(limit in _limits(run) for run in self._spare)
        marker = _marker_of(pid)
        if marker is None:
            return None
        return belongs(marker, self._token) and not any(belongs(marker, run) for run in self._spare)

    def stop(self, *, grace_s: float | None = None, bound_s: float | None = None) -> Stopped:
        """Stop all of it; see :func:`stop`."""
        import psutil

        started = time.monotonic()
        grace_end = started + (GRACE_S if grace_s is None else grace_s)
        deadline = started + (BOUND_S if bound_s is None else bound_s)
        try:
            left = self._signal_until_gone(psutil.Process.terminate, min(grace_end, deadline))
            if left:
                left = self._signal_until_gone(psutil.Process.kill, deadline)
        except BaseException:
            self._signal_until_gone(psutil.Process.kill, deadline)
            raise
        for process in left:
            _log.warning("process %d of run %s cannot be ended", process.pid, self._token)
        return Stopped(len(self._known), left)

    def _signal_until_gone(
        self, send: Callable[[psutil.Process], None], end: float
    ) -> list[psutil.Process]:
        """Signal each once, those that appear meanwhile too; return what lives at *end*."""
        signalled: set[psutil.Process] = set()

        def signal(process: psutil.Process) -> None:
            if process not in signalled:
                signalled.add(process)
                self._signal(send, process)

        pause_s = FIRST_PAUSE_S
        quiet_looks = 0
        while True:
            living = self._look(on_sight=signal)
            for process in living:
                signal(process)
            quiet_looks = 0 if living else quiet_looks + 1
            if quiet_looks == QUIET_LOOKS or (quiet_looks and self._is_clear):
                return []
            if time.monotonic() >= end or (living and self._denied.issuperset(living)):
                return living
            time.sleep(pause_s if living else FIRST_PAUSE_S)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _signal(self, send: Callable[[psutil.Process], None], process: psutil.Process) -> None:
        import psutil

        try:
            send(process)
            name = process.name()  # a command line could tell a secret
            _log.debug("run %s: %s %d (%s)", self._token, send.__name__, process.pid, name)
            if process.status() == psutil.STATUS_STOPPED:
                process.resume()  # it does not see the signal before
        except psutil.NoSuchProcess:
            pass  # ended by itself
        except psutil.AccessDenied:
            self._denied.add(process)

    def _look(self, on_sight: Callable[[psutil.Process], None]) -> list[psutil.Process]:
        """All that live now: by mark, by memory, and what hangs below these.

        Args:
            on_sight: Called at once with each that has the mark and whose parent does not: what
                forks and ends again and again would be gone by the end of the look. Others wait
                for their parents: a shell whose command ended before it would begin the next one.
        """
        kin = self._kin(on_sight)
        gone = {pid for pid, known in self._known.items() if pid in kin and not known.is_running()}
        heads = self._known.keys() - gone
        # Where its pid is another process's by now, that process differs in something.
        if self._root is not None and kin.get(self._root.pid, self._root) == self._root:
            heads.add(self._root.pid)
        # The members of a session are taken for its leader's children, after its end too: what is
        # ours began it, and what was forked behind our back may have lost all other signs.
        below: dict[int, list[int]] = defaultdict(list)
        for pid, seen in kin.items():
            below[seen.parent].append(pid)
            below[seen.session].append(pid)
        ours, unvisited = set(heads), list(heads)
        while unvisited:
            for pid in below.pop(unvisited.pop(), ()):
                if pid not in ours:
                    ours.add(pid)
                    unvisited.append(pid)
        listed = sorted(ours & kin.keys())
        living = [process for pid in listed if (process := self._remember(pid))]
        if gone or len(living) < len(listed):
            self._is_clear = False  # what has ended since it was listed may have forked before
        return living

    def _kin(self, on_sight: Callable[[psutil.Process], None]) -> dict[int, Seen]:
        """All that live and are young enough to be ours; remembers those with the mark."""
        self._is_clear = True
        kin: dict[int, Seen] = {}
        us = os.getpid()
        since = 0 if self._root is None else self._root.started
        # Newest first: what forks and ends again and again is caught at its latest.
        for pid in sorted(_pids(), reverse=True):
            seen = _look_at(pid)
            if pid == us or (seen is not None and seen.started < since):
                continue
            if seen is None or not seen.is_alive:
                self._is_clear = False
                continue
            kin[pid] = seen
            if self._is_marked(pid):
                process = self._remember(pid)
                if process is not None and not self._is_marked(seen.parent):
                    on_sight(process)
        return kin

    def _is_marked(self, pid: int) -> bool:
        bears = self.bears(pid)
        if bears is None:
            self._is_clear = False
        return bool(bears)

    def _remember(self, pid: int) -> psutil.Process | None:
        process = self._known.get(pid)
        if not (process and process.is_running()) and (process := _process(pid)):
            self._known[pid] = process
        return process


def _process(pid: int) -> psutil.Process | None:
    import psutil

    with suppress(psutil.Error):  # it has just ended
        return psutil.Process(pid)
    return None
