"""Data directories: leased, reused, remembered, and never left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opencode_sync import OpenCodeCancelledError, OpenCodeConfigError, OpenCodeError
from opencode_sync.process import data_dirs
from opencode_sync.process.data_dirs import (
    DataDirectories,
    link_credentials,
    user_data,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pool() -> Iterator[DataDirectories]:
    """A temporary one."""
    pool = DataDirectories(None)
    yield pool
    pool.close()


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """Of a user with credentials."""
    data = tmp_path / "user" / "opencode"
    data.mkdir(parents=True)
    (data / "auth.json").write_text('{"provider": "secret"}')
    return {"XDG_DATA_HOME": str(data.parent)}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- leases --------------------------------------------------------------------------------------


def test_a_directory_is_used_again_and_a_lease_given_back_once(pool: DataDirectories) -> None:
    first = pool.lease({})
    first.release()
    second = pool.lease({})

    first.release()

    assert second.path == first.path
    assert pool.lease({}).path != second.path


def test_a_lease_that_nobody_kept_is_given_back(pool: DataDirectories) -> None:
    lease = pool.lease({})
    lease.remember("ses_1", "/a")
    lease.release()
    path = pool.lease({}, session_id="ses_1").path

    assert pool.lease({}, session_id="ses_1").path == path


def test_a_ctrl_c_during_a_lease_gives_it_back_although_its_traceback_is_kept(
    pool: DataDirectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = data_dirs.link_credentials

    def link_and_interrupt(*arguments: object, **settings: object) -> None:
        link(*arguments, **settings)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) as caught:
        patched.setattr(data_dirs, "link_credentials", link_and_interrupt)
        pool.lease({})

    assert caught.value.__traceback__ is not None
    assert pool.lease({}).path.name == "0"


def test_a_directory_that_cannot_be_made_is_told_and_its_place_stays_free(
    pool: DataDirectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", "/nowhere")
        with pytest.raises(OpenCodeError, match="no place for a temporary data directory"):
            pool.lease({})

    assert pool.lease({}).path.name == "0"


def test_many_threads_never_share_a_directory(pool: DataDirectories) -> None:
    held: set[Path] = set()
    shared: list[Path] = []

    def work() -> None:
        for _ in range(100):
            lease = pool.lease({})
            if lease.path in held:
                shared.append(lease.path)
            held.add(lease.path)
            held.discard(lease.path)
            lease.release()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not shared
    assert len(list(pool.lease({}).path.parent.iterdir())) <= 9


def test_giving_a_lease_back_waits_for_nobody(pool: DataDirectories) -> None:
    lease = pool.lease({})

    with pool._locked():  # as a thread may hold it that waits for what we hold
        returning = threading.Thread(target=lease.release)
        returning.start()
        returning.join(20)
        assert not returning.is_alive()

    assert pool.lease({}).path == lease.path


def test_directories_are_the_user_s_alone(pool: DataDirectories) -> None:
    before = os.umask(0)
    try:
        path = pool.lease({}).path
    finally:
        os.umask(before)

    assert mode(path.parent) == 0o700
    assert mode(path / "opencode") == 0o700


# --- credentials ---------------------------------------------------------------------------------


def test_credentials_are_linked_and_never_copied(
    pool: DataDirectories, env: dict[str, str]
) -> None:
    Path(env["XDG_DATA_HOME"], "opencode", "mcp-auth.json").write_text("{}")

    path = pool.lease(env).path / "opencode"

    assert sorted(entry.name for entry in path.iterdir()) == ["auth.json", "mcp-auth.json"]
    assert all(entry.is_symlink() for entry in path.iterdir())
    assert (path / "auth.json").read_text() == '{"provider": "secret"}'


def test_removing_the_directories_leaves_the_credentials(
    pool: DataDirectories, env: dict[str, str]
) -> None:
    pool.lease(env)

    pool.close()

    assert Path(env["XDG_DATA_HOME"], "opencode", "auth.json").exists()


def test_credentials_that_have_moved_are_linked_anew(tmp_path: Path, env: dict[str, str]) -> None:
    pool = DataDirectories(tmp_path / "kept")
    pool.lease(env).release()
    moved = tmp_path / "moved" / "opencode"
    moved.mkdir(parents=True)
    (moved / "auth.json").write_text("moved")

    lease = pool.lease({"XDG_DATA_HOME": str(moved.parent)})

    assert (lease.path / "opencode" / "auth.json").read_text() == "moved"
    lease.release()


def test_credentials_that_cannot_be_looked_at_keep_no_run_from_starting(
    pool: DataDirectories, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = f"/{'x' * 300}"  # too long a name for any file system

    lease = pool.lease({"XDG_DATA_HOME": nowhere})

    assert list((lease.path / "opencode").iterdir()) == []
    assert f"credentials {nowhere}/opencode/auth.json cannot be used" in caplog.text


@pytest.mark.parametrize("own", ["a file", "a link"])
def test_credentials_that_a_user_has_put_there_himself_stay(
    tmp_path: Path, env: dict[str, str], own: str
) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "opencode").mkdir(parents=True)
    elsewhere.write_text("own")
    if own == "a link":
        (data / "opencode" / "auth.json").symlink_to(elsewhere)
    else:
        (data / "opencode" / "auth.json").write_text("own")

    link_credentials(env, data, is_ours=False)

    assert (data / "opencode" / "auth.json").read_text() == "own"


def test_the_user_s_data_is_where_opencode_looks_for_it() -> None:
    assert user_data({"XDG_DATA_HOME": "/data", "HOME": "/home/me"}) == Path("/data/opencode")
    assert user_data({"HOME": "/home/me"}) == Path("/home/me/.local/share/opencode")


# --- what OpenCode unpacks -----------------------------------------------------------------------


def test_what_a_run_unpacked_goes_with_it(pool: DataDirectories) -> None:
    lease = pool.lease({})
    (lease.unpacked / ".1-0.so").write_bytes(b"library")

    lease.release()

    assert list(lease.unpacked.iterdir()) == []


def test_a_session_is_branched_by_several_runs_and_what_they_unpacked_stays_for_the_last(
    pool: DataDirectories,
) -> None:
    pool.lease({}).remember("ses_1", "/w")
    first, second = (pool.lease({}, session_id="ses_1", fork=True) for _ in range(2))
    (first.unpacked / ".1-0.so").write_bytes(b"library")

    second.release()

    assert first.path == second.path
    assert [path.name for path in first.unpacked.iterdir()] == [".1-0.so"]


def test_what_a_killed_process_left_unpacked_goes_with_the_next_run(tmp_path: Path) -> None:
    left = tmp_path / "0" / data_dirs.UNPACKED
    left.mkdir(parents=True)
    (left / ".1-0.so").write_bytes(b"library")
    pool = DataDirectories(tmp_path)

    unpacked = pool.lease({}).unpacked

    assert unpacked == left
    assert list(unpacked.iterdir()) == []


def test_a_run_that_keeps_its_session_elsewhere_is_not_found_here(pool: DataDirectories) -> None:
    pool.lease({}, holds_sessions=False).remember("ses_1", "/w")

    with pytest.raises(OpenCodeConfigError, match="'ses_1' is unknown here"):
        pool.lease({}, session_id="ses_1")


# --- sessions ------------------------------------------------------------------------------------


def test_a_session_is_found_where_it_began(pool: DataDirectories) -> None:
    first, second = pool.lease({}), pool.lease({})
    second.remember("ses_2", "/w")
    first.release()
    second.release()

    assert pool.lease({}, session_id="ses_2").path == second.path


def test_an_unknown_session_is_refused_with_the_next_step(pool: DataDirectories) -> None:
    with pytest.raises(OpenCodeConfigError, match=r"'ses_9' is unknown here: .*data_dir="):
        pool.lease({}, session_id="ses_9")


@pytest.mark.parametrize("fork", [False, True], ids=["continued", "forked"])
def test_a_session_is_refused_in_another_directory_than_its_own(
    pool: DataDirectories, fork: bool
) -> None:
    lease = pool.lease({})
    lease.remember("ses_1", "/repo")
    lease.release()

    with pytest.raises(OpenCodeConfigError, match="'ses_1' works in '/repo', not in '/repo/sub'"):
        pool.lease({}, session_id="ses_1", workspace="/repo/sub", fork=fork)

    assert pool.lease({}, session_id="ses_1", workspace="/repo", fork=fork).path == lease.path


@pytest.mark.parametrize("fork", [False, True], ids=["continued", "forked"])
def test_a_session_has_one_run_at_a_time(pool: DataDirectories, fork: bool) -> None:
    lease = pool.lease({})
    lease.remember("ses_1", "/w")
    lease.release()
    again = pool.lease({}, session_id="ses_1")

    with pytest.raises(OpenCodeConfigError, match="has a run under way"):
        pool.lease({}, session_id="ses_1", fork=fork)

    again.release()
    pool.lease({}, session_id="ses_1").release()


def test_the_last_session_of_a_workspace_is_known(pool: DataDirectories) -> None:
    lease = pool.lease({})
    for session, workspace in (("1", "/a"), ("2", "/a"), ("3", "/b"), ("1", "/a")):
        lease.remember(session, workspace)

    assert pool.last_session("/a") == "1"
    assert pool.last_session("/c") is None


# --- kept roots ----------------------------------------------------------------------------------


def test_a_kept_root_stays_and_remembers(tmp_path: Path) -> None:
    first = DataDirectories(tmp_path / "kept")
    lease = first.lease({})
    lease.remember("ses_1", "/a")
    lease.release()
    first.close()

    second = DataDirectories(tmp_path / "kept")

    assert second.last_session("/a") == "ses_1"
    again = second.lease({}, session_id="ses_1")
    assert again.path == lease.path
    again.release()


def test_a_kept_root_is_the_user_s_alone(tmp_path: Path) -> None:
    pool = DataDirectories(tmp_path / "kept")
    lease = pool.lease({})
    lease.remember("ses_1", "/a")
    lease.release()

    assert mode(tmp_path / "kept") == 0o700
    assert mode(tmp_path / "kept" / "sessions.jsonl") == 0o600


def test_a_broken_line_of_the_index_costs_one_session(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    lines = [b'{"session": "ses_1", "slot"', b"\xff", b"[]", b'{"session": 1}']
    whole = json.dumps({"session": "ses_2", "slot": 0, "workspace": "/a"}).encode()
    (kept / "sessions.jsonl").write_bytes(b"\n".join([*lines, whole, b""]))

    assert DataDirectories(kept).last_session("/a") == "ses_2"


def test_processes_that_share_a_root_do_not_share_a_directory(tmp_path: Path) -> None:
    pool = DataDirectories(tmp_path / "kept")
    lease = pool.lease({})
    lease.remember("ses_1", "/a")
    program = """
