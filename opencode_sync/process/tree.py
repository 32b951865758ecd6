"""The processes of a run: marked in their environment, found by the mark, and stopped.

    opencode        OPENCODE_SYNC_RUN=A       set by us: chain()
      tool          OPENCODE_SYNC_RUN=A       inherited, through setsid and double forks too
        opencode    OPENCODE_SYNC_RUN=A/B     a tool that uses opencode_sync itself
      tool          a resource limit of A's   env -i: Linux hands it down all the same, see mark()

OpenCode's end is not its tools' end: they have sessions of their own and go on under pid 1, where a
walk over parents does not find them; the mark does. What bears A is stopped with A, so an outer run
takes its inner ones along. A token has the form PROCESS.N; PROCESS alone stands for all runs of one
Python process.

Out of reach is a tool that was handed to a service or a container, and one of another user, if we
are not root. Where there are no such limits (all but Linux), also a tool that cleans its
environment (or writes over it, as some daemons do to set their title) and outlives both its parent
and the leader of its session.

Also loaded without the package, by the watchdog's process: imports nothing else of ours.

The system's processes, as one look shows them: parent, session, age, and one variable.

    pids() --> is_older(pid, since)? --> look_at(pid) --> Seen
                                         variable(pid, name, part) --> its value, "" or None
                                         limit_of(pid) --> a number that it was given, or 0

Knows processes; nothing of runs, their marks, or signals. Also loaded without the package, by the
watchdog's process.
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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import psutil

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


_log = logging.getLogger("opencode_sync")

MARKER = "OPENCODE_SYNC_RUN"
GRACE_S = 1.0  # between asking and killing
BOUND_S = 4.5  # on a whole stop(); what is killed is gone within milliseconds
FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.1
# A process shows no environment for the moment in which it starts another program, and what ends
# after pids() may have forked before. A look that met nothing of the kind is believed; else it
# takes two that find nothing, a pause apart.
QUIET_LOOKS = 2


def process_token() -> str:
    """The token of all runs of this Python process; a forked child has one of its own."""
    return _process_token


def run_token() -> str:
    """A new token, for one run."""
    set_aside()
    return f"{_process_token}.{next(_run_numbers)}"


def chain(token: str, env: Mapping[str, str]) -> str:
    """The value of the marker for a child whose environment would else be *env*."""
    outer = env.get(MARKER)
    return f"{outer}/{token}" if outer else token


def belongs(mark: str, token: str) -> bool:
    """Whether *mark*, a value of the marker, says that its process is one of *token*'s."""
    return any(part == token or part.startswith(f"{token}.") for part in mark.split("/"))


def mark(pid: int, token: str) -> None:
    """Mark our child *pid*, just started, and all that it will start with *token* once more.

    Linux hands resource limits down through every fork and exec, whatever becomes of environment,
    parent and session. The one for real-time processes that do not sleep is unlimited nearly
    everywhere, is touched by next to nobody, and a limit of 100,000 years changes nothing. One that
    is set already stays: it is an outer run's, or somebody's for a reason.
    """
    set_limit(pid, _limits(token)[0])


def _limits(token: str) -> range:
    """The limits that processes of *token* may bear; empty where it is not a token."""
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
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def find(token: str) -> list[psutil.Process]:
    """All living processes that bear *token*, except this one. 1 ms where there are 100."""
    limits = _limits(token)
    bearing = (
        pid
        for pid in pids()
        if (limit_of(pid) in limits and (seen := look_at(pid)) is not None and seen.is_alive)
        or belongs(variable(pid, MARKER, token) or "", token)
    )
    return [process for pid in bearing if pid != os.getpid() and (process := _process(pid))]


Sign = Callable[[int], "bool | None"]
"""Whether a process is ours; None where it cannot be told for the moment."""


class Stopped(NamedTuple):
    """What :func:`stop` did.

    Attributes:
        asked: How many processes it found.
        left: Those of them that could not be ended.
    """

    asked: int
    left: list[psutil.Process]


def born(pid: int) -> int:
    """When our child *pid*, not yet reaped, was started; 0 where that cannot be had."""
    with suppress(OSError):  # no descriptor left
        if (seen := look_at(pid)) is not None:
            return seen.started
    return 0


def stop(
    token: str,
    *,
    roots: Iterable[int] = (),
    since: int = 0,
    spare: Collection[str] = (),
    grace_s: float | None = None,
    bound_s: float | None = None,
) -> Stopped:
    """End what bears *token*, with all descendants.

    All are asked (SIGTERM), and after the grace what is left is killed, until nothing is found any
    more. An obedient tree takes some 20 ms. From any thread, in a finaliser too; takes no lock. If
    it is interrupted (by a second Ctrl-C), it kills at once, then raises. Zombies count as gone:
    reaping is their parents' business.

    Args:
        roots: Pids of our own children of which descendants count whatever their environment;
            one that has been reaped is ignored, even if the pid is another process's now.
        since: When the first that bears the token was started, as :func:`born` tells; what is
            older is passed over. 0 for all.
        spare: Tokens of runs under *token* to leave alone.
        grace_s: Seconds between asking and killing; None for ``GRACE_S``.
        bound_s: Seconds for all; None for ``BOUND_S``.
    """
    tree = Tree(_by_mark(token, spare), token, roots=tuple(roots), since=since)
    return tree.stop(grace_s=grace_s, bound_s=bound_s)


