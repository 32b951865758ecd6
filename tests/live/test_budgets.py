"""Budgets, and models that never come to an end, with a process per run and with a warm server.

All runs are under way together, and share one model and one runner of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    BatchRun,
    OpenCodeBudgetError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeServer,
    RunConfig,
    RunResult,
    RunStream,
)
from opencode_sync.api.runner import Runner
from opencode_sync.core.config import merged
from opencode_sync.testing import Answer, ChatRequest, Reply, ScriptedModel, ToolCall, tool_call
from tests.live.warm import config, shell

TIMEOUT_S = 150.0  # of runs that must not need it
AT_ONCE = 3  # more models without an end leave a server no time for anything else
STEP_TOKENS = 120
STEP_COST = (100 * 1 + 20 * 10) / 1e6

# What the model answers to each request that begins with the word, again and again.
ANSWERS: dict[str, Answer] = {
    "Unknown": Reply("hi", finish_reason="weird"),
    "Empty": Reply("", finish_reason="weird"),
    "Toolless": Reply("hi", finish_reason="tool_calls"),
    "Malformed": Reply(tool_calls=[ToolCall("write", '{"filePath": "x')], finish_reason="length"),
    "Unoffered": tool_call("nonsense"),
    "Misfitting": tool_call("bash", comand="ls"),
    "Structured": ToolCall("StructuredOutput", '{"name": "x'),
    "Work": shell("echo here"),
    "Delegate": tool_call(
        "task", description="Help", prompt="Unknown to a sub-agent", subagent_type="general"
    ),
}


def _answer(request: ChatRequest) -> Answer:
    return ANSWERS.get(request.prompt.partition(" ")[0], "Done.")


@pytest.fixture(scope="module")
def script() -> Callable[[ChatRequest], Answer]:
    return _answer


@pytest.fixture(scope="module")
def cfg(model: ScriptedModel) -> RunConfig:
    """Of the model, and of one without a price."""
    cfg = config(model)
    free = {"name": "Free", "limit": {"context": 100_000, "output": 9_000}, "tool_call": True}
    provider = {"scripted": {"models": {"free": free}}}
    return cfg.replace(config_overrides=merged(cfg.config_overrides or {}, {"provider": provider}))


# Each way once with a server, and with processes where what they print tells of it.
LIMITS: dict[str, dict[str, Any]] = {
    "Unknown reason, paid for": {"max_cost": 1.5 * STEP_COST},
    "Delegate it": {},
    "Work by steps": {"max_steps": 2},
}
ON_SERVER: dict[str, dict[str, Any]] = {
    "Unknown reason": {},
    "Malformed call": {},
    "Empty answer": {},
    "Toolless step": {},
    "Unoffered tool": {},
    "Misfitting arguments": {},
    "Structured output": {"max_repairs": 0, "schema": {"type": "object", "required": ["name"]}},
    "Work by tokens": {"max_tokens": 2 * STEP_TOKENS},
}

Errors = dict[str, OpenCodeError]


@pytest.fixture(scope="module")
def errors(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Errors:
    """What each run ended with, by its prompt."""
    limits = LIMITS | (ON_SERVER if isinstance(runner, OpenCodeServer) else {})
    with ExitStack() as streams, ThreadPoolExecutor(AT_ONCE) as threads:

        def start(prompt: str) -> OpenCodeError:
            workspace = tmp_path_factory.mktemp("workspace")
            return _error_of(
                streams.enter_context(
                    runner.stream(prompt, workspace, timeout_s=TIMEOUT_S, **limits[prompt])
                )
            )

        return dict(zip(limits, threads.map(start, limits), strict=True))


def _error_of(stream: RunStream) -> OpenCodeError:
    with pytest.raises(OpenCodeError) as caught:
        stream.wait()
    return caught.value


@pytest.mark.only("server")
@pytest.mark.parametrize("prompt", ["Unknown reason", "Empty answer", "Toolless step"])
def test_a_model_that_is_asked_again_and_again_ends_the_run(
    errors: Errors, prompt: str, model: ScriptedModel
) -> None:
    error = errors[prompt]

    assert isinstance(error, OpenCodeIncompleteError)
    reason = "tool-calls" if prompt == "Toolless step" else "unknown"
    assert "times in a row" in str(error)
    assert repr(reason) in str(error)
    assert error.result is not None
    assert (error.result.status, error.result.finish_reason) == ("incomplete", reason)
    assert error.result.total_cost == pytest.approx(error.result.turns * STEP_COST)
    # Until it was stopped it may have been asked some more times, at most 18 a second.
    asked = [request for request in model.requests if request.prompt == prompt]
    assert 3 <= error.result.turns <= len(asked)


@pytest.mark.only("server")
@pytest.mark.parametrize(
    "prompt", ["Malformed call", "Unoffered tool", "Misfitting arguments", "Structured output"]
)
def test_a_model_that_calls_tools_in_vain_again_and_again_ends_the_run(
    errors: Errors, prompt: str
) -> None:
    error = errors[prompt]

    assert isinstance(error, OpenCodeIncompleteError)
    assert "with wrong arguments" in str(error)
    assert error.result is not None
    assert error.result.status == "incomplete"
    assert error.result.turns >= 5  # it may have been asked some more times until it was stopped
    assert error.result.total_cost == pytest.approx(error.result.turns * STEP_COST)


def test_a_sub_agent_that_is_asked_again_and_again_ends_the_run(errors: Errors) -> None:
    error = errors["Delegate it"]

    assert isinstance(error, OpenCodeIncompleteError)
    assert error.result is not None
    assert (error.result.status, error.result.turns) == ("incomplete", 0)
    assert error.result.total_cost >= 3 * STEP_COST


def test_a_model_that_is_asked_again_and_again_does_not_pass_its_budget(errors: Errors) -> None:
    error = errors["Unknown reason, paid for"]

    assert isinstance(error, OpenCodeBudgetError)
    assert error.limit_name == "max_cost"
    assert error.result is not None
    assert error.result.status == "over_budget"


def test_a_run_ends_with_its_last_step(errors: Errors) -> None:
    error = errors["Work by steps"]

    assert isinstance(error, OpenCodeBudgetError)
    assert (error.limit_name, error.limit, error.spent) == ("max_steps", 2, 2)
    assert error.result is not None
    assert error.result.status == "over_budget"
    assert error.result.tool_calls[0]["part"]["state"]["output"] == "here\n"


@pytest.mark.only("server")
def test_a_run_ends_where_its_tokens_are_used_up(errors: Errors) -> None:
    error = errors["Work by tokens"]

    assert isinstance(error, OpenCodeBudgetError)
    assert (error.limit_name, error.limit) == ("max_tokens", 2 * STEP_TOKENS)
    assert error.spent == 3 * STEP_TOKENS


# --- prices that nobody knows --------------------------------------------------------------------


@pytest.mark.only("server")
def test_a_model_without_a_price_is_warned_of_and_bound_by_its_tokens(
    runner: Runner, tmp_path: Path
) -> None:
    cfg = runner._run_cfg.replace(model="scripted/free")
    limits = {"max_cost": STEP_COST, "max_tokens": STEP_TOKENS, "timeout_s": TIMEOUT_S}

    with runner.stream("Work for free", tmp_path, run_cfg=cfg, **limits) as stream:
        error = _error_of(stream)

    assert isinstance(error, OpenCodeBudgetError)
    assert error.limit_name == "max_tokens"
    assert error.result is not None
    assert error.result.total_cost == 0
    (warning,) = error.result.warnings
    assert f"{STEP_TOKENS} tokens were counted at $0.00, so max_cost does not bind" in warning


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.only("server")
def test_a_batch_stops_what_is_under_way_and_runs_it_again_with_a_larger_budget(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go_on(steps: float) -> BatchRun[RunResult | OpenCodeError]:
        return runner.map(
            ["Work one", "Work two"],
            tmp_path,
            max_workers=2,
            checkpoint=tmp_path / "done.jsonl",
            max_total_cost=steps * STEP_COST,
            timeout_s=TIMEOUT_S,
            on_error="return",
        )

    with go_on(4) as first:
        stopped = list(first)
    monkeypatch.setitem(ANSWERS, "Work", "Worked.")
    with go_on(40) as second:
        ends = list(second)

    assert [getattr(end, "limit_name", None) for end in stopped] == ["max_total_cost"] * 2
    results = [end.result for end in stopped if isinstance(end, OpenCodeError)]
    assert {result.status for result in results if result is not None} == {"over_budget"}
    # Each may have ended one more step until it was stopped.
    assert 4 * STEP_COST <= first.report.total_cost + 1e-9 <= 8 * STEP_COST
    assert [end.answer for end in ends if isinstance(end, RunResult)] == ["Worked."] * 2
    assert second.report.total_cost == pytest.approx(2 * STEP_COST)
