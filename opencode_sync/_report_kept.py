"""What a batch keeps of its jobs for its page: what no checkpoint has, in short.

    ends --add()--> the last MOST, compressed, some 500 bytes each --+
    the checkpoint's file, where there is one -----------------------+--records()--> a page

So the memory that a batch takes does not grow with its length, nor with its events.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from ._report_jobs import short_of
from ._report_records import Record, records_in, records_of
from .core.errors import OpenCodeError
from .core.records import dumped
from .core.result import RunResult

MOST = 10_000


class Kept:
    """The jobs of one batch, as far as a page can still tell of them; from any thread, picklable.

    Attributes:
        checkpoint: The batch's checkpoint, or None.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        self.checkpoint = checkpoint
        self._lines: deque[bytes] = deque(maxlen=MOST)

    @property
    def title(self) -> str:
        return "Batch" if self.checkpoint is None else self.checkpoint.name

    def add(self, end: RunResult | OpenCodeError) -> None:
        """Keep in short how a job ended that is in no checkpoint."""
        (record,) = records_of([end])
        self._lines.append(zlib.compress(dumped(short_of(record)), 1))

    def records(self) -> Iterator[Record]:
        """All that is in the checkpoint, of whichever run, and then what was kept."""
        if self.checkpoint is not None and self.checkpoint.exists():
            yield from records_in(self.checkpoint)
        for line in list(self._lines):
            yield json.loads(zlib.decompress(line))
