"""What is in the way of a million prompts, by figures that leave no doubt of it."""

from __future__ import annotations

import pytest

from tests.benchmarks.scale import Figures, Way, simulate


@pytest.mark.parametrize(
    "workers, cpu_s, batch_s, model_s, what, per_s",
    [
        (1, 0.0, 0.0, 10.0, "the model", 0.2),
        (8, 10.0, 0.0, 1.0, "the processor", 0.4),
        (8, 0.0, 5.0, 1.0, "the batch", 0.2),
    ],
)
def test_what_is_short_is_what_the_time_goes_into(
    workers: int, cpu_s: float, batch_s: float, model_s: float, what: str, per_s: float
) -> None:
    figures = Figures(cores=2, model_s=model_s)

    outcome = simulate(Way("a way", workers, cpu_s), batch_s, prompts=2_000, machines=2, f=figures)

    assert next(iter(outcome.shares)) == what
    assert outcome.per_s == pytest.approx(per_s, rel=0.1)
    assert sum(outcome.shares.values()) == pytest.approx(1)
