"""Structured output: what is asked for, which value an answer means, and whether it fits."""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import dataclass
from datetime import date
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field, field_validator
from typing_extensions import TypedDict

from opencode_sync.core.errors import OpenCodeConfigError
from opencode_sync.core.schema import OutputSchema, SchemaMismatch, find_values


class Bird(BaseModel):
    name: str
    legs: int


class Person(BaseModel):
    name: str
    kids: list[Person] = []


@dataclass
class Fish:
    name: str
    fins: int


class Tree(TypedDict):
    name: str
    rings: int


CITY = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["name", "people"],
}


@pytest.mark.parametrize(
    "schema, text, value",
    [
        (Bird, '{"name": "Kiebitz", "legs": 2}', Bird(name="Kiebitz", legs=2)),
        (Fish, '{"name": "Hecht", "fins": 7}', Fish("Hecht", 7)),
        (Tree, '{"name": "Eibe", "rings": 900}', {"name": "Eibe", "rings": 900}),
        (CITY, '{"name": "Jena", "people": 110000}', {"name": "Jena", "people": 110000}),
        (list[int], "[1, 2]", [1, 2]),
        (int, "42", 42),
    ],
    ids=["pydantic", "dataclass", "TypedDict", "JSON Schema", "a list", "a number"],
)
def test_each_kind_of_schema_gives_its_own_kind_of_value(
    schema: Any, text: str, value: Any
) -> None:
    assert OutputSchema(schema).find(text).value == value


MISFITS: dict[str, tuple[Any, str, str]] = {
    "missing field": (Bird, '{"name": "Kiebitz"}', r"\$\.legs: Field required"),
    "nested": (list[Bird], '[{"name": "Ibis", "legs": "two"}]', r"\$\[0\]\.legs: .*integer"),
    "wrong type": (CITY, '{"name": "Jena", "people": "many"}', r"\$\.people: 'many' is not of"),
    "Python's own": ({"type": "number"}, "NaN", "no JSON value"),
    "too large a number": ({"type": "array"}, "[1e400]", "the number 1e400 is too large"),
    "a key twice": (CITY, '{"name": "Jena", "people": 1, "people": 2}', "'people' occurs twice"),
}


@pytest.mark.parametrize("schema, text, words", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_told_in_the_validators_words(
    schema: Any, text: str, words: str
) -> None:
    with pytest.raises(SchemaMismatch, match=words):
        OutputSchema(schema).find(text)


NOT_SCHEMAS: dict[str, tuple[Any, str]] = {
    "a str": ("Bird", "use a class"),
    "None": (None, "use a class"),
    "bad JSON Schema": ({"type": "no such type"}, "not a valid JSON Schema"),
    "not JSON": ({"default": object()}, "not valid JSON"),
    "an empty schema": ({}, "accepts every value"),
    "an example": ({"name": "Ibis"}, "it has 'name', but none of the keywords, .*example"),
    "annotations alone": ({"title": "Bird", "format": "date"}, "none of the keywords"),
    "a value": (Bird(name="Kiebitz", legs=2), "cannot be used"),
}


@pytest.mark.parametrize("schema, words", NOT_SCHEMAS.values(), ids=NOT_SCHEMAS)
def test_what_is_not_a_schema_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(OpenCodeConfigError, match=words):
        OutputSchema(schema)


@pytest.mark.parametrize(
    "wrapped",
    [
        {"name": "city", "strict": True, "schema": CITY},
        {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}},
        {"name": "city", "description": "A city", "input_schema": CITY},
        {"type": "function", "function": {"name": "city", "parameters": CITY}},
    ],
    ids=["named", "chat format", "a tool", "a function"],
)
def test_a_json_schema_is_taken_out_of_what_other_libraries_wrap_it_in(wrapped: Any) -> None:
    assert OutputSchema(wrapped).json_schema == CITY


def test_a_json_schema_for_an_object_that_has_a_schema_stays_as_it_is() -> None:
    schema = {"type": "object", "properties": {"schema": CITY}}

    assert OutputSchema(schema).json_schema == schema


def test_a_reference_to_elsewhere_is_refused_and_not_fetched() -> None:
    schema = OutputSchema({"$ref": "http://127.0.0.1:9/schema.json"})

    with pytest.raises(OpenCodeConfigError, match="refers to what it does not hold"):
        schema.find("{}")


@pytest.mark.parametrize("package, schema", [("pydantic", Bird), ("jsonschema.exceptions", CITY)])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    package: str, schema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(OpenCodeConfigError, match=r"opencode-sync-sdk\[schema\]"):
        OutputSchema(schema)


class Choosy(BaseModel):
    colour: str

    @field_validator("colour")
    @classmethod
    def known(cls, colour: str) -> int:
        return {"red": 1}[colour]


@dataclass
class Crashing:
    name: str

    def __post_init__(self) -> None:
        raise TypeError("half a bug")


