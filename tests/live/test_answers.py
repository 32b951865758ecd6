"""What a run says of its answer, with both runners: whole or cut, and whose words it is.

Each runner answers many prompts, and what one run shows is looked at by several tests.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from opencode_sync import (
    BatchReport,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeServer,
    Retry,
    RunConfig,
    RunResult,
)
from opencode_sync.api.runner import Runner
from opencode_sync.core.config import merged
from opencode_sync.testing import Reply, ScriptedModel, TokenUsage
from tests.live.warm import Script, config, make_configuration, shell


@pytest.fixture(scope="module")
def cfg(model: ScriptedModel) -> RunConfig:
    """Of a model of any length, and of one whose conversations are soon summed up."""
    cfg = config(model)
    models = cfg.config_overrides["provider"]["scripted"]["models"]  # type: ignore[index]
    small = models[model.name] | {
        "name": "small",
        "limit": {"context": 10_000, "output": 1_000},
    }
    audit = {"template": "Audit $ARGUMENTS", "description": "Audits", "subtask": True}
    changes = {
        "provider": {"scripted": {"models": {"small": small}}},
        "compaction": {"auto": True},
        "command": {"audit": audit},
    }
    return cfg.replace(config_overrides=merged(cfg.config_overrides or {}, changes))


def write_plugin(workspace: Path, code: str) -> None:
    path = make_configuration(workspace) / "plugin" / "plugin.js"
    path.parent.mkdir()
    path.write_text(code)


# --- cut answers ---------------------------------------------------------------------------------

CUT = Reply("cut in the mid", finish_reason="length")


# A process is asked for the first two alone: what makes an answer whole is looked at in one place.
PROMPTS = ["cut it", "go on", "filter it", "say nothing"]


@dataclass
class Batch:
    """A batch with a cut, a filtered, an empty and a whole answer."""

    ends: list[RunResult | OpenCodeError]
    report: BatchReport
    checkpoint: Path


@pytest.fixture(scope="module")
def batch(runner: Runner, script: Script, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    script.to("cut it", CUT)
    script.to("filter it", Reply("filtered", finish_reason="content_filter"))
    script.to("say nothing", Reply(""))
    # A step that is cut in the middle of a run: OpenCode runs its tool, and asks again.
    going_on = Reply("So far", tool_calls=[shell("echo hi")], finish_reason="length")
    script.to("go on", going_on, "The whole answer.")
    path = tmp_path_factory.mktemp("batch") / "jobs.jsonl"

    prompts = PROMPTS if isinstance(runner, OpenCodeServer) else PROMPTS[:2]
    batch = runner.map(prompts, path.parent, checkpoint=path, on_error="return", max_workers=2)
    return Batch(list(batch), batch.report, path)


@pytest.mark.parametrize(
    "index, words, text",
    [
        (0, "cut off at the model's output limit", "cut in the mid"),
        pytest.param(
            *(2, "cut off by the provider's content filter", "filtered"),
            marks=pytest.mark.only("server"),
        ),
    ],
    ids=["at the output limit", "by a content filter"],
)
def test_a_cut_answer_is_an_error_that_says_why(
    batch: Batch, index: int, words: str, text: str
) -> None:
    error = batch.ends[index]

    assert isinstance(error, OpenCodeIncompleteError)
    assert words in str(error)
    assert error.result is not None
    assert (error.result.status, error.result.final_text) == ("incomplete", text)
    assert error.result.total_cost > 0


def test_the_last_step_says_whether_the_answer_is_whole(batch: Batch) -> None:
    result = batch.ends[1]

    assert isinstance(result, RunResult)
    assert (result.status, result.answer) == ("ok", "The whole answer.")


@pytest.mark.only("server")
def test_cut_and_empty_answers_are_counted(batch: Batch) -> None:
    report = batch.report

    assert (report.done, report.failed, report.empty) == (2, 2, 1)
    assert sum(report.errors.values()) == 2
    assert all(kind.startswith("OpenCodeIncompleteError") for kind in report.errors)
    assert "1 with an empty answer" in str(report)


def test_what_a_checkpoint_gives_back_is_what_was_given(
    runner: Runner, batch: Batch, tmp_path: Path
) -> None:
    given = batch.ends[1]
    file = shutil.copy(batch.checkpoint, tmp_path / "copy.jsonl")

    (again,) = runner.map(["go on"], batch.checkpoint.parent, checkpoint=file)

    assert isinstance(given, RunResult)
    again.index = given.index
    assert again == given
    # Once in each of them, and neither in its raw line nor among the tool calls again.
    [call] = given.tool_calls
    assert file.read_text().count(json.dumps(call, ensure_ascii=False)) == 1


@pytest.mark.only("server")
def test_a_resumed_batch_asks_for_cut_answers_again(
    runner: Runner, batch: Batch, script: Script
) -> None:
    script.to("cut it", "whole this time")
    script.to("filter it", "whole this time")
    n_asked = len(script.requests)

    again = list(runner.map(PROMPTS, batch.checkpoint.parent, checkpoint=batch.checkpoint))

    assert [result.status for result in again] == ["ok", "ok", "ok", "ok"]
    assert [result.answer for result in again[::2]] == ["whole this time"] * 2
    assert len(script.requests) == n_asked + 2


def test_a_cut_answer_is_asked_for_again_where_a_batch_retries(
    runner: Runner, script: Script, tmp_path: Path
) -> None:
    replies = iter([Reply("Half of", finish_reason="length"), Reply("All of it.")])
    script.answers["tell all"] = lambda request: next(replies)
    path = tmp_path / "done.jsonl"

    batch = runner.map(["tell all"], tmp_path, retries=Retry(1, delay_s=0), checkpoint=path)
    [result] = batch

    assert (result.status, result.final_text) == ("ok", "All of it.")
    assert [each.final_text for each in batch.results if isinstance(each, RunResult)] == [
        "All of it."
    ]
    assert (batch.report.retried, batch.report.failed) == (1, 0)
    assert batch.report.total_cost == pytest.approx(2 * result.total_cost)


# --- whose words it is ---------------------------------------------------------------------------

# What OpenCode says by itself (1.18.33): after a summary, and after a command's sub-agent.
CONTINUE = (
    "Continue if you have next steps, or stop and ask for clarification if you are unsure how to "
    "proceed."
)
SUMMARIZE = "Summarize the task tool output above and continue with your task."
SUMMARY = "Scripted conversation"  # what the scripted model answers to what OpenCode asks by itself
NEAR_THE_LIMIT = TokenUsage(input=9_500, output=100)
# Prints without a newline, before the events of a step and in the middle of a run.
NOISY = """
export const Noisy = async () => {
  process.stdout.write('loaded {"plugin": [')
  return { "tool.execute.before": async () => { process.stdout.write('before {"a": 1} ') } }
}
"""


@pytest.fixture(scope="module")
def summed_up(
    runner: Runner, cfg: RunConfig, script: Script, tmp_path_factory: pytest.TempPathFactory
) -> RunResult:
    """A run in which the conversation is summed up between two steps, and a plugin prints."""
    workspace = tmp_path_factory.mktemp("noisy")
    write_plugin(workspace, NOISY)
    looking = Reply("Let me look.", tool_calls=[shell("echo hi")], usage=NEAR_THE_LIMIT)
    prompt = script.to("Look into it", looking)
    script.to(CONTINUE, "That is all.")
    return runner.run(prompt, workspace, run_cfg=cfg.replace(model="scripted/small"))


def test_what_opencode_says_by_itself_is_not_in_the_text(summed_up: RunResult) -> None:
    said = json.dumps(summed_up.events)

    assert SUMMARY in said
    assert CONTINUE in said
    assert [event["type"] for event in summed_up.events].count("compaction") == 1
    assert summed_up.final_text == "Let me look.\n\nThat is all."
    assert (summed_up.status, summed_up.answer) == ("ok", "That is all.")


def test_the_tokens_of_a_summary_are_counted(summed_up: RunResult) -> None:
    assert summed_up.turns == 3
    assert summed_up.token_usage.input == 9_500 + 2 * 100


@pytest.mark.only("process")
def test_text_that_a_plugin_prints_takes_no_event_with_it(summed_up: RunResult) -> None:
    noise = "".join(str(e.get("raw")) for e in summed_up.events if e["type"] == "diagnostic")

    assert noise == 'loaded {"plugin": [before {"a": 1} '
    assert any(line.startswith('loaded {"plugin": [') for line in summed_up.raw_stdout_lines)
    assert (summed_up.status, summed_up.turns, len(summed_up.tool_calls)) == ("ok", 3, 1)


@pytest.mark.only("server")
def test_a_good_answer_is_not_lost_by_a_summary_after_it(
    runner: Runner, cfg: RunConfig, script: Script, workspace: Path
) -> None:
    prompt = script.to("Give a number", Reply('{"n": 5}', usage=NEAR_THE_LIMIT))
    script.to(CONTINUE, "I have given it.")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}

    result = runner.run(
        prompt,
        workspace,
        run_cfg=cfg.replace(model="scripted/small"),
        schema=schema,
        max_repairs=0,
    )

    assert (result.status, result.parsed) == ("ok", {"n": 5})


@pytest.mark.only("server")
def test_a_run_that_ends_with_a_summary_has_no_whole_answer(
    runner: Runner, cfg: RunConfig, script: Script, tmp_path: Path
) -> None:
    stop = '{"experimental.compaction.autocontinue": async (_, out) => { out.enabled = false }}'
    write_plugin(tmp_path, f"export const Stop = async () => ({stop})")
    looking = Reply("Let me look.", tool_calls=[shell("echo hi")], usage=NEAR_THE_LIMIT)
    prompt = script.to("Look once", looking)

    with pytest.raises(OpenCodeIncompleteError) as caught:
        runner.run(prompt, tmp_path, run_cfg=cfg.replace(model="scripted/small"))

    result = caught.value.result
    assert result is not None
    assert SUMMARY in json.dumps(result.events)
    assert (result.status, result.final_text) == ("incomplete", "Let me look.")


def test_a_sub_agent_that_speaks_first_does_not_answer_for_the_run(
    runner: Runner, cfg: RunConfig, script: Script, workspace: Path
) -> None:
    script.to("Audit the code", "For my parent only.")
    script.to(SUMMARIZE, "The code is fine.")

    result = runner.run("the code", workspace, run_cfg=cfg.replace(command="audit"))

    assert (result.status, result.final_text) == ("ok", "The code is fine.")
    assert result.session_id == script.last.session_id
    [auditor] = result.sub_agents
    assert auditor.parent_id == result.session_id
    assert (auditor.token_usage.total, result.token_usage.total) == (120, 240)
    assert [event["part"]["tool"] for event in result.tool_calls] == ["task"]
