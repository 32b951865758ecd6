"""What a revert does to files, and what it says where OpenCode cannot restore them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opencode_sync import OpenCodeConfigError, OpenCodeServer
from opencode_sync.testing import ScriptedModel, tool_call
from tests.live.warm import Script, config, make_what_stays

MakeRepository = Callable[[str], Path]


@pytest.fixture(scope="module")
def keeping(opencode_binary: str, model: ScriptedModel) -> Iterator[OpenCodeServer]:
    """A server that keeps snapshots."""
    with OpenCodeServer(opencode_binary, run_cfg=config(model, lean=False)) as server:
        make_what_stays(server)
        yield server


@pytest.fixture
def repository(tmp_path: Path) -> MakeRepository:
    """Makes a git repository, without a commit, and returns its path."""

    def make(name: str) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        subprocess.run(["git", "init", "--quiet"], cwd=path, check=True)
        return path

    return make


def writing(script: Script, path: Path, text: str) -> str:
    """A prompt upon which the model writes *text* to *path*."""
    return script.to(f"Write {text}", tool_call("write", filePath=str(path), content=text), "Done.")


def test_files_are_restored_and_named(
    keeping: OpenCodeServer,
    script: Script,
    repository: MakeRepository,
) -> None:
    file = repository("repository") / "a.txt"
    with keeping.session(file.parent) as chat:
        chat.send(writing(script, file, "one"))
        chat.send(writing(script, file, "two"))

        restored = chat.revert()

        assert [Path(path).name for path in restored] == ["a.txt"]
        assert file.read_text() == "one"
        chat.unrevert()
        assert file.read_text() == "two"
        with pytest.raises(OpenCodeConfigError, match="nothing to unrevert"):
            chat.unrevert()


def test_files_of_a_repository_inside_of_another_are_not_left_in_silence(
    keeping: OpenCodeServer,
    script: Script,
    repository: MakeRepository,
) -> None:
    outer = repository("outer")
    file = repository("outer/inner") / "a.txt"
    with keeping.session(outer) as chat:
        chat.send(writing(script, file, "inside"))

        with pytest.raises(OpenCodeConfigError, match="cannot restore what was changed by write"):
            chat.revert()

        assert len(chat.messages()) > 1
        assert chat.revert(all_files=False) == []
        assert file.read_text() == "inside"


def test_without_snapshots_a_revert_says_that_files_stay(
    server: OpenCodeServer,
    script: Script,
    repository: MakeRepository,
) -> None:
    workspace = repository("repository")
    command = tool_call("bash", command="echo made > made.txt", description="Make it")
    with server.session(workspace) as chat:
        chat.send("Only words")
        chat.send(script.to("Make it", command, "Made."))

        with pytest.raises(OpenCodeConfigError, match="changed by bash: it has no snapshot"):
            chat.revert()

        assert chat.revert(all_files=False) == []
        assert (workspace / "made.txt").read_text() == "made\n"
        assert chat.revert() == []  # of words, nothing is to be restored
