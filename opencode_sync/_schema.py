"""The shape of an answer: asked for in words, found in a text, validated.

    schema (a class, a type, a JSON Schema) --> OutputSchema --+--> instruction   for a prompt
                                                               +--> tool_schema   for a server
    answer text --> JSON values in it --+--> Fit: the value, validated
    what the tool was given ------------+--> SchemaMismatch: the validator's words, for a repair

pydantic validates classes and types, jsonschema validates mappings; both are imported when used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from .errors import OpenCodeConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_FENCED = re.compile(r"```[\w-]*[ \t]*\n(.*?)```", re.DOTALL)
_OPENING = re.compile(r"[\[{]")
_MOST_STARTS = 200  # where a value may begin in prose; a text of braces alone would take for ever
_MOST_WORDS = 20  # faults told to the model at a time
_WRAPPED = "value"
_SHARED = ("$defs", "definitions")  # where a schema keeps what it refers to


class SchemaMismatch(Exception):
    """An answer that does not fit; *faults* are the validator's words, one entry a fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


class Fit(NamedTuple):
    """A value that fits, and the JSON that it was made of."""

    value: Any
    json: Any


class OutputSchema:
    """What an answer has to look like; picklable as what it was made of.

    Attributes:
        json_schema: The same as a JSON Schema.
        tool_schema: The same for arguments of a tool, which are an object: *json_schema*, or an
            object with such a value.
    """

    def __init__(self, schema: Any) -> None:
        """
        Args:
            schema: A JSON Schema as a mapping, or a pydantic model class, a dataclass, a
                ``TypedDict``, or any other type that pydantic's ``TypeAdapter`` takes.

        Raises:
            OpenCodeConfigError: If it is none of these, or the package for it is missing.
        """
        self._source = schema
        self._adapter: TypeAdapter[Any] | None = None
        if isinstance(schema, Mapping):
            self.json_schema = _checked_schema(schema)
        else:
            self._adapter, self.json_schema = _adapted(schema)
        self._is_object = self.json_schema.get("type") == "object"
        self.tool_schema = self.json_schema if self._is_object else _wrapped(self.json_schema)

    def __reduce__(self) -> tuple[Any, ...]:
        return OutputSchema, (self._source,)

    @property
    def instruction(self) -> str:
        """What a prompt has to say for such an answer."""
        schema = json.dumps(self.json_schema, ensure_ascii=False)
        return (
            "Answer with one JSON value and nothing else: no introduction, no explanation. "
            f"It has to fit this JSON Schema:\n{schema}"
        )

    @staticmethod
    def repair(faults: list[str]) -> str:
        """What to say to an answer that did not fit."""
        words = "\n".join(f"- {fault}" for fault in faults[:_MOST_WORDS])
        return (
            f"That answer does not fit the JSON Schema:\n{words}\n"
            "Answer again, with the corrected JSON value and nothing else."
        )

    def parse(self, text: str) -> Any:
        """The validated value of the JSON in *text*; see :meth:`find`."""
        return self.find(text).value

    def find(self, text: str) -> Fit:
        """The JSON in *text* that fits: bare, in a fenced block, or amid prose.

        Raises:
            SchemaMismatch: With what is wrong with the likeliest value.
        """
        first: SchemaMismatch | None = None
        for value in _json_values(text):
            try:
                return Fit(self.validate(value), value)
            except SchemaMismatch as mismatch:
                first = first or mismatch
        raise first or SchemaMismatch(["the answer holds no JSON value"])

    def take(self, arguments: Any) -> Fit:
        """What a tool of *tool_schema* was called with, if it fits; raises SchemaMismatch."""
        value = arguments
        if not self._is_object:
            if not isinstance(arguments, Mapping) or _WRAPPED not in arguments:
                raise SchemaMismatch([f"$: {_WRAPPED!r} is missing"])
            value = arguments[_WRAPPED]
        return Fit(self.validate(value), value)

    def validate(self, value: Any) -> Any:
        """The validated form of a JSON value; raises SchemaMismatch."""
        if self._adapter is None:
            return _validate_mapping(self.json_schema, value)
        from pydantic import ValidationError

        try:
            # By the rules for JSON, after which a date is a str also where a model is strict.
            return self._adapter.validate_json(json.dumps(value))
        except ValidationError as error:
            raise SchemaMismatch(
                [f"{_path(fault['loc'])}: {fault['msg']}" for fault in error.errors()]
            ) from None


