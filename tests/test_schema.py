"""The shape of an answer: what is asked for, found and validated."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel
from typing_extensions import TypedDict

from opencode_sync._schema import OutputSchema, SchemaMismatch
from opencode_sync.errors import OpenCodeConfigError


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
    ],
    ids=["missing field", "nested", "wrong type", "no JSON", "braces alone"],
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
        ({"type": "no such type"}, "no JSON Schema"),
        ({"default": object()}, "no JSON"),
        (Iterator[type("Socket", (), {})], "cannot be used"),
    ],
    ids=["a str", "None", "bad JSON Schema", "not JSON", "a type that pydantic refuses"],
)
def test_what_is_no_schema_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(OpenCodeConfigError, match=words):
        OutputSchema(schema)


def test_a_reference_to_elsewhere_is_refused_and_not_fetched() -> None:
    schema = OutputSchema({"$ref": "http://127.0.0.1:9/schema.json"})

    with pytest.raises(OpenCodeConfigError, match="refers to what it does not hold"):
        schema.parse("{}")


@pytest.mark.parametrize("package, schema", [("pydantic", Bird), ("jsonschema.exceptions", CITY)])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    package: str, schema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(OpenCodeConfigError, match=r"opencode-sync\[schema\]"):
        OutputSchema(schema)


def test_a_value_survives_being_stored_as_json() -> None:
    schema = OutputSchema(list[Fish])

    assert schema.validate(schema.dump([Fish("Hecht", 7)])) == [Fish("Hecht", 7)]


def test_a_schema_pickles() -> None:
    copy = pickle.loads(pickle.dumps(OutputSchema(Bird)))

    assert copy.parse('{"name": "Kiebitz", "legs": 2}') == Bird(name="Kiebitz", legs=2)


def test_the_instruction_holds_the_schema_and_a_repair_holds_the_faults() -> None:
    schema = OutputSchema(CITY)

    assert '"people"' in schema.instruction
    assert "- $.people: too few" in schema.repair(["$.people: too few"])