def stop_strays(token: str) -> Stopped:
    """Stop what has lost its parent and all signs of *token* but the limit, with all descendants.

    Of a server's processes these are what no session can be told for: a tool cleaned their
    environment, and its shell has ended.
    """
    return Tree(_by_limit_alone(token), token).stop()


def _by_mark(token: str, spare: Collection[str]) -> Sign:
    """Whether a process bears *token*, and none that is to be spared."""
    limits, spared = _limits(token), [_limits(run) for run in spare]

    def bears(pid: int) -> bool | None:
        if (limit := limit_of(pid)) in limits:
            return not any(limit in run for run in spared)
        mark = variable(pid, MARKER, token)
        if mark is None:
            return None
        return belongs(mark, token) and not any(belongs(mark, run) for run in spare)

    return bears


def _by_limit_alone(token: str) -> Sign:
    limits = _limits(token)

    def is_stray(pid: int) -> bool | None:
        if limit_of(pid) not in limits or (seen := look_at(pid)) is None:
            return False
        # An empty environment reads as one that is not there for the moment.
        return limit_of(seen.parent) not in limits and not variable(pid, MARKER, token)

    return is_stray


class Tree:
    """Processes that bear a sign, and their descendants, as far as they have been seen.

    A process that was seen once is remembered: with its parent's death it may lose the only sign
    that it is ours. psutil knows it by pid and start time, so a signal goes to no other.
    """

    def __init__(
        self, sign: Sign, label: str, *, roots: Collection[int] = (), since: int = 0
    ) -> None:
        """For *roots* and *since*, see :func:`stop`.

        Args:
            label: For log lines.
        """
        self._sign = sign
        self._label = label
        self._roots = roots
        self._since = since
        self._is_clear = False  # whether the last look can have missed nothing
        self._known: dict[int, psutil.Process] = {}
        self._denied: set[psutil.Process] = set()

    @classmethod
    def of(cls, token: str) -> Tree:
        """Find what bears *token*, and remember it."""
        tree = cls(_by_mark(token, ()), token)
        tree._look(on_sight=_nothing)
        return tree

    def stop(self, *, grace_s: float | None = None, bound_s: float | None = None) -> Stopped:
        """Stop all of it; see :func:`stop`."""
        import psutil

        started = time.monotonic()
        grace_end = started + (GRACE_S if grace_s is None else grace_s)
        deadline = started + (BOUND_S if bound_s is None else bound_s)
        try:
            left = self.signal_until_gone(psutil.Process.terminate, min(grace_end, deadline))
            if left:
                left = self.signal_until_gone(psutil.Process.kill, deadline)
        except BaseException:
            self.signal_until_gone(psutil.Process.kill, deadline)
            raise
        for process in left:
            _log.warning("process %d of run %s cannot be ended", process.pid, self._label)
        return Stopped(self.found, left)

    @property
    def found(self) -> int:
        return len(self._known)

    def signal_until_gone(
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
            _log.debug("run %s: %s %d (%s)", self._label, send.__name__, process.pid, name)
            if process.status() == psutil.STATUS_STOPPED:
                process.resume()  # it does not see the signal before
        except psutil.NoSuchProcess:
            pass  # ended by itself
        except psutil.AccessDenied:
            self._denied.add(process)

    def _look(self, on_sight: Callable[[psutil.Process], None]) -> list[psutil.Process]:
        """All that live now: by mark, by root, by memory, and what hangs below these.

        Args:
            on_sight: Called at once with each that bears the mark and whose parent does not: what
                forks and ends again and again would be gone by the end of the look. Others wait
                for their parents: a shell whose command ended before it would begin the next one.
        """
        self._is_clear = True
        kin, marked = self._kin(on_sight)
        us = os.getpid()
        # A root that is alive and not our child has been reaped, and its pid given away.
        heads = {root for root in self._roots if root not in kin or kin[root].parent == us}
        kin.pop(us, None)
        heads |= {pid for pid in self._known if pid not in kin}
        ours = (heads & kin.keys()) | (marked & kin.keys())
        ours |= {pid for pid, process in self._known.items() if pid in kin and process.is_running()}
        # The members of a session are taken for its leader's children, after its end too: what is
        # ours began it, and what was forked behind our back may have lost all other signs.
        below: dict[int, list[int]] = defaultdict(list)
        for pid, seen in kin.items():
            below[seen.parent].append(pid)
            below[seen.session].append(pid)
        unvisited = list(ours | heads)
        while unvisited:
            for pid in below.pop(unvisited.pop(), ()):
                if pid not in ours:
                    ours.add(pid)
                    unvisited.append(pid)
        return [process for pid in sorted(ours) if (process := self._remember(pid))]

    def _kin(self, on_sight: Callable[[psutil.Process], None]) -> tuple[dict[int, Seen], set[int]]:
        """All that live and are young enough to be ours, and those of them that bear the mark."""
        kin, marked = {}, set()
        us = os.getpid()
        # Newest first: what forks and ends again and again is caught at its latest.
        for pid in sorted(pids(), reverse=True):
            if is_older(pid, self._since):
                continue
            seen = look_at(pid)
            if seen is not None and seen.started < self._since:
                continue
            if seen is not None and seen.is_alive:
                kin[pid] = seen
                if pid != us and self._is_marked(pid):
                    marked.add(pid)
                    process = self._remember(pid)
                    if process is not None and not self._is_marked(seen.parent):
                        on_sight(process)
            else:
                self._is_clear = False
        return kin, marked

    def _is_marked(self, pid: int) -> bool:
        bears = self._sign(pid)
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


def _nothing(process: psutil.Process) -> None:
    pass
