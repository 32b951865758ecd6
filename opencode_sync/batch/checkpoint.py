"""Finished jobs on disk, one line of JSON each, found again by key.

    write(entries) --> lines at the end of the file, synced       (a line: see core.records)
    take_key(job) ---> its key in the file --find()--> the result or error as it was

In memory are only the keys and where their lines begin. A line is complete and synced, or it is cut
off by the next batch that opens the file; one that is damaged otherwise is skipped. One batch
writes: it locks ``PATH.lock``, which stays behind, and the file itself, which may have other names.

A job with a key is found by it, any other one by its fingerprint: see batch.fingerprint.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import threading
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..core.errors import OpenCodeConfigError, OpenCodeError
from ..core.limits import Spent
from ..core.records import (
    Entry,
    Line,
    end_of,
    failure_of,
    head_of,
    is_unfinished,
    line_of,
    lines_in,
    parsed,
    replacing,
    respent,
)
from ..core.request import OnMismatch
from ..core.result import RunResult
from ..core.schema import OutputSchema, SchemaMismatch
from ..core.text import count
from .fingerprint import Identity

if TYPE_CHECKING:
    from filelock import BaseFileLock

_log = logging.getLogger("opencode_sync")

# Errors of systems that cannot sync a directory: network file systems, or a directory that may be
# written and not read. Its entry is then as safe as that system makes it.
_NOT_SYNCED = {
    *(errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF),
    *(errno.EACCES, errno.EPERM),
}
# An entry of the index: where the line begins, times 8, and these. One int for each of a million
# jobs takes a fifth of what an object would.
_FAILED, _UNFINISHED, _TAKEN = 1, 2, 4
_READ_BYTES = 8192  # at once; most lines are shorter
_MOST_NAMED = 5  # damaged lines in a warning


class Checkpoint:
    """The finished jobs of a batch, in a file that outlives it."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        output: OutputSchema | None = None,
        on_mismatch: OnMismatch = "raise",
        *,
        retry_failed: bool = True,
    ) -> None:
        """Open *path*, or make it.

        Args:
            output: Schema that the values in the file are validated with when they are loaded.
            on_mismatch: What to do with a job that the file has with another prompt, workspace or
                other settings.
            retry_failed: Do not find failed jobs.

        Raises:
            OpenCodeConfigError: It is in use, or not a checkpoint.
        """
        # Links are resolved, so that two names of one file have one lock.
        self._path = Path(os.path.realpath(os.path.expanduser(path)))
        self._named = os.path.abspath(os.path.expanduser(path))
        self._output = output
        self._on_mismatch = on_mismatch
        self._not_found = _UNFINISHED | (_FAILED if retry_failed else 0)
        self._index: dict[str, int] = {}
        self._taken: set[str] = set()  # keys of jobs of this batch that are not in the index
        self._repeats: dict[str, int] = {}  # how many jobs have one fingerprint, from two up
        self._superseded = 0  # lines whose key has a later line
        self._damaged: set[int] = set()  # offsets of lines
        self._answers: dict[str, int] = {}  # those of the last ones of keys that failed since
        self._settings: list[Any] = []  # of the batches that wrote the file, the last first
        self.spent = Spent()  # by earlier batches
        # Held by close() too, after which the descriptor's number may be another file's.
        self._writing = threading.Lock()
        try:
            with contextlib.ExitStack() as undo:
                self._lock = self._acquire()
                undo.callback(self._lock.release)
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                undo.callback(_unlock_and_close, self._descriptor)
                self._identity = os.fstat(self._descriptor)
                if not _locked(self._descriptor):
                    raise self._in_use()
                self._check_in_place()
                self._sync_directory()  # or a power cut could lose the new file's name
                self._size = self._scan()
                # Whether a job of this batch is in the file, as far as there is one in it.
                self.has_matched = not self._index
                undo.pop_all()
        except OSError as error:
            raise self._refusal(error.strerror or str(error)) from error
        self._is_open = True

    @property
    def is_of_earlier_version(self) -> bool:
        """Whether it has lines that an earlier version wrote."""
        return any(isinstance(settings, str) for settings in self._settings)

    def take_key(self, key: str | None, identity: Identity) -> str:
        """Return the key in the file of this batch's next job: its own, or one made for it.

        Raises:
            OpenCodeConfigError: If *key* was taken before, or cannot be written.
        """
        if key is None:
            key = self._key_of(identity)
        elif self._is_taken(key):
            raise OpenCodeConfigError(f"two jobs have the key {key!r}: a checkpoint needs one each")
        else:
            try:
                key.encode()
            except UnicodeEncodeError:
                raise OpenCodeConfigError(f"the key {key!r} cannot be encoded as UTF-8") from None
        if key in self._index:
            self._index[key] |= _TAKEN
        else:
            self._taken.add(key)
        return key

    def _key_of(self, identity: Identity) -> str:
        """The key of a job without one: where it is in the file, else its fingerprint."""
        own, n = identity.fingerprint, 1
        if self._is_taken(own):  # the same prompt once more
            n = self._repeats[own] = self._repeats.get(own, 1) + 1
        known = [own, *map(identity.under, identity.earlier)]
        if self._on_mismatch != "rerun":
            # With other settings of the batch; earlier versions did not write a job's own ones.
            others = (each for each in self._settings if isinstance(each, dict) or not identity.own)
            known += map(identity.under, others)
        keys = [each if n == 1 else f"{each}#{n}" for each in known]
        # One that is to be run again gets a line of its own: the next batch may know no other key.
        found = (key for key in keys if not self._index.get(key, _UNFINISHED) & self._not_found)
        key = next(found, keys[0])
        if key != keys[0]:
            self._taken.add(own)
        return key

    def _is_taken(self, key: str) -> bool:
        return key in self._taken or bool(self._index.get(key, 0) & _TAKEN)

    def find(self, key: str, identity: Identity) -> RunResult | OpenCodeError | None:
        """The end of the job *key*, or None if it is to be run, such as after it was stopped.

        Raises:
            OpenCodeConfigError: The file has *key* with another prompt, workspace or settings; or
                with a value that no longer fits the schema.
            OpenCodeError: The file cannot be read any more.
        """
        place = self._index.get(key)
        if place is None:
            return None
        self.has_matched = True
        same = [identity.fingerprint, *map(identity.under, identity.earlier)]
        is_superseded = bool(place & self._not_found)
        if is_superseded:
            # A job that failed when it was to be run again with other settings.
            failed = self._entry(place) if key in self._answers else None
            if failed is None or failed["fingerprint"] in same:
                return None
            place = self._answers[key] * 8
        entry = self._entry(place)
        if entry is None or (entry["failure"] is not None and self._not_found & _FAILED):
            return None
        if entry["fingerprint"] not in same:
            differences = identity.differences(entry)
            if differences and self._on_mismatch == "rerun":
                return None
            if differences and self._on_mismatch == "raise":
                raise self._mismatch(" and another ".join(differences))
        try:
            end = end_of(entry)
        except (TypeError, ValueError, AttributeError, KeyError) as error:  # edited by hand
            self._tell_damaged(place, error)
            return None
        if self._output is not None and isinstance(end, RunResult):
            try:
                end._json, end.parsed = end.parsed, self._output.validate(end.parsed)
            except SchemaMismatch as mismatch:
                if self._on_mismatch == "rerun":
                    return None
                raise self._mismatch(f"schema, which its value does not fit: {mismatch}") from None
        if is_superseded:
            self._restore(key)
        return end

    def warn_unmatched(self, n_jobs: int) -> None:
        """Warn that none of the first *n_jobs* of this batch is in the file, unless it is empty."""
        has_matched, self.has_matched = self.has_matched, True  # once is enough
        if self._index and not has_matched:
            _log.warning(
                "checkpoint %s has %s, and not one of the first %s of this batch, which run: is "
                "it the file of other prompts, workspaces or settings?",
                *(self._path, count(len(self._index), "job"), count(n_jobs, "job")),
            )

    def has_failed(self, key: str) -> bool:
        """Whether the file has *key* with a failure."""
        return bool(self._index.get(key, 0) & _FAILED)

    def write(self, entries: Sequence[Entry]) -> None:
        """Append *entries*; returns when they are on the disk.

        Raises:
            OpenCodeError: The disk is full or broken, or the file was removed or replaced; then
                none of them is in the file.
        """
        entries = [self._with_earlier_tries(entry) for entry in entries]
        lines = [line_of(entry) for entry in entries]
        with self._writing:
            try:
                self._append(b"".join(lines))
            except OSError as error:
                raise OpenCodeError(
                    f"checkpoint {str(self._path)!r}: {error.strerror}; "
                    f"{len(entries)} finished jobs were not saved: fix that, and run the batch "
                    "again"
                ) from error
            for entry, line in zip(entries, lines, strict=True):
                failure = failure_of(entry.end) if isinstance(entry.end, OpenCodeError) else None
                self._note(entry.key, self._size, failure is not None, is_unfinished(failure))
                self._size += len(line)

    def _restore(self, key: str) -> None:
        """Append the answer to *key* that a failure has superseded: its last line counts."""
        line = respent(_line_at(self._descriptor, self._answers[key]), self._spent_on(key))
        with self._writing:
            try:
                self._append(line)
            except OSError as error:
                raise OpenCodeError(f"checkpoint {str(self._path)!r}: {error.strerror}") from error
            self._note(key, self._size, False, False)
            self._size += len(line)

    def close(self) -> None:
        """Reduce the file to one line for each job, and unlock it. Idempotent."""
        with self._writing:
            if not self._is_open:
                return
            self._is_open = False
        try:
            if self._superseded:
                self._drop_superseded()
        except OSError as error:  # the file is as good as before, only longer
            _log.warning("checkpoint %s keeps old failures: %s", self._path, error.strerror)
        finally:
            # Not unlocked before: what another batch wrote would be lost with the replaced file.
            _unlock_and_close(self._descriptor)
            self._lock.release()

    # -- the file ----------------------------------------------------------------------------------

    def _acquire(self) -> BaseFileLock:
        from filelock import FileLock, Timeout

        if not self._path.parent.is_dir():  # the lock would make it
            raise self._refusal(f"there is no directory {str(self._path.parent)!r}")
        lock = FileLock(f"{self._path}.lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise self._in_use() from None
        return lock

    def _check_in_place(self) -> None:
        """Raise OSError if the path no longer leads to the file that is open here."""
        try:
            there = os.stat(self._named)
        except (FileNotFoundError, NotADirectoryError):
            raise _not_in_place() from None
        if not os.path.samestat(there, self._identity):
            raise _not_in_place()

    def _scan(self) -> int:
        """Index all lines, and repair the last one; returns the file's size."""
        last: Line | None = None
        settings: dict[bytes, None] = {}  # in the order of their last lines
        n_tokens = 0
        damaged: list[int] = []
        costs = array("d")  # summed exactly, since those of superseded lines are taken off again
        try:
            for last in lines_in(self._lines()):
                head = last.head
                if head is None:
                    if last.data.strip():
                        damaged.append(last.number)
                        self._damaged.add(last.offset)
                    continue
                settings.pop(head.settings, None)
                settings[head.settings] = None
                before = self._spent_on(head.key)
                costs.extend((head.spent.cost, -before.cost))
                n_tokens += head.spent.tokens - before.tokens
                self._note(head.key, last.offset, head.is_failure, head.is_unfinished)
        except ValueError as error:
            raise self._refusal(str(error)) from None
        self.spent = Spent(math.fsum(costs), n_tokens)
        self._settings = [json.loads(each) for each in reversed(settings)]
        if damaged:
            named = ", ".join(map(str, damaged[:_MOST_NAMED]))
            more = len(damaged) - _MOST_NAMED
            which = f"line{'s' * (len(damaged) > 1)} {named}" + f" and {more:,} more" * (more > 0)
            _log.warning("checkpoint %s: %s", self._path, f"{which}: damaged, and skipped")
        size = 0 if last is None else last.offset + len(last.data)
        if size < os.fstat(self._descriptor).st_size:
            _log.warning("checkpoint %s: the last line was cut off, and is removed", self._path)
            os.ftruncate(self._descriptor, size)
            os.fsync(self._descriptor)
        elif last is not None and not last.data.endswith(b"\n"):  # complete nevertheless
            _write_all(self._descriptor, b"\n")
            size += 1
        return size

    def _spent_on(self, key: str) -> Spent:
        """What all tries at the job *key* have spent."""
        place = self._index.get(key)
        # Not by its entry: a line whose end is damaged was paid for too.
        head = None if place is None else head_of(self._line(place))
        return Spent() if head is None else head.spent

    def _with_earlier_tries(self, entry: Entry) -> Entry:
        return entry._replace(before=self._spent_on(entry.key))

    def _lines(self) -> Iterator[bytes]:
        with self._reading() as file:
            yield from file

    def _reading(self) -> IO[bytes]:
        """Open the file again, to read; raise OSError if its name is another file's by now."""
        file = open(self._path, "rb")
        if os.path.samestat(os.fstat(file.fileno()), self._identity):
            return file
        file.close()
        raise _not_in_place()

    def _append(self, data: bytes) -> None:
        if not self._is_open:
            raise OSError(errno.EBADF, "it is closed")
        try:
            _write_all(self._descriptor, data)
            os.fsync(self._descriptor)
            self._check_in_place()
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise

    def _note(self, key: str, offset: int, is_failure: bool, is_unfinished: bool) -> None:
        known = self._index.get(key)
        self._superseded += known is not None
        if not is_failure:
            self._answers.pop(key, None)
        elif known is not None and not known & _FAILED:
            self._answers[key] = known // 8
        is_taken = key in self._taken if known is None else known & _TAKEN
        self._taken.discard(key)
        flags = _FAILED * is_failure | _UNFINISHED * is_unfinished | _TAKEN * bool(is_taken)
        self._index[key] = offset * 8 | flags

    def _entry(self, place: int) -> dict[str, Any] | None:
        """Read the line of an entry of the index; None, and a warning, if it is damaged."""
        if (entry := parsed(self._line(place))) is None:
            self._tell_damaged(place)
        return entry

    def _line(self, place: int) -> bytes:
        try:
            # Of the file that was opened, whatever has its name by now.
            return _line_at(self._descriptor, place // 8)
        except OSError as error:
            raise OpenCodeError(f"checkpoint {str(self._path)!r}: {error.strerror}") from error

    def _tell_damaged(self, place: int, error: Exception | None = None) -> None:
        why = "" if error is None else f" ({error})"
        number, offset, end = 1, 0, place // 8
        # In pieces, and of the file that was opened: it may be large, or have been replaced since.
        while data := os.pread(self._descriptor, min(2**20, end - offset), offset):
            number, offset = number + data.count(b"\n"), offset + len(data)
        _log.warning(
            "checkpoint %s: line %d is damaged%s: its job is run again", self._path, number, why
        )

    def _drop_superseded(self) -> None:
        """Keep only the last line of each key: a failure goes when a later run has succeeded.

        Its last answer stays until there is a newer one. Damaged lines stay too: somebody may be
        able to repair them.
        """
        if os.stat(self._path).st_nlink > 1:  # its other names would keep the old file
            return
        kept = {place // 8 for place in self._index.values()} | self._damaged
        kept.update(self._answers.values())
        offset = 0
        with replacing(self._path, 0o600) as file:
            for line in self._lines():
                if offset in kept:
                    file.write(line)
                offset += len(line)
        self._sync_directory()

    def _sync_directory(self) -> None:
        try:
            descriptor = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in _NOT_SYNCED:
                raise

    def _in_use(self) -> OpenCodeConfigError:
        return OpenCodeConfigError(
            f"checkpoint {str(self._path)!r} is being written by another batch: wait for that "
            "one, or name another file"
        )

    def _mismatch(self, what: str) -> OpenCodeConfigError:
        return self._refusal(
            f"it has this job with another {what}: on_mismatch 'rerun' runs it again, 'keep' takes "
            "what the file has; or use another file, or another key"
        )

    def _refusal(self, why: str) -> OpenCodeConfigError:
        return OpenCodeConfigError(f"checkpoint {str(self._path)!r}: {why}")


def _line_at(descriptor: int, offset: int) -> bytes:
    """The line of a file that begins at *offset*."""
    pieces: list[bytes] = []
    while piece := os.pread(descriptor, _READ_BYTES, offset):
        end = piece.find(b"\n") + 1
        pieces.append(piece[:end] if end else piece)
        if end:
            break
        offset += len(piece)
    return b"".join(pieces)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _not_in_place() -> OSError:
    return OSError(errno.ESTALE, "the file was removed or replaced while it was in use")


def _locked(descriptor: int) -> bool:
    """Lock the file itself; False if another process has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks: the lock of the name has to do
        pass
    return True


def _unlock_and_close(descriptor: int) -> None:
    # A forked child may have the descriptor too: closing ours alone would leave the lock held.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
