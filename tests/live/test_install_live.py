"""One real install, with npm and the network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from opencode_sync.core.errors import OpenCodeBinaryNotFoundError, OpenCodeConfigError
from opencode_sync.process.command import TESTED_VERSION, managed_root
from opencode_sync.process.install import install
from opencode_sync.process.versions import binary_version

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]  # some 10 s on a fast line


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tested version, in a data directory that holds nothing else."""
    data = tmp_path_factory.mktemp("installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(data))
        try:
            program = install()
        except OpenCodeBinaryNotFoundError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no install from here: {error}")
    yield program
    shutil.rmtree(data)  # pytest keeps the directories of three sessions, of 185 MB each


@pytest.fixture
def data_home(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(installed.parents[4]))


def test_the_program_answers_with_the_version_asked_for(installed: Path) -> None:
    assert binary_version(installed) == TESTED_VERSION


def test_one_copy_of_the_program_is_all_that_stays(installed: Path, data_home: None) -> None:
    files = [path for path in managed_root().rglob("*") if path.is_file()]

    assert [path for path in files if path.name != ".lock"] == [installed]
    assert installed.stat().st_nlink == 1


def test_a_second_install_needs_no_npm(
    installed: Path, data_home: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")

    assert install() == installed


def test_a_version_that_was_never_published_is_refused_by_npm(
    installed: Path, data_home: None
) -> None:
    with pytest.raises(OpenCodeConfigError, match=r"npm has no opencode-ai 0\.0\.999:"):
        install("0.0.999")
