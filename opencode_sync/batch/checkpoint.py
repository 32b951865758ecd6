"""Finished jobs on disk, one line of JSON each, found again by key.

    write(entries) --> lines at the end of the file, synced       (a line: see core.records)
    find(key) -------> Saved --load()--> the result or error as it was

In memory are only the keys and where their lines begin. A line is complete and synced, or it is cut
off by the next batch that opens the file. One batch writes: it locks ``PATH.lock``, which stays
behind, and the file itself, which may have other names.

A job is found again if its fingerprint is the same: a hash of the prompt, the workspace and the
settings. Passwords, values of variables and whatever a configuration's key calls a secret are left
out before anything is hashed, so a fingerprint reveals none of them, and a new API key does not
make a new job.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ..core.config import RunConfig
from ..core.errors import OpenCodeConfigError, OpenCodeError
from ..core.limits import Spent
from ..core.records import (
    Entry,
    Line,
    end_of,
    failure_of,
    is_unfinished,
    line_of,
    lines_in,
    parsed,
    replacing,
    result_of,
    spent_in,
)
from ..core.result import RunResult
from ..core.schema import OutputSchema, SchemaMismatch
from ..core.secrets import VALUES_ARE_SECRET, is_secret, setting_name

if TYPE_CHECKING:
    from filelock import BaseFileLock

_log = logging.getLogger("opencode_sync")

# Errors of systems that cannot sync a directory: network file systems, or a directory that may be
# written and not read. Its entry is then as safe as that system makes it.
_NOT_SYNCED = {
    *(errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF),
    *(errno.EACCES, errno.EPERM),
}
_DIGITS = 32  # 128 bits: no two of any number of jobs are alike by chance
_USER_IN_URL = re.compile(r"://[^/@\s]*@")


class Saved(NamedTuple):
    """A finished job in the file: where its line begins, and what the index has of it."""

    offset: int
    is_failure: bool
    fingerprint: str
    spent: Spent = Spent()  # on all tries at it
    is_unfinished: bool = False


class Checkpoint:
    """The finished jobs of a batch, in a file that outlives it."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: str,
        output: OutputSchema | None = None,
    ) -> None:
        """Open *path*, or make it.

        Args:
            settings: Fingerprint of the settings that all jobs have in common.
            output: Schema that the values in the file are validated with when they are loaded.

        Raises:
            OpenCodeConfigError: It is in use, damaged, not a checkpoint, or was written with other
                settings.
        """
        # Links are resolved, so that two names of one file have one lock.
        self._path = Path(os.path.realpath(os.path.expanduser(path)))
        self._named = os.path.abspath(os.path.expanduser(path))
        self._settings = settings
        self._output = output
        self._index: dict[str, Saved] = {}
        self._taken: dict[str, int] = {}  # how many jobs of this batch have each key
        self._superseded = 0  # lines whose key has a later line
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
                undo.pop_all()
        except OSError as error:
            raise self._refusal(error.strerror or str(error)) from error
        # By earlier batches.
        self.spent = sum((saved.spent for saved in self._index.values()), Spent())
        self._is_open = True

    def take_key(self, key: str | None, fingerprint: str) -> str:
        """The key of this batch's next job: its own, or one made of its *fingerprint*.

        Raises:
            OpenCodeConfigError: If *key* was taken before, or cannot be written.
        """
        wanted = fingerprint if key is None else key
        taken = self._taken[wanted] = self._taken.get(wanted, 0) + 1
        if key is None:
            return wanted if taken == 1 else f"{wanted}#{taken}"  # the same prompt once more
        if taken > 1:
            raise OpenCodeConfigError(f"two jobs have the key {key!r}: a checkpoint needs one each")
        try:
            key.encode()
        except UnicodeEncodeError:
            raise OpenCodeConfigError(f"the key {key!r} cannot be encoded as UTF-8") from None
        return key

    def find(self, key: str, fingerprint: str, *, failures: bool = True) -> Saved | None:
        """The finished job *key*, or None if it is to be run, such as after it was stopped.

        Args:
            failures: Find failed jobs too.

        Raises:
            OpenCodeConfigError: The file has *key* with another prompt, workspace or settings.
        """
        saved = self._index.get(key)
        if saved is None or saved.is_unfinished or (saved.is_failure and not failures):
            return None
        if saved.fingerprint != fingerprint:
            raise OpenCodeConfigError(
                f"checkpoint {str(self._path)!r} has the job {key!r} with another prompt, "
                "workspace or other settings: use another file, or another key"
            )
        return saved

    def has_failed(self, key: str) -> bool:
        """Whether the file has *key* with a failure."""
        saved = self._index.get(key)
        return saved is not None and saved.is_failure

    def load(self, saved: Saved) -> RunResult | OpenCodeError:
        """Read a finished job's result or error from the file.

        Raises:
            OpenCodeConfigError: The line is damaged, or its value no longer fits the schema.
        """
        try:
            with self._reading() as file:
                file.seek(saved.offset)
                line = file.readline()
        except OSError as error:
            raise self._refusal(error.strerror or str(error)) from error
        try:
            if (entry := parsed(line)) is None:
                raise ValueError("not a line of a checkpoint")
            end = end_of(entry)
        except (TypeError, ValueError, AttributeError, KeyError) as error:  # edited by hand
            raise self._refusal(f"the line at byte {saved.offset} is damaged: {error}") from None
        if self._output is not None and isinstance(end, RunResult):
            try:
                end._json, end.parsed = end.parsed, self._output.validate(end.parsed)
            except SchemaMismatch as mismatch:
                raise self._refusal(f"a value in it does not fit the schema: {mismatch}") from None
        return end

    def write(self, entries: Sequence[Entry]) -> None:
        """Append *entries*; returns when they are on the disk.

        Raises:
            OpenCodeError: The disk is full or broken, or the file was removed or replaced; then
                none of them is in the file.
        """
        entries = [self._with_earlier_tries(entry) for entry in entries]
        lines = [line_of(entry, self._settings) for entry in entries]
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
                failure = entry.end if isinstance(entry.end, OpenCodeError) else None
                saved = Saved(
                    self._size,
                    failure is not None,
                    entry.fingerprint,
                    entry.before + Spent.on(result_of(entry.end)),
                    failure is not None and is_unfinished(failure_of(failure)),
                )
                self._note(entry.key, saved)
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
        try:
            for last in lines_in(self._lines()):
                entry = last.entry
                if entry["settings"] != self._settings:
                    raise ValueError(
                        f"line {last.number} was written with other settings: use another file"
                    )
                failure, spent = entry["failure"], spent_in(entry)
                saved = Saved(
                    last.offset,
                    failure is not None,
                    entry["fingerprint"],
                    spent,
                    is_unfinished(failure),
                )
                self._note(entry["key"], saved)
        except ValueError as error:
            raise self._refusal(str(error)) from None
        size = 0 if last is None else last.offset + len(last.data)
        if size < os.fstat(self._descriptor).st_size:
            _log.warning("checkpoint %s: the last line was cut off, and is removed", self._path)
            os.ftruncate(self._descriptor, size)
            os.fsync(self._descriptor)
        elif last is not None and not last.data.endswith(b"\n"):  # complete nevertheless
            _write_all(self._descriptor, b"\n")
            size += 1
        return size

    def _with_earlier_tries(self, entry: Entry) -> Entry:
        before = self._index.get(entry.key)
        return entry if before is None else entry._replace(before=before.spent)

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

    def _note(self, key: str, saved: Saved) -> None:
        self._superseded += key in self._index
        self._index[key] = saved

    def _drop_superseded(self) -> None:
        """Keep only the last line of each key: a failure goes when a later run has succeeded."""
        if os.stat(self._path).st_nlink > 1:  # its other names would keep the old file
            return
        current = {saved.offset for saved in self._index.values()}
        offset = 0
        with replacing(self._path, 0o600) as file:
            for line in self._lines():
                if offset in current:
                    file.write(line)
                offset += len(line)
            shutil.copymode(self._path, file.name)
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

    def _refusal(self, why: str) -> OpenCodeConfigError:
        return OpenCodeConfigError(f"checkpoint {str(self._path)!r}: {why}")


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


