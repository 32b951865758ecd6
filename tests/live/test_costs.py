"""What a run cost, with sub-agents and what OpenCode asks for by itself, on both runners.

One run with two sub-agents side by side, one of which calls another, answers most tests; its
session is then continued and forked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from opencode_sync import (
    OpenCodeBudgetError,
    OpenCodeClient,
    RunConfig,
    RunResult,
    SubAgent,
    TokenUsage,
)
from opencode_sync.api.runner import Runner
from opencode_sync.core.config import merged
from opencode_sync.testing import Answer, ChatRequest, Reply, ScriptedModel, ToolCall, tool_call
from tests.live.warm import config, make_configuration, shell

# Of one answer of the model.
STEP = TokenUsage(total=120, input=100, output=20)
STEP_COST = (100 * 1 + 20 * 10) / 1e6
MOST_STEPS = 100  # of a sub-agent that nobody stops
LONG = "x" * 1_000_000

# Sub-agents may call sub-agents, and OpenCode may ask for titles.
AGENTS = {"general": {"permission": {"task": "allow"}}, "title": {"disable": False}}


def task(prompt: str, **more: str) -> ToolCall:
    return tool_call(
        "task", description=f"to {prompt}", prompt=prompt, subagent_type="general", **more
    )


def steps(n: int) -> tuple[TokenUsage, object]:
    return TokenUsage(n * 120, n * 100, n * 20), pytest.approx(n * STEP_COST)


class Script:
    """Each prompt is answered with one of these, and then, when its tools are done, with words."""

    def __init__(self) -> None:
        self.taken_up = ""  # the session that is worked in once more
        self.n_spent = 0

    def __call__(self, request: ChatRequest) -> Answer:
        prompt, is_done = request.prompt, request.messages[-1]["role"] == "tool"
        if prompt == "spend" and self.n_spent < MOST_STEPS:
            self.n_spent += 1
            return shell(f"echo {self.n_spent}")
        if is_done:
            return f"{prompt} is done"
        if prompt == "delegate":
            return Reply("I ask two.", tool_calls=[task("ask on"), task("look")])
        if prompt == "ask on":
            return task("dig")
        if prompt == "look":
            return shell("echo seen")
        if prompt == "delegate again":
            return task("touch", task_id=self.taken_up)
        if prompt == "dig":
            return LONG
        if prompt.endswith("fill up"):
            return Reply(tool_calls=[shell("echo full")], usage=TokenUsage(input=900, output=20))
        if prompt == "touch":
            return shell("touch made")
        if prompt == "delegate spending":
            return task("spend")
        return f"re {prompt}"


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def cfg(model: ScriptedModel) -> RunConfig:
    base = config(model)
    tight = {"scripted": {"models": {"tight": {"limit": {"context": 1_000, "output": 100}}}}}
    ours = {
        "agent": AGENTS,
        "subagent_depth": 2,
        "provider": tight,
        "compaction": {"auto": True},
    }
    return base.replace(config_overrides=merged(base.config_overrides or {}, ours))


@dataclass
class Family:
    """A run with sub-agents, and what the model was asked meanwhile."""

    result: RunResult
    n_requests: int
    n_side_requests: int

    def called(self, title: str) -> SubAgent:
        [found] = [each for each in self.result.sub_agents if title in each.title]
        return found


# Says something at each event, in the midst of what tells us of sub-agents.
NOISY = """
export const Noisy = async () => ({ event: async () => { process.stderr.write("working ... ") } })
"""


@pytest.fixture(scope="module")
def family(runner: Runner, workspace: Path, model: ScriptedModel) -> Family:
    if not (workspace / ".opencode").exists():
        plugin = make_configuration(workspace) / "plugin" / "noisy.js"
        plugin.parent.mkdir()
        plugin.write_text(NOISY)
    before = len(model.requests), len(model.side_requests)

    result = runner.run("delegate", workspace)

    after = len(model.requests), len(model.side_requests)
    return Family(result, after[0] - before[0], after[1] - before[1])


def test_tokens_and_dollars_of_all_requests_are_in_the_totals(family: Family) -> None:
    result = family.result

    assert (result.status, result.turns, result.warnings) == ("ok", 2, [])
    assert result.final_text == "I ask two.\n\ndelegate is done"
    assert family.n_requests == 7
    assert (result.token_usage, result.total_cost) == steps(7)


def test_opencode_asks_the_model_for_nothing_by_itself(family: Family) -> None:
    assert family.n_side_requests == 0


def test_each_sub_agent_stands_in_the_result_with_what_it_used(family: Family) -> None:
    ask_on, look, dig = map(family.called, ("ask on", "look", "dig"))

    assert {each.agent for each in family.result.sub_agents} == {"general"}
    assert [each.parent_id for each in (ask_on, look)] == [family.result.session_id] * 2
    assert dig.parent_id == ask_on.session_id
    for each, n in ((ask_on, 2), (look, 2), (dig, 1)):
        assert (each.token_usage, each.total_cost) == steps(n)


def test_tool_calls_of_sub_agents_are_told(family: Family) -> None:
    calls = {(call["sessionID"], call["part"]["tool"]) for call in family.result.tool_calls}

    assert calls == {
        (family.result.session_id, "task"),
        (family.called("ask on").session_id, "task"),
        (family.called("look").session_id, "bash"),
    }
    assert len(family.result.tool_calls) == 4


def test_what_a_sub_agent_says_is_told_whole_and_is_not_the_answer(family: Family) -> None:
    said = {
        event["sessionID"]: event["part"]["text"]
        for event in family.result.events
        if event["type"] == "text"
    }

    assert said[family.called("dig").session_id] == LONG
    assert LONG not in family.result.stderr
    assert family.result.answer == "delegate is done"


def test_a_sub_agent_is_announced_before_its_events(family: Family) -> None:
    known = {family.result.session_id}

    for event in family.result.events:
        assert event["sessionID"] in known
        if event["type"] == "sub_agent":
            known.add(event["childID"])

    assert len(known) == 4


def test_text_that_a_plugin_prints_takes_no_dollar_with_it(family: Family) -> None:
    if family.result.stderr:  # a server's is its own
        assert family.result.stderr.startswith("working ... ")
        assert "opencode-sync: " not in family.result.stderr


def test_a_sub_agent_that_is_taken_up_again_is_counted_from_there(
    runner: Runner, family: Family, cfg: RunConfig, script: Script, workspace: Path
) -> None:
    (workspace / "made").unlink(missing_ok=True)  # of another runner's fork, which may
    script.taken_up = family.called("look").session_id
    going_on = cfg.replace(
        session_id=family.result.session_id, permission={"bash": {"*": "allow", "touch *": "deny"}}
    )

    result = runner.run("delegate again", workspace, run_cfg=going_on)

    [again] = result.sub_agents
    assert (again.session_id, again.agent) == (script.taken_up, "general")
    assert (again.token_usage, again.total_cost) == steps(2)
    assert (result.token_usage, result.total_cost) == steps(4)
    assert (result.status, result.denied_tools) == ("denied", ["bash"])
    assert not (workspace / "made").exists()


def test_in_a_fork_only_its_own_sub_agents_are_counted(
    runner: Runner,
    family: Family,
    cfg: RunConfig,
    script: Script,
    workspace: Path,
    model: ScriptedModel,
) -> None:
    script.taken_up = family.called("look").session_id
    before = len(model.side_requests)
    forking = cfg.replace(session_id=family.result.session_id, fork=True)

    result = runner.run("delegate again", workspace, run_cfg=forking)

    assert result.session_id != family.result.session_id
    # On a server it goes on with sessions of its own parent alone: others have other rules.
    (sub_agent,) = result.sub_agents
    assert (sub_agent.session_id == script.taken_up) == isinstance(runner, OpenCodeClient)
    assert (result.token_usage, result.total_cost) == steps(4)
    assert len(model.side_requests) == before


def test_max_cost_ends_a_sub_agent_in_the_midst_of_its_work(
    runner: Runner, script: Script, workspace: Path
) -> None:
    script.n_spent = 0

    with pytest.raises(OpenCodeBudgetError) as caught:
        runner.run("delegate spending", workspace, max_cost=2.5 * STEP_COST)

    result = caught.value.result
    assert result is not None
    [spender] = result.sub_agents
    # What had come by the end of the process or the turn is counted too.
    assert result.total_cost >= spender.total_cost > 2.5 * STEP_COST
    assert script.n_spent < MOST_STEPS


def test_a_compaction_is_counted_and_no_title_is_asked_for_whatever_the_prompt(
    runner: Runner, cfg: RunConfig, workspace: Path, model: ScriptedModel
) -> None:
    # The emoji stands where OpenCode cuts the title off, in the midst of it.
    prompt = f"--help\x01\ttwo\n{'x' * 37}\N{GRINNING FACE} and fill up"
    before = len(model.requests), len(model.side_requests)

    result = runner.run(prompt, workspace, run_cfg=cfg.replace(model="scripted/tight"))

    assert prompt.index("\N{GRINNING FACE}") == 49
    assert len(model.side_requests) == before[1] + 1  # the summary
    n_requests = len(model.requests) - before[0]
    assert result.token_usage.output == 20 * (n_requests + 1)


def test_a_process_that_tells_nothing_of_its_sub_agents_is_warned_of(
    opencode_binary: str, cfg: RunConfig, tmp_path: Path
) -> None:
    untold = cfg.replace(extra_env={**(cfg.extra_env or {}), "BUN_INSPECT_PRELOAD": ""})

    with OpenCodeClient(opencode_binary, run_cfg=untold) as client:
        result = client.run("delegate", tmp_path)

    [warning] = result.warnings
    assert warning.startswith("What 2 sub-agent(s) used and did is not counted")
    assert (result.token_usage, result.total_cost) == steps(2)
