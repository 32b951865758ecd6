"""The cell magic, with a small program in the place of opencode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core.error import UsageError

from opencode_sync import OpenCodeConfigError, OpenCodeProcessError, notebook
from opencode_sync.notebook import Magic, filled
from tests.standin import write_standin


@pytest.fixture
def names() -> dict[str, Any]:
    """The notebook's variables."""
    return {}


@pytest.fixture
def magic(
    names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Magic]:
    monkeypatch.setenv("OPENCODE_BINARY", str(write_standin(tmp_path / "opencode")))
    magic = Magic(SimpleNamespace(user_ns=names))
    yield magic
    magic.close()


def test_the_cell_is_the_prompt(magic: Magic, names: dict[str, Any]) -> None:
    magic.opencode("--into result", "step(text='Hello.')\n")

    assert names["result"].answer == "Hello."
    assert names["result"].prompt == "step(text='Hello.')"


def test_model_and_workspace_are_passed_on(
    magic: Magic, names: dict[str, Any], tmp_path: Path
) -> None:
    there = tmp_path / "a b"
    there.mkdir()

    magic.opencode(
        f"-w '{there}' -m p/m --into result", "step(text=' '.join([os.getcwd(), *sys.argv]))"
    )

    assert names["result"].answer.startswith(f"{there} ")
    assert "-m p/m" in names["result"].answer


def test_braces_are_left_alone_unless_filling_is_asked_for(
    magic: Magic, names: dict[str, Any]
) -> None:
    names["word"] = "Yes."

    magic.opencode("--into plain", "step(text='{word}')")
    magic.opencode("--into full --fill", "step(text='{word}')")

    assert (names["plain"].answer, names["full"].answer) == ("{word}", "Yes.")


def test_a_failed_run_leaves_what_it_had_got(magic: Magic, names: dict[str, Any]) -> None:
    with pytest.raises(OpenCodeProcessError):
        magic.opencode("--into result", "step(text='So far.', reason='tool-calls'); fail('no')")

    assert names["result"].final_text == "So far."


@pytest.mark.parametrize(
    "line, cell, error",
    [
        ("--into result --bogus", "step()", UsageError),
        ('--into result -w "x', "step()", UsageError),
        ("--workspace none --into result", "step()", OpenCodeConfigError),
        ("--into result", " ", OpenCodeConfigError),
        ("--into result --fill", "{missing}", OpenCodeConfigError),
        ("--into result -m nobody", "step()", OpenCodeConfigError),
    ],
)
def test_where_no_run_has_begun_no_older_result_is_kept(
    magic: Magic, names: dict[str, Any], line: str, cell: str, error: type[Exception]
) -> None:
    names["result"] = "of an earlier cell"

    with pytest.raises(error):
        magic.opencode(line, cell)

    assert names["result"] is None


def test_a_cell_may_use_the_result_that_it_replaces(magic: Magic, names: dict[str, Any]) -> None:
    names["result"] = "Old."

    magic.opencode("--into result --fill", "step(text='{result}')")

    assert names["result"].answer == "Old."


@pytest.mark.parametrize("line", ["--into 1x", "--into for", "--bogus", "--mod p/m", '-w "x'])
def test_wrong_usage_is_one_line_on_stderr(magic: Magic, line: str) -> None:
    with pytest.raises(UsageError, match="see %%opencode"):
        magic.opencode(line, "x")


def test_loading_registers_and_unloading_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[Any, ...]] = []
    shell = SimpleNamespace(
        user_ns={}, register_magic_function=lambda *words: registered.append(words)
    )

    notebook.load(shell)
    notebook.load(shell)
    notebook.unload(shell)

    assert [words[1:] for words in registered] == [("cell", "opencode")] * 2
    assert notebook._loaded is None


# --- filling -------------------------------------------------------------------------------------


def test_only_names_in_braces_are_filled() -> None:
    template = 'a {name} {"json": {"b": 1}} {{name}} {} {0}'

    assert filled(template, {"name": 7}) == 'a 7 {"json": {"b": 1}} {name} {} {0}'


def test_an_undefined_name_is_an_error() -> None:
    with pytest.raises(OpenCodeConfigError, match="no variable 'nme'"):
        filled("{nme}", {"name": 7})