# --- fingerprints ---------------------------------------------------------------------------------


def settings_fingerprint(cfg: RunConfig, schema: Mapping[str, Any] | None = None) -> str:
    """Hash the settings *cfg*, without secrets, and the *schema* of the answers."""
    settings = {
        field.name: value
        for field in fields(cfg)
        if field.name != "password" and (value := getattr(cfg, field.name)) != field.default
    }
    if isinstance(environment := settings.get("extra_env"), Mapping):
        settings["extra_env"] = sorted(environment)
    plain = _without_secrets(settings)
    return _hashed(plain if schema is None else [plain, schema])


def job_fingerprint(prompt: str, workspace: str, settings: str) -> str:
    """Hash a job, given the fingerprint of its *settings*."""
    return _hashed([prompt, workspace, settings])


def _without_secrets(value: Any, name: str = "") -> Any:
    """*value* of the setting *name*, with None in the place of secrets below it."""
    if isinstance(value, Mapping):
        plain: dict[str, Any] = {}
        for key, each in value.items():
            below = setting_name(name, key)
            is_left_out = name in VALUES_ARE_SECRET or is_secret(below, each)
            plain[str(key)] = None if is_left_out else _without_secrets(each, below)
        return plain
    if isinstance(value, (list, tuple)):
        return [_without_secrets(each) for each in value]
    return _USER_IN_URL.sub("://", value) if isinstance(value, str) else value


def _hashed(value: Any) -> str:
    # ASCII, so that lone surrogates pass.
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
