"""How many jobs may be in flight while a provider refuses; with a clock of the test's own."""

from __future__ import annotations

import pytest

from opencode_sync import ErrorInfo, RunConfig, RunResult, Tried
from opencode_sync.batch.throttle import (
    MAX_PAUSE_S,
    OUT_S,
    Outages,
    Throttle,
    is_rate_limit,
    retry_after_s,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_without_refusals_all_may_run(clock: Clock) -> None:
    throttle = Throttle(8, clock=clock)

    throttle.succeeded()

    assert (throttle.limit, throttle.lowest, throttle.pause_s()) == (8, 8, 0.0)


def test_as_many_may_run_as_are_not_waiting_for_the_provider(clock: Clock) -> None:
    throttle = Throttle(12, clock=clock)

    for job in range(9):
        throttle.refused(12, job)

    assert (throttle.limit, throttle.lowest, throttle.refusals) == (3, 3, 9)


def test_a_job_that_is_refused_again_counts_once(clock: Clock) -> None:
    throttle = Throttle(12, clock=clock)

    for _ in range(9):
        throttle.refused(12, 1)

    assert (throttle.limit, throttle.refusals) == (11, 9)


def test_a_job_that_goes_on_is_not_waiting_any_more(clock: Clock) -> None:
    throttle = Throttle(12, clock=clock)
    for job in range(6):
        throttle.refused(12, job)

    for job in range(6):
        throttle.recovered(job)
    throttle.refused(6, 7)

    assert throttle.limit == 5


def test_refusals_of_jobs_that_have_ended_halve_what_was_in_flight(clock: Clock) -> None:
    throttle = Throttle(8, clock=clock)

    for _ in range(5):
        throttle.refused(8)
        clock.now += 0.1

    assert (throttle.limit, throttle.refusals) == (4, 5)


def test_while_too_many_are_still_in_flight_nothing_more_is_halved(clock: Clock) -> None:
    throttle = Throttle(8, clock=clock)
    throttle.refused(8)
    clock.now += 60

    throttle.refused(7)

    assert throttle.limit == 4


def test_it_never_goes_below_one(clock: Clock) -> None:
    throttle = Throttle(4, clock=clock)

    for job in range(4):
        throttle.refused(4, job)

    assert throttle.limit == 1


def test_successes_bring_it_back_fast_at_first_slowly_near_what_was_refused(clock: Clock) -> None:
    throttle = Throttle(16, clock=clock)
    for job in range(7):
        throttle.refused(16, job)  # 10 were too many
    for job in range(20, 36):
        throttle.refused(16, job)
    throttle._too_many = 10

    levels = [throttle.limit]
    while levels[-1] < 16:
        throttle.succeeded()
        levels.append(throttle.limit)

    needed = {level: levels.count(level) for level in range(1, 16)}
    assert needed[1] == needed[2] == 1
    assert needed[3] < needed[7] < needed[9] > needed[12]


def test_none_starts_until_retry_after_is_over(clock: Clock) -> None:
    throttle = Throttle(4, clock=clock)

    throttle.refused(4, 1, 20.0)
    clock.now += 5

    assert throttle.pause_s() == pytest.approx(15.0)


def test_a_retry_after_of_hours_is_not_waited_for(clock: Clock) -> None:
    throttle = Throttle(4, clock=clock)

    throttle.refused(4, 1, 36_000.0)

    assert throttle.pause_s() == MAX_PAUSE_S


def test_switched_off_it_only_counts(clock: Clock) -> None:
    throttle = Throttle(4, adaptive=False, clock=clock)

    throttle.refused(4, 1, 20.0)

    assert (throttle.limit, throttle.pause_s(), throttle.refusals) == (4, 0.0, 1)


@pytest.mark.parametrize(
    "status, message, expected",
    [
        (429, "", True),
        (529, "Overloaded", True),
        (500, "rate limit in the text of something else", False),
        (None, "Rate limit exceeded", True),
        (None, "Too Many Requests", True),
        (None, "connection reset", False),
        (None, None, False),
    ],
)
def test_what_counts_as_too_many_requests(status: object, message: object, expected: bool) -> None:
    assert is_rate_limit(status, message) is expected


@pytest.mark.parametrize("value", [None, "3", True, -1, float("nan"), float("inf")], ids=repr)
def test_an_odd_retry_after_is_none(value: object) -> None:
    assert retry_after_s({"retry_after_s": value}) is None


def test_the_headers_of_the_refusal_that_a_run_ended_with_are_read_too() -> None:
    headers = {"retry-after": "2", "retry-after-ms": "1500"}
    event = {"type": "error", "error": {"data": {"statusCode": 429, "responseHeaders": headers}}}

    assert retry_after_s(event) == 1.5


# --- models that are out -------------------------------------------------------------------------

CFG = RunConfig(model="a/one", fallback_models=("b/two", "c/three"))


def out(model: str, retry_after_s: float | None = None) -> Tried:
    return Tried(model, ErrorInfo("APIError", "no", 429), retry_after_s=retry_after_s)


def answered(model: str) -> RunResult:
    return RunResult(model=model, turns=1)


def passed_over(outages: Outages, job: int, cfg: RunConfig = CFG) -> list[str]:
    return [each.model for each in outages.passed_over(job, cfg)]


def test_a_model_that_is_out_is_passed_over_until_it_wants_to_be_asked_again(clock: Clock) -> None:
    outages = Outages(clock)
    outages.left(CFG, out("a/one", 3600))

    assert passed_over(outages, 1) == ["a/one"]
    clock.now += 3599
    assert passed_over(outages, 2) == ["a/one"]
    clock.now += 1
    assert passed_over(outages, 3) == []


def test_it_is_then_asked_by_one_job_until_that_has_ended(clock: Clock) -> None:
    outages = Outages(clock)
    outages.left(CFG, out("a/one", 10))
    clock.now += 10

    assert [passed_over(outages, job) for job in (1, 2, 3)] == [[], ["a/one"], ["a/one"]]

    outages.ended(2, answered("b/two"))
    assert passed_over(outages, 4) == ["a/one"]
    outages.ended(1, answered("a/one"))
    assert [passed_over(outages, job) for job in (5, 6)] == [[], []]


def test_one_that_is_still_out_is_passed_over_again(clock: Clock) -> None:
    outages = Outages(clock)
    outages.left(CFG, out("a/one", 10))
    clock.now += 10
    passed_over(outages, 1)

    outages.left(CFG, out("a/one", 20))
    outages.ended(1, answered("b/two"))
    clock.now += 19

    assert passed_over(outages, 2) == ["a/one"]


def test_a_job_that_ends_before_the_model_has_answered_leaves_it_to_the_next(clock: Clock) -> None:
    outages = Outages(clock)
    outages.left(CFG, out("a/one", 10))
    clock.now += 10
    passed_over(outages, 1)

    outages.ended(1, None)

    assert [passed_over(outages, job) for job in (2, 3)] == [[], ["a/one"]]


def test_without_a_time_of_the_provider_it_is_passed_over_for_a_minute(clock: Clock) -> None:
    outages = Outages(clock)
    outages.left(CFG, out("a/one"))

    clock.now += OUT_S - 1
    assert passed_over(outages, 1) == ["a/one"]
    clock.now += 1
    assert passed_over(outages, 2) == []


def test_a_later_model_is_asked_again_only_where_those_before_it_are_out(clock: Clock) -> None:
    outages = Outages(clock)
    outages.left(CFG, out("b/two", 10))
    clock.now += 10

    assert [passed_over(outages, job) for job in (1, 2)] == [[], []]
    outages.left(CFG, out("a/one", 10))
    assert [passed_over(outages, job) for job in (3, 4)] == [["a/one"], ["a/one", "b/two"]]


def test_the_last_model_is_never_passed_over(clock: Clock) -> None:
    outages = Outages(clock)
    for model in ("a/one", "b/two", "c/three"):
        outages.left(CFG, out(model, 3600))

    assert passed_over(outages, 1) == ["a/one", "b/two"]


def test_a_model_that_is_out_for_one_key_may_answer_another(clock: Clock) -> None:
    outages = Outages(clock)
    outages.left(CFG.replace(extra_env={"KEY": "first"}), out("a/one", 3600))

    assert passed_over(outages, 1, CFG.replace(extra_env={"KEY": "second"})) == []
    assert passed_over(outages, 2, CFG.replace(extra_env={"KEY": "first"})) == ["a/one"]
