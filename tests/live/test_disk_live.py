"""A disk that is full, and a database that somebody else holds: told, and waited out."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from opencode_sync import OpenCodeClient, OpenCodeError, OpenCodeServer
from opencode_sync.api.runner import Runner
from tests.live.warm import MakeModel, config

MEGABYTE = 1_000_000


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 20 MB, which is where temporary files go."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)]
    if (
        not sys.platform.startswith("linux")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    monkeypatch.setenv("TMPDIR", str(disk))
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, left: int) -> None:
    space = os.statvfs(disk)
    with open(disk / "fill", "wb", buffering=0) as file:
        file.write(bytes(space.f_bavail * space.f_frsize - left))  # or less: others write, too


@pytest.mark.parametrize("kind", [OpenCodeClient, OpenCodeServer], ids=["process", "server"])
def test_a_temporary_directory_that_is_full_is_told(
    kind: type[OpenCodeClient] | type[OpenCodeServer],
    opencode_binary: str,
    workspace: Path,
    scripted: MakeModel,
    small_disk: Path,
) -> None:
    fill(small_disk, left=MEGABYTE // 4)  # there is space to begin in
    runner: Runner = kind(opencode_binary, run_cfg=config(scripted("hello")))

    with (
        pytest.raises(OpenCodeError, match=rf"MB are left in '{small_disk}'.*set TMPDIR"),
        runner,
    ):
        runner.run("hello", workspace)


def test_a_disk_that_fills_up_under_a_server_is_told(
    opencode_binary: str, workspace: Path, scripted: MakeModel, small_disk: Path
) -> None:
    with OpenCodeServer(opencode_binary, run_cfg=config(scripted("hello"))) as server:
        server.run("first", workspace)
        fill(small_disk, left=0)

        with pytest.raises(OpenCodeError, match=rf"MB are left in '{small_disk}'.*set TMPDIR"):
            for _ in range(100):  # what is there may do for some
                server.run("more", workspace)


def test_a_database_that_another_writer_holds_is_waited_for(
    opencode_binary: str,
    workspace: Path,
    tmp_path: Path,
    scripted: MakeModel,
) -> None:
    """OpenCode itself waits for 5 s, and ends then."""
    data = tmp_path / "data"
    with OpenCodeClient(
        opencode_binary, isolate_db=False, data_dir=data, run_cfg=config(scripted("hello"))
    ) as client:
        client.run("first", workspace)
        [database] = (data / "opencode").glob("*.db")
        writer = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
        writer.execute("BEGIN IMMEDIATE")
        log = logging.getLogger("opencode_sync")
        release = _Release(writer)
        log.addHandler(release)

        try:
            result = client.run("second", workspace, startup_retry_delay_s=0)
        finally:
            log.removeHandler(release)
            writer.close()

    assert (result.status, result.attempts) == ("ok", 2)


class _Release(logging.Handler):
    """Lets go of the database when the first attempt has failed."""

    def __init__(self, writer: sqlite3.Connection) -> None:
        super().__init__(logging.WARNING)
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        if "failed to start" in record.getMessage() and self._writer.in_transaction:
            self._writer.execute("ROLLBACK")
