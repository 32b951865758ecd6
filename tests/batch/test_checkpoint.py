"""Finished jobs on disk: found again, never lost, never run twice without need."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import pytest

from opencode_sync import (
    Job,
    OpenCodeBudgetError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    RunResult,
)
from opencode_sync.batch.checkpoint import Checkpoint
from opencode_sync.batch.fingerprint import Identity
from opencode_sync.core import records
from opencode_sync.core.events import iter_parse_lines
from opencode_sync.core.records import Entry
from opencode_sync.core.result import aggregate_run_result
from tests.scripted import STEP_COST, ScriptedRunner

ROOT = Path(__file__).parents[2]


def lines_of(path: Path) -> list[dict[str, Any]]:
    # The last may be half written: a batch goes on while its results are looked at.
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


# --- found again ---------------------------------------------------------------------------------


def test_finished_jobs_are_not_run_again(runner: ScriptedRunner, path: Path) -> None:
    first = list(runner.map(["a", "b"], checkpoint=path))

    batch = runner.map(["b", "a", "c"], checkpoint=path)
    again = list(batch)

    assert [result.answer for result in again] == ["B", "A", "C"]
    assert [result.index for result in again] == [0, 1, 2]
    assert again[1].events == first[0].events
    assert sorted(runner.prompts) == ["a", "b", "c"]
    assert (batch.report.cached, batch.report.done, batch.report.total_cost) == (2, 1, 0.01)


def test_a_result_is_in_the_file_before_it_is_given(runner: ScriptedRunner, path: Path) -> None:
    for n, result in enumerate(runner.map(map(str, range(20)), checkpoint=path)):
        assert result.prompt in {line["prompt"] for line in lines_of(path)}
        assert n == result.index


def test_the_same_prompt_more_than_once_is_as_many_jobs(runner: ScriptedRunner, path: Path) -> None:
    list(runner.map(["a", "a"], checkpoint=path))

    again = list(runner.map(["a", "a", "a"], checkpoint=path))

    assert len(again) == 3
    assert len({line["key"] for line in lines_of(path)}) == 3
    assert runner.prompts == ["a"] * 3


def test_a_job_with_a_key_is_found_by_it(runner: ScriptedRunner, path: Path) -> None:
    list(runner.map([Job("a", key="one"), Job("a", key="two")], checkpoint=path))

    again = list(runner.map([Job("a", key="two")], checkpoint=path))

    assert {line["key"] for line in lines_of(path)} == {"one", "two"}
    assert again[0].key == "two"
    assert len(runner.prompts) == 2


def test_failures_are_run_again(runner: ScriptedRunner, path: Path) -> None:
    list(runner.map(["a", "fail b"], checkpoint=path, on_error="return"))

    batch = runner.map(["a", "fail b"], checkpoint=path, on_error="return")
    list(batch)

    assert sorted(runner.prompts) == ["a", "fail b", "fail b"]
    assert (batch.report.cached, batch.report.retried) == (1, 1)


def test_the_failure_of_a_job_that_was_run_again_is_dropped_from_the_file(
    runner: ScriptedRunner, path: Path
) -> None:
    list(runner.map([Job("fail", key="k"), "b"], checkpoint=path, on_error="return"))

    list(runner.map([Job("better", key="k"), "b"], checkpoint=path))

    assert [(line["prompt"], line["failure"]) for line in lines_of(path)] == [
        ("b", None),
        ("better", None),
    ]


def test_failures_can_be_kept(runner: ScriptedRunner, path: Path) -> None:
    jobs: list[str | Job] = ["a", Job("fail b", key="k")]
    _, first = runner.map(jobs, checkpoint=path, on_error="return")

    _, again = runner.map(jobs, checkpoint=path, on_error="return", retry_failed=False)

    assert again == first
    assert isinstance(again, OpenCodeProcessError)
    assert (again.index, again.key, again.prompt) == (1, "k", "fail b")
    assert len(runner.prompts) == 2


def cut_in(path: Path) -> None:
    """Write the first line as an earlier version did, which took a cut answer for a whole one."""
    first, *rest = lines_of(path)
    lines = [{**first, "finish_reason": "length", "status": "ok"}, *rest]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_cut_answer_that_is_there_as_ok_counts_as_a_failure(
    runner: ScriptedRunner, path: Path
) -> None:
    list(runner.map(["a", "b"], checkpoint=path, max_workers=1))
    cut_in(path)

    kept, _ = runner.map(["a", "b"], checkpoint=path, retry_failed=False, on_error="return")
    again = list(runner.map(["a", "b"], checkpoint=path))

    assert isinstance(kept, OpenCodeIncompleteError)
    assert "cut off at the model's output limit" in str(kept)
    assert kept.result is not None
    assert (kept.result.status, kept.result.answer) == ("incomplete", "A")
    assert [result.status for result in again] == ["ok", "ok"]
    assert runner.prompts == ["a", "b", "a"]


def test_what_was_ended_from_outside_is_not_in_the_file(runner: ScriptedRunner, path: Path) -> None:
    with runner.map(["a", "hold b"], checkpoint=path) as batch:
        next(batch)
        runner.wait_for(2)

    assert [line["prompt"] for line in lines_of(path)] == ["a"]


@pytest.mark.parametrize(
    "error",
    [
        OpenCodeTimeoutError("too long", limit_s=3.0, elapsed_s=3.1),
        OpenCodeConfigError("no such workspace"),
        OpenCodeProcessError(7, "red", reason="none"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_back_equal(path: Path, error: OpenCodeError) -> None:
    if not isinstance(error, OpenCodeConfigError):
        error.result = RunResult(attempts=1, prompt="p", key="k", index=3, stderr="red")
    checkpoint = Checkpoint(path, retry_failed=False)
    asked = Identity("p", "/", ".", None, {}, {}, "f")

    checkpoint.write([Entry("k", "f", error, asked.facts)])

    assert checkpoint.find("k", asked) == error
    checkpoint.close()


def test_two_jobs_with_one_key_are_refused(runner: ScriptedRunner, path: Path) -> None:
    with pytest.raises(OpenCodeConfigError, match="two jobs have the key 'k'"):
        list(runner.map([Job("a", key="k"), Job("b", key="k")], checkpoint=path))


# --- the file ------------------------------------------------------------------------------------


def test_all_lines_are_of_one_shape(runner: ScriptedRunner, path: Path) -> None:
    jobs = ["a", "fail", "", "refused", "line\u2028separator and \ud83d\ude00"]

    list(runner.map(jobs, checkpoint=path, on_error="return"))

    shapes = {tuple(line) for line in map(json.loads, path.read_text().split("\n")[:-1])}
    assert len(shapes) == 1
    assert {"key", "prompt", "status", "answer", "total_cost", "failure"} <= set(shapes.pop())


def test_what_json_does_not_know_is_written_all_the_same(path: Path) -> None:
    events: list[Any] = [{"type": "x", "n": float("nan"), "half": "\ud800", "path": ROOT}]
    checkpoint = Checkpoint(path)
    facts = {"settings": {}, "own": {}, "files": None}

    checkpoint.write([Entry("k", "f", RunResult(events=events), facts)])
    checkpoint.close()

    (line,) = lines_of(path)
    assert line["events"] == [{"type": "x", "n": None, "half": "?", "path": str(ROOT)}]


def test_each_event_is_in_the_file_once_and_comes_back_wherever_it_was(path: Path) -> None:
    state = '{"status":"completed","input":{},"output":"the only ö"}'
    lines = [
        '{"type":"step_start","sessionID":"s"}',
        f'{{"type":"tool_use","sessionID":"s","part":{{"tool":"bash","state":{state}}}}}',
        "words of a plugin",
        '{"type":"step_finish","sessionID":"s","part":{"reason":"stop","cost":1e-2,"tokens":{}}}',
    ]
    result = aggregate_run_result(events=iter_parse_lines(lines), raw_stdout_lines=lines)
    result.key = "k"
    checkpoint = Checkpoint(path)
    asked = Identity("", "/", ".", None, {}, {}, "f")

    checkpoint.write([Entry("k", "f", result, asked.facts)])
    again = checkpoint.find("k", asked)
    checkpoint.close()

    assert again == result
    assert path.read_text().count("the only ö") == 1
    (line,) = lines_of(path)
    assert line["tool_calls"] == [1]
    assert line["raw_stdout_lines"] == [0, 1, *lines[2:]]  # of others the text may differ


def test_a_torn_last_line_is_cut_off_and_its_job_run_again(
    runner: ScriptedRunner, path: Path
) -> None:
    list(runner.map(["a", "b"], checkpoint=path, max_workers=1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])

    again = list(runner.map(["a", "b"], checkpoint=path, max_workers=1))

    assert [result.answer for result in again] == ["A", "B"]
    assert runner.prompts == ["a", "b", "b"]
    assert len(lines_of(path)) == 2


@pytest.mark.parametrize("end", [b"{", b'{"key": "', b"\0" * 4096], ids=["brace", "key", "zeros"])
def test_a_line_that_was_hardly_begun_is_cut_off(
    runner: ScriptedRunner, path: Path, end: bytes
) -> None:
    list(runner.map(["a"], checkpoint=path))
    whole = path.read_bytes()
    path.write_bytes(whole + end)

    list(runner.map(["a"], checkpoint=path))

    assert path.read_bytes() == whole


def test_a_last_line_without_its_newline_counts(runner: ScriptedRunner, path: Path) -> None:
    list(runner.map(["a"], checkpoint=path))
    path.write_bytes(path.read_bytes()[:-1])

    list(runner.map(["a", "b"], checkpoint=path))

    assert sorted(runner.prompts) == ["a", "b"]
    assert len(lines_of(path)) == 2


@pytest.mark.parametrize(
    "damage",
    [b'{"key": "x", \n', b"\0\0\0\n", b'{"key": 3}\n', b"[]\n", b"\xff\n", b"end"],
    ids=repr,
)
def test_a_damaged_line_is_skipped_and_named(
    runner: ScriptedRunner, path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    list(runner.map(["a", "b", Job("fail", key="k")], checkpoint=path, on_error="return"))
    lines = path.read_bytes().splitlines(keepends=True)
    place = 3 if damage == b"end" else 1
    path.write_bytes(b"".join([*lines[:place], damage, *lines[place:]]))

    again = list(runner.map(["a", "b", Job("better", key="k"), "c"], checkpoint=path))

    assert [result.answer for result in again] == ["A", "B", "BETTER", "C"]
    assert runner.prompts.count("a") == runner.prompts.count("b") == 1
    assert f"{path}: line {place + 1}: damaged, and skipped" in caplog.text
    # A hand may repair it, so it is not dropped with the failure that was run again.
    assert damage.rstrip(b"\n") in path.read_bytes().splitlines()
    assert path.read_bytes().count(b"\n") == 5


def test_many_damaged_lines_are_one_warning(
    runner: ScriptedRunner, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    list(runner.map(["a"], checkpoint=path))
    path.write_bytes(path.read_bytes() + b"x\n" * 1_234)

    list(runner.map(["a"], checkpoint=path))

    assert [record.message for record in caplog.records] == [
        f"checkpoint {path}: lines 2, 3, 4, 5, 6 and 1,229 more: damaged, and skipped"
    ]


@pytest.mark.parametrize("damage", ["cut", "edited"])
def test_a_job_whose_line_turns_out_to_be_damaged_is_run_again(
    runner: ScriptedRunner, path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    list(runner.map(["a", "b"], checkpoint=path, max_workers=1))
    first, second = path.read_text().splitlines(keepends=True)
    if damage == "cut":
        second = second.replace('"step_finish"', '"step_')
    else:
        second = json.dumps(json.loads(second) | {"token_usage": 3, "events": 3}) + "\n"
    path.write_text(first + second)

    again = list(runner.map(["a", "b"], checkpoint=path))

    assert [result.answer for result in again] == ["A", "B"]
    assert sorted(runner.prompts) == ["a", "b", "b"]
    assert f"{path}: line 2 is damaged" in caplog.text
    assert [line["prompt"] for line in lines_of(path)] == ["a", "b"]


def test_a_line_whose_end_is_damaged_was_paid_for(runner: ScriptedRunner, path: Path) -> None:
    list(runner.map(["a", "b"], checkpoint=path, max_workers=1))
    path.write_text(path.read_text().replace('"answer": "B"', '"answer": "B'))
    list(runner.map(["a", "b"], checkpoint=path))

    with pytest.raises(OpenCodeBudgetError) as caught:
        list(runner.map(["a", "b", "c"], checkpoint=path, max_total_cost=0.0))

    assert caught.value.spent == pytest.approx(3 * STEP_COST)


def test_what_an_editor_does_to_a_file_is_no_damage(
    runner: ScriptedRunner, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = list(runner.map(["a", "b"], checkpoint=path, max_workers=1))
    one, two = lines_of(path)
    compact = json.dumps(two, separators=(",", ":"))
    path.write_bytes(f"\ufeff{json.dumps(one)}\r\n\r\n{compact}\r\n\r\n".encode())

    again = list(runner.map(["a", "b"], checkpoint=path))

    assert again == first
    assert caplog.text == ""


@pytest.mark.parametrize("text", ["a line of prose", '{"prompt": "a"}', "a,b\n1,2\n"], ids=repr)
def test_a_file_that_is_no_checkpoint_is_left_alone(
    runner: ScriptedRunner, path: Path, text: str
) -> None:
    path.write_text(text)

    with pytest.raises(OpenCodeConfigError, match="not a checkpoint: none of its lines"):
        next(runner.map(["a"], checkpoint=path))

    assert path.read_text() == text


def test_a_path_that_cannot_be_written_is_refused(runner: ScriptedRunner, tmp_path: Path) -> None:
    with pytest.raises(OpenCodeConfigError, match=r"checkpoint .*there is no directory"):
        next(runner.map(["a"], checkpoint=tmp_path / "missing" / "x.jsonl"))


def _as_it_is(path: Path) -> Path:
    return path


def _by_another_name(path: Path) -> Path:
    link = path.with_name("link.jsonl")
    link.hardlink_to(path)
    return link


def _without_its_lock_file(path: Path) -> Path:
    Path(f"{path}.lock").unlink()
    return path


@pytest.mark.parametrize("found", [_as_it_is, _by_another_name, _without_its_lock_file])
def test_two_writers_are_refused(
    runner: ScriptedRunner, path: Path, found: Callable[[Path], Path]
) -> None:
    with runner.map(["a", "b"], checkpoint=path) as first:
        next(first)

        with pytest.raises(OpenCodeConfigError, match="is being written by another batch"):
            next(runner.map(["c"], checkpoint=found(path)))


def test_the_file_is_held_until_it_has_one_line_a_job(
    runner: ScriptedRunner, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(runner.map([Job("fail", key="k")], checkpoint=path, on_error="return"))
    others: list[object] = []

    def beside_another(target: Path, mode: int) -> AbstractContextManager[IO[bytes]]:
        monkeypatch.undo()
        Path(f"{path}.lock").unlink()
        try:
            others.append(list(runner.map(["c"], checkpoint=path)))
        except OpenCodeConfigError as error:
            others.append(error)
        return records.replacing(target, mode)

    monkeypatch.setattr("opencode_sync.batch.checkpoint.replacing", beside_another)

    list(runner.map([Job("better", key="k")], checkpoint=path))

    assert [type(other) for other in others] == [OpenCodeConfigError]


def test_a_file_with_two_names_stays_one_file(runner: ScriptedRunner, path: Path) -> None:
    list(runner.map([Job("fail", key="k")], checkpoint=path, on_error="return"))
    link = path.with_name("link.jsonl")
    link.hardlink_to(path)

    list(runner.map([Job("better", key="k")], checkpoint=path))

    assert link.samefile(path)
    assert [end.answer for end in runner.map([Job("better", key="k")], checkpoint=link)] == [
        "BETTER"
    ]


def test_a_full_disk_ends_the_batch_and_leaves_the_file_whole(
    runner: ScriptedRunner, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(runner.map(["a"], checkpoint=path))
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", _no_space)

    with pytest.raises(OpenCodeError, match="No space left on device; 1 finished jobs were not"):
        list(runner.map(["a", "b"], checkpoint=path))

    assert path.read_bytes() == before


def _no_space(descriptor: int) -> None:
    if os.path.isfile(f"/proc/self/fd/{descriptor}"):
        raise OSError(28, "No space left on device")


def _removed(path: Path) -> None:
    path.unlink()


def _replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("")
    other.replace(path)


def _moved_with_its_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


@pytest.mark.parametrize("gone", [_removed, _replaced, _moved_with_its_directory])
def test_a_file_that_is_removed_or_replaced_ends_the_batch(
    runner: ScriptedRunner, tmp_path: Path, gone: Callable[[Path], None]
) -> None:
    path = tmp_path / "directory" / "batch.jsonl"
    path.parent.mkdir()
    with runner.map(["a", "hold b", "c"], checkpoint=path, max_workers=1) as batch:
        next(batch)
        runner.wait_for(2)

        gone(path)
        runner.release()

        with pytest.raises(OpenCodeError, match=r"removed or replaced .*1 finished jobs were not"):
            list(batch)
    assert runner.prompts == ["a", "hold b"]


def test_a_file_that_was_replaced_is_not_taken_for_the_own_one(
    runner: ScriptedRunner, path: Path
) -> None:
    jobs = ["a", "b", "c"]
    first = list(runner.map(jobs, checkpoint=path))
    stranger = "a file of somebody else\n"

    with runner.map(jobs, checkpoint=path, buffersize=1) as batch:
        again = [next(batch)]
        path.unlink()
        path.write_text(stranger)
        again += batch

    assert again == first
    assert path.read_text() == stranger


def test_a_failure_is_not_dropped_from_a_file_that_was_replaced(
    runner: ScriptedRunner, path: Path
) -> None:
    list(runner.map([Job("fail", key="k")], checkpoint=path, on_error="return"))
    stranger = "a file of somebody else\n"

    with runner.map([Job("better", key="k")], checkpoint=path) as batch:
        next(batch)
        path.unlink()
        path.write_text(stranger)

    assert path.read_text() == stranger


def test_a_directory_that_cannot_be_synced_is_no_reason_to_refuse(
    runner: ScriptedRunner, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr("os.fsync", no_directories)

    assert len(list(runner.map(["a"], checkpoint=path))) == 1


def test_a_disk_that_fails_to_keep_the_directory_is_a_reason(
    runner: ScriptedRunner, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.fsync", broken)

    with pytest.raises(OpenCodeConfigError, match="Input/output error"):
        next(runner.map(["a"], checkpoint=path))


def test_a_link_beside_the_file_is_not_written_through(
    runner: ScriptedRunner, path: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.with_name(f"{path.name}.new").symlink_to(victim)
    list(runner.map([Job("fail", key="k")], checkpoint=path, on_error="return"))

    list(runner.map([Job("better", key="k")], checkpoint=path))

    assert victim.read_text() == "precious"
    assert [line["prompt"] for line in lines_of(path)] == ["better"]
    assert not path.is_symlink()


def test_the_permissions_of_the_file_stay(runner: ScriptedRunner, path: Path) -> None:
    list(runner.map([Job("fail", key="k")], checkpoint=path, on_error="return"))
    path.chmod(0o640)

    list(runner.map([Job("better", key="k")], checkpoint=path))

    assert stat.S_IMODE(path.stat().st_mode) == 0o640


# --- killed in the middle ------------------------------------------------------------------------

N_JOBS, WORKERS = 200, 4

CHILD = f"""
import sys, time
from tests.scripted import ScriptedRunner

