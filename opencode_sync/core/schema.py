"""Structured output: a schema, asked for in words, and the value that an answer holds for it.

    schema (a class, a type, a JSON Schema) --> OutputSchema --+--> instruction   for a prompt
                                                               +--> tool_schema   for a server
    answer --> find() --+--> Fit: the validated value
    tool ----> take() --+--> SchemaMismatch: what the validator says, for a repair prompt

    answer --without <think> blocks--> the last fenced block, if there is one
                                       else the whole answer, if it is JSON
                                       else the outermost values amid the prose

A value inside brackets that are not closed, or that hold invalid JSON, is never taken: it is a part
of something else. pydantic validates classes and types, jsonschema validates mappings; both are
imported when used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from .errors import OpenCodeConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_MOST_FAULTS = 20  # sent to the model at a time
_WRAPPED = "value"  # the key of a value that is not an object, in a tool's arguments
_ROUNDED = 2**53  # by OpenCode, which reads arguments of tools as JavaScript does


class SchemaMismatch(Exception):
    """An answer without a value that fits; *faults* says why, one entry a fault."""

    def __init__(self, *faults: str) -> None:
        super().__init__("; ".join(faults))
        self.faults = list(faults)


class Fit(NamedTuple):
    """A value that fits, and the JSON that it was made from."""

    value: Any
    json: Any


class OutputSchema:
    """What an answer has to look like; picklable if its source is.

    Attributes:
        json_schema: The schema as a JSON Schema.
        tool_schema: The schema for arguments of a tool, which are an object: *json_schema* itself,
            or an object with such a value.
    """

    def __init__(self, schema: Any) -> None:
        """
        Args:
            schema: A JSON Schema as a mapping, or a pydantic model class, a dataclass, a
                ``TypedDict``, or any other type that pydantic's ``TypeAdapter`` takes.

        Raises:
            OpenCodeConfigError: If it is not one of these, or the package for it is missing.
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
        """The words in a prompt that ask for such an answer."""
        schema = json.dumps(self.json_schema, ensure_ascii=False)
        return (
            "Answer with one JSON value and nothing else: no introduction, no explanation. "
            f"It has to fit this JSON Schema:\n{schema}"
        )

    @staticmethod
    def repair(faults: list[str], *, is_cut: bool = False) -> str:
        """The prompt after an answer that did not fit.

        Args:
            is_cut: The answer was cut off at the limit of the model's output.
        """
        words = "\n".join(f"- {fault}" for fault in faults[:_MOST_FAULTS])
        again = "Answer again, shorter" if is_cut else "Answer again"
        return (
            f"That answer does not fit the JSON Schema:\n{words}\n"
            f"{again}, with the corrected JSON value and nothing else."
        )

    def find(self, text: str, *, is_cut: bool = False) -> Fit:
        """Find the JSON value that *text* means: in the last fenced block, bare, or amid prose.

        Amid prose, exactly one value must fit.

        Args:
            is_cut: The text was cut off, so that only a value at its very end counts.

        Raises:
            SchemaMismatch: Says what is wrong with the likeliest value.
        """
        values, is_stated = find_values(text, is_cut=is_cut)
        if is_stated:
            return self._fit(values[0])
        fits: dict[str, Fit] = {}
        mismatches: list[SchemaMismatch] = []
        for value in values:
            try:
                fits[json.dumps(value, sort_keys=True)] = self._fit(value)
            except SchemaMismatch as mismatch:
                mismatches.append(mismatch)
        if not fits:
            raise mismatches[0]
        if len(fits) > 1:
            raise SchemaMismatch(f"the answer holds {len(fits)} different values that fit")
        (fit,) = fits.values()
        # Empty brackets are mostly not a value: a check box, a call of a function.
        if fit.json in ([], {}):
            raise SchemaMismatch("the answer holds an empty value amid other text")
        return fit

    def take(self, arguments: Any) -> Fit:
        """Validate the arguments with which a tool of *tool_schema* was called.

        Raises:
            SchemaMismatch: If they do not fit, or a number in them may have been rounded.
        """
        value = arguments
        if not self._is_object:
            if not isinstance(arguments, Mapping) or _WRAPPED not in arguments:
                raise SchemaMismatch(f"$: {_WRAPPED!r} is missing")
            value = arguments[_WRAPPED]
        fit = self._fit(value)
        for number in _whole_numbers(value):
            if abs(number) >= _ROUNDED:
                raise SchemaMismatch(
                    f"$: the tool rounds whole numbers from 2**53 on, such as {number}"
                )
        return fit

    def _fit(self, value: Any) -> Fit:
        return Fit(self.validate(value), value)

    def validate(self, value: Any) -> Any:
        """The validated form of a JSON value.

        Raises:
            SchemaMismatch: Also for whatever a validator of the user's own raises.
        """
        try:
            if self._adapter is None:
                return _validate_json(self.json_schema, value)
            return _validate_typed(self._adapter, value)
        except (SchemaMismatch, OpenCodeConfigError):
            raise
        except Exception as error:
            fault = f"$: the validator raised {type(error).__name__}: {error}"
            raise SchemaMismatch(fault) from error


