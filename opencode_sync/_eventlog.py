"""A run's log file: each event as a line of JSON, in the file before the next one is waited for.

{"type": "attempt", ...}       before each attempt
{"type": "step_start", ...}    and so on, as they come
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from ._checks import checked_path
from .errors import OpenCodeConfigError, OpenCodeError
from .events import Event, OtherEvent, dump_event


class EventLog:
    """Truncated when made; written unbuffered, so that a kill of ours loses nothing.

    Runs that share one do not write over one another: each adds at the end, whole lines at a time.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Raises:
            OpenCodeConfigError: If it cannot be opened.
        """
        absolute = checked_path("log_file", path)
        try:
            self._file = open(absolute, "wb", buffering=0, opener=_at_its_end)
        except OSError as error:
            raise OpenCodeConfigError(f"log_file {os.fspath(path)!r}: {error.strerror}") from error

    def mark_attempt(self) -> None:
        """Write the line that stands before an attempt's events."""
        mark: OtherEvent = {"type": "attempt", "timestamp": time.time_ns() // 1_000_000}
        self.write([mark])

    def write(self, events: Iterable[Event]) -> None:
        """
        Raises:
            OpenCodeError: If the disk is full, say; nothing more is written then.
        """
        if self._file.closed:
            return
        data = memoryview(b"".join(map(dump_event, events)))
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self.close()
            raise OpenCodeError(
                f"log_file {os.fspath(self._file.name)!r}: {error.strerror}; the run was stopped"
            ) from error

    def close(self) -> None:
        self._file.close()


def _at_its_end(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_APPEND, 0o666)  # as open() does, within the umask
