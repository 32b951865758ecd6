"""A batch's jobs, read from text: three ways to write them, and what is wrong with a line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from opencode_sync import Job, OpenCodeConfigError, RunConfig
from opencode_sync.cli.map import read_jobs

Read = Callable[..., list[Job]]

BASE = RunConfig(model="p/base", permission={"edit": "deny"})


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Reads *text* as the file *name* of the current directory, or from stdin."""
    monkeypatch.chdir(tmp_path)

    def read(text: str | bytes, name: str = "jobs.txt") -> list[Job]:
        data = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        if name != "-":
            (tmp_path / name).write_bytes(data)
        return read_jobs(name, ".", BASE)

    return read


def prompts(jobs: list[Job]) -> list[str]:
    return [job.prompt for job in jobs]


# --- plain text ----------------------------------------------------------------------------------


def test_plain_text_is_a_prompt_per_line_and_blank_lines_are_skipped(read: Read) -> None:
    assert read("one\n\n  \n two \nthree") == [Job("one"), Job(" two "), Job("three")]


def test_a_byte_order_mark_and_carriage_returns_are_not_part_of_a_prompt(read: Read) -> None:
    assert prompts(read("\ufeffone\r\ntwo\r\n")) == ["one", "two"]


def test_only_a_newline_ends_a_prompt(read: Read) -> None:
    assert prompts(read("one\u2028still one\x0cand on\ntwo")) == [
        "one\u2028still one\x0cand on",
        "two",
    ]


# --- JSON lines ----------------------------------------------------------------------------------


def test_an_object_has_settings_of_its_own_over_the_common_ones(read: Read, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "a.txt").touch()
    line = {"prompt": "one\ntwo", "workspace": "repo", "key": "k", "timeout_s": 5}
    line |= {"max_cost": 0.5, "max_steps": 7, "max_tokens": 9_000}
    line |= {"model": "p/own", "files": "a.txt", "variant": "high"}

    (job,) = read(json.dumps(line), "jobs.jsonl")

    cfg = BASE.replace(model="p/own", files=(str(tmp_path / "a.txt"),), variant="high")
    limits = {"timeout_s": 5, "max_cost": 0.5, "max_steps": 7, "max_tokens": 9_000}
    assert job == Job("one\ntwo", str(tmp_path / "repo"), cfg, key="k", **limits)


def test_an_object_with_a_prompt_alone_takes_the_common_settings(read: Read) -> None:
    assert read('{"prompt": "one", "model": null}', "jobs.jsonl") == [Job("one")]


# --- CSV -----------------------------------------------------------------------------------------


def test_a_table_has_a_job_per_row_and_empty_cells_say_nothing(read: Read) -> None:
    table = (
        "key,prompt,model,timeout_s,max_steps\r\n"
        'a,"one,\ntwo ""2""",p/own,1.5,3\r\n,three,,\r\n\r\nb,four\r\n'
    )

    jobs = read(table, "jobs.csv")

    assert jobs == [
        Job('one,\ntwo "2"', None, BASE.replace(model="p/own"), 1.5, "a", max_steps=3),
        Job("three"),
        Job("four", key="b"),
    ]


def test_a_cell_may_hold_a_long_prompt(read: Read) -> None:
    (job,) = read(f"prompt\n{'x' * 200_000}\n", "jobs.csv")

    assert len(job.prompt) == 200_000


# --- which of them it is -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["-", "jobs", "jobs.list"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param('\n{"prompt": "one"}\n', id="JSON lines"),
        pytest.param('key, "prompt"\nk,one\n', id="CSV"),
        pytest.param("prompt\none\n", id="CSV of one column"),
        pytest.param("one\n", id="plain"),
    ],
)
def test_without_a_known_suffix_the_first_line_decides(read: Read, name: str, text: str) -> None:
    assert prompts(read(text.replace(', "', ',"'), name)) == ["one"]


def test_prose_with_the_word_prompt_is_not_a_header(read: Read) -> None:
    assert prompts(read("Write a prompt, please\nprompt, model, and more\n", "-")) == [
        "Write a prompt, please",
        "prompt, model, and more",
    ]


