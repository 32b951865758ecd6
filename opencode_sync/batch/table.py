"""Jobs from tables: files as people have them, and pandas' frames.

    path or "-" --> bytes --> text --+-- lines    a prompt per line
                                     +-- csv      a header and rows, with any separator and quoting
                                     +-- jsonl    a JSON object per line
                                     +-- json     an array of objects, or of prompts
    Parquet --> pandas --> frame ----+
                                     +--> Table --> Job(prompt, key, settings, metadata), ...

An error says where a file cannot be read, and which columns there are. What is wrong with one job
is left to the batch, in which it is an error in its place.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ..core.config import Job, RunConfig
from ..core.errors import OpenCodeConfigError
from ..core.limits import LIMITS_OF_A_JOB
from ..core.records import jsonable
from ..core.request import checked_config

STDIN = "-"

Format = Literal["lines", "csv", "tsv", "jsonl", "json", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
_OTHER_SUFFIXES = {".txt": "lines", ".tab": "tsv", ".ndjson": "jsonl", ".pq": "parquet"}
_BY_SUFFIX: dict[str, Any] = {**{f".{name}": name for name in FORMATS}, **_OTHER_SUFFIXES}

# Fields of RunConfig that may differ within a batch, also on one server.
SETTINGS = ("model", "agent", "variant", "title", "command", "files", "permission", "thinking")

_PROMPT, _KEY = "prompt", "key"
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
# What Python's and pandas' ways to write a missing value as text leave in a cell.
_MISSING = frozenset({"nan", "NaN", "None", "<NA>", "NaT", "null"})

_SEPARATORS = ",;\t|"
# A character of a header that may separate cells, beside those: not part of a usual name.
_ODD_SEPARATOR = re.compile(r"[^\w\s\"'.()\[\]{}/#&+,;|-]|[\x1c-\x1f]")
_HEADER_CELL = re.compile(r"[A-Za-z_][\w .:/#%-]{0,60}(\([^()]{1,20}\))?")
_ROWS_LOOKED_AT = 20
_LONGEST_CELL = 2**31 - 1  # characters; the csv module's default of 131,072 is less than a prompt
_SHOWN_COLUMNS = 30


class Row(NamedTuple):
    """Where a row is, such as ``"line 3"``, and its cells by column; None for an empty one."""

    place: str
    cells: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """What a file or a frame holds.

    Attributes:
        name: Of the file, for people.
        format: How it was read.
        columns: In their order.
        separator: Between the cells of a CSV file.
        has_mark: Whether it began with a byte order mark, as Excel writes and wants it.
    """

    name: str
    format: str
    columns: Sequence[str]
    rows: Sequence[Row]
    separator: str = ","
    has_mark: bool = False


class _Misread(Exception):
    """The input cannot be read; the message says where, and why."""


@dataclass(frozen=True)
class Roles:
    """Which columns make the prompt and the key; None for ``prompt``, and for ``key`` if it exists.

    Attributes:
        template: A text with ``{column}`` for what a row has there; ``{{`` and ``}}`` are braces.
    """

    template: str | None = None
    prompt_column: str | None = None
    key_column: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise OpenCodeConfigError(f"{name} is {value!r}: use a text")
        if self.template is not None and self.prompt_column is not None:
            raise OpenCodeConfigError(
                "template and prompt_column exclude each other: use {column} in the template"
            )
        if self.template is not None and not self.placeholders:
            raise OpenCodeConfigError("the template names no column: use {column} in it")

    @property
    def placeholders(self) -> list[str]:
        """The columns that the template names."""
        found = _PLACEHOLDER.finditer(self.template or "")
        return [match[1].strip() for match in found if match[1]]

    @property
    def wanted(self) -> list[str]:
        """The columns that there have to be."""
        prompts = self.placeholders or [self.prompt_column or _PROMPT]
        return [*prompts, *([] if self.key_column is None else [self.key_column])]

    def prompt(self, cells: Mapping[str, Any]) -> Any:
        """The prompt of a row; None if a cell that it is made of is empty."""
        if self.template is None:
            return _present(cells.get(self.prompt_column or _PROMPT))
        values = {name: _present(cells.get(name)) for name in self.placeholders}
        if None in values.values():
            return None
        as_json = partial(json.dumps, ensure_ascii=False, default=str)
        texts = {
            name: value if isinstance(value, str) else as_json(value)
            for name, value in values.items()
        }
        return _PLACEHOLDER.sub(
            lambda match: texts[match[1].strip()] if match[1] else match[0][0], self.template
        )


def _present(value: Any) -> Any:
    """*value*, or None for an empty one, and for what stands for one."""
    if isinstance(value, str) and (not value.strip() or value.strip() in _MISSING):
        return None
    return value


def read_jobs(
    source: Any,
    *,
    template: str | None = None,
    prompt_column: str | None = None,
    key_column: str | None = None,
    run_cfg: RunConfig | None = None,
    format: Format | None = None,
) -> list[Job]:
    """Read a job from each row of a file, or of a pandas DataFrame.

    A row's prompt is its cell in the column ``prompt``, or in another one, or made from several
    cells by a template. Its ``key``, ``workspace``, ``timeout_s``, ``max_cost``, ``max_steps`` and
    ``max_tokens`` are the job's; all other columns become its metadata. A job whose row has no
    prompt is an error in its place in a batch.

    Args:
        source: The path of a file, ``"-"`` for stdin, or a pandas DataFrame. Files are text in
            UTF-8, or UTF-16 with a byte order mark, or Parquet if pandas is installed.
        template: Makes the prompts, as in ``"Explain {file}: {error}"``; ``{{`` is a brace.
        prompt_column, key_column: Names of columns, in place of ``prompt`` and ``key``.
        run_cfg: The columns ``model``, ``agent``, ``variant``, ``title``, ``command``, ``files``,
            ``permission`` and ``thinking`` change these for a job, unless the template names them.
        format: ``"lines"`` for a prompt per line; ``"csv"`` with any separator, or ``"tsv"``;
            ``"jsonl"`` for an object per line; ``"json"`` for an array of objects or prompts;
            ``"parquet"``. None for what the file's suffix says, or else its beginning.

    Raises:
        OpenCodeConfigError: The input cannot be read, lacks a column, or may be a table or not.
            Names the line and the columns that there are.
    """
    roles = Roles(template, prompt_column, key_column)
    if run_cfg is not None:
        checked_config(run_cfg, run_cfg)
    return jobs_of(read_table(source, roles, format), roles, run_cfg)


def is_frame(value: object) -> bool:
    """Whether *value* is a table in memory, which iterates over something else than rows."""
    return hasattr(value, "columns") and hasattr(value, "shape")


# --- from rows to jobs ---------------------------------------------------------------------------


def jobs_of(table: Table, roles: Roles, run_cfg: RunConfig | None) -> list[Job]:
    """A job for each row of *table*; see :func:`read_jobs`."""
    missing = [name for name in roles.wanted if name not in table.columns]
    if missing and table.columns:
        braces = "" if roles.template is None else "; in a template, write {{ and }} for braces"
        raise OpenCodeConfigError(f"{table.name}: {_no_column(missing[0], table)}{braces}")
    settings = [name for name in SETTINGS if name in table.columns]
    settings = [name for name in settings if name not in roles.wanted]
    if settings and run_cfg is None:
        raise OpenCodeConfigError(
            f"{table.name}: the column {settings[0]!r} is a setting of its job: pass run_cfg=, the "
            "settings that it changes, or rename the column"
        )
    return [_job(row.cells, roles, settings, run_cfg) for row in table.rows]


def _no_column(name: str, table: Table) -> str:
    there = f"there are {_listed(table.columns)}"
    if table.format == "lines":
        there = "it was read as a prompt per line, which is the column 'prompt'"
    return (
        f"no column {name!r}: {there}; name the columns with prompt_column=, key_column= or "
        "template= (--prompt-column, --key-column, --prompt), the format with format= (--format)"
    )


def _job(
    cells: Mapping[str, Any], roles: Roles, settings: Sequence[str], run_cfg: RunConfig | None
) -> Job:
    key_column = roles.key_column or _KEY
    limits = {
        name: _number(cells[name], is_whole=name in ("max_steps", "max_tokens"))
        for name in LIMITS_OF_A_JOB
        if cells.get(name) is not None
    }
    changes = {name: cells[name] for name in settings if cells.get(name) is not None}
    if "files" in changes:
        changes["files"] = _from_here(changes["files"])
    known = {key_column, "workspace", *LIMITS_OF_A_JOB, *settings}
    if roles.template is None:
        known.add(roles.prompt_column or _PROMPT)
    metadata = {name: value for name, value in cells.items() if name not in known}
    if isinstance(given := metadata.get("metadata"), Mapping):
        metadata = {**given, **{name: metadata[name] for name in metadata if name != "metadata"}}
    return Job(
        roles.prompt(cells),
        cells.get("workspace"),
        run_cfg.replace(**changes) if run_cfg is not None and changes else None,
        key=_key(cells.get(key_column)),
        metadata=metadata or None,
        **limits,
    )


def _number(value: Any, *, is_whole: bool) -> Any:
    """The number in a cell; anything else is left as it is, and refused by the batch."""
    if isinstance(value, bool):
        return value
    try:
        number = float(value)
        return int(number) if is_whole and number.is_integer() else number
    except (TypeError, ValueError, OverflowError):
        return value


def _key(value: Any) -> Any:
    """A row's key; a number's digits, and None for what is missing."""
    if isinstance(value, float) and value.is_integer():  # pandas' way with an empty cell among ints
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _present(value)


def _from_here(files: Any) -> Any:
    names = [files] if isinstance(files, str) else files
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return files  # refused by the batch
    return tuple(os.path.abspath(os.path.expanduser(name)) for name in names)


# --- files and frames ----------------------------------------------------------------------------


def read_table(source: Any, roles: Roles, format: Format | None = None) -> Table:
    """Read the rows of a file or a frame; arguments and errors as for :func:`read_jobs`."""
    if format is not None and format not in FORMATS:
        raise OpenCodeConfigError(f"format is {format!r}: use {', '.join(FORMATS)}")
    if callable(getattr(source, "itertuples", None)):
        return _table_of_frame(source, "the DataFrame")
    if not isinstance(source, (str, os.PathLike)):
        raise OpenCodeConfigError(f"source is {type(source).__name__}: use a path or a DataFrame")
    path = os.fspath(source)
    name = "stdin" if path == STDIN else path
    if path == STDIN and not hasattr(sys.stdin, "buffer"):
        raise OpenCodeConfigError("stdin: closed, or not a stream of bytes")
    try:
        data = sys.stdin.buffer.read() if path == STDIN else Path(path).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # also a NUL in the path, or ~nobody
        reason = getattr(error, "strerror", None) or error
        raise OpenCodeConfigError(f"{name}: {reason}") from None
    try:
        return _table_in(data, name, roles, format, Path(path).suffix.lower())
    except _Misread as error:
        raise OpenCodeConfigError(f"{name}, {error}") from None


def _table_in(data: bytes, name: str, roles: Roles, format: Format | None, suffix: str) -> Table:
    said = format or _BY_SUFFIX.get(suffix)
    if said == "parquet" or (said is None and data[:4] == b"PAR1"):
        return _table_of_frame(_frame_in(data, name), name, "parquet")
    text, has_mark = _decoded(data)
    if format is None and said in (None, "lines"):
        said = _guessed(text, roles, is_lines=said == "lines")
    if said in ("csv", "tsv"):
        return _csv_table(text, name, roles, "\t" if said == "tsv" else None, has_mark)
    rows = list(_READERS[str(said)](text))
    columns = list(dict.fromkeys(column for row in rows for column in row.cells))
    return Table(name, str(said), columns, rows)


def _decoded(data: bytes) -> tuple[str, bool]:
    """The text, and whether it began with a byte order mark."""
    if data.startswith((b"PK\x03\x04", b"\x1f\x8b")):
        raise _Misread("line 1: this is a spreadsheet, or compressed: save it as text, such as CSV")
    is_wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # Excel's "Unicode text"
    try:
        text = data.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise _Misread(
            f"line {line}, column {column}: not UTF-8: {error.reason}; in Excel, save it as "
            "'CSV UTF-8'"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise _Misread(f"line {line}: a NUL character: this is not a text file")
    return text, is_wide or data[:1] == b"\xef"


def _frame_in(data: bytes, name: str) -> Any:
    try:
        return importlib.import_module("pandas").read_parquet(io.BytesIO(data))
    except ImportError as error:
        raise OpenCodeConfigError(
            f"{name}: a Parquet file needs pandas and pyarrow: run 'pip install pandas pyarrow'"
        ) from error
    except Exception as error:
        raise OpenCodeConfigError(f"{name}: not valid Parquet: {error}") from error


def _table_of_frame(frame: Any, name: str, format: str = "frame") -> Table:
    levels = [name for name in frame.index.names if name is not None and name not in frame.columns]
    columns = [str(column) for column in (*levels, *frame.columns)]
    if twice := _twice(columns):
        raise OpenCodeConfigError(f"{name}: two columns or levels of the index {twice!r}")
    if levels:  # an index that says something
        frame = frame.reset_index(level=levels)
    rows = [
        Row(f"row {number}", {column: _plain(cell) for column, cell in zip(columns, cells)})  # noqa: B905 - as many
        for number, cells in enumerate(frame.itertuples(index=False, name=None))
    ]
    return Table(name, format, columns, rows)


def _plain(cell: Any) -> Any:
    try:
        return jsonable(cell)
    except ValueError:
        return cell  # refused by the batch, if it is metadata


def _twice(columns: Sequence[str]) -> str | None:
    """A name that two columns have."""
    return next((name for name in columns if name and columns.count(name) > 1), None)


# --- what the text is ----------------------------------------------------------------------------


def _guessed(text: str, roles: Roles, *, is_lines: bool) -> Format:
    """The format of *text*, whose name does not say it, or says that it has a prompt per line.

    Raises:
        _Misread: It may be one or the other.
    """
    if not is_lines and re.match(r'\{|\[\s*[\[{"\]]', text.lstrip()):
        return "json"
    first = _first_line(text)
    for separator in _SEPARATORS:
        header = _cells(first, separator)
        has_header = set(roles.wanted) <= set(header)
        if has_header and (not is_lines or roles != Roles()):  # or somebody has named its columns
            return "csv"
        if has_header or _is_like_a_table(text, first, separator, header):
            raise _Misread(
                f"line 1: this may be a table with the columns {_listed(header)}: if so, pass "
                "format='csv' (--format csv), and prompt_column= or template= (--prompt-column, "
                "--prompt) where no column is called 'prompt'; if each line is a prompt, pass "
                "format='lines' (--format lines)"
            )
    return "lines"


def _is_like_a_table(text: str, first: str, separator: str, header: Sequence[str]) -> bool:
    """Whether the first lines have as many cells each, and the very first one has names."""
    if len(header) < 2 or len(set(header)) < len(header) or f"{separator} " in first:
        return False  # programs write no space behind a comma, people do
    if not all(map(_HEADER_CELL.fullmatch, [header[0] or "index", *header[1:]])):
        return False
    try:
        rows = islice(_records(text, _Dialect(separator)), _ROWS_LOOKED_AT)
        widths = [len(cells) for _, cells in rows]
    except _Misread:
        return False
    return len(widths) > 1 and set(widths) == {len(header)}


def _first_line(text: str) -> str:
    return next((line for _, line in _lines(text)), "")


def _cells(line: str, separator: str) -> list[str]:
    return [cell.strip(" \"'") for cell in line.split(separator)]


def _listed(columns: Sequence[str]) -> str:
    more = len(columns) - _SHOWN_COLUMNS
    shown = ", ".join(map(repr, columns[:_SHOWN_COLUMNS]))
    return f"{shown} and {more} more" if more > 0 else shown


# --- text that is not a table --------------------------------------------------------------------


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines(), which also splits at characters that prompts contain, such as U+2028.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield number, line.removesuffix("\n")


def _prompts(text: str) -> Iterator[Row]:
    for number, line in _lines(text):
        yield Row(f"line {number}", {_PROMPT: line})


def _json_lines(text: str) -> Iterator[Row]:
    for number, line in _lines(text):
        value = _parsed(line, number)
        if not isinstance(value, dict):
            raise _Misread(f'line {number}: use a JSON object, such as {{"prompt": "..."}}')
        yield Row(f"line {number}", _cells_of(value))


def _json(text: str) -> Iterator[Row]:
    """The rows of an array, of one object over several lines, or of an object per line."""
    try:
        value = _parsed(text)
    except _Misread:
        if text.lstrip().startswith("["):
            raise
        yield from _json_lines(text)
        return
    entries = value if isinstance(value, list) else [value]
    for number, entry in enumerate(entries):
        if isinstance(entry, str):
            entry = {_PROMPT: entry}
        if not isinstance(entry, dict) or all(isinstance(each, dict) for each in entry.values()):
            raise _Misread(
                f"entry {number}: use an array of JSON objects or prompts, such as "
                '[{"prompt": "..."}] (of pandas: to_json(orient=\'records\'))'
            )
        yield Row(f"entry {number}", _cells_of(entry))


def _parsed(text: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _Misread(
            f"line {line or error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    except RecursionError:
        raise _Misread(f"line {line or 1}: nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise _Misread(f"line {line or 1}: {error}") from None


def _cells_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value != value else value for name, value in entry.items()}  # NaN


_READERS = {"lines": _prompts, "jsonl": _json_lines, "json": _json}


# --- CSV -----------------------------------------------------------------------------------------


class _Dialect(NamedTuple):
    separator: str
    quote: str | None = '"'
    escape: str | None = None
    skips_space: bool = False


def _csv_table(text: str, name: str, roles: Roles, separator: str | None, has_mark: bool) -> Table:
    if hint := re.match(r"sep=(.)\r?\n", text, re.IGNORECASE):  # Excel's own way to say it
        separator, text = hint[1], "\n" + text[hint.end() :]
    dialect = _dialect_of(text, roles, separator)
    columns: list[str] = []
    rows: list[Row] = []
    for line, cells in _records(text, dialect):
        if not columns:
            columns = _columns_of(cells, f"line {line}")
            continue
        for n, cell in enumerate(cells):
            if cell.strip() and not (n < len(columns) and columns[n]):
                raise _Misread(
                    f"line {line}, column {n + 1}: {len(cells)} cells, but the header has no name "
                    f"for this one: {_listed(columns)}"
                )
        # A row may be short: the missing cells are empty.
        named = zip_longest(columns, cells[: len(columns)], fillvalue="")
        row = {column: cell if cell.strip() else None for column, cell in named if column}
        rows.append(Row(f"line {line}", row))
    return Table(name, "csv", [name for name in columns if name], rows, dialect.separator, has_mark)


def _columns_of(header: Sequence[str], place: str) -> list[str]:
    columns = [cell.strip() for cell in header]
    if not columns[0] and "index" not in columns:
        columns[0] = "index"  # as pandas and R write it, without a name
    if twice := _twice(columns):
        raise _Misread(f"{place}: two columns {twice!r}")
    return columns


def _records(text: str, dialect: _Dialect) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the line that it begins in."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=dialect.separator,
        quotechar=dialect.quote,
        quoting=csv.QUOTE_NONE if dialect.quote is None else csv.QUOTE_MINIMAL,
        escapechar=dialect.escape,
        skipinitialspace=dialect.skips_space,
        strict=True,
    )
    longest = csv.field_size_limit(_LONGEST_CELL)
    begun_at = 1
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                yield begun_at, cells
            begun_at = reader.line_num + 1
    except csv.Error as error:
        raise _Misread(f"line {begun_at}: not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(longest)


def _dialect_of(text: str, roles: Roles, separator: str | None) -> _Dialect:
    """How *text* is written: with the first separator and quoting that all of its rows fit."""
    first = _first_line(text)
    separators = separator or _SEPARATORS + "".join(dict.fromkeys(_ODD_SEPARATOR.findall(first)))

    def rank(separator: str) -> tuple[bool, int]:
        cells = _cells(first, separator)
        return set(roles.wanted) <= set(cells), len(cells)

    best = max(map(rank, separators))
    candidates = [
        dialect
        for each in separators
        if rank(each) == best
        for dialect in _quotings(each, text, first)
    ]
    return next((dialect for dialect in candidates if _fits(text, dialect)), candidates[0])


def _quotings(separator: str, text: str, first: str) -> Iterator[_Dialect]:
    skips_space = f"{separator} " in first
    if first.startswith("'"):
        yield _Dialect(separator, "'", None, skips_space)
    yield _Dialect(separator, '"', None, skips_space)
    if '\\"' in text:  # as MySQL writes it
        yield _Dialect(separator, '"', "\\", skips_space)
    if separator == "\t" and separator in first:  # as shell tools write it
        yield _Dialect(separator, None, None, skips_space)


def _fits(text: str, dialect: _Dialect) -> bool:
    """Whether it is valid in that dialect, and no row is longer than the header."""
    width = 0
    try:
        for _, cells in _records(text, dialect):
            width = width or len(cells)
            # Without quotes, a row that is shorter may be the first line of a cell that has more.
            is_cut = dialect.quote is None and len(cells) < width
            if is_cut or any(map(str.strip, cells[width:])):
                return False
    except _Misread:
        return False
    return True