@pytest.mark.parametrize(
    "schema, answer, words",
    [
        (Choosy, '{"colour": "blue"}', "the validator raised KeyError: 'blue'"),
        (Crashing, '{"name": "Jena"}', "the validator raised TypeError: half a bug"),
        ({"$ref": "#"}, "1", "the validator raised RecursionError"),
    ],
    ids=["field_validator", "dataclass", "a schema that refers to itself"],
)
def test_what_a_validator_raises_is_a_mismatch_with_its_cause(
    schema: Any, answer: str, words: str
) -> None:
    with pytest.raises(SchemaMismatch, match=words) as caught:
        OutputSchema(schema).find(answer)

    assert type(caught.value.__cause__).__name__ in words


class Strict(BaseModel, strict=True):
    born: date = Field(alias="Born")
    tags: tuple[str, ...]


def test_a_value_can_be_made_again_from_its_json() -> None:
    schema = OutputSchema(Strict)

    value, plain = schema.find('{"Born": "2000-01-02", "tags": ["a"]}')

    assert value.born == date(2000, 1, 2)
    assert schema.validate(json.loads(json.dumps(plain))) == value


@pytest.mark.parametrize(
    "schema, value",
    [
        (int, 42),
        (Person, {"name": "a", "kids": [{"name": "b", "kids": []}]}),
        ({"type": "array", "items": {"$ref": "#"}}, [[], [[]]]),
        ({"$ref": "#/definitions/a", "definitions": {"a": {"type": "string"}}}, "a"),
    ],
    ids=["number", "recursive model", "recursive JSON Schema", "definitions"],
)
def test_arguments_of_a_tool_are_an_object_with_the_value(schema: Any, value: Any) -> None:
    output = OutputSchema(schema)

    validator = Draft202012Validator(output.tool_schema)

    assert output.tool_schema["type"] == "object"
    assert validator.is_valid({"value": value})
    assert not validator.is_valid({"value": {"kids": 1}})
    assert output.take({"value": value}).json == value


def test_the_schema_of_an_object_is_the_tool_s_as_it_is() -> None:
    output = OutputSchema(Bird)

    assert output.tool_schema == output.json_schema
    assert output.take({"name": "Kiebitz", "legs": 2}).value == Bird(name="Kiebitz", legs=2)


def test_arguments_without_the_value_do_not_fit() -> None:
    with pytest.raises(SchemaMismatch, match="'value' is missing"):
        OutputSchema(int).take({"number": 42})


@pytest.mark.parametrize("value", [{"ids": [1, 2**53]}, {"id": -(2**60)}, {"a": {"b": 10**20}}])
def test_a_tool_s_number_that_may_have_been_rounded_is_no_answer(value: Any) -> None:
    with pytest.raises(SchemaMismatch, match=r"rounds whole numbers from 2\*\*53 on"):
        OutputSchema({"type": "object"}).take(value)


def test_numbers_that_are_exact_are_taken() -> None:
    value = {"a": 2**53 - 1, "b": True, "c": 1e300, "d": [None, "9" * 30]}

    assert OutputSchema({"type": "object"}).take(value).json == value
    assert OutputSchema(int).find(str(2**60)).value == 2**60


def test_a_schema_pickles() -> None:
    copy = pickle.loads(pickle.dumps(OutputSchema(Bird)))

    assert copy.find('{"name": "Kiebitz", "legs": 2}').value == Bird(name="Kiebitz", legs=2)


def test_the_instruction_holds_the_schema_and_a_repair_holds_the_faults() -> None:
    schema = OutputSchema(CITY)

    assert '"people"' in schema.instruction
    assert "- $.people: too few" in schema.repair(["$.people: too few"])


# --- which value an answer means -----------------------------------------------------------------


PERSON = OutputSchema(Person)
NAMES = OutputSchema(list[str])
A, B = '{"name": "a"}', '{"name": "b"}'


def fenced(text: str) -> str:
    return f"```json\n{text}\n```"


MEANT = {
    "bare": f"\n {A}\n",
    "fenced": fenced(A),
    "fenced with tildes": f"~~~\n{A}\n~~~",
    "fenced in a list": f"- Here:\n  ```json\n  {A}\n  ```",
    "a longer fence": f"````\n{A}\n````",
    "the last of two blocks": f"First:\n{fenced(B)}\nBetter:\n{fenced(A)}\nDone.",
    "a block after a draft": f"{B} is what I had, now:\n{fenced(A)}",
    "a fence closed behind the value": f"```json\n{A}```",
    "a fence that is not closed": f"```json\n{A}",
    "Windows line ends": f"```\r\n{A}\r\n```\r\n",
    "amid prose": f"Gladly: {A}.",
    "brackets in prose": f"As {{said}} in [the note](x), it is {A}, mostly.",
    "the same value twice": f"{A}\nAgain, to be sure:\n{A}",
    "the one of two that fits": f'{{"title": "of another shape"}}, but {A}',
}


@pytest.mark.parametrize("text", MEANT.values(), ids=MEANT)
def test_the_value_that_is_meant_is_found(text: str) -> None:
    assert PERSON.find(text).value == Person(name="a")