def output_schema(schema: Any) -> OutputSchema | None:
    """Of the argument *schema* of a verb, where None stands for none."""
    return None if schema is None else OutputSchema(schema)


def _adapted(schema: Any) -> tuple[TypeAdapter[Any], dict[str, Any]]:
    try:
        from pydantic import TypeAdapter
        from pydantic.errors import PydanticUserError
    except ImportError:
        raise _missing("pydantic") from None
    name = getattr(schema, "__name__", repr(schema))
    if isinstance(schema, (str, bytes, int, float, list, tuple)) or schema is None:
        raise OpenCodeConfigError(f"schema is {schema!r}: use a class, a type or a JSON Schema")
    try:
        adapter = TypeAdapter(schema)
        return adapter, adapter.json_schema()
    except (PydanticUserError, AttributeError, NameError, TypeError) as error:
        # The others come of what is no type at all, such as an instance.
        reason = str(error).partition("\n")[0]
        raise OpenCodeConfigError(f"schema {name} cannot be used: {reason}") from error


def _checked_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
    except ImportError:
        raise _missing("jsonschema") from None
    try:
        plain: dict[str, Any] = json.loads(json.dumps(schema, allow_nan=False))
        validator_for(plain).check_schema(plain)
    except SchemaError as error:
        raise OpenCodeConfigError(f"schema is no JSON Schema: {error.message}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise OpenCodeConfigError(f"schema is no JSON: {error}") from None
    return plain


def _wrapped(schema: Mapping[str, Any]) -> dict[str, Any]:
    """An object with a value of *schema*, whose references lead to the same as before."""
    inner = {key: value for key, value in schema.items() if key not in (*_SHARED, "$schema")}
    shared = {key: _moved(schema[key]) for key in _SHARED if key in schema}
    return {
        "type": "object",
        "properties": {_WRAPPED: _moved(inner)},
        "required": [_WRAPPED],
        **shared,
    }


def _moved(value: Any) -> Any:
    if isinstance(value, list):
        return [_moved(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: f"#/properties/{_WRAPPED}{each[1:]}" if _leads_inside(key, each) else _moved(each)
        for key, each in value.items()
    }


def _leads_inside(key: str, value: Any) -> bool:
    shared = tuple(f"#/{name}/" for name in _SHARED)
    is_local = key == "$ref" and isinstance(value, str) and value.startswith("#")
    return is_local and not value.startswith(shared)


def _validate_mapping(schema: dict[str, Any], value: Any) -> Any:
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    # A registry of its own: by default a "$ref" to a URL would be fetched.
    validator = validator_for(schema)(schema, registry=Registry())
    try:
        faults = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]
    except Unresolvable as error:
        raise OpenCodeConfigError(f"schema refers to what it does not hold: {error}") from None
    if faults:
        raise SchemaMismatch(faults)
    return value


def _missing(package: str) -> OpenCodeConfigError:
    return OpenCodeConfigError(
        f"schema= needs {package} here: run 'pip install \"opencode-sync-sdk[schema]\"'"
    )


def _path(location: tuple[int | str, ...]) -> str:
    return "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)


def _no_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _json_values(text: str) -> Iterator[Any]:
    """The JSON values in *text*, the likeliest first."""
    for candidate in (text, *_FENCED.findall(text)):
        try:
            yield json.loads(candidate, parse_constant=_no_json)
        except (ValueError, RecursionError):
            continue
    decoder, position = json.JSONDecoder(parse_constant=_no_json), 0
    for _ in range(_MOST_STARTS):
        match = _OPENING.search(text, position)
        if match is None:
            return
        try:
            value, position = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            position = match.start() + 1
        else:
            yield value