class Slow(ScriptedRunner):
    def _open(self, request, cancelled, keep_raw):
        with open(sys.argv[2], "a") as log:
            log.write(request.prompt + "\\n")
        time.sleep(0.005)
        return super()._open(request, cancelled, keep_raw)

with Slow() as runner:
    jobs = (str(n) for n in range({N_JOBS}))
    for result in runner.map(jobs, checkpoint=sys.argv[1], max_workers={WORKERS}):
        print(result.answer, flush=True)
"""


def run_child(path: Path, log: Path, kill_after: int | None = None, with_signal: int = 9) -> int:
    """Run the batch in a process of its own, which gets the signal after so many results."""
    command = [sys.executable, "-c", CHILD, str(path), str(log)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        for n, _ in enumerate(child.stdout, 1):
            if n == kill_after:
                child.send_signal(with_signal)
        return child.wait(timeout=30)


@pytest.mark.parametrize(
    "number, is_torn",
    [(signal.SIGKILL, True), (signal.SIGINT, False)],
    ids=["killed in a write", "interrupted"],
)
def test_a_batch_that_was_ended_in_the_middle_is_completed(
    path: Path, tmp_path: Path, number: signal.Signals, is_torn: bool
) -> None:
    log = tmp_path / "begun"

    status = run_child(path, log, kill_after=80, with_signal=number)
    assert status == -number
    if is_torn:
        with open(path, "ab") as file:
            file.write(path.read_bytes()[:300])
    assert run_child(path, log) == 0

    answers = [line["answer"] for line in lines_of(path)]
    assert sorted(answers, key=int) == [str(n) for n in range(N_JOBS)]
    begun = Counter(log.read_text().split())
    assert len(begun) == N_JOBS
    assert max(begun.values()) <= 2
    assert sum(count == 2 for count in begun.values()) <= WORKERS
