"""Shows a run while it goes on: the text as it comes, one line for each tool.

live(stream) --> _Pieces: events as pieces to show --+--> _Terminal: a terminal or a file
                                                     +--> _Cell: a notebook's cell, in place
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TextIO

from ..core.errors import OpenCodeConfigError
from ..core.events import Event
from ..core.reading import mapping, part_of, tried_in
from ..core.result import RunResult, is_by_model
from ..core.stream import RunStream
from ..core.text import is_terminal, markdown, one_line, outcome, printable, verbatim

LINE_WIDTH = 100
UPDATE_S = 0.1  # between updates of a cell while text comes in deltas

Kind = Literal["begin", "more", "end", "line", "pause"]
"""Text that begins, continues or ends a paragraph; a line of its own; or a pause, in which
something else may write to the screen."""


def tool_line(event: Mapping[str, Any]) -> str:
    """One line for a tool's event: ``"[bash] ls -l (exit status 2)"``."""
    part = part_of(event)
    state = mapping(part.get("state"))
    name = one_line(str(part.get("tool") or event.get("type")), LINE_WIDTH // 2)
    status = mapping(state.get("metadata")).get("exit")
    ending = f" (exit status {status})" if status else ""
    if state.get("status") == "error":
        ending = f" (failed: {one_line(str(state.get('error')), LINE_WIDTH // 2)})"
    subject = one_line(_subject(state), max(10, LINE_WIDTH - len(name) - len(ending) - 3))
    return f"[{name}]{subject and ' '}{subject}{ending}"


def _subject(state: Mapping[str, Any]) -> str:
    """The tool's title, else its first argument."""
    if title := state.get("title"):
        return str(title)
    return next((str(value) for value in mapping(state.get("input")).values()), "")


def live(
    stream: RunStream, *, file: TextIO | None = None, notes: TextIO | None = None
) -> RunResult:
    """Show the events of *stream* as they come, and return its result.

    In a notebook they are one cell of Markdown, updated in place; elsewhere, or if *file* is
    given, plain text. An interrupt stops the run.

    Args:
        file: Where the model's text goes, laid out as in ``result.final_text``; None for stdout.
        notes: Where a line for each tool, retry, fallback and warning goes; None for *file*.

    Raises:
        OpenCodeError: As iterating over *stream* does, after everything is shown.
    """
    if not hasattr(stream, "result"):  # a RunResult, most likely
        kind = type(stream).__name__
        raise OpenCodeConfigError(f"stream is {kind}: use what a runner's stream() returns")
    is_cell = file is None and notes is None and in_notebook()
    shown_in = file or sys.stdout
    if shown_in is None or getattr(shown_in, "closed", False):  # a service may have no stdout
        shown_in = io.StringIO()
    screen: _Cell | _Terminal = _Cell() if is_cell else _Terminal(shown_in, notes)
    pieces = _Pieces()
    with stream:
        try:
            for event in _until_its_end(stream):
                is_text = event.get("type") in ("text", "text_delta")
                if is_text and not is_by_model(stream.result, event):
                    continue  # a sub-agent's, a summary, or not of the model
                for kind, text in pieces.of(event):
                    screen.show(kind, text)
        finally:
            screen.end(stream.result)
    return stream.result


def _until_its_end(stream: RunStream) -> Iterator[Event]:
    try:
        yield from stream
    except KeyboardInterrupt:
        if stream.wait_ended(0):  # usually because of this interrupt
            yield from stream  # the run's last output
        raise


def in_notebook() -> bool:
    """Whether this runs in a notebook, whose cells show Markdown; imports nothing."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class _Pieces:
    """Turns events into pieces to show.

    A server sends text twice, in deltas and then whole: what is shown already is left out.
    """

    def __init__(self) -> None:
        self._shown: dict[object, str] = {}  # of each part whose deltas are coming
        self._open_part: object = None

    def of(self, event: Mapping[str, Any]) -> Iterator[tuple[Kind, str]]:
        kind = event.get("type")
        if kind == "text_delta":
            yield from self._delta(event.get("partID"), str(event.get("delta", "")))
        elif kind == "text":
            yield from self._whole(part_of(event))
        elif kind == "tool_use":
            self._open_part = None
            yield "line", tool_line(event)
        elif kind == "retry":
            self._open_part = None
            yield "line", f"[retry] {one_line(str(event.get('message')), LINE_WIDTH - 8)}"
        elif kind == "fallback":
            self._open_part = None
            next_model = event.get("next_model")
            line = f"{tried_in(event)}{f': {next_model} is asked' if next_model else ''}"
            yield "line", f"[fallback] {one_line(line, LINE_WIDTH - 11)}"
        elif kind == "warning":
            self._open_part = None
            yield "line", f"[warning] {printable(' '.join(str(event.get('message')).split()))}"
        elif kind in ("permission", "question"):
            self._open_part = None
            yield "pause", ""

    def _delta(self, part_id: object, text: str) -> Iterator[tuple[Kind, str]]:
        yield "more" if part_id == self._open_part else "begin", text
        self._open_part = part_id
        self._shown[part_id] = self._shown.get(part_id, "") + text

    def _whole(self, part: Mapping[str, Any]) -> Iterator[tuple[Kind, str]]:
        text = str(part.get("text", ""))
        shown = self._shown.pop(part.get("id"), "")
        # If a connection broke, deltas are missing: the whole text is shown again.
        rest = text[len(shown) :] if text.startswith(shown) else ""
        if shown and part.get("id") == self._open_part:
            yield "end", rest
            rest = ""
        if not text.startswith(shown):
            rest = text
        if rest:
            yield "begin", rest
            yield "end", ""
        self._open_part = None


class _Terminal:
    """Plain text: a blank line between paragraphs, notes on lines of their own."""

    def __init__(self, file: TextIO, notes: TextIO | None) -> None:
        self._file = file
        self._notes = notes or file
        # A terminal would obey escape sequences; a file gets the text unchanged.
        self._clean = printable if is_terminal(file) else str
        self._is_begun = self._is_in_paragraph = False

    def show(self, kind: Kind, text: str) -> None:
        if kind == "line":
            self._end_paragraph()
            _write(self._notes, f"{text}\n")
            _flush(self._notes)
            return
        if kind == "pause":
            self._end_paragraph()
            _flush(self._file)
            return
        if kind == "begin":
            self._end_paragraph()
            if self._is_begun:
                self._file.write("\n")
            self._is_begun = self._is_in_paragraph = True
        _write(self._file, self._clean(text))
        if kind == "end":
            self._end_paragraph()
        _flush(self._file)

    def end(self, result: RunResult) -> None:
        self._end_paragraph()
        _flush(self._file)

    def _end_paragraph(self) -> None:
        if self._is_in_paragraph:
            self._file.write("\n")
            self._is_in_paragraph = False


def _write(file: TextIO, text: str) -> None:
    try:
        file.write(text)
    except UnicodeEncodeError as error:
        # A character that the encoding lacks must not end the run.
        file.write(text.encode(error.encoding, "replace").decode(error.encoding))


def _flush(file: TextIO) -> None:
    if hasattr(file, "flush"):  # programs put objects with write() alone in the place of stdout
        file.flush()


class _Cell:
    """One output of a notebook's cell, updated in place."""

    def __init__(self) -> None:
        from IPython.display import DisplayHandle

        self._blocks: list[tuple[Kind, str]] = []
        self._handle: Any = DisplayHandle()  # type: ignore[no-untyped-call]
        self._shown_at: float | None = None

    def show(self, kind: Kind, text: str) -> None:
        if kind == "pause":
            return
        if kind in ("more", "end"):
            text = self._blocks.pop()[1] + text
        self._blocks.append(("line" if kind == "line" else "begin", text))
        now = time.monotonic()
        is_due = self._shown_at is None or now >= self._shown_at + UPDATE_S
        if is_due or kind in ("end", "line"):
            self._update("")

    def end(self, result: RunResult) -> None:
        self._update(f"*{verbatim(outcome(result))}*")

    def _update(self, footer: str) -> None:
        blocks = [
            f"<code>{verbatim(text)}</code>" if kind == "line" else markdown(text)
            for kind, text in self._blocks
        ]
        data = {"text/markdown": "\n\n".join([*blocks, footer])}
        if self._shown_at is None:
            self._handle.display(data, raw=True)
        else:
            self._handle.update(data, raw=True)
        self._shown_at = time.monotonic()
