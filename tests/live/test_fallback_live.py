"""A model that is out, and the next one that answers: both runners, sessions, a batch.

What makes a model count as out is decided in one place: each way is shown on a server, where a run
costs little.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import OpenCodeClient, OpenCodeProcessError, OpenCodeServer, RunConfig
from opencode_sync.api.runner import Runner
from opencode_sync.testing import Answer, ChatRequest, Reply, ScriptedModel
from tests.live.warm import (
    WITHIN_S,
    Script,
    config,
    conversation,
    make_configuration,
    shell,
)

HOUR_S = 3600.0
FIRST, SECOND = "scripted/scripted", "other/backup"


@pytest.fixture(scope="module")
def backup() -> Iterator[ScriptedModel]:
    def answer(request: ChatRequest) -> Answer:
        return '{"n": 3}' if "Shape" in request.prompt else f"backup {request.prompt}"

    with ScriptedModel(answer, model="backup") as model:
        yield model


@pytest.fixture(scope="module")
def cfg(model: ScriptedModel, backup: ScriptedModel) -> RunConfig:
    """With two providers: the module's script, and one that always answers."""
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {
            "baseURL": backup.base_url,
            "apiKey": "none",
            "headers": {"Connection": "close"},
        },
        "models": {"backup": {"cost": {"input": 1, "output": 10}, "tool_call": True}},
    }
    both = config(model)
    overrides: dict[str, Any] = dict(both.config_overrides or {})
    overrides["provider"] = {**overrides["provider"], "other": provider}
    return both.replace(config_overrides=overrides, fallback_models=(SECOND,))


@pytest.mark.parametrize(
    "reply, error",
    [
        pytest.param(
            Reply.failure(429, "slow down", retry_after_s=HOUR_S),
            "APIError 429: slow down",
            marks=pytest.mark.only("server"),
            id="429",
        ),
        pytest.param(
            Reply.failure(401, "bad key"),
            "APIError 401: bad key",
            marks=pytest.mark.only("server"),
            id="401",
        ),
        pytest.param(Reply.cut("Half an"), "APIError: ", id="cut"),
    ],
)
def test_a_run_whose_model_is_out_is_answered_by_the_next_one(
    runner: Runner, workspace: Path, script: Script, reply: Answer, error: str
) -> None:
    script.to("Refused", reply)

    result = runner.run("Refused", workspace, timeout_s=WITHIN_S)

    assert (result.status, result.answer, result.model) == ("ok", "backup Refused", SECOND)
    assert [each.model for each in result.tried] == [FIRST]
    assert str(result.tried[0].error).startswith(error)
    assert result.final_text == "backup Refused"
    assert (result.attempts, result.turns) == (2, 1)
    assert [event["type"] for event in result.events].count("fallback") == 1


@pytest.mark.only("server")
def test_a_model_that_nobody_knows_is_out(runner: Runner, workspace: Path, cfg: RunConfig) -> None:
    unknown = cfg.replace(model="scripted/nope")

    result = runner.run("Unknown", workspace, run_cfg=unknown, timeout_s=WITHIN_S)

    assert (result.answer, result.model) == ("backup Unknown", SECOND)
    assert "Model not found: scripted/nope" in str(result.tried[0])


def test_a_result_says_who_answered_also_where_only_the_configuration_names_it(
    runner: Runner, workspace: Path, cfg: RunConfig
) -> None:
    unnamed = cfg.replace(model=None, fallback_models=())

    result = runner.run("Unnamed", workspace, run_cfg=unnamed, timeout_s=WITHIN_S)

    assert (result.answer, result.model, result.tried) == ("re Unnamed", FIRST, [])


def test_where_all_are_out_the_error_of_the_last_is_raised(
    runner: Runner, workspace: Path, script: Script, cfg: RunConfig
) -> None:
    script.to("All", Reply.failure(429, "slow down", retry_after_s=HOUR_S))
    both = cfg.replace(model="scripted/nope", fallback_models=(FIRST,))

    with pytest.raises(OpenCodeProcessError, match="APIError 429: slow down") as caught:
        runner.run("All", workspace, run_cfg=both, timeout_s=WITHIN_S)

    assert caught.value.result is not None
    unknown, refused = caught.value.result.tried
    assert (unknown.model, refused.model) == ("scripted/nope", FIRST)
    assert "Model not found: scripted/nope" in str(unknown)


@pytest.mark.only("server")
def test_a_run_that_has_used_a_tool_stays_with_its_model(
    runner: Runner, workspace: Path, script: Script
) -> None:
    script.to("Act", shell("echo done >> file.txt"), Reply.failure(401, "bad key"))

    with pytest.raises(OpenCodeProcessError, match="bad key") as caught:
        runner.run("Act", workspace, timeout_s=WITHIN_S)

    assert caught.value.result is not None
    assert caught.value.result.tried == []
    assert (workspace / "file.txt").read_text() == "done\n"


