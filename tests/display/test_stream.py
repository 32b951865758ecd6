"""What a run looks like: in a terminal, in a file, in a notebook's cell."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any, cast

import pytest

from opencode_sync.core.errors import OpenCodeConfigError, OpenCodeError
from opencode_sync.core.result import RunResult
from opencode_sync.core.stream import RunStream
from opencode_sync.display import stream as display
from opencode_sync.display.stream import live, tool_line


def text(words: str, part: str = "a") -> dict[str, Any]:
    return {"type": "text", "part": {"id": part, "text": words}}


def delta(words: str, part: str = "a") -> dict[str, Any]:
    return {"type": "text_delta", "partID": part, "delta": words}


def tool(name: str, **state: Any) -> dict[str, Any]:
    return {"type": "tool_use", "part": {"tool": name, "state": state}}


LS = tool("bash", status="completed", title="ls", metadata={"exit": 0})


class Scripted:
    """A stream that gives *events*, raises those that are errors, and then *error*."""

    def __init__(
        self,
        events: Iterable[dict[str, Any] | BaseException],
        error: BaseException | None = None,
    ) -> None:
        self.result = RunResult()
        self.has_ended = self.is_closed = False
        self._events = iter(events)
        self._error = error

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *exception: object) -> None:
        self.is_closed = True

    def wait_ended(self, timeout: float) -> bool:
        return self.has_ended

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        event = next(self._events, None)
        if event is None:
            error, self._error = self._error, None
            raise error or StopIteration
        if isinstance(event, BaseException):
            self.has_ended = True
            raise event
        self.result.append_event(cast(Any, event))
        return event


def stream(
    *events: dict[str, Any] | BaseException, error: BaseException | None = None
) -> RunStream:
    return cast(RunStream, Scripted(events, error))


def shown(*events: dict[str, Any]) -> str:
    file = io.StringIO()
    live(stream(*events), file=file)
    return file.getvalue()


def test_a_stdout_that_can_only_be_written_to_is_enough() -> None:
    class Logger:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

    logger = Logger()
    with redirect_stdout(cast(Any, logger)):
        live(stream(LS, text("Done.")))

    assert logger.text == "[bash] ls\nDone.\n"


def closed_file() -> io.StringIO:
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize("stdout", [None, closed_file()], ids=["none", "closed"])
def test_without_a_stdout_the_run_goes_on_unseen(stdout: Any) -> None:
    with redirect_stdout(stdout):
        result = live(stream(text("Done.")))

    assert result.answer == "Done."


# --- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event, line",
    [
        (LS, "[bash] ls"),
        (tool("bash", title="make", metadata={"exit": 2}), "[bash] make (exit status 2)"),
        (tool("read", status="error", error="no such\nfile"), "[read] (failed: no such file)"),
        (tool("grep", input={"pattern": "x", "path": "."}), "[grep] x"),
        (tool("a\x1b[31mb", title="c\x07d"), "[ab] cd"),
        ({"type": "tool_use", "part": "odd"}, "[tool_use]"),
        ({"type": "tool_use", "part": {"state": "odd"}}, "[tool_use]"),
    ],
)
def test_a_tool_has_one_line(event: dict[str, Any], line: str) -> None:
    assert tool_line(event) == line


def test_beside_a_long_error_the_command_is_still_shown() -> None:
    line = tool_line(tool("x" * 50, title="y" * 500, status="error", error="z" * 500))

    assert "] yyyyyyy... (failed: z" in line


def test_a_long_command_keeps_to_the_width() -> None:
    line = tool_line(tool("bash", title="x" * 500, metadata={"exit": 1}))

    assert len(line) == display.LINE_WIDTH
    assert line.endswith("... (exit status 1)")


# --- a terminal ----------------------------------------------------------------------------------


def test_text_is_laid_out_as_in_the_result() -> None:
    events = [text("I look."), LS, text("Two\nfiles.", "b"), text("Done.", "c")]
    notes = io.StringIO()
    file = io.StringIO()

    result = live(stream(*events), file=file, notes=notes)

    assert file.getvalue() == f"{result.final_text}\n" == "I look.\n\nTwo\nfiles.\n\nDone.\n"
    assert notes.getvalue() == "[bash] ls\n"


def test_tools_are_lines_between_paragraphs_without_a_file_for_notes() -> None:
    assert shown(text("I look."), LS, text("Done.", "b")) == "I look.\n[bash] ls\n\nDone.\n"


ASKED = {"type": "permission", "permission": "bash"}
RETRY = {"type": "retry", "message": "429: slow\ndown"}
FALLBACK = {
    "type": "fallback",
    "model": "a/one",
    "next_model": "b/two",
    "error": {"name": "APIError", "data": {"message": "slow\ndown", "statusCode": 429}},
}
WARNING = {"type": "warning", "message": "The MCP server 'f'\n\x1b[31mdid not start."}


@pytest.mark.parametrize(
    "events, expected",
    [
        pytest.param(
            [delta("I "), delta("look."), text("I look."), text("Done.", "b")],
            "I look.\n\nDone.\n",
            id="text in deltas is shown once",
        ),
        pytest.param([delta("I "), text("I look.")], "I look.\n", id="a missing end is added"),
        pytest.param(
            [delta("I "), delta("k."), text("I look.")],
            "I k.\n\nI look.\n",
            id="a text with lost deltas is shown again",
        ),
        pytest.param(
            [delta("one"), delta("two", "b"), text("one"), text("two", "b")],
            "one\n\ntwo\n",
            id="parts stand apart",
        ),
        pytest.param(
            [delta("I "), ASKED, delta("look."), text("I look.")],
            "I \n\nlook.\n",
            id="a question is on a line of its own",
        ),
        pytest.param(
            [delta("I "), LS, text("I look.")],
            "I \n[bash] ls\n\nlook.\n",
            id="a tool is on a line of its own",
        ),
        pytest.param(
            [delta("He"), WARNING, delta("llo")],
            "He\n[warning] The MCP server 'f' did not start.\n\nllo\n",
            id="a warning is on a line of its own",
        ),
        pytest.param([RETRY], "[retry] 429: slow down\n", id="a retry is shown"),
        pytest.param(
            [FALLBACK],
            "[fallback] a/one (APIError 429: slow down): b/two is asked\n",
            id="a model that is out is shown with the next one",
        ),
    ],
)
def test_events_become_paragraphs_and_lines(events: list[dict[str, Any]], expected: str) -> None:
    assert shown(*events) == expected


def test_a_terminal_is_not_obeyed_a_file_gets_the_text_as_it_is() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file, terminal = io.StringIO(), Terminal()

    live(stream(text("\x1b[2Jhi")), file=file)
    live(stream(text("\x1b[2Jhi")), file=terminal)

    assert (file.getvalue(), terminal.getvalue()) == ("\x1b[2Jhi\n", "hi\n")


def test_the_default_is_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    live(stream(text("Hi.")))

    assert capsys.readouterr() == ("Hi.\n", "")


def test_what_came_before_an_error_is_complete_on_the_screen() -> None:
    file = io.StringIO()
    failing = stream(delta("So far"), error=OpenCodeError("no"))

    with pytest.raises(OpenCodeError):
        live(failing, file=file)

    assert file.getvalue() == "So far\n"


def test_an_interrupt_ends_the_run_and_what_it_had_still_written_is_shown() -> None:
    file = io.StringIO()
    interrupted = stream(KeyboardInterrupt(), text("So far."))

    with pytest.raises(KeyboardInterrupt):
        live(interrupted, file=file)

    assert cast(Any, interrupted).is_closed
    assert file.getvalue() == "So far.\n"


# --- a cell --------------------------------------------------------------------------------------


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a notebook's cell shows, one entry for each update."""
    pages: list[str] = []

    class DisplayHandle:
        def display(self, data: dict[str, str], *, raw: bool) -> None:
            assert not pages
            pages.append(data["text/markdown"])

        def update(self, data: dict[str, str], *, raw: bool) -> None:
            assert pages
            pages.append(data["text/markdown"])

    shell = SimpleNamespace(kernel=object())
    ipython: Any = SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(
        sys.modules, "IPython.display", cast(Any, SimpleNamespace(DisplayHandle=DisplayHandle))
    )
    return pages


