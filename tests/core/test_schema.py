"""The shape of an answer: what is asked for, found and validated."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field, field_validator
from typing_extensions import TypedDict

from opencode_sync.core.errors import OpenCodeConfigError
from opencode_sync.core.schema import OutputSchema, SchemaMismatch


class Bird(BaseModel):
    name: str
    legs: int


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
    assert OutputSchema(schema).parse(text) == value


@pytest.mark.parametrize(
    "text",
    [
        ' {"name": "Jena", "people": 1}\n',
        'Here it is:\n```json\n{"name": "Jena", "people": 1}\n```\nAnything else?',
        '```\n{"name": "Jena", "people": 1}\n```',
        'I think {it} is {"name": "Jena", "people": 1}, mostly.',
        '{"name": "not this one"} but {"name": "Jena", "people": 1}',
    ],
    ids=["bare", "fenced as json", "fenced", "amid prose", "the second of two"],
)
def test_the_value_is_found_wherever_it_stands(text: str) -> None:
    assert OutputSchema(CITY).parse(text) == {"name": "Jena", "people": 1}


@pytest.mark.parametrize(
    "schema, text, words",
    [
        (Bird, '{"name": "Kiebitz"}', r"\$\.legs: Field required"),
        (list[Bird], '[{"name": "Kiebitz", "legs": "two"}]', r"\$\[0\]\.legs: .*integer"),
        (CITY, '{"name": "Jena", "people": "many"}', r"\$\.people: 'many' is not of type"),
        (CITY, "I would rather not.", "no JSON value"),
        (CITY, "{" * 5_000, "no JSON value"),
        ({"type": "number"}, "NaN", "no JSON value"),
        ({"type": "array"}, "[1e400]", "the number 1e400 is too large"),
        ({"type": "array"}, "[-Infinity]", "-Infinity is not valid JSON"),
        (CITY, '{"name": "Jena", "people": 1, "people": 2}', "'people' stands twice"),
    ],
    ids=[
        "missing field",
        "nested",
        "wrong type",
        "no JSON",
        "braces alone",
        "Python's own",
        "too large a number",
        "infinity",
        "a key twice",
    ],
)
def test_what_does_not_fit_is_told_in_the_validators_words(
    schema: Any, text: str, words: str
) -> None:
    with pytest.raises(SchemaMismatch, match=words):
        OutputSchema(schema).parse(text)


@pytest.mark.parametrize(
    "schema, words",
    [
        ("Bird", "use a class"),
        (None, "use a class"),
        ({"type": "no such type"}, "not a valid JSON Schema"),
        ({"default": object()}, "not valid JSON"),
        ({}, "accepts every value"),
        (
            {"name": "Kiebitz", "legs": 2},
            "it has 'name', 'legs', but none of the keywords, .*example",
        ),
        ({"title": "Bird", "format": "date"}, "none of the keywords"),
        ({"name": "Bird", "schema": {"legs": 2}}, "none of the keywords"),
        (Iterator[type("Socket", (), {})], "cannot be used"),
        (Bird(name="Kiebitz", legs=2), "cannot be used"),
    ],
    ids=[
        "a str",
        "None",
        "bad JSON Schema",
        "not JSON",
        "an empty schema",
        "an example",
        "annotations alone",
        "an example with a name",
        "a type that pydantic refuses",
        "a value",
    ],
)
def test_what_is_no_schema_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(OpenCodeConfigError, match=words):
        OutputSchema(schema)


@pytest.mark.parametrize(
    "wrapped",
    [
        {"name": "city", "strict": True, "schema": CITY},
        {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}},
        {"type": "json_schema", "name": "city", "schema": CITY},
        {"type": "json_schema", "schema": CITY},
        {"name": "city", "description": "A city", "input_schema": CITY},
        {"type": "function", "function": {"name": "city", "parameters": CITY}},
    ],
    ids=["named", "chat format", "response format", "OpenCode's format", "a tool", "a function"],
)
def test_a_json_schema_is_taken_out_of_what_other_libraries_wrap_it_in(wrapped: Any) -> None:
    assert OutputSchema(wrapped).json_schema == CITY


def test_a_json_schema_for_an_object_that_has_a_schema_stays_as_it_is() -> None:
    schema = {"type": "object", "properties": {"schema": CITY}}

    assert OutputSchema(schema).json_schema == schema


def test_a_reference_to_elsewhere_is_refused_and_not_fetched() -> None:
    schema = OutputSchema({"$ref": "http://127.0.0.1:9/schema.json"})

    with pytest.raises(OpenCodeConfigError, match="refers to what it does not hold"):
        schema.parse("{}")


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
def test_what_a_validator_raises_is_a_misfit_with_its_cause(
    schema: Any, answer: str, words: str
) -> None:
    with pytest.raises(SchemaMismatch, match=words) as caught:
        OutputSchema(schema).parse(answer)

    assert type(caught.value.__cause__).__name__ in words


class Strict(BaseModel, strict=True):
    born: date = Field(alias="Born")
    tags: tuple[str, ...]


def test_a_value_is_made_again_of_the_json_that_it_was_made_of() -> None:
    schema = OutputSchema(Strict)

    value, plain = schema.find('{"Born": "2000-01-02", "tags": ["a"]}')

    assert value.born == date(2000, 1, 2)
    assert schema.validate(json.loads(json.dumps(plain))) == value


class Node(BaseModel):
    children: list[Node] = []


@pytest.mark.parametrize(
    "schema, value",
    [
        (list[Bird], [{"name": "Kiebitz", "legs": 2}]),
        (int, 42),
        (Node, {"children": [{"children": []}]}),
        ({"type": "array", "items": {"$ref": "#"}}, [[], [[]]]),
        ({"$ref": "#/definitions/a", "definitions": {"a": {"type": "string"}}}, "a"),
    ],
    ids=["list", "number", "recursive model", "recursive JSON Schema", "definitions"],
)
def test_arguments_of_a_tool_are_an_object_with_the_value(schema: Any, value: Any) -> None:
    output = OutputSchema(schema)

    validator = Draft202012Validator(output.tool_schema)

    assert output.tool_schema["type"] == "object"
    assert validator.is_valid({"value": value})
    assert not validator.is_valid({"value": {"children": 1}})
    assert output.take({"value": value}).json == value


def test_an_object_is_the_tools_arguments_as_it_is() -> None:
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
    assert OutputSchema(int).parse(str(2**60)) == 2**60


def test_a_schema_pickles() -> None:
    copy = pickle.loads(pickle.dumps(OutputSchema(Bird)))

    assert copy.parse('{"name": "Kiebitz", "legs": 2}') == Bird(name="Kiebitz", legs=2)


def test_the_instruction_holds_the_schema_and_a_repair_holds_the_faults() -> None:
    schema = OutputSchema(CITY)

    assert '"people"' in schema.instruction
    assert "- $.people: too few" in schema.repair(["$.people: too few"])
