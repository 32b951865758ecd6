"""Text for people: safe to print to a terminal, or to show in a notebook.

    printable(), spelled_out(), one_line()     for terminals
    verbatim(), markdown(), html_table()       for notebooks
    outcome(), result_markdown(), error_...()  results and errors in these forms

Text of a model, a tool or a prompt may hold escape sequences, script tags, or the address of a
picture that tells its server who looked. None of that has an effect in what these functions return.
Knows strings and the fields of a result; of screens only whether one is a terminal.
"""

from __future__ import annotations

import html
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import OpenCodeError
    from .result import RunResult

_SHOWN_CHARS = 100_000  # of an answer in a notebook: a browser is slow with megabytes

# ECMA-48: control sequences (colours, cursor), strings up to their end (titles, links), the rest.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
# Controls except tab and newline; and characters that show nothing by themselves (Unicode's
# Default_Ignorable_Code_Point): marks that change the order of the text around them, tags and
# fillers that hide a text in another one, other line separators.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Joiners and emoji styles: Persian and emoji need them; after ASCII they can only hide something.
_JOINERS = "[\u200c\u200d\ufe0e\ufe0f]"
_LONE_JOINERS = re.compile(rf"(?<![^\x00-\x7f]){_JOINERS}+")
_HIDDEN = re.compile(f"{_CONTROLS.pattern}|{_JOINERS}")
_FENCE = re.compile(r" {0,3}(?P<marks>`{3,}(?=[^`]*$)|~{3,})\s*(?P<language>[\w+#.-]*)")
_CODE = re.compile(r"(?<![\\`])(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_CODE_CHARS = 10_000  # of a line that is searched for code, which takes quadratic time
_LIBRARIES = (os.path.dirname(os.path.dirname(__file__)), os.path.dirname(os.__file__))
_PUNCTUATION = re.compile(r"[^\w\s]")


def is_terminal(stream: object) -> bool:
    """Whether *stream* is one; not if it is None, closed, or an object without ``isatty``.

    Services, notebooks and test runners put such objects in the place of stdout and stderr.
    """
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        return False


def strip_ansi(text: str) -> str:
    """*text* without terminal escape sequences: OpenCode colours stderr even where it is a file."""
    return _ANSI.sub("", text)


def printable(text: str) -> str:
    """*text* without control sequences and invisible characters; newlines and tabs stay."""
    text = _CONTROLS.sub("", strip_ansi(text).replace("\r\n", "\n"))
    return _LONE_JOINERS.sub("", text)


def spelled_out(text: str) -> str:
    """*text* with control sequences and invisible characters written out, as ``\\x1b``.

    For text that somebody has to judge: :func:`printable` may hide what is dangerous in it.
    Newlines and tabs stay.
    """
    text = text.replace("\r\n", "\n")
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str, width: int) -> str:
    """*text* as one printable line of at most *width* characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def money(dollars: float) -> str:
    """``"$0.0012"``, ``"$3.40"``."""
    return f"${dollars:.2f}" if dollars >= 1 else f"${dollars:.4f}"


def count(number: int, noun: str) -> str:
    """``"1 step"``, ``"2,000 steps"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def outcome(result: RunResult) -> str:
    """``"ok, 2 steps, bash, edit x2, 360 tokens, $0.0009, 4.1 s"``."""
    words = [result.status, *([f"by {result.model}"] if result.tried else [])]
    words += [count(result.turns, "step"), *tools_used(result)]
    words += [count(result.token_usage.total, "token"), money(result.total_cost)]
    return one_line(", ".join([*words, f"{result.duration_s:.1f} s"]), 200)


