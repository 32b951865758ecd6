"""Jobs from tables: how people's programs write them, and what is wrong with one."""

from __future__ import annotations

import csv
import importlib
import io
import json
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import Job, OpenCodeConfigError, RunConfig, RunResult, read_jobs
from tests.scripted import ScriptedRunner

Read = Callable[..., list[Job]]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Reads *text* as the file *name* of the current directory, or from stdin."""
    monkeypatch.chdir(tmp_path)

    def read(text: str | bytes, name: str = "jobs.csv", **options: Any) -> list[Job]:
        data = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        if name != "-":
            (tmp_path / name).write_bytes(data)
        return read_jobs(name, **options)

    return read


def prompts(jobs: list[Job]) -> list[str]:
    return [job.prompt for job in jobs]


# --- plain text ----------------------------------------------------------------------------------


def test_plain_text_is_a_prompt_per_line_and_blank_lines_are_skipped(read: Read) -> None:
    jobs = read("one\n\n  \n two \nthree", "jobs.txt")

    assert jobs == [Job("one"), Job(" two "), Job("three")]


def test_a_byte_order_mark_and_carriage_returns_are_not_part_of_a_prompt(read: Read) -> None:
    assert prompts(read("\ufeffone\r\ntwo\r\n", "jobs.txt")) == ["one", "two"]


def test_only_a_newline_ends_a_prompt(read: Read) -> None:
    assert prompts(read("one\u2028still one\x0cand on\ntwo", "jobs.txt")) == [
        "one\u2028still one\x0cand on",
        "two",
    ]


# --- as programs write them ----------------------------------------------------------------------

# A separator, quotes, a newline, a formula, and what Excel would take for a number.
CELLS = ['He said "Hi; no, don\'t"', "two\nlines", "=1+1", "007", "a\tb|c"]


def _csv(**settings: Any) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, **settings)
    writer.writerows([["id", "prompt"], *enumerate(CELLS)])
    return text.getvalue()


def _pandas(tmp_path: Path, write: Callable[[Any, Path], None]) -> bytes:
    pandas = pytest.importorskip("pandas")
    write(pandas.DataFrame({"id": range(len(CELLS)), "prompt": CELLS}), tmp_path / "written")
    return (tmp_path / "written").read_bytes()


def _parquet(frame: Any) -> bytes:
    pytest.importorskip("pyarrow")
    data: bytes = frame.to_parquet()
    return data


# Ten files as programs write them: their name and how they are made.
PROGRAMS: dict[str, tuple[str, Callable[[Path], str | bytes]]] = {
    "Excel, CSV UTF-8": ("a.csv", lambda _: _csv().encode("utf-8-sig")),
    "Excel, where a comma is decimal": ("a.csv", lambda _: _csv(delimiter=";").encode("utf-8-sig")),
    "Excel, with a hint": ("a.csv", lambda _: "sep=;\r\n" + _csv(delimiter=";")),
    "Excel, Unicode text": ("a.tsv", lambda _: _csv(dialect="excel-tab").encode("utf-16")),
    "a database's dump": (
        "a.csv",
        lambda _: _csv(quoting=csv.QUOTE_ALL, doublequote=False, escapechar="\\"),
    ),
    "single quotes": ("a.csv", lambda _: _csv(quotechar="'", quoting=csv.QUOTE_ALL)),
    "an odd separator, from a pipe": ("-", lambda _: _csv(delimiter="|", lineterminator="\n")),
    "pandas, CSV": (
        "a.csv",
        lambda tmp_path: _pandas(tmp_path, lambda frame, path: frame.to_csv(path, index=False)),
    ),
    "pandas, JSON lines": (
        "a.jsonl",
        lambda tmp_path: _pandas(
            tmp_path, lambda frame, path: frame.to_json(path, orient="records", lines=True)
        ),
    ),
    "pandas, a JSON array": (
        "-",
        lambda tmp_path: _pandas(
            tmp_path, lambda frame, path: frame.to_json(path, orient="records", indent=2)
        ),
    ),
    "pandas, Parquet": (
        "a.parquet",
        lambda tmp_path: _pandas(
            tmp_path,
            lambda frame, path: path.write_bytes(_parquet(frame)),
        ),
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_table_is_read_as_programs_write_it(read: Read, tmp_path: Path, program: str) -> None:
    name, written = PROGRAMS[program]

    jobs = read(written(tmp_path), name)

    assert prompts(jobs) == CELLS
    assert [int(job.metadata["id"]) for job in jobs] == list(range(len(CELLS)))


def test_a_table_of_shell_tools_has_no_quotes(read: Read) -> None:
    made = ["printf", r"id\tprompt\n1\t\"Hi\" he said\n2\tx \" y\n"]

    jobs = read(subprocess.run(made, capture_output=True, check=True).stdout, "-")

    assert prompts(jobs) == ['"Hi" he said', 'x " y']


def test_rows_of_a_database_come_through_csv(read: Read) -> None:
    database = sqlite3.connect(":memory:")
    text = io.StringIO()
    rows = database.execute("SELECT 'one' AS prompt, NULL AS \"key\" UNION SELECT 'two', 2")
    csv.writer(text).writerows([[each[0] for each in rows.description], *rows])
    database.close()

    assert read(text.getvalue(), "-") == [Job("one"), Job("two", key="2")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", "^", ":", "~", "\x1f"], ids=repr)
def test_any_separator_is_found(read: Read, separator: str) -> None:
    text = f"id{separator}prompt\n1{separator}x, y; z\n".replace(
        "x, y; z", '"x, y; z"' if separator in ",;" else "x, y; z"
    )

    assert read(text) == [Job("x, y; z", metadata={"id": "1"})]


def test_a_table_of_one_column_may_hold_commas_without_quotes(read: Read) -> None:
    assert prompts(read("prompt\r\nHello, world\r\n")) == ["Hello, world"]


def test_a_space_behind_a_separator_is_not_part_of_a_cell(read: Read) -> None:
    assert read('key, prompt\nk, "one, two"\n') == [Job("one, two", key="k")]


def test_a_cell_may_hold_a_long_prompt(read: Read) -> None:
    (job,) = read(f"prompt\n{'x' * 200_000}\n")

    assert len(job.prompt) == 200_000


# --- columns -------------------------------------------------------------------------------------


def test_a_row_has_settings_and_the_other_columns_are_its_metadata(
    read: Read, tmp_path: Path
) -> None:
    base = RunConfig(model="p/base", permission={"edit": "deny"})
    line = {"prompt": "one\ntwo", "workspace": "repo", "key": "k", "timeout_s": 5}
    line |= {"max_cost": 0.5, "max_steps": 7, "max_tokens": 9_000}
    line |= {"model": "p/own", "files": "a.txt", "variant": "high", "row": [1, None]}

    (job,) = read(json.dumps(line), "jobs.jsonl", run_cfg=base)

    cfg = base.replace(model="p/own", files=(str(tmp_path / "a.txt"),), variant="high")
    limits = {"timeout_s": 5.0, "max_cost": 0.5, "max_steps": 7, "max_tokens": 9_000}
    assert job == Job("one\ntwo", "repo", cfg, key="k", metadata={"row": [1, None]}, **limits)


def test_empty_cells_say_nothing_and_blank_rows_are_skipped(read: Read) -> None:
    table = (
        "key,prompt,timeout_s,max_steps,row\r\na,one,1.5,3,\r\n,two\r\n\r\nb,three,,,7\r\n,,,,\r\n"
    )

    assert read(table) == [
        Job("one", timeout_s=1.5, key="a", max_steps=3, metadata={"row": None}),
        Job("two", metadata={"row": None}),
        Job("three", key="b", metadata={"row": "7"}),
    ]


def test_metadata_of_an_object_is_metadata(read: Read) -> None:
    line = {"prompt": "x", "metadata": {"a": 1}, "b": 2}

    assert read(json.dumps(line), "-") == [Job("x", metadata={"a": 1, "b": 2})]


def test_a_template_makes_the_prompts(read: Read) -> None:
    table = "file,error,title\na.py,{x} 1,T\n"

    (job,) = read(table, template="Explain { file }: {error} as {{json}}, {title}")

    assert job.prompt == "Explain a.py: {x} 1 as {json}, T"
    assert job.metadata == {"file": "a.py", "error": "{x} 1", "title": "T"}


def test_a_cell_in_a_template_may_be_any_value(read: Read) -> None:
    line = {"a": ["é", None], "b": 1.5, "c": "{b}"}

    assert prompts(read(json.dumps(line), "-", template="{a} {b} {c}")) == ['["é", null] 1.5 {b}']


def test_other_columns_may_be_the_prompt_and_the_key(read: Read) -> None:
    (job,) = read("id,text,prompt\n7,hello,x\n", "-", prompt_column="text", key_column="id")

    assert job == Job("hello", key="7", metadata={"prompt": "x"})


def test_the_index_that_pandas_writes_without_a_name_is_metadata(read: Read) -> None:
    assert read(",prompt\n0,one\n1,two\n") == [
        Job("one", metadata={"index": "0"}),
        Job("two", metadata={"index": "1"}),
    ]


def test_an_empty_prompt_cell_is_a_fault_in_its_place(read: Read, runner: ScriptedRunner) -> None:
    jobs = read("id,prompt\n1,one\n2,\n3,nan\n4,four\n")

    one, empty, nan, four = runner.map(jobs, on_error="return")

    assert isinstance(one, RunResult)
    assert isinstance(four, RunResult)
    assert (str(empty), empty.metadata) == (str(nan), {"id": "2"})
    assert "no prompt" in str(nan)


def test_a_cell_that_a_template_needs_is_a_fault_in_its_place_too(read: Read) -> None:
    jobs = read("file,error\na.py,E1\nb.py,\n", template="{file}: {error}")

    assert prompts(jobs) == ["a.py: E1", None]


def test_what_a_row_says_of_its_job_is_judged_in_its_place(
    read: Read, runner: ScriptedRunner, tmp_path: Path
) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": 1},
        {"prompt": " "},
        {"prompt": "x", "key": [1]},
        {"prompt": "x", "timeout_s": "soon"},
        {"prompt": "x", "max_steps": 1.5},
        {"prompt": "x", "max_cost": 10**400},
        {"prompt": "x", "workspace": "none"},
        {"prompt": "x", "model": "m"},
        {"prompt": "x", "files": [1]},
        {"prompt": "x", "permission": "ask"},
        {"prompt": "good"},
    ]
    text = "\n".join(map(json.dumps, lines))

    *ends, good = runner.map(read(text, "-", run_cfg=RunConfig()), on_error="return")

    assert isinstance(good, RunResult)
    assert [type(end) for end in ends] == [OpenCodeConfigError] * len(ends)


# --- frames --------------------------------------------------------------------------------------


def test_a_frame_is_read_with_its_missing_values_and_its_index() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "prompt": ["one", None],
            "timeout_s": [1.5, None],
            "max_steps": [3, None],
            "n": [1, None],
            "when": pandas.to_datetime(["2026-05-04", None]),
        },
        index=pandas.Index([10, 11], name="bug"),
    )

    jobs = read_jobs(frame, key_column="bug")

    assert jobs == [
        Job(
            "one",
            timeout_s=1.5,
            key="10",
            max_steps=3,
            metadata={"n": 1.0, "when": "2026-05-04T00:00:00"},
        ),
        Job(None, key="11", metadata={"n": None, "when": None}),  # type: ignore[arg-type]
    ]


def test_levels_of_one_name_in_a_frames_index_are_refused() -> None:
    pandas = pytest.importorskip("pandas")
    index = pandas.MultiIndex.from_tuples([(1, 2)], names=["bug", "bug"])

    with pytest.raises(OpenCodeConfigError, match="two columns or levels of the index 'bug'"):
        read_jobs(pandas.DataFrame({"prompt": ["x"]}, index=index))


def test_a_frame_given_to_map_runs_its_rows_and_never_the_names_of_its_columns(
    runner: ScriptedRunner,
) -> None:
    pandas = pytest.importorskip("pandas")

    results = list(runner.map(pandas.DataFrame({"prompt": ["a", "b"], "row": [1, 2]})))
    with pytest.raises(OpenCodeConfigError, match="no column 'prompt': there are 'text', 'row'"):
        runner.map(pandas.DataFrame({"text": ["a"], "row": [1]}))

    assert [each.answer for each in results] == ["A", "B"]
    assert [each.metadata for each in results] == [{"row": 1}, {"row": 2}]


def test_a_column_of_a_frame_is_an_input_like_any_other(runner: ScriptedRunner) -> None:
    pandas = pytest.importorskip("pandas")

    good, missing = runner.map(pandas.Series(["a", float("nan")]), on_error="return")

    assert isinstance(good, RunResult)
    assert isinstance(missing, OpenCodeConfigError)


# --- which of them it is -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["-", "jobs", "jobs.list"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param('\n{"prompt": "one"}\n', id="JSON lines"),
        pytest.param('[{"prompt": "one"}]', id="JSON"),
        pytest.param('\n["one"]', id="prompts in JSON"),
        pytest.param('key,"prompt"\nk,one\n', id="CSV"),
        pytest.param("id;prompt\n1;one\n", id="semicolons"),
        pytest.param("id\tprompt\n1\tone\n", id="tabs"),
        pytest.param("prompt\none\n", id="CSV of one column"),
        pytest.param("one\n", id="plain"),
    ],
)
def test_without_a_known_suffix_the_beginning_decides(read: Read, name: str, text: str) -> None:
    assert prompts(read(text, name)) == ["one"]


@pytest.mark.parametrize("name", ["-", "jobs.txt"])
@pytest.mark.parametrize(
    "lines",
    [
        ["Write a prompt, please", "prompt, model, and more"],
        ["Hello, world", "Bye, moon"],
        ["[draft] Explain", "[final] Explain"],
        ["a;b", "c"],
        ["x" * 200_000],
        ["f(a,b)", "g(c,d)"],
    ],
    ids=["the word prompt", "commas", "brackets", "uneven", "long", "code"],
)
def test_prose_is_not_a_table(read: Read, name: str, lines: list[str]) -> None:
    assert prompts(read("\n".join(lines), name)) == lines


def test_a_txt_file_is_plain_even_if_it_begins_with_a_brace(read: Read) -> None:
    assert prompts(read('{"prompt": "one"}', "jobs.TXT")) == ['{"prompt": "one"}']


@pytest.mark.parametrize(
    "name, text, column",
    [
        ("-", "id,text\n1,Explain\n", "text"),
        ("-", "id\ttext\n1\tExplain\n", "text"),
        ("jobs.txt", "id,prompt\n1,Explain\n", "prompt"),
        ("jobs.txt", "prompt\nExplain\n", "prompt"),
    ],
)
def test_what_may_be_either_is_refused_with_what_to_pass(
    read: Read, name: str, text: str, column: str
) -> None:
    with pytest.raises(OpenCodeConfigError, match=r"line 1: this may be a table.*--format lines"):
        read(text, name)

    assert prompts(read(text, name, format="lines")) == text.splitlines()
    assert prompts(read(text, name, format="csv", prompt_column=column)) == ["Explain"]


def test_named_columns_say_that_it_is_a_table(read: Read) -> None:
    assert prompts(read("id,text\n1,one\n", "jobs.txt", template="{id} {text}")) == ["1 one"]


# --- what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("a.txt", b"one\n\xff\n", "a.txt, line 2, column 1: not UTF-8"),
        (
            "a.jsonl",
            '{"prompt": "one"}\n\n{"prompt": }',
            "a.jsonl, line 3, column 12: not valid JSON: Expecting",
        ),
        ("a.jsonl", '["one"]', "a.jsonl, line 1: use a JSON object"),
        ("a.json", '[{"prompt": "x"},\n]', "a.json, line 2, column 1: not valid JSON"),
        ("a.json", '[{"prompt": "x"}, 3]', "a.json, entry 1: use an array of JSON objects"),
        ("a.json", '{"prompt": {"0": "x"}}', "a.json, entry 0: use an array of JSON objects"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: nested too deeply"),
        ("a.jsonl", f'{{"prompt": {"9" * 5000}}}', "a.jsonl, line 1: Exceeds the limit (4300"),
        ("a.jsonl", '{"key": "k"}', "a.jsonl: no column 'prompt': there are 'key'; name the"),
        ("a.csv", "promt,key\nx,k\n", "a.csv: no column 'prompt': there are 'promt', 'key'"),
        ("a.csv", "prompt,key,prompt\nx,k,y\n", "a.csv, line 1: two columns 'prompt'"),
        ("a.csv", "prompt,model\nx,p/m\n", "a.csv: the column 'model' is a setting"),
        ("a.csv", 'prompt,key\n"x\ny",k\nz,l,m\n', "a.csv, line 4, column 3: 3 cells, but"),
        ("a.csv", 'prompt\nx\n"y\n', "a.csv, line 3: not valid CSV: unexpected end of data"),
        ("a.tsv", 'id\tprompt\n1\t"x\ny\n', "a.tsv, line 2: not valid CSV"),
        ("a.txt", b"one\nt\0w\0o\0", "a.txt, line 2: a NUL character"),
        ("a.xlsx", b"PK\x03\x04...", "a.xlsx, line 1: this is a spreadsheet"),
        ("a.csv.gz", b"\x1f\x8b...", "a.csv.gz, line 1: this is a spreadsheet, or compressed"),
        ("-", '{"prompt": "x"}\n{', "stdin, line 2, column 2: not valid JSON"),
    ],
)
def test_an_error_names_its_place(read: Read, name: str, text: str | bytes, told: str) -> None:
    with pytest.raises(OpenCodeConfigError) as caught:
        read(text, name)

    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"template": "{eror}"}, "no column 'eror': there are 'prompt', 'error'"),
        ({"template": 'as {"a": 1}: {error}'}, "in a template, write {{ and }} for braces"),
        ({"template": "no column"}, "the template names no column"),
        ({"template": "{error}", "prompt_column": "error"}, "exclude each other"),
        ({"key_column": "id"}, "no column 'id'"),
        ({"prompt_column": 3}, "prompt_column is 3: use a text"),
        ({"format": "xml"}, "format is 'xml': use lines, csv"),
        ({"run_cfg": {}}, "run_cfg is dict"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(
    read: Read, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(OpenCodeConfigError, match=told):
        read("prompt,error\nx,y\n", **options)


@pytest.mark.parametrize("source", [["a"], b"a.csv", None, 3], ids=repr)
def test_a_source_of_another_type_is_refused(source: Any) -> None:
    with pytest.raises(OpenCodeConfigError, match="use a path or a DataFrame"):
        read_jobs(source)


@pytest.mark.parametrize(
    "name, told",
    [("none.txt", "No such file"), ("a\0b", "null byte"), ("~nobody-of-that-name/a", "home")],
)
def test_a_file_that_cannot_be_read_is_named(name: str, told: str) -> None:
    with pytest.raises(OpenCodeConfigError, match=told):
        read_jobs(name)


@pytest.mark.parametrize("stdin", [None, io.StringIO("a prompt")], ids=["closed", "of text"])
def test_a_stdin_that_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch, stdin: Any) -> None:
    monkeypatch.setattr("sys.stdin", stdin)

    with pytest.raises(OpenCodeConfigError, match="stdin: closed, or not a stream of bytes"):
        read_jobs("-")


def test_parquet_without_pandas_says_what_to_install(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "pandas", None)

    with pytest.raises(OpenCodeConfigError, match="pip install pandas pyarrow"):
        read(b"PAR1...", "a.parquet")