def test_a_cell_shows_text_and_tools_and_at_the_end_the_outcome(cell: list[str]) -> None:
    live(stream(text("**I** look <b>."), LS))

    assert cell[0].startswith("**I** look &lt;b>.")
    assert "<code>&#91;bash&#93; ls</code>" in cell[-2]
    assert cell[-1].endswith("0 tokens&#44; &#36;0&#46;0000&#44; 0&#46;0 s*")


def test_a_cell_is_not_updated_for_every_delta(
    cell: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "UPDATE_S", 60.0)
    deltas = [delta(letter) for letter in "abcdefgh"]

    live(stream(*deltas, text("abcdefgh")))

    assert [page.strip() for page in cell[:-1]] == ["a", "abcdefgh"]


def test_a_terminal_of_ipython_has_no_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    ipython: Any = SimpleNamespace(get_ipython=lambda: object())
    monkeypatch.setitem(sys.modules, "IPython", ipython)

    assert not display.in_notebook()


def test_what_a_sub_agent_says_is_not_shown_and_its_tools_are() -> None:
    of_child = {"sessionID": "ses_child"}
    announced = {"type": "sub_agent", "sessionID": "ses_1", "childID": "ses_child"}

    assert shown(
        delta("I ask."),
        announced,
        delta("To you", "b") | of_child,
        text("To you.", "b") | of_child,
        LS | of_child,
        text("I ask."),
    ) == ("I ask.\n[bash] ls\n")


def test_what_is_no_stream_is_refused() -> None:
    with pytest.raises(OpenCodeConfigError, match="stream is RunResult: use what a runner's"):
        live(RunResult())  # type: ignore[arg-type]