def test_a_first_line_that_is_longer_than_any_header_is_a_prompt(read: Read) -> None:
    assert prompts(read("x" * 200_000, "-")) == ["x" * 200_000]


def test_a_txt_file_is_plain_even_if_it_begins_with_a_brace(read: Read) -> None:
    assert prompts(read('{"prompt": "one"}', "jobs.TXT")) == ['{"prompt": "one"}']


# --- what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("a.txt", "\n \n", "a.txt holds no prompts"),
        ("a.txt", b"one\n\xff\n", "a.txt, line 2: not UTF-8"),
        (
            "a.jsonl",
            '{"prompt": "one"}\n\n{"prompt": }',
            "a.jsonl, line 3: not valid JSON: Expecting",
        ),
        ("a.jsonl", '["one"]', "a.jsonl, line 1: use a JSON object"),
        ("a.json", "[\n", "a.json, line 1: not valid JSON"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: nested too deeply"),
        ("a.jsonl", '{"key": "k"}', "line 1: no field 'prompt'"),
        ("a.jsonl", '{"prompt": 1}', "line 1: prompt is int"),
        ("a.jsonl", '{"prompt": " "}', "line 1: the prompt is blank"),
        ("a.jsonl", '{"prompt": "\\ud800"}', "line 1: the prompt cannot be encoded"),
        (
            "a.jsonl",
            '{"prompt": "x", "modle": "p/m"}',
            "line 1: unknown field 'modle': use prompt,",
        ),
        ("a.jsonl", '{"prompt": "x", "model": "m"}', "line 1: model 'm' names no provider"),
        ("a.jsonl", '{"prompt": "x", "model": 1}', "line 1: model is of type int"),
        ("a.jsonl", '{"prompt": "x", "permission": "ask"}', "line 1: permission is 'ask'"),
        ("a.jsonl", '{"prompt": "x", "key": 1}', "line 1: key is 1: use a text"),
        ("a.jsonl", '{"prompt": "x", "timeout_s": -1}', "line 1: timeout_s is -1"),
        ("a.jsonl", '{"prompt": "x", "workspace": "none"}', "does not exist"),
        ("a.jsonl", '{"prompt": "x", "files": ["none"]}', "line 1: no file"),
        ("a.jsonl", '{"prompt": "x", "files": [1]}', "line 1: files: use a path"),
        ("a.csv", "promt,key\nx,k\n", "a.csv, line 1: no column 'prompt' in 'promt, key'"),
        ("a.csv", "prompt,key,prompt\nx,k,y\n", "a.csv, line 1: two columns 'prompt'"),
        ("a.csv", "prompt,modle\nx,p/m\n", "a.csv, line 2: unknown field 'modle'"),
        ("a.csv", 'prompt,key\n"x\ny",k\nz,l,m\n', "a.csv, line 4: 3 cells, but 2 columns"),
        ("a.csv", 'prompt\nx\n"y\n', "a.csv, line 3: not valid CSV: unexpected end of data"),
        ("a.csv", "prompt,key\n,k\n", "a.csv, line 2: the prompt is blank"),
        ("a.csv", "prompt,timeout_s\nx,soon\n", "a.csv, line 2: timeout_s is 'soon'"),
        ("a.csv", "prompt,max_steps\nx,1.5\n", "a.csv, line 2: max_steps is '1.5'"),
        ("a.csv", "prompt,key\nx,k\ny,k\n", "line 3: the key 'k' is also in line 2"),
        ("-", '{"prompt": "x"}\n{', "stdin, line 2: not valid JSON"),
    ],
)
def test_an_error_names_its_line(read: Read, name: str, text: str | bytes, told: str) -> None:
    with pytest.raises(OpenCodeConfigError) as caught:
        read(text, name)

    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(OpenCodeConfigError, match=r"none\.txt: No such file"):
        read_jobs(str(tmp_path / "none.txt"), ".", BASE)
