"""A batch as a page: one file, which asks nothing of the network.

    records --+--> rows --> charts, figures, the table's JSON --+--> report.html.j2 --> FILE
              +--> details, each put aside on disk at once -----+

In memory is a short row for each job. The page forbids itself every script and style but its own
two, whose hashes it names, and every request; what jobs say is in it as JSON and becomes text.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ._report_charts import span
from ._report_jobs import Row, detail_of, row_of
from ._report_page import page_of, script_json, short
from ._report_records import Record, records_in, records_of
from .core.errors import OpenCodeConfigError, OpenCodeError
from .core.records import replacing
from .core.result import RunResult
from .core.text import money

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["checkpoint_to_html", "results_to_html", "write_html"]

_HOUSE = Path(__file__).parent
_PAGE_CHARS = 80_000_000  # of all details; a browser takes that in a second or two
_WORDS = {
    "ok": "ok",
    "error": "error",
    "denied": "denied",
    "incomplete": "incomplete",
    "timed_out": "timed out",
    "cancelled": "cancelled",
    "over_budget": "over budget",
}


def results_to_html(
    results: Iterable[RunResult | OpenCodeError],
    path: str | os.PathLike[str],
    *,
    title: str = "Batch",
) -> None:
    """Write the page of results, or of errors that stand in a result's place, to *path*.

    Raises:
        OpenCodeConfigError: Jinja2 is not installed, or *path* cannot be written.
    """
    write_html(records_of(results), path, title=title)


def checkpoint_to_html(
    checkpoint: str | os.PathLike[str], path: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Write the page of all jobs in a checkpoint's file to *path*; also while a batch writes it.

    Raises:
        OpenCodeConfigError: As above, or there is no such checkpoint.
    """
    write_html(records_in(checkpoint), path, title=title or Path(checkpoint).name)


def write_html(
    records: Iterable[Record], path: str | os.PathLike[str], *, title: str = "Batch"
) -> None:
    """Write the page of *records* to *path*; a file that is there is replaced, once all is well.

    Args:
        records: One mapping for each job, in the shape of a checkpoint's lines: the keys of
            ``RunResult.to_dict()``, and ``failure``, None or ``{"type", "message", ...}``. They
            are drawn one by one and not kept. Those without ``started_at``, a Unix time in
            seconds, are placed in time by their first event, or not at all.

    Raises:
        OpenCodeConfigError: Jinja2 is not installed, or *path* cannot be written.
    """
    template = _template()
    target = Path(os.path.realpath(Path(path).expanduser()))
    with tempfile.TemporaryFile("w+", prefix="opencode-sync-", encoding="ascii") as aside:
        rows = list(_drawn(records, aside))
        aside.seek(0)
        page = template.stream(page=page_of(rows, title), details=map(str.rstrip, aside))
        page.enable_buffering(50)
        try:
            _write(target, page)
        except OSError as error:
            why = error.strerror or str(error)
            raise OpenCodeConfigError(f"report {str(target)!r}: {why}") from error


def _drawn(records: Iterable[Record], aside: TextIO) -> Iterator[Row]:
    """The rows of *records*, while the details go to *aside*, a line each."""
    written = 0
    for place, record in enumerate(records):
        written += aside.write(script_json(detail_of(record, brief=written > _PAGE_CHARS)) + "\n")
        yield row_of(record, place)


def _write(target: Path, pieces: Iterable[str]) -> None:
    if target.exists() and not target.is_file():  # /dev/stdout, a pipe
        with open(target, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(pieces)
        return
    with replacing(target) as new:
        new.writelines(piece.encode("utf-8", "replace") for piece in pieces)


def _template() -> Template:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise OpenCodeConfigError(
            "a report page needs Jinja2: run 'pip install \"opencode-sync-sdk[report]\"'"
        ) from None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"money": money, "span": span, "short": short, "words": _WORDS.get}
    for name, file in (("style", "_report.css"), ("script", "_report.js")):
        text = (_HOUSE / file).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        environment.globals[name] = text
        environment.globals[f"{name}_hash"] = f"sha256-{digest}"
    return environment.from_string((_HOUSE / "report.html.j2").read_text(encoding="utf-8"))
