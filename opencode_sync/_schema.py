"""The shape of an answer: asked for in words, found in a text, validated.

    schema (a class, a type, a JSON Schema) --> OutputSchema --+--> instruction   for a prompt
                                                               +--> tool_schema   for a server
    answer text --_extract--> JSON value --+--> Fit: the value, validated
    what the tool was given ---------------+--> SchemaMismatch: the validator's words, for a repair

pydantic validates classes and types, jsonschema validates mappings; both are imported when used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ._extract import NoValueError, find_values
from .errors import OpenCodeConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_MOST_WORDS = 20  # faults told to the model at a time
_WRAPPED = "value"
_ROUNDED = 2**53  # by OpenCode, which reads what its tools are given as JavaScript does
_MOST_KEYS = 5  # told in an error
_WRAPPERS = ("schema", "json_schema", "input_schema", "parameters", "function")
_WRAPPER_KEYS = {*_WRAPPERS, "type", "name", "title", "description", "strict"}
_SAYS_NOTHING = {"format"}  # an annotation, unless asked for
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
    def repair(faults: list[str], *, is_cut: bool = False) -> str:
        """What to say to an answer that did not fit.

        Args:
            is_cut: It was cut off at the limit of the model's output.
        """
        words = "\n".join(f"- {fault}" for fault in faults[:_MOST_WORDS])
        again = "Answer again, shorter" if is_cut else "Answer again"
        return (
            f"That answer does not fit the JSON Schema:\n{words}\n"
            f"{again}, with the corrected JSON value and nothing else."
        )

    def parse(self, text: str) -> Any:
        """The validated value of the JSON in *text*; see :meth:`find`."""
        return self.find(text).value

    def find(self, text: str, *, is_cut: bool = False) -> Fit:
        """The JSON value that *text* means: in the last fenced block, bare, or amid prose.

        Amid prose, exactly one value must fit.

        Args:
            is_cut: The text was cut off, so that it means only a value that it ends with.

        Raises:
            SchemaMismatch: With what is wrong with the likeliest value.
        """
        try:
            values, is_stated = find_values(text, is_cut=is_cut)
        except NoValueError as error:
            raise SchemaMismatch([str(error)]) from None
        if is_stated:
            return Fit(self.validate(values[0]), values[0])
        fits: dict[str, Fit] = {}
        first: SchemaMismatch | None = None
        for value in values:
            try:
                fits[json.dumps(value, sort_keys=True)] = Fit(self.validate(value), value)
            except SchemaMismatch as mismatch:
                first = first or mismatch
        if first is not None and not fits:
            raise first
        if len(fits) > 1:
            raise SchemaMismatch([f"the answer holds {len(fits)} different values that fit"])
        (fit,) = fits.values()
        # Brackets with nothing in them are mostly no value: a check box, a call of a function.
        if fit.json in ([], {}):
            raise SchemaMismatch(["the answer holds an empty value amid other text"])
        return fit

    def take(self, arguments: Any) -> Fit:
        """What a tool of *tool_schema* was called with, if it fits; raises SchemaMismatch."""
        value = arguments
        if not self._is_object:
            if not isinstance(arguments, Mapping) or _WRAPPED not in arguments:
                raise SchemaMismatch([f"$: {_WRAPPED!r} is missing"])
            value = arguments[_WRAPPED]
        fit = Fit(self.validate(value), value)
        for number in _whole_numbers(value):
            if abs(number) >= _ROUNDED:
                raise SchemaMismatch(
                    [f"$: the tool rounds whole numbers from 2**53 on, such as {number}"]
                )
        return fit

    def validate(self, value: Any) -> Any:
        """The validated form of a JSON value.

        Raises:
            SchemaMismatch: Also for whatever a validator of the user's own raises.
        """
        try:
            return self._validated(value)
        except (SchemaMismatch, OpenCodeConfigError):
            raise
        except Exception as error:
            fault = f"$: the validator raised {type(error).__name__}: {error}"
            raise SchemaMismatch([fault]) from error

    def _validated(self, value: Any) -> Any:
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
        plain = _unwrapped(plain)
        validator_for(plain).check_schema(plain)
    except SchemaError as error:
        raise OpenCodeConfigError(f"schema is not a valid JSON Schema: {error.message}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise OpenCodeConfigError(f"schema is not valid JSON: {error}") from None
    if not plain.keys() & (validator_for(plain).VALIDATORS.keys() - _SAYS_NOTHING):
        raise OpenCodeConfigError(_accepts_everything(plain))
    return plain


def _unwrapped(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema itself, where *schema* is what another SDK takes: the schema with a name."""
    while not schema.keys() - _WRAPPER_KEYS:
        inner = [schema[key] for key in _WRAPPERS if isinstance(schema.get(key), dict)]
        if len(inner) != 1:
            break
        schema = inner[0]
    return schema


def _accepts_everything(schema: Mapping[str, Any]) -> str:
    if not schema:
        return "schema is {}, which accepts every value: say what the answer has to look like"
    keys = ", ".join(map(repr, list(schema)[:_MOST_KEYS]))
    return (
        f"schema is not a JSON Schema: it has {keys}, but none of the keywords, and so accepts "
        'every value; use {"type": "object", "properties": {...}}, not an example of an answer'
    )


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


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _whole_numbers(each)


def _missing(package: str) -> OpenCodeConfigError:
    return OpenCodeConfigError(
        f"schema= needs {package} here: run 'pip install \"opencode-sync-sdk[schema]\"'"
    )


def _path(location: tuple[int | str, ...]) -> str:
    return "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)
