"""The shape of an answer: asked for in words, found in a text, validated.

    schema (a class, a type, a JSON Schema) --> OutputSchema --+--> instruction   for a prompt
                                                               +--> tool_schema   for a server
    answer text --_extract--> JSON value --+--> Fit: the value, validated
    what the tool was given ---------------+--> SchemaMismatch: the validator's words, for a repair

pydantic validates classes and types, jsonschema validates mappings; both are imported when used.

Find the JSON value that an answer means.

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
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from .errors import OpenCodeConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

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
