"""Budgets, and models that never come to an end, with a process per run and with a warm server.

All runs are under way together, and share one model and one runner of each kind.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeBudgetError,
    OpenCodeClient,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeServer,
    RunConfig,
    RunStream,
)
from opencode_sync.runner import Runner
from opencode_sync.testing import Answer, ChatRequest, Reply, ScriptedModel
from tests.live.warm import config, open_connections, shell

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes and shell"),
    pytest.mark.timeout(240),
]

TIMEOUT_S = 150.0  # of runs that must not need it
STEP_TOKENS = 120
STEP_COST = (100 * 1 + 20 * 10) / 1e6

# What the model answers to each request that begins with the word, again and again.
ANSWERS: dict[str, Answer] = {
    "Unknown": Reply("hi", finish_reason="weird"),
    "Empty": Reply("", finish_reason="weird"),
    "Toolless": Reply("hi", finish_reason="tool_calls"),
    "Work": shell("echo here"),
}


def _answer(request: ChatRequest) -> Answer:
    return ANSWERS.get(request.prompt.partition(" ")[0], "Done.")


@pytest.fixture(scope="module")
def model() -> Iterator[ScriptedModel]:
    with ScriptedModel(_answer) as model:
        yield model


@pytest.fixture(scope="module", params=[OpenCodeClient, OpenCodeServer], ids=["process", "server"])
def runner(
    request: pytest.FixtureRequest, opencode_binary: str, model: ScriptedModel
) -> Iterator[Runner]:
    cfg: RunConfig = config(model)
    with request.param(opencode_binary, run_cfg=cfg) as runner:
        if isinstance(runner, OpenCodeServer):
            open_connections(runner)
        yield runner


Errors = dict[str, OpenCodeError]


@pytest.fixture(scope="module")
def errors(
    runner: Runner, model: ScriptedModel, tmp_path_factory: pytest.TempPathFactory
) -> Errors:
    """What each run ended with, by its prompt."""
    limits: dict[str, dict[str, Any]] = {
        "Unknown reason": {},
        "Empty answer": {},
        "Toolless step": {},
        "Unknown reason, paid for": {"max_cost": 1.5 * STEP_COST},
        "Work by steps": {"max_steps": 2},
        "Work by tokens": {"max_tokens": 2 * STEP_TOKENS},
    }
    with ExitStack() as streams, ThreadPoolExecutor(len(limits)) as threads:

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


def test_a_run_ends_where_its_tokens_are_used_up(errors: Errors) -> None:
    error = errors["Work by tokens"]

    assert isinstance(error, OpenCodeBudgetError)
    assert (error.limit_name, error.limit) == ("max_tokens", 2 * STEP_TOKENS)
    assert error.spent == 3 * STEP_TOKENS
