"""Which JSON value an answer means, and when none is taken: decided on texts alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel

from opencode_sync.core.schema import NoValueError, OutputSchema, SchemaMismatch, find_values


class Node(BaseModel):
    name: str
    kids: list[Node] = []


NODE = OutputSchema(Node)
NAMES = OutputSchema(list[str])
A, B = '{"name": "a"}', '{"name": "b"}'


def fenced(text: str, language: str = "json") -> str:
    return f"```{language}\n{text}\n```"


# --- which value ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        A,
        f"\n {A}\n",
        fenced(A),
        f"~~~\n{A}\n~~~",
        f"- Here:\n  ```json\n  {A}\n  ```",
        f"First:\n{fenced(B)}\nBetter:\n{fenced(A)}\nDone.",
        f"{B} is what I had, now:\n{fenced(A)}",
        f"````\n{A}\n````",
        f"```json\n{A}```",
        f"```json\n{A}",
        f"```\r\n{A}\r\n```\r\n",
        f"Gladly: {A}.",
        f"As {{said}} in [the note](x), it is {A}, mostly.",
        f"{A}\nAgain, to be sure:\n{A}",
        f'{{"title": "of another shape"}}, but {A}',
    ],
    ids=[
        "bare",
        "with space around",
        "fenced",
        "fenced with tildes",
        "fenced in a list",
        "the last of two blocks",
        "a block after a draft",
        "a longer fence",
        "a fence closed behind the value",
        "a fence that is not closed, around a whole value",
        "Windows line ends",
        "amid prose",
        "brackets in prose",
        "the same value twice",
        "the one of two that fits",
    ],
)
def test_the_value_that_is_meant_is_found(text: str) -> None:
    assert NODE.parse(text) == Node(name="a")


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"name": "root", "kids": [{"name": "leaf"}, {"na', "cut off"),
        (f"Draft: {A}. Final: " + '{"name": "root", "kids": [', "cut off"),
        ('{"name": "root", "kids": [{"name": "leaf"},]}', "no JSON value: "),
        (f"Draft: {A}. Final: " + '{"name": "root",}', "no JSON value: "),
        (f'As {{"name": ..., "kids": [...]}} says: {A}', "no JSON value: "),
        (f'{{"name": "root",\n{fenced(A)}\n}}', "cut off"),
        (f'{{"name": "see:\n{fenced(A)}\n"}}', "cut off"),
        (f"{fenced(A)}\nNo, wait:\n```json\n" + '{"name": "ro', "last fenced block"),
        (f"{fenced(A)}\nNo, wait: " + '{"name": "ro', "cut off"),
        (f"{A} is it. Run:\n{fenced('ls', 'bash')}", "last fenced block holds no JSON value"),
        (f"{fenced(A)}\n{fenced('[1]')}", r"\$: Input should be"),
        (f"{A} or {B}", "2 different values that fit"),
        ("I would rather not.", "no JSON value"),
        ("", "no JSON value"),
    ],
    ids=[
        "a part of a cut value",
        "a draft before a cut value",
        "a part of an invalid value",
        "a draft before an invalid value",
        "a template before a value",
        "a block in a value",
        "a block in a string",
        "a block before a cut block",
        "a block before a cut value",
        "a block that is not JSON",
        "a last block that does not fit",
        "two different values",
        "prose",
        "nothing",
    ],
)
def test_no_value_is_taken_where_there_is_a_doubt(text: str, words: str) -> None:
    with pytest.raises(SchemaMismatch, match=words):
        NODE.parse(text)


@pytest.mark.parametrize(
    "text",
    ['- [ ] read it\n["a", "b"]', "- [ ] read it\n- [ ] write it", "Call f([]) for it."],
    ids=["check box and a list", "check boxes", "a call"],
)
def test_empty_brackets_in_prose_are_not_taken_for_a_list(text: str) -> None:
    with pytest.raises(SchemaMismatch):
        NAMES.parse(text)


@pytest.mark.parametrize("text", ["[]", fenced("[]")], ids=["bare", "fenced"])
def test_an_empty_list_that_is_the_whole_answer_is_one(text: str) -> None:
    assert NAMES.parse(text) == []


@pytest.mark.parametrize(
    "schema, text, value",
    [
        (int, "42", 42),
        (int, fenced("42"), 42),
        (bool, "true", True),
        (str, '"see [1"', "see [1"),
        (str, json.dumps("```json\n[1]\n```"), "```json\n[1]\n```"),
        (int | None, "null", None),
    ],
    ids=["number", "fenced number", "bool", "a bracket in a string", "a fence in one", "null"],
)
def test_a_value_without_brackets_is_the_whole_answer(schema: Any, text: str, value: Any) -> None:
    assert OutputSchema(schema).parse(text) == value


@pytest.mark.parametrize(
    "schema, text",
    [(int, "It is 42."), (bool, "true, I think"), (str, "Jena"), (str, 'It is "Jena".')],
    ids=["number", "bool", "prose for a string", "string"],
)
def test_a_value_without_brackets_is_not_found_amid_prose(schema: Any, text: str) -> None:
    with pytest.raises(SchemaMismatch, match="no JSON value"):
        OutputSchema(schema).parse(text)


# --- thoughts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"<think>Perhaps {B}</think>\n{A}",
        f"<THINKING>\n{fenced(B)}\n</THINKING>\n\n{fenced(A)}",
        f"So {B} will not do.</think>{A}",
        f"<think>one {B}</think><think>two [</think> {A}",
        f"{A}<think>or is it {B}",
    ],
    ids=["before", "with a fence", "begun by the template", "two, one unclosed inside", "unclosed"],
)
def test_a_thought_is_not_an_answer(text: str) -> None:
    assert NODE.parse(text) == Node(name="a")


@pytest.mark.parametrize("text", [f"<think>{A}</think>", f"<think>{A}", f"{A}</think>"])
def test_an_answer_of_thoughts_alone_has_no_value(text: str) -> None:
    with pytest.raises(SchemaMismatch, match="no JSON value"):
        NODE.parse(text)


@pytest.mark.parametrize("around", ["{}", "Here: {}", "<think>hm</think>{}"])
def test_a_value_that_quotes_a_thought_stays_as_it_is(around: str) -> None:
    quoted = json.dumps({"name": "<think>x</think>y"})

    assert NODE.parse(around.replace("{}", quoted)) == Node(name="<think>x</think>y")


# --- cut answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [A, fenced(A), f"Here:\n{fenced(A)}", '"a"', "[1]", "true", "null"]
)
def test_of_a_cut_answer_a_value_counts_with_which_it_ends(text: str) -> None:
    (value,), is_stated = find_values(text, is_cut=True)

    assert is_stated
    assert value in (json.loads(A), "a", [1], True, None)


@pytest.mark.parametrize(
    "text",
    [
        f"Here: {A}",
        f"{A} and so",
        f"{fenced(A)}\nNo, wai",
        f"```json\n{A}",
        '{"name": "a',
        "12",
        "-1.5",
        "I thi",
        "",
    ],
    ids=[
        "amid prose",
        "before prose",
        "a block before prose",
        "an open fence",
        "an open value",
        "a number that may go on",
        "a fraction that may",
        "prose",
        "nothing",
    ],
)
def test_of_a_cut_answer_nothing_else_counts(text: str) -> None:
    with pytest.raises(NoValueError, match="cut off"):
        find_values(text, is_cut=True)


@pytest.mark.parametrize(
    "text",
    ["{" * 100_000, "{}" * 100_000 + "{", "{a}" * 100_000, "[" * 100_000 + "]" * 100_000],
    ids=["opening", "closed ones", "invalid ones", "deep"],
)
def test_a_long_text_of_brackets_takes_no_time_to_speak_of(text: str) -> None:
    with pytest.raises((NoValueError, SchemaMismatch)):
        NODE.parse(text)
