"""What makes a job another one: a checkpoint has it under the same key, or with the same words."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field, create_model

from opencode_sync import Job, OpenCodeConfigError, OpenCodeError, RunConfig, RunResult
from tests.scripted import ScriptedRunner

EARLIER = Path(__file__).with_name("earlier.jsonl")  # of version 0.1.0 before its first release


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "batch.jsonl"


def ended(runner: ScriptedRunner, *jobs: str | Job, **options: Any) -> list[str]:
    """The answers of *jobs*, or the words of the errors in their places."""
    ends = runner.map(jobs, on_error="return", **options)
    return [str(end) if isinstance(end, OpenCodeError) else end.answer for end in ends]


# --- what matters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "now",
    [
        {"print_logs": True, "log_level": "DEBUG", "thinking": True},
        {"lean": True, "disable_autoupdate": False, "keep_background": True},
        {"title": "Tonight", "share": False, "port": 4096},
        {"attach": "http://127.0.0.1:4096", "username": "me", "password": "s3cret"},
        {"extra_env": {"LOGS": "1"}},
    ],
    ids=lambda now: ", ".join(now),
)
def test_a_setting_that_changes_nothing_that_is_asked_makes_no_new_job(
    runner: ScriptedRunner, path: Path, now: dict[str, Any]
) -> None:
    jobs = ["a", Job("b", key="k")]
    ended(runner, *jobs, checkpoint=path, run_cfg=RunConfig(model="a/b"))

    cfg = RunConfig(model="a/b", **now)
    again = ended(runner, *jobs, checkpoint=path, run_cfg=cfg, timeout_s=60, max_steps=7)

    assert again == ["A", "B"]
    assert len(runner.begun) == 2


@pytest.mark.parametrize(
    "setting, what",
    [
        ({"model": "a/c"}, "model ('a/b' there, 'a/c' here)"),
        ({"variant": "high"}, "variant (not set there, 'high' here)"),
        ({"agent": "plan"}, "agent (not set there, 'plan' here)"),
        ({"permission": {"edit": "deny"}}, "permission: "),
        ({"permission": "deny"}, "permission (not set there, 'deny' here)"),
        ({"tools": {"get_token": True}}, "tools: "),
        ({"mcp": {"env": {"type": "local", "command": ["x"]}}}, "mcp: "),
        ({"instructions": ["style.md"]}, "instructions: "),
        ({"command": "review"}, "command (not set there, 'review' here)"),
        ({"pure": True}, "pure (not set there, True here)"),
        ({"config_overrides": {"options": {"budgetTokens": 7}}}, "config_overrides: "),
        ({"config_overrides": {"agent": {"keyword-finder": {"prompt": "x"}}}}, "config_overrides"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_changes_what_is_asked_is_named(
    runner: ScriptedRunner, path: Path, setting: dict[str, Any], what: str
) -> None:
    jobs = ["a", Job("b", key="k")]
    before = RunConfig(model="a/b")
    ended(runner, *jobs, checkpoint=path, run_cfg=before)

    again = ended(runner, *jobs, "c", checkpoint=path, run_cfg=before.replace(**setting))

    assert all(f"{path}': it has this job with another {what}" in end for end in again[:2])
    assert again[2] == "C"
    assert sorted(runner.prompts) == ["a", "b", "c"]


def test_an_edited_prompt_of_a_key_is_named(runner: ScriptedRunner, path: Path) -> None:
    ended(runner, Job("a", key="k"), checkpoint=path)

    with pytest.raises(OpenCodeConfigError, match="this job with another prompt: on_mismatch"):
        next(runner.map([Job("b", key="k")], checkpoint=path))


def test_another_word_for_on_mismatch_is_refused(runner: ScriptedRunner, path: Path) -> None:
    with pytest.raises(OpenCodeConfigError, match="on_mismatch is 'ignore': use 'raise' or"):
        runner.map(["a"], checkpoint=path, on_mismatch="ignore")  # type: ignore[arg-type]


def secret_config(word: str) -> RunConfig:
    return RunConfig(
        model="a/b",
        password=word,
        attach=f"http://user:{word}@127.0.0.1:1",
        extra_env={"ANTHROPIC_API_KEY": word},
        mcp={
            "far": {"type": "remote", "url": "http://127.0.0.1:1", "headers": {"X-Own": word}},
            "near": {"type": "local", "command": ["x"], "environment": {"X": word}},
        },
        config_overrides={"provider": {"p": {"options": {"apiKey": word, "token": [word]}}}},
    )


def test_no_secret_is_in_the_file_and_a_new_one_makes_no_new_job(
    runner: ScriptedRunner, path: Path
) -> None:
    list(runner.map(["a"], checkpoint=path, run_cfg=secret_config("s3cret-word")))
    text = path.read_text()
    list(runner.map(["a"], checkpoint=path, run_cfg=secret_config("new")))

    assert "s3cret-word" not in text
    assert runner.prompts == ["a"]


# --- going on nevertheless ------------------------------------------------------------------------


def test_each_of_two_equal_prompts_is_kept_once(runner: ScriptedRunner, path: Path) -> None:
    ended(runner, "a", "a", checkpoint=path, run_cfg=RunConfig(model="a/b"))

    now: dict[str, Any] = {"checkpoint": path, "run_cfg": RunConfig(model="a/c")}
    kept = ended(runner, "a", "a", "a", **now, on_mismatch="keep")

    assert kept == ["A", "A", "A"]
    assert len(runner.begun) == 3


@pytest.mark.parametrize("job", ["a", Job("a", key="k")], ids=["without a key", "with a key"])
@pytest.mark.parametrize(
    "on_mismatch, n_runs, n_cached", [("rerun", 2, 0), ("keep", 1, 1)], ids=["rerun", "keep"]
)
def test_a_mismatch_can_be_run_again_or_kept(
    runner: ScriptedRunner,
    path: Path,
    job: str | Job,
    on_mismatch: Any,
    n_runs: int,
    n_cached: int,
) -> None:
    ended(runner, job, checkpoint=path, run_cfg=RunConfig(model="a/b"))

    now: dict[str, Any] = {"checkpoint": path, "run_cfg": RunConfig(model="a/c")}
    batch = runner.map([job], on_mismatch=on_mismatch, **now)
    (result,) = batch

    assert result.answer == "A"
    assert (len(runner.begun), batch.report.cached) == (n_runs, n_cached)
    if on_mismatch == "rerun":  # from now on it is a job of these settings
        assert ended(runner, job, **now) == ["A"]
        assert len(runner.begun) == n_runs


def test_what_was_run_again_takes_the_place_of_the_job_with_its_key(
    runner: ScriptedRunner, path: Path
) -> None:
    ended(runner, Job("a", key="k"), checkpoint=path)

    batch = runner.map([Job("b", key="k")], checkpoint=path, on_mismatch="rerun")
    list(batch)

    assert [line for line in path.read_text().splitlines() if '"key": "k"' not in line] == []
    assert path.read_text().count("\n") == 1
    assert '"cost_before": 0.01' in path.read_text()


def test_an_answer_stays_where_the_job_fails_when_it_is_run_again_with_other_settings(
    runner: ScriptedRunner, path: Path
) -> None:
    def run(prompt: str, **options: Any) -> Any:
        batch = runner.map([Job(prompt, key="k")], checkpoint=path, on_error="return", **options)
        (end,) = batch
        assert [type(each) for each in batch.results] == [type(end)]
        return end

    run("a")
    for _ in range(2):  # found as what failed, and run once more
        assert str(run("fail b", on_mismatch="rerun")).endswith("bad key")
    told = str(run("c"))
    kept = run("c", on_mismatch="keep", max_total_cost=0.03)
    found = run("a")

    assert "it has this job with another prompt" in told
    assert (kept.answer, found.answer) == ("A", "A")
    assert runner.prompts == ["a", "fail b", "fail b"]
    (line,) = map(json.loads, path.read_text().splitlines())
    assert line["spent"]["cost"] == pytest.approx(0.03)
    assert line["cost_before"] == pytest.approx(0.02)


def test_what_is_kept_is_of_the_latest_of_other_settings(
    runner: ScriptedRunner, path: Path
) -> None:
    models = [f"a/{n}" for n in range(9)]
    for model in models:
        ended(runner, "a", checkpoint=path, run_cfg=RunConfig(model=model), on_mismatch="rerun")
    last = path.read_text().splitlines()[-1]

    (result,) = runner.map(["a"], checkpoint=path, on_mismatch="keep")

    assert result.to_dict()["started_at"] == json.loads(last)["started_at"]


def test_what_had_failed_with_other_settings_is_run_once_with_the_new_ones(
    runner: ScriptedRunner, path: Path
) -> None:
    def run(model: str) -> list[str]:
        return ended(runner, "flaky 1 a", checkpoint=path, run_cfg=RunConfig(model=model))

    failed, first, again = run("a/b"), run("a/c"), run("a/c")

    assert "503" in failed[0]
    assert first == again == ["FLAKY 1 A"]
    assert len(runner.begun) == 2


# --- jobs with settings of their own --------------------------------------------------------------


def test_a_prompt_for_two_models_is_two_jobs_in_any_order(
    runner: ScriptedRunner, path: Path
) -> None:
    one, two = (Job("a", run_cfg=RunConfig(model=model)) for model in ("a/b", "a/c"))
    ended(runner, one, checkpoint=path)

    again = ended(runner, two, one, checkpoint=path)
    once_more = ended(runner, "a", one, checkpoint=path, run_cfg=RunConfig(model="a/c"))

    assert again == once_more == ["A", "A"]
    assert [request.cfg.model for request in runner.begun] == ["a/b", "a/c"]


def test_the_batch_s_settings_do_not_matter_to_a_job_with_its_own(
    runner: ScriptedRunner, path: Path
) -> None:
    jobs = [Job("a", run_cfg=RunConfig(model="a/b")), Job("b", run_cfg=RunConfig(), key="k")]
    ended(runner, *jobs, checkpoint=path)

    again = ended(runner, *jobs, checkpoint=path, run_cfg=RunConfig(agent="plan", model="a/b"))

    assert again == ["A", "B"]
    assert len(runner.begun) == 2


def test_a_row_s_own_settings_do_not_hide_that_the_batch_s_have_changed(
    runner: ScriptedRunner, path: Path
) -> None:
    def run(model: str) -> list[str]:
        cfg = RunConfig(model=model)
        job = Job("a", run_cfg=cfg.replace(agent="plan"))
        return ended(runner, job, checkpoint=path, run_cfg=cfg)

    run("a/b")
    (end,) = run("a/c")

    assert "another model ('a/b' there, 'a/c' here): on_mismatch" in end


# --- workspaces and files -------------------------------------------------------------------------


def _moved(workspace: Path) -> Path:
    return workspace.rename(workspace.with_name("moved"))


def _linked(workspace: Path) -> Path:
    link = workspace.with_name("link")
    link.symlink_to(workspace)
    return link


@pytest.mark.parametrize("change", [_moved, _linked])
def test_a_directory_that_was_moved_or_linked_has_the_same_jobs(
    runner: ScriptedRunner,
    path: Path,
    tmp_path: Path,
    change: Callable[[Path], Path],
) -> None:
    def run(workspace: Path) -> list[str]:
        cfg = RunConfig(files=("notes.txt",))
        jobs = ["a", Job("b", key="k"), Job("c", workspace / "sub"), Job("d", tmp_path)]
        return ended(runner, *jobs, workspace=workspace, checkpoint=path, run_cfg=cfg)

    workspace = tmp_path / "workspace"
    (workspace / "sub").mkdir(parents=True)
    for directory in (workspace, workspace / "sub", tmp_path):
        (directory / "notes.txt").write_text("notes")
    first = run(workspace)

    again = run(change(workspace))

    assert first == again == ["A", "B", "C", "D"]
    assert len(runner.begun) == 4


def test_a_link_that_leads_elsewhere_by_now_is_another_directory(
    runner: ScriptedRunner, path: Path, tmp_path: Path
) -> None:
    link, batch = tmp_path / "current", tmp_path / "batch"
    for name in ("one", "two", "batch"):
        (tmp_path / name).mkdir()

    for name in ("one", "two", "two"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        ended(runner, Job("a", link), workspace=batch, checkpoint=path)

    assert [request.workspace.name for request in runner.begun] == ["one", "two"]


def test_another_directory_has_other_jobs(
    runner: ScriptedRunner, path: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    jobs = [Job("a", tmp_path / "one"), Job("b", tmp_path / "one", key="k")]
    ended(runner, *jobs, workspace=tmp_path, checkpoint=path)

    jobs = [Job("a", tmp_path / "two"), Job("b", tmp_path / "two", key="k")]
    again = ended(runner, *jobs, workspace=tmp_path, checkpoint=path)

    assert again[0] == "A"
    assert "another workspace: on_mismatch" in again[1]
    assert len(runner.begun) == 3


def test_a_job_of_a_key_is_found_from_another_directory(
    runner: ScriptedRunner, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    job = Job("a", tmp_path / "one", key="k")
    monkeypatch.chdir(tmp_path)
    ended(runner, job, checkpoint=path)

    monkeypatch.chdir("/")

    assert ended(runner, job, checkpoint=path) == ["A"]
    assert len(runner.begun) == 1


def test_files_count_by_their_content(runner: ScriptedRunner, path: Path, tmp_path: Path) -> None:
    def run(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        job = Job("a", run_cfg=RunConfig(files=(tmp_path / name,)), key="k")
        return ended(runner, job, checkpoint=path)[0]

    first, renamed, changed = run("one.txt", "one"), run("two.txt", "one"), run("two.txt", "two")

    assert first == renamed == "A"
    assert "another files: on_mismatch" in changed
    assert len(runner.begun) == 1


# --- schemas --------------------------------------------------------------------------------------


class Bird(BaseModel):
    """A bird."""

    title: str = Field(description="Its name.")


Renamed = create_model(
    "Renamed", __doc__="Any animal.", title=(str, Field(description="Its name."))
)
Asked = create_model("Bird", title=(str, Field(description="Its Latin name.")))
Wider = create_model("Bird", title=(str | None, Field(description="Its name.")))


def test_words_of_a_schema_that_ask_for_nothing_make_no_new_job() -> None:
    from opencode_sync.batch.fingerprint import settings_of

    def described(schema: type[BaseModel]) -> object:
        return settings_of(RunConfig(), schema.model_json_schema())

    assert described(Renamed) == described(Bird)
    assert described(Asked) != described(Bird)
    assert described(Wider) != described(Bird)


# --- nothing matches ------------------------------------------------------------------------------


def test_a_file_of_other_jobs_is_warned_of_before_anything_is_run(
    runner: ScriptedRunner, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    list(runner.map(["a", "b"], checkpoint=path, max_workers=1))
    begun: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        begun.extend(runner.prompts)
        return True

    logger = logging.getLogger("opencode_sync")
    logger.addFilter(note)
    list(runner.map(map(str, range(9)), checkpoint=path, max_workers=2))
    logger.removeFilter(note)

    assert begun == ["a", "b"]
    assert "has 2 jobs, and not one of the first 4 jobs of this batch" in caplog.text


def test_a_file_with_one_of_the_jobs_is_not_warned_of(
    runner: ScriptedRunner, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ended(runner, "a", "fail b", checkpoint=path)

    ended(runner, "new", "a", checkpoint=path)
    ended(runner, "new", "fail b", checkpoint=path)
    ended(runner, checkpoint=path)
    ended(runner, Job("was", key="k"), checkpoint=path)
    caplog.clear()
    ended(runner, "newer", Job("edited", key="k"), checkpoint=path)

    assert caplog.text == ""


# --- a file of an earlier version -----------------------------------------------------------------


def test_a_file_of_an_earlier_version_is_read(runner: ScriptedRunner, path: Path) -> None:
    shutil.copy(EARLIER, path)
    jobs = ["a", Job("spend 1 b", key="k"), "fail c", "d"]
    # Of these settings, the second one counted then, and does not matter now.
    cfg = RunConfig(model="a/b", lean=True)
    now: dict[str, Any] = {"workspace": "/", "checkpoint": path, "run_cfg": cfg}

    first, second, *stopped = runner.map(jobs, **now, max_total_cost=0.04, on_error="return")
    again = ended(runner, *jobs, **now)

    assert isinstance(first, RunResult)
    assert isinstance(second, RunResult)
    assert (first.answer, first.key) == ("A", None)
    assert (second.answer, second.tool_calls) == ("SPEND 1 B", [second.events[1]])
    assert all("$0.04 of it before, as the checkpoint says" in str(end) for end in stopped)
    assert again[::3] == ["A", "D"]
    assert sorted(runner.prompts) == ["d", "fail c"]


def test_a_job_that_an_earlier_version_wrote_with_other_settings_is_an_error(
    runner: ScriptedRunner, path: Path
) -> None:
    shutil.copy(EARLIER, path)
    jobs = ["a", Job("spend 1 b", key="k")]

    now: dict[str, Any] = {"workspace": "/", "checkpoint": path, "run_cfg": RunConfig(model="c/d")}
    ends = ended(runner, *jobs, **now)
    kept = ended(runner, *jobs, **now, on_mismatch="keep")

    assert all("another workspace or settings (an earlier version wrote it" in end for end in ends)
    assert kept == ["A", "SPEND 1 B"]
    assert runner.prompts == []
