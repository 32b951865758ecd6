"""What a child writes, on its way to who reads it.

    unnamed file --Output.read()--> block --LineSplitter--> whole lines

Knows bytes; nothing of processes and threads.
"""

from __future__ import annotations

import os
import tempfile
from typing import IO, Literal

BLOCK_BYTES = 256 * 1024

Channel = Literal["stdout", "stderr"]
Block = tuple[Channel, bytes]


class Output:
    """A file that a child writes, read as it grows.

    Attributes:
        is_wanted: Whether somebody still reads it. A plain flag, since a lock could be held by
            the very thread that a finaliser interrupts.
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
        """What stands after the last newline; taken out."""
        rest, self._pending = b"".join(self._pending), []
        return rest
