"""Find the JSON value that an answer means.

    answer --without <think> blocks--> the last fenced block, if there is one
                                       else the whole answer, if it is JSON
                                       else the outermost values amid the prose

A value inside brackets that are not closed, or that hold what is not valid JSON, is never found: it
is a part of something else. Knows JSON and Markdown's fences; nothing of schemas.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

_THINK_TAG = r"<{}(?:think|thinking|thought|reasoning)>"
_MARK = re.compile(rf"[\[{{]|{_THINK_TAG.format('/?')}", re.IGNORECASE)
_TAG = re.compile(_THINK_TAG.format("/?"), re.IGNORECASE)
_END_OF_THOUGHT = re.compile(_THINK_TAG.format("/"), re.IGNORECASE)
# Its own line, as Markdown has it: inside a string of valid JSON there is no line break.
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})([^`\n]*)$", re.MULTILINE)
_OPENING = re.compile(r"[\[{]")
# A string of JSON, as far as it goes, or a bracket.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("?)|[\[\]{}]', re.DOTALL)
_MEANT_AS_JSON = re.compile(r"""\s*(?:\{\s*["'}]|\[\s*["'\[{\d\]-])""")
_MOST_INVALID = 1_000  # brackets in prose; json counts all lines before each fault that it finds
_SHOWN_CHARS = 40


class NoValueError(ValueError):
    """The answer holds no JSON value, or none that is whole; the text says why."""


class Found(NamedTuple):
    """The values that an answer may mean.

    Attributes:
        values: In the order of the text.
        is_stated: The answer is its one value. Else they stand amid prose, and may be drafts.
    """

    values: list[Any]
    is_stated: bool


def find_values(answer: str, *, is_cut: bool = False) -> Found:
    """Find the JSON values that *answer* may mean.

    Args:
        is_cut: The model was stopped while it wrote. Then a value counts only where the answer
            ends with it, since what was to follow might have been another one.

    Raises:
        NoValueError: If it holds no whole value.
    """
    text = _without_thoughts(answer).strip()
    pieces, block = _split_at_fences(text)
    if block is not None:
        for piece in pieces:  # the block may stand in a value that is not valid JSON
            list(_outermost(piece))
        if is_cut and not (block.is_closed and block.is_last):
            raise NoValueError("the answer is cut off, and not at the end of its last fenced block")
        return Found([_stated(block.text, "the last fenced block", is_cut)], True)
    try:
        return Found([_stated(text, "the answer", is_cut)], True)
    except NoValueError as error:
        values = list(_outermost(text))
        if is_cut:
            raise NoValueError(f"{error} (it is cut off)") from None
        if not values:
            raise
    return Found(values, False)


# -- values ----------------------------------------------------------------------------------------


def _stated(text: str, where: str, is_cut: bool) -> Any:
    """Parse *text*, all of which has to be JSON."""
    text = text.strip()
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        why = f": {error}" if _MEANT_AS_JSON.match(text) else ""
        raise NoValueError(f"{where} holds no JSON value{why}") from None
    # The other kinds of values end with a mark of their own.
    if is_cut and isinstance(value, (int, float)) and not isinstance(value, bool):
        raise NoValueError(f"{where} may lack the end of its number")
    return value


def _outermost(text: str) -> Iterator[Any]:
    """The values in *text* that stand in no other brackets.

    Raises:
        NoValueError: If brackets are not closed, or hold what is nearly JSON: the values in them
            are parts of something, and those beside them perhaps drafts of it.
    """
    position = n_invalid = 0
    while (opening := _OPENING.search(text, position)) is not None:
        start = opening.start()
        try:
            value, position = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            position = _end_of_brackets(text, start)
            n_invalid += 1
            if _MEANT_AS_JSON.match(text, start) or n_invalid > _MOST_INVALID:
                raise NoValueError(f"the answer holds no JSON value: {error}") from None
        else:
            yield value


def _end_of_brackets(text: str, start: int) -> int:
    """Where the brackets that open at *start* are closed, whatever is in them."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
            if not depth:
                return token.end()
        elif not token[1]:
            break
    shown = text[start : start + _SHOWN_CHARS]
    raise NoValueError(
        f"the answer holds no JSON value: it is cut off, since {shown!r}... is not closed"
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:_SHOWN_CHARS]} is too large")
    return number


def _not_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is not valid JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_not_json)


# -- what stands around them -----------------------------------------------------------------------


class _Block(NamedTuple):
    text: str
    is_closed: bool
    is_last: bool  # nothing follows it


def _split_at_fences(text: str) -> tuple[list[str], _Block | None]:
    """The pieces of *text* outside of fenced blocks, and the last of these blocks."""
    pieces: list[str] = []
    block: _Block | None = None
    opening: re.Match[str] | None = None
    position = 0
    for fence in _FENCE.finditer(text):
        if opening is None:
            pieces.append(text[position : fence.start()])
            opening = fence
        elif fence[1].startswith(opening[1]) and not fence[2].strip():
            is_last = not text[fence.end() :].strip()
            block = _Block(text[opening.end() : fence.start()], True, is_last)
            opening, position = None, fence.end()
    if opening is not None:
        # Some models put the closing fence behind the value, or leave it out.
        inside = text[opening.end() :].strip()
        return pieces, _Block(inside.removesuffix(opening[1]), False, True)
    return [*pieces, text[position:]], block


def _without_thoughts(text: str) -> str:
    """*text* without its ``<think>`` blocks; a value that quotes such a tag stays as it is."""
    if _TAG.search(text) is None:
        return text
    kept: list[str] = []
    begin = position = 0
    while (mark := _MARK.search(text, position)) is not None:
        position = mark.end()
        if mark[0] in "[{":
            try:
                _, position = _DECODER.raw_decode(text, mark.start())
            except (ValueError, RecursionError):
                continue
        elif mark[0].startswith("</"):
            # The template of some models has the opening tag, so that the answer begins within.
            kept, begin = [], position
        else:
            kept.append(text[begin : mark.start()])
            end = _END_OF_THOUGHT.search(text, position)
            begin = position = len(text) if end is None else end.end()
    return "".join([*kept, text[begin:]])