DOUBTFUL = {
    "a part of a cut value": ('{"name": "root", "kids": [{"name": "leaf"}, {"na', "cut off"),
    "a draft before a cut value": (f'Draft: {A}. Final: {{"name": "root", "kids": [', "cut off"),
    "a part of an invalid value": ('{"name": "root", "kids": [{"name": "x"},]}', "no JSON value: "),
    "a draft before an invalid value": (f'Draft: {A}. Final: {{"name": "r",}}', "no JSON value: "),
    "a template before a value": (f'As {{"name": ..., "kids": []}} says: {A}', "no JSON value: "),
    "a block in a value": (f'{{"name": "root",\n{fenced(A)}\n}}', "cut off"),
    "a block in a string": (f'{{"name": "see:\n{fenced(A)}\n"}}', "cut off"),
    "a block before a cut block": (f'{fenced(A)}\n```\n{{"name": "ro', "last fenced block"),
    "a block before a cut value": (f'{fenced(A)}\nNo, wait: {{"name": "ro', "cut off"),
    "a block that is not JSON": (f"{A} is it. Run:\n{fenced('ls')}", "block holds no JSON value"),
    "a last block that does not fit": (f"{fenced(A)}\n{fenced('[1]')}", r"\$: Input should be"),
    "two different values": (f"{A} or {B}", "2 different values that fit"),
    "prose": ("I would rather not.", "no JSON value"),
    "nothing": ("", "no JSON value"),
}


@pytest.mark.parametrize("text, words", DOUBTFUL.values(), ids=DOUBTFUL)
def test_no_value_is_taken_where_there_is_a_doubt(text: str, words: str) -> None:
    with pytest.raises(SchemaMismatch, match=words):
        PERSON.find(text)


@pytest.mark.parametrize(
    "text",
    ['- [ ] read it\n["a", "b"]', "- [ ] read it\n- [ ] write it", "Call f([]) for it."],
    ids=["check box and a list", "check boxes", "a call"],
)
def test_empty_brackets_in_prose_are_not_taken_for_a_list(text: str) -> None:
    with pytest.raises(SchemaMismatch):
        NAMES.find(text)


def test_an_empty_list_that_is_the_whole_answer_is_one() -> None:
    assert NAMES.find(fenced("[]")).value == []


@pytest.mark.parametrize(
    "schema, text, value",
    [
        (int, fenced("42"), 42),
        (bool, "true", True),
        (str, '"see [1"', "see [1"),
        (str, json.dumps("```json\n[1]\n```"), "```json\n[1]\n```"),
        (int | None, "null", None),
    ],
    ids=["number", "bool", "a bracket in a string", "a fence in one", "null"],
)
def test_a_value_without_brackets_is_the_whole_answer(schema: Any, text: str, value: Any) -> None:
    assert OutputSchema(schema).find(text).value == value


@pytest.mark.parametrize(
    "schema, text",
    [(int, "It is 42."), (str, "Jena"), (str, 'It is "Jena".')],
    ids=["number", "prose for a string", "string"],
)
def test_a_value_without_brackets_is_not_found_amid_prose(schema: Any, text: str) -> None:
    with pytest.raises(SchemaMismatch, match="no JSON value"):
        OutputSchema(schema).find(text)


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
    assert PERSON.find(text).value == Person(name="a")


@pytest.mark.parametrize("text", [f"<think>{A}</think>", f"<think>{A}", f"{A}</think>"])
def test_an_answer_of_thoughts_alone_has_no_value(text: str) -> None:
    with pytest.raises(SchemaMismatch, match="no JSON value"):
        PERSON.find(text)


@pytest.mark.parametrize("around", ["{}", "Here: {}", "<think>hm</think>{}"])
def test_a_value_that_quotes_a_thought_stays_as_it_is(around: str) -> None:
    quoted = json.dumps({"name": "<think>x</think>y"})

    assert PERSON.find(around.replace("{}", quoted)).value == Person(name="<think>x</think>y")


# --- cut answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [A, f"Here:\n{fenced(A)}", '"a"', "true", "null"])
def test_a_value_at_the_end_of_a_cut_answer_counts(text: str) -> None:
    (value,), is_stated = find_values(text, is_cut=True)

    assert is_stated
    assert value in (json.loads(A), "a", True, None)


CUT = {
    "amid prose": f"Here: {A}",
    "before prose": f"{A} and so",
    "a block before prose": f"{fenced(A)}\nNo, wai",
    "an open fence": f"```json\n{A}",
    "an open value": '{"name": "a',
    "a number that may go on": "12",
    "a fraction that may": "-1.5",
    "prose": "I thi",
}


@pytest.mark.parametrize("text", CUT.values(), ids=CUT)
def test_no_other_value_of_a_cut_answer_counts(text: str) -> None:
    with pytest.raises(SchemaMismatch, match="cut off"):
        find_values(text, is_cut=True)


@pytest.mark.parametrize(
    "text",
    ["{" * 100_000, "{a}" * 100_000, "[" * 100_000 + "]" * 100_000],
    ids=["opening", "invalid ones", "deep"],
)
def test_a_long_text_of_brackets_takes_no_time_to_speak_of(text: str) -> None:
    with pytest.raises(SchemaMismatch):
        PERSON.find(text)
