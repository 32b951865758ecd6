"""How many jobs may be in flight while a provider refuses; with a clock of the test's own."""

from __future__ import annotations

import pytest

from opencode_sync.batch.throttle import MAX_PAUSE_S, Throttle, is_rate_limit, retry_after_s


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