def tools_used(result: RunResult) -> list[str]:
    """Each tool's name once, in the order of first use; ``"edit x2"`` where it was used twice."""
    parts = [event.get("part") for event in result.tool_calls]
    names = Counter(str(part.get("tool")) for part in parts if isinstance(part, dict))
    return [name if times == 1 else f"{name} x{times}" for name, times in names.items()]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """*rows* as lines with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def verbatim(text: str) -> str:
    """*text* with all punctuation as HTML entities: Markdown and HTML show it as it is."""
    return _PUNCTUATION.sub(lambda match: f"&#{ord(match[0])};", printable(text))


def markdown(text: str) -> str:
    """The Markdown *text* without HTML and pictures, which show as the text that they are.

    A block of code gets a new fence, in the first column and not occurring in the block, so that
    every renderer sees the same blocks as this function.
    """
    lines = iter(printable(text).split("\n"))
    out: list[str] = []
    for line in lines:
        fence = _FENCE.match(line)
        if fence is None:
            out.append(_prose(line))
            continue
        closing = re.compile(rf" {{0,3}}{fence['marks'][0]}{{{len(fence['marks'])},}}\s*$")
        block: list[str] = []
        for inside in lines:
            if closing.match(inside):
                break
            block.append(inside)
        inner = max(map(len, re.findall("`+", "\n".join(block))), default=0)
        marks = "`" * max(3, inner + 1)
        out += ["", f"{marks}{fence['language']}", *block, marks, ""]
    return "\n".join(out)


def _code(match: re.Match[str]) -> str:
    return f"<code>{verbatim(match[2])}</code>" if "<" in match[2] else match[0]


def _prose(line: str) -> str:
    """A line outside of code blocks; code in it that holds a tag becomes our own HTML."""
    if len(line) <= _CODE_CHARS:
        line = _CODE.sub(_code, line)
    return re.sub(r"<(?!/?code>)", "&lt;", line).replace("![", "!&#91;")


def html_table(rows: Iterable[tuple[str, str]]) -> str:
    """*rows* of a name and a text as an HTML table, all escaped."""
    left = "text-align: left; vertical-align: top"
    lines = (
        f'<tr><th style="{left}">{html.escape(name)}</th>'
        f'<td style="{left}; white-space: pre-wrap">{html.escape(printable(text))}</td></tr>'
        for name, text in rows
    )
    return f"<table>{''.join(lines)}</table>"


def result_markdown(result: RunResult) -> str:
    """A result for a notebook: the answer, and a line on how it came about."""
    text = result.answer or result.final_text
    if len(text) > _SHOWN_CHARS:
        text = f"{text[:_SHOWN_CHARS]}\n\n... {len(text) - _SHOWN_CHARS:,} characters more"
    notes = [outcome(result)]
    if result.error is not None:
        notes.append(one_line(str(result.error), 500))
    if result.denied_tools:
        notes.append(f"denied: {', '.join(result.denied_tools)}")
    notes += [f"did not answer: {one_line(str(each), 500)}" for each in result.tried]
    notes += [f"warning: {one_line(message, 500)}" for message in result.warnings]
    return "\n\n".join([markdown(text), *(f"*{verbatim(note)}*" for note in notes)])


def error_html(error: OpenCodeError) -> str:
    """An error for a notebook, as a value: a small table."""
    rows = [(type(error).__name__, str(error))]
    if error.index is not None:
        rows.append(("job", str(error.index) if error.key is None else error.key))
    if error.prompt:
        rows.append(("prompt", one_line(error.prompt, 200)))
    if error.result is not None:
        rows.append(("until then", outcome(error.result)))
    return html_table(rows)


def error_lines(error: OpenCodeError) -> list[str]:
    """A raised error for IPython: the user's own lines, and the message."""
    import traceback

    lines = [
        f"{_place(frame.filename)}, line {frame.lineno}: {frame.line}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_LIBRARIES) and "site-packages" not in frame.filename
    ]
    if error.result is not None:
        lines.append(f"until then: {outcome(error.result)}")
    return [*lines, f"{type(error).__name__}: {printable(str(error))}"]


def _place(filename: str) -> str:
    # A notebook's cells have files of their own, with numbers for names.
    return "cell" if "ipykernel_" in filename else os.path.basename(filename)
