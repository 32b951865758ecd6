"""A run as a person sees it: text as it comes, each tool as one line.

    live(stream) --> text, deltas, tools --+--> a terminal or a file, as it comes
                                           +--> one cell of a notebook, updated in place

Knows events and screens; whose run it is, and what it costs, is somebody else's matter.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TextIO

from ..core.errors import OpenCodeConfigError
from ..core.events import Event
from ..core.reading import is_synthetic
from ..core.result import RunResult
from ..core.stream import RunStream
from ..core.text import markdown, one_line, outcome, printable, verbatim

LINE_WIDTH = 100
UPDATE_S = 0.1  # between updates of a cell while text comes in deltas

Kind = Literal["begin", "more", "end", "line", "pause"]
"""Text that begins a paragraph, goes on with it, or ends it; a line of its own; or nothing, while
somebody else may write."""


def event_line(event: Mapping[str, Any]) -> str:
    """What a person would want to see of *event*: text, a tool's line, or "" for all else."""
    if event.get("type") == "tool_use":
        return tool_line(event)
    part = event.get("part")
    if event.get("type") != "text" or not isinstance(part, Mapping) or is_synthetic(part):
        return ""
    return printable(str(part.get("text", "")))


def tool_name(event: Mapping[str, Any]) -> str:
    """The tool's name in its event, or the event's type where it names none."""
    part = event.get("part")
    return str((part.get("tool") if isinstance(part, Mapping) else None) or event.get("type"))


def tool_line(event: Mapping[str, Any]) -> str:
    """The event of a tool in one line: ``"[bash] ls -l (exit status 2)"``."""
    part = event.get("part")
    part = part if isinstance(part, Mapping) else {}
    state = part.get("state")
    state = state if isinstance(state, Mapping) else {}
    name = one_line(tool_name(event), LINE_WIDTH // 2)
    metadata = state.get("metadata")
    status = metadata.get("exit") if isinstance(metadata, Mapping) else None
    ending = f" (exit status {status})" if status else ""
    if state.get("status") == "error":
        ending = f" (failed: {one_line(str(state.get('error')), LINE_WIDTH // 2)})"
    subject = one_line(_subject(state), max(10, LINE_WIDTH - len(name) - len(ending) - 3))
    return f"[{name}]{subject and ' '}{subject}{ending}"


def _subject(state: Mapping[str, Any]) -> str:
    """What a tool was used on: its title, else its first argument."""
    if title := state.get("title"):
        return str(title)
    arguments = state.get("input")
    values = arguments.values() if isinstance(arguments, Mapping) else ()
    return next((str(value) for value in values), "")


def live(
    stream: RunStream, *, file: TextIO | None = None, notes: TextIO | None = None
) -> RunResult:
    """Show what *stream* gives as it comes, and return its result.

    In a notebook that is one cell of Markdown, updated in place; elsewhere, or where *file* is
    given, it is plain text. An interrupt ends the run.

    Args:
        file: Gets the model's text, standing as in ``result.final_text``; None for stdout.
        notes: Gets a line for each tool, retry and warning; None for *file*.

    Raises:
        OpenCodeError: As iterating does, when all that came is on the screen.
    """
    if not hasattr(stream, "result"):  # what run() returns has ended
        kind = type(stream).__name__
        raise OpenCodeConfigError(f"stream is {kind}: use what a runner's stream() returns")
    is_cell = file is None and notes is None and in_notebook()
    # A program may have no stdout: a service, or one without a console.
    shown_in = file or sys.stdout or io.StringIO()
    screen: _Cell | _Terminal = _Cell() if is_cell else _Terminal(shown_in, notes)
    pieces = _Pieces()
    with stream:
        try:
            for event in _until_its_end(stream):
                is_text = event.get("type") in ("text", "text_delta")
                if is_text and not stream.result._is_by_model(event):
                    continue
                for kind, text in pieces.of(event):
                    screen.show(kind, text)
        finally:
            screen.end(stream.result)
    return stream.result


def _until_its_end(stream: RunStream) -> Iterator[Event]:
    try:
        yield from stream
    except KeyboardInterrupt:
        if stream.wait_ended(0):  # by this interrupt, as a rule
            yield from stream  # what the run had still written
        raise


def in_notebook() -> bool:
    """Whether there is a cell to show Markdown in; imports nothing."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class _Pieces:
    """Events as pieces to show.

    A server gives text twice, in deltas and then whole: what has been shown is left out.
    """

    def __init__(self) -> None:
        self._shown: dict[object, str] = {}  # by part, while its deltas come
        self._open_part: object = None
        self._sub_agents: set[object] = set()  # sessions

    def of(self, event: Mapping[str, Any]) -> Iterator[tuple[Kind, str]]:
        kind = event.get("type")
        if kind == "sub_agent":
            self._sub_agents.add(event.get("childID"))
        elif kind in ("text", "text_delta") and event.get("sessionID") in self._sub_agents:
            pass  # said to the agent that called it
        elif kind == "text_delta":
            yield from self._delta(event.get("partID"), str(event.get("delta", "")))
        elif kind == "text":
            yield from self._whole(event.get("part"))
        elif kind == "tool_use":
            self._open_part = None
            yield "line", tool_line(event)
        elif kind == "retry":
            self._open_part = None
            yield "line", f"[retry] {one_line(str(event.get('message')), LINE_WIDTH - 8)}"
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

    def _whole(self, part: object) -> Iterator[tuple[Kind, str]]:
        part = part if isinstance(part, Mapping) else {}
        text = str(part.get("text", ""))
        shown = self._shown.pop(part.get("id"), "")
        # Deltas are lost with a connection; what was shown of them is then said again.
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
    """Plain text: paragraphs apart by a blank line, lines between them."""

    def __init__(self, file: TextIO, notes: TextIO | None) -> None:
        self._file = file
        self._notes = notes or file
        # A terminal obeys escape sequences; a file or a program gets the text as it is.
        self._clean = printable if file.isatty() else str
        self._is_begun = self._is_in_paragraph = False

    def show(self, kind: Kind, text: str) -> None:
        if kind == "line":
            self._end_paragraph()
            _write(self._notes, f"{text}\n")
            self._notes.flush()
            return
        if kind == "pause":
            self._end_paragraph()
            self._file.flush()
            return
        if kind == "begin":
            self._end_paragraph()
            if self._is_begun:
                self._file.write("\n")
            self._is_begun = self._is_in_paragraph = True
        _write(self._file, self._clean(text))
        if kind == "end":
            self._end_paragraph()
        self._file.flush()

    def end(self, result: RunResult) -> None:
        self._end_paragraph()
        self._file.flush()

    def _end_paragraph(self) -> None:
        if self._is_in_paragraph:
            self._file.write("\n")
            self._is_in_paragraph = False


def _write(file: TextIO, text: str) -> None:
    try:
        file.write(text)
    except UnicodeEncodeError as error:
        # What an encoding has not is no reason to end the run.
        file.write(text.encode(error.encoding, "replace").decode(error.encoding))


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