def output_schema(schema: Any) -> OutputSchema | None:
    """Normalize the *schema* argument of a verb; None means no schema."""
    return None if schema is None else OutputSchema(schema)


def _validate_typed(adapter: TypeAdapter[Any], value: Any) -> Any:
    from pydantic import ValidationError

    try:
        # In JSON mode, in which a date is a str also where a model is strict.
        return adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        faults = [f"{_path(fault['loc'])}: {fault['msg']}" for fault in error.errors()]
        raise SchemaMismatch(*faults) from None


def _path(location: tuple[int | str, ...]) -> str:
    return "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)


def _validate_json(schema: dict[str, Any], value: Any) -> Any:
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
        raise SchemaMismatch(*faults)
    return value


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _whole_numbers(each)


# --- schemas -------------------------------------------------------------------------------------

_MOST_KEYS = 5  # quoted in an error
_WRAPPERS = ("schema", "json_schema", "input_schema", "parameters", "function")
_WRAPPER_KEYS = {*_WRAPPERS, "type", "name", "title", "description", "strict"}
_ANNOTATIONS = {"format"}  # keywords that accept everything, unless they are asked for
_SHARED = ("$defs", "definitions")  # where a schema keeps what it refers to


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
        # The last three: it is not a type at all, but an instance, say.
        reason = str(error).partition("\n")[0]
        raise OpenCodeConfigError(f"schema {name} cannot be used: {reason}") from error