@pytest.mark.only("server")
def test_a_command_that_names_a_model_asks_no_other(
    runner: Runner, tmp_path: Path, script: Script, cfg: RunConfig
) -> None:
    commands = make_configuration(tmp_path) / "command"
    commands.mkdir()
    (commands / "own.md").write_text(f"---\nmodel: {FIRST}\n---\nOwn $ARGUMENTS\n")
    script.to("Own way", Reply.failure(401, "bad key"))
    own = cfg.replace(command="own", model=SECOND, fallback_models=(FIRST,))

    with pytest.raises(OpenCodeProcessError, match="bad key") as caught:
        runner.run("way", tmp_path, run_cfg=own, timeout_s=WITHIN_S)

    assert caught.value.result is not None
    assert [each.model for each in caught.value.result.tried] == [FIRST]
    assert len(script.asked("Own way")) == 1


def test_a_turn_that_falls_back_goes_on_with_the_conversation(
    runner: OpenCodeClient | OpenCodeServer, workspace: Path, script: Script, backup: ScriptedModel
) -> None:
    script.to("Second", Reply.failure(429, "slow down", retry_after_s=HOUR_S))

    with runner.session(workspace, timeout_s=WITHIN_S) as chat:
        first = chat.send("First")
        second = chat.send("Second")
        third = chat.send("Third")

    assert [each.model for each in (first, second, third)] == [FIRST, SECOND, FIRST]
    assert first.session_id == second.session_id == third.session_id
    said = conversation(backup.requests[-1])
    assert said[:2] == ["First", "re First"]
    # A process per turn cannot take the prompt back that the first model was asked.
    assert said[2:] in (["Second"], ["Second", "Second"])
    assert len(said) == 3 or not isinstance(runner, OpenCodeServer)


def test_a_value_with_a_schema_comes_from_the_next_model(
    runner: Runner, workspace: Path, script: Script
) -> None:
    script.to("Shape", Reply.failure(402, "no credits"))

    result = runner.run("Shape", workspace, schema={"type": "object"}, timeout_s=WITHIN_S)

    assert (result.parsed, result.model) == ({"n": 3}, SECOND)


@pytest.mark.only("server")
def test_a_server_that_runs_elsewhere_is_asked_for_the_next_model(
    runner: OpenCodeServer, opencode_binary: str, workspace: Path, script: Script
) -> None:
    script.to("Elsewhere", Reply.failure(429, "slow down", retry_after_s=HOUR_S))
    cfg = RunConfig(
        model=FIRST, fallback_models=(SECOND,), attach=runner.url, password=runner.password
    )

    with OpenCodeClient(opencode_binary, run_cfg=cfg) as client:
        result = client.run("Elsewhere", workspace, timeout_s=WITHIN_S)

    assert (result.answer, result.model) == ("backup Elsewhere", SECOND)
    assert result.tried[0].retry_after_s == pytest.approx(HOUR_S, abs=WITHIN_S)
    assert len(script.asked("Elsewhere")) == 1


@pytest.mark.only("server")
def test_a_batch_goes_on_when_its_first_model_drops_out_in_the_middle(
    runner: OpenCodeServer, workspace: Path, script: Script
) -> None:
    n_answered, lock = 0, threading.Lock()

    def drop_out(request: ChatRequest) -> Answer:
        nonlocal n_answered
        with lock:
            n_answered += 1
            is_out = n_answered > 20
        if is_out:
            return Reply.failure(429, "slow down", retry_after_s=HOUR_S)
        return f"re {request.prompt}"

    script.answers.clear()
    prompts = [f"Number {n}" for n in range(40)]
    script.answers.update(dict.fromkeys(prompts, drop_out))

    with runner.map(prompts, workspace, max_workers=4, timeout_s=WITHIN_S) as batch:
        results = list(batch)

    by_first = [result for result in results if result.model == FIRST]
    others = [result for result in results if result.model == SECOND]
    assert [result.status for result in results] == ["ok"] * 40
    assert (len(by_first), len(others)) == (20, 20)
    assert all(result.answer == f"re {result.prompt}" for result in by_first)
    assert all(result.answer == f"backup {result.prompt}" for result in others)
    # Those that were at work when it dropped out have asked it, and none that began later.
    n_refused = sum(each.was_asked for result in others for each in result.tried)
    assert n_answered == 20 + n_refused
    assert n_refused <= 4
    assert all([each.model for each in result.tried] == [FIRST] for result in others)
    assert batch.report.total_cost == pytest.approx(sum(result.total_cost for result in results))