import sys
from opencode_sync.process.data_dirs import DataDirectories
pool = DataDirectories(sys.argv[1])
print(pool.lease({}).path.name)
try:
    pool.lease({}, session_id="ses_1")
except ValueError as error:
    print(error)
"""

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "kept")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )

    assert done.stdout.decode().splitlines() == [
        "1",
        "the directory of session 'ses_1' is in use by another process: wait for it",
    ]
    lease.release()


def test_a_root_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OpenCodeConfigError, match=r"data_dir .*file"):
        DataDirectories(tmp_path / "file" / "kept").lease({})


def test_a_full_disk_is_told(pool: DataDirectories, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/0")

    monkeypatch.setattr(Path, "mkdir", fail)

    with pytest.raises(OpenCodeError, match="'/somewhere/0': No space left"):
        pool.lease({})


@pytest.mark.parametrize(
    "name, use",
    [
        ("sessions.jsonl", lambda pool: pool.last_session("/a")),
        ("config", DataDirectories.empty_config),
    ],
    ids=["the index", "the empty configuration"],
)
def test_what_stands_in_the_way_in_a_kept_root_is_named(
    tmp_path: Path, name: str, use: Callable[[DataDirectories], object]
) -> None:
    (tmp_path / name / "opencode").mkdir(parents=True)
    (tmp_path / name / "opencode" / "node_modules").write_text("")

    with pytest.raises(OpenCodeError, match=rf"data directory '.*/{name}"):
        use(DataDirectories(tmp_path))


def test_an_index_that_cannot_be_written_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = DataDirectories(tmp_path / "kept")
    lease = pool.lease({})
    (tmp_path / "kept" / "sessions.jsonl").mkdir()

    lease.remember("ses_1", "/a")

    assert "ses_1 will not be found" in caplog.text
    lease.release()


# --- closing -------------------------------------------------------------------------------------


def test_closing_removes_temporary_directories_and_tells_the_watchdog(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Path] = []
    removed: list[Path] = []
    monkeypatch.setattr(data_dirs, "add_directory", made.append)
    monkeypatch.setattr(data_dirs, "discard_directory", removed.append)
    pool = DataDirectories(None, watchdog=True)
    path = pool.lease({}).path

    pool.close()
    pool.close()

    assert not path.exists()
    assert made == removed == [path.parent]


def test_a_directory_that_cannot_be_removed_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    removed: list[Path] = []
    monkeypatch.setattr(data_dirs, "discard_directory", removed.append)
    pool = DataDirectories(None, watchdog=True)
    root = pool.lease({}).path.parent
    with monkeypatch.context() as patch:
        patch.setattr(data_dirs.shutil, "rmtree", lambda *args, **options: None)
        pool.close()

    assert removed == []
    data_dirs.shutil.rmtree(root)


def test_after_closing_there_are_no_leases() -> None:
    pool = DataDirectories(None)
    pool.close()

    with pytest.raises(OpenCodeCancelledError, match="closed"):
        pool.lease({})


def test_an_empty_configuration_is_one(pool: DataDirectories) -> None:
    path = pool.empty_config()

    assert not list(path.rglob("opencode.json*"))
    assert mode(path) == 0o700