def _checked_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
    except ImportError:
        raise _missing("jsonschema") from None
    try:
        plain = _unwrapped(json.loads(json.dumps(schema, allow_nan=False)))
        validator_for(plain).check_schema(plain)
    except SchemaError as error:
        raise OpenCodeConfigError(f"schema is not a valid JSON Schema: {error.message}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise OpenCodeConfigError(f"schema is not valid JSON: {error}") from None
    if not plain:
        raise OpenCodeConfigError(
            "schema is {}, which accepts every value: say what the answer has to look like"
        )
    if not plain.keys() & (validator_for(plain).VALIDATORS.keys() - _ANNOTATIONS):
        keys = ", ".join(map(repr, list(plain)[:_MOST_KEYS]))
        raise OpenCodeConfigError(
            f"schema is not a JSON Schema: it has {keys}, but none of the keywords, and so accepts "
            'every value; use {"type": "object", "properties": {...}}, not an example of an answer'
        )
    return plain


def _missing(package: str) -> OpenCodeConfigError:
    return OpenCodeConfigError(
        f"schema= needs {package} here: run 'pip install \"opencode-sync-sdk[schema]\"'"
    )


def _unwrapped(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema in *schema*, if that is what other SDKs take: a schema with a name."""
    while not schema.keys() - _WRAPPER_KEYS:
        inner = [schema[key] for key in _WRAPPERS if isinstance(schema.get(key), dict)]
        if len(inner) != 1:
            break
        schema = inner[0]
    return schema


def _wrapped(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object with a value of *schema*; what it refers to stays the same."""
    inner = {key: value for key, value in schema.items() if key not in (*_SHARED, "$schema")}
    shared = {key: _moved(schema[key]) for key in _SHARED if key in schema}
    return {
        "type": "object",
        "properties": {_WRAPPED: _moved(inner)},
        "required": [_WRAPPED],
        **shared,
    }


def _moved(value: Any) -> Any:
    """*value* with its references to the whole schema, or to parts of it, led to the new place."""
    if isinstance(value, list):
        return [_moved(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    moved = {}
    for key, each in value.items():
        is_local = key == "$ref" and isinstance(each, str) and each.startswith("#")
        if is_local and not each.startswith(tuple(f"#/{name}/" for name in _SHARED)):
            moved[key] = f"#/properties/{_WRAPPED}{each[1:]}"
        else:
            moved[key] = _moved(each)
    return moved


# --- values in an answer -------------------------------------------------------------------------

_THINK_TAG = r"<{}(?:think|thinking|thought|reasoning)>"
_TAG = re.compile(_THINK_TAG.format("/?"), re.IGNORECASE)
_CLOSING_TAG = re.compile(_THINK_TAG.format("/"), re.IGNORECASE)
_TAG_OR_BRACKET = re.compile(rf"[\[{{]|{_TAG.pattern}", re.IGNORECASE)
# On a line of its own, as in Markdown: a string of valid JSON has no line breaks.
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})([^`\n]*)$", re.MULTILINE)
_OPENING = re.compile(r"[\[{]")
# A string of JSON, as far as it goes, or a bracket.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("?)|[\[\]{}]', re.DOTALL)
_MEANT_AS_JSON = re.compile(r"""\s*(?:\{\s*["'}]|\[\s*["'\[{\d\]-])""")
_MOST_INVALID = 1_000  # brackets in prose: json counts all lines before each fault that it finds
_SHOWN_CHARS = 40
_NO_VALUE = "the answer holds no JSON value"


def find_values(answer: str, *, is_cut: bool = False) -> tuple[list[Any], bool]:
    """The JSON values that *answer* may mean, and whether the answer states its one value.

    Values that are not stated are found within prose and may be drafts; they are in the text's
    order.

    Args:
        is_cut: The model was stopped while it wrote. Then a value counts only where the answer
            ends with it, since what was to follow might have been another one.

    Raises:
        SchemaMismatch: If there is no whole value.
    """
    text = _without_thoughts(answer).strip()
    pieces, block = _split_at_fences(text)
    if block is not None:
        for piece in pieces:  # the block may be inside a value that is not valid JSON
            list(_outermost(piece))
        if is_cut and not (block.is_closed and block.is_last):
            raise SchemaMismatch("the answer is cut off, and not at the end of its last block")
        return [_stated(block.text, "the last fenced block", is_cut)], True
    try:
        return [_stated(text, "the answer", is_cut)], True
    except SchemaMismatch as error:
        values = list(_outermost(text))
        if is_cut:
            raise SchemaMismatch(f"{error} (it is cut off)") from None
        if not values:
            raise
    return values, False


def _stated(text: str, where: str, is_cut: bool) -> Any:
    """Parse *text*, all of which has to be JSON."""
    text = text.strip()
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        why = f": {error}" if _MEANT_AS_JSON.match(text) else ""
        raise SchemaMismatch(f"{where} holds no JSON value{why}") from None
    # All other kinds of values end with a mark of their own.
    if is_cut and isinstance(value, (int, float)) and not isinstance(value, bool):
        raise SchemaMismatch(f"{where} may be cut off inside its number")
    return value


def _outermost(text: str) -> Iterator[Any]:
    """The values in *text* that are not inside other brackets.

    Raises:
        SchemaMismatch: If brackets are not closed, or hold what is nearly JSON: the values in them
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
                raise SchemaMismatch(f"{_NO_VALUE}: {error}") from None
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
    raise SchemaMismatch(f"{_NO_VALUE}: it is cut off, since {shown!r}... is not closed")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return found


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:_SHOWN_CHARS]} is too large")
    return number


def _not_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is not valid JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_not_json)


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
        # Some models put the closing fence right behind the value, or leave it out.
        inside = text[opening.end() :].strip()
        return pieces, _Block(inside.removesuffix(opening[1]), False, True)
    return [*pieces, text[position:]], block


def _without_thoughts(text: str) -> str:
    """*text* without its ``<think>`` blocks; a value that quotes such a tag stays as it is."""
    if _TAG.search(text) is None:
        return text
    kept: list[str] = []
    begin = position = 0
    while (mark := _TAG_OR_BRACKET.search(text, position)) is not None:
        position = mark.end()
        if mark[0] in "[{":
            try:
                _, position = _DECODER.raw_decode(text, mark.start())
            except (ValueError, RecursionError):
                continue
        elif mark[0].startswith("</"):
            # With some models the opening tag is in the prompt's template, and not in the answer.
            kept, begin = [], position
        else:
            kept.append(text[begin : mark.start()])
            end = _CLOSING_TAG.search(text, position)
            begin = position = len(text) if end is None else end.end()
    return "".join([*kept, text[begin:]])
