"""Limits of a run reach it, whichever verb it was asked for with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import Job, OpenCodeBudgetError
from opencode_sync.api.session import Session
from opencode_sync.core.request import Budget, Spent
from tests.scripted import STEP_COST, STEP_TOKENS, ScriptedRunner

PROMPT = "spend 9 steps"
LIMITS = {"max_cost": 1.5 * STEP_COST, "max_tokens": STEP_TOKENS, "max_steps": 2}


@pytest.fixture
def runner() -> Iterator[ScriptedRunner]:
    with ScriptedRunner(max_workers=2) as runner:
        yield runner


Ask = Callable[..., Any]
VERBS: dict[str, Ask] = {
    "run": lambda runner, where, **limits: runner.run(PROMPT, where, **limits),
    "stream": lambda runner, where, **limits: runner.stream(PROMPT, where, **limits).wait(),
    "submit": lambda runner, where, **limits: runner.submit(PROMPT, where, **limits).result(20),
    "map": lambda runner, where, **limits: list(runner.map([PROMPT], where, **limits)),
    "Job": lambda runner, where, **limits: list(runner.map([Job(PROMPT, where, **limits)])),
    "send": lambda runner, where, **limits: Session(runner, where).send(PROMPT, **limits),
    "session.stream": lambda runner, where, **limits: (
        Session(runner, where).stream(PROMPT, **limits).wait()
    ),
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("ask", VERBS.values(), ids=VERBS)
def test_each_verb_takes_each_limit(
    runner: ScriptedRunner, tmp_path: Path, ask: Ask, limit: str
) -> None:
    with pytest.raises(OpenCodeBudgetError) as caught:
        ask(runner, tmp_path, **{limit: LIMITS[limit]})

    error = caught.value
    assert (error.limit_name, error.limit) == (limit, LIMITS[limit])
    assert error.result is not None
    assert (error.result.status, error.result.turns) == ("over_budget", 2)


@pytest.mark.parametrize(
    "budget, spent, told",
    [
        (Budget(5.0), Spent(5.5, 9), "max_total_cost of $5 is spent ($5.5): "),
        (
            Budget(None, 9_000),
            Spent(5.5, 9_500),
            "max_total_tokens of 9,000 tokens is spent (9,500",
        ),
        (Budget(5.0, 9_000), Spent(1.5, 9_500), "max_total_tokens of 9,000"),
        (Budget(5.0, 9_000), Spent(5.0, 0), "max_total_cost of $5"),
    ],
    ids=["dollars", "tokens", "tokens first", "dollars first"],
)
def test_the_error_names_the_budget_that_is_spent(budget: Budget, spent: Spent, told: str) -> None:
    assert budget.is_spent(spent)

    assert str(budget.error(spent, Spent(), "it ended")).startswith(told)
