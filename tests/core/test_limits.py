"""Limits of a run, as a stream keeps them, and the budget of a batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from opencode_sync import (
    ErrorInfo,
    OpenCodeBudgetError,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    Retry,
    RunResult,
)
from opencode_sync.core.limits import Budget, Limits, Meter, Spent
from tests.core.scripts import RETRY, Script, forever, step, stream_of, text

LONG_S = 20.0


def refused_with(status: int) -> OpenCodeError:
    result = RunResult(error=ErrorInfo("APIError", "no", status))
    return OpenCodeProcessError(1, reason=f"status {status}", result=result)


def test_the_total_limit_ends_the_run_with_what_was_got() -> None:
    source = Script([text("so far")], forever())
    stream = stream_of(source, timeout_s=0.1)

    with pytest.raises(OpenCodeTimeoutError, match=r"over 0\.1 s \(timeout_s\)") as caught:
        stream.wait()

    assert caught.value.limit == "timeout_s"
    assert caught.value.result is stream.result
    assert stream.result.final_text == "so far"
    assert stream.result.status == "timed_out"
    assert source.stops == 1


def test_a_run_that_ended_before_the_deadline_has_no_timeout() -> None:
    source = Script([text("a")], [step()])
    stream = stream_of(source, timeout_s=0.05)
    source.started_at -= LONG_S

    assert stream.wait().status == "ok"


def test_a_slow_consumer_does_not_make_the_run_idle() -> None:
    gate = forever()
    source = Script([text("a")], gate, [step()])
    stream = stream_of(source, idle_timeout_s=0.2)

    next(stream)
    threading.Event().wait(0.4)  # the consumer's own time
    gate.set()

    assert stream.wait().status == "ok"


def test_the_idle_limit_says_what_the_provider_said() -> None:
    stream = stream_of(Script([text("a"), RETRY], forever()), idle_timeout_s=0.1)

    with pytest.raises(OpenCodeTimeoutError) as caught:
        stream.wait()

    assert caught.value.limit == "idle_timeout_s"
    assert "the provider was being retried: 429 slow down" in str(caught.value)


def test_a_provider_that_has_answered_since_is_not_blamed() -> None:
    stream = stream_of(Script([RETRY], [text("a")], forever()), idle_timeout_s=0.1)

    with pytest.raises(OpenCodeTimeoutError) as caught:
        stream.wait()

    assert "retried" not in str(caught.value)


def test_the_deadline_is_one_instant_for_all_that_wait() -> None:
    meter = Meter(Limits(timeout_s=1.0))
    meter.start(time.monotonic())

    first = meter.deadline()

    assert meter.deadline() == first


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")

    limits = Limits(
        timeout_s=numpy.float32(1.5),
        max_cost=numpy.float64(2),
        max_steps=numpy.int64(3),
        startup_retries=numpy.int8(1),
    )

    values = (limits.timeout_s, limits.max_cost, limits.max_steps, limits.startup_retries)
    assert values == (1.5, 2.0, 3, 1)
    assert [type(value) for value in values] == [float, float, int, int]
    with pytest.raises(OpenCodeConfigError, match="max_steps is "):
        Limits(max_steps=numpy.float64(1.5))


def test_a_limit_beyond_all_clocks_is_none() -> None:
    for seconds in (1e300, 10**10):
        for name in ("timeout_s", "idle_timeout_s"):
            assert stream_of(Script([step()]), **{name: seconds}).wait().status == "ok"


def test_a_sign_of_life_is_not_idle() -> None:
    source = Script(forever())
    signs = 8

    def receive(timeout: float | None) -> Sequence[Any] | None:
        nonlocal signs
        signs -= 1
        assert timeout == 0.3  # it begins anew with each
        return [] if signs > 1 else [step()] if signs else None

    source.receive = receive  # type: ignore[method-assign]

    assert stream_of(source, idle_timeout_s=0.3).wait().status == "ok"


def test_the_budget_is_checked_at_each_step() -> None:
    parts = [[step("tool-calls", 0.4)] for _ in range(5)]
    source = Script(*parts, forever())
    stream = stream_of(source, max_cost=1.0)

    with pytest.raises(OpenCodeBudgetError, match=r"\$1 exceeded: \$1.2 spent after 3") as caught:
        stream.wait()

    assert caught.value.spent == pytest.approx(1.2)
    assert stream.result.status == "over_budget"


def asked_again(n: int, reason: str = "unknown", session: str = "ses_1") -> list[Any]:
    """Steps that OpenCode 1.18.33 begins again at once, each as a block of its own."""
    tokens = {"total": 120, "input": 100, "output": 20}
    finish = {"reason": reason, "cost": 0.0003, "tokens": tokens}
    return [
        [
            {"type": "step_start", "sessionID": session, "part": {}},
            {"type": "text", "sessionID": session, "part": {"text": "hi"}},
            {"type": "step_finish", "sessionID": session, "part": finish},
        ]
        for _ in range(n)
    ]


TOOL_USE: dict[str, Any] = {
    "type": "tool_use",
    "sessionID": "ses_1",
    "part": {"tool": "bash", "state": {"status": "completed", "input": {}, "output": "x"}},
}


@pytest.mark.parametrize("reason", ["unknown", "tool-calls", "other"])
def test_a_run_whose_model_is_asked_again_and_again_is_stopped_after_three_steps(
    reason: str,
) -> None:
    source = Script(*asked_again(3, reason), forever())
    stream = stream_of(source)

    with pytest.raises(OpenCodeIncompleteError, match=f"3 times in a row.*{reason}") as caught:
        stream.wait()

    assert source.stops == 1
    assert caught.value.result is stream.result
    assert (stream.result.status, stream.result.turns) == ("incomplete", 3)
    assert stream.result.finish_reason == reason


def test_a_sub_agent_that_is_asked_again_and_again_ends_the_run() -> None:
    root: dict[str, Any] = {"type": "step_start", "sessionID": "ses_1", "part": {}}
    stream = stream_of(Script([root], *asked_again(3, session="ses_2"), forever()))

    with pytest.raises(OpenCodeIncompleteError):
        stream.wait()


def test_two_steps_that_lead_to_nothing_are_forgiven() -> None:
    stream = stream_of(
        Script(*asked_again(2), [TOOL_USE, *asked_again(1)[0]], *asked_again(2, "stop"))
    )

    assert stream.wait().status == "ok"


def test_a_sub_agent_whose_answers_are_cut_may_be_called_again_and_again() -> None:
    root: dict[str, Any] = {"type": "step_start", "sessionID": "ses_1", "part": {}}
    answers = asked_again(4, "length", session="ses_2")
    done = step() | {"sessionID": "ses_1"}

    assert stream_of(Script([root], *answers, [done])).wait().status == "ok"


def test_steps_that_call_tools_may_end_for_whatever_reason() -> None:
    steps = [[*block[:2], TOOL_USE, block[2]] for block in asked_again(9)]

    assert stream_of(Script(*steps, [step()])).wait().turns == 10


def call(tool: str, session: str = "ses_1", **state: Any) -> dict[str, Any]:
    return {"type": "tool_use", "sessionID": session, "part": {"tool": tool, "state": state}}


MALFORMED = {"tool": "write", "error": "Invalid input for tool write: JSON parsing failed"}
VOID_CALLS = {
    "malformed": call("invalid", status="completed", input=MALFORMED),
    "of no tool": call("write", status="error", error="Model tried to call unavailable tool"),
    "misfitting": call("write", status="error", error="... was called with invalid arguments: ..."),
}


def calling(event: Any, n: int, reason: str = "tool-calls") -> list[Any]:
    """Steps that call a tool alone, each as a block of its own."""
    return [[block[0], event, block[2]] for block in asked_again(n, reason)]


@pytest.mark.parametrize("reason", ["tool-calls", "stop", "length", "unknown"])
@pytest.mark.parametrize("void", VOID_CALLS)
def test_a_run_whose_model_calls_tools_in_vain_again_and_again_is_stopped(
    void: str, reason: str
) -> None:
    source = Script(*calling(VOID_CALLS[void], 5, reason), forever())
    stream = stream_of(source)

    with pytest.raises(OpenCodeIncompleteError, match=r"5 times in a row.*the last was 'write'"):
        stream.wait()

    assert source.stops == 1
    assert (stream.result.status, stream.result.turns) == ("incomplete", 5)


def test_a_model_that_finds_the_right_call_in_the_end_goes_on() -> None:
    void, mixed = VOID_CALLS["malformed"], [VOID_CALLS["malformed"], TOOL_USE, step("tool-calls")]
    failing = call("read", status="error", error="File not found: /x")
    steps = [*calling(void, 4), mixed, *calling(void, 4), *calling(failing, 9), *calling(void, 4)]

    assert stream_of(Script(*steps, [step()])).wait().status == "ok"


def test_calls_in_vain_and_answers_that_do_not_end_add_up() -> None:
    steps = [*calling(VOID_CALLS["malformed"], 3), *asked_again(2)]

    with pytest.raises(OpenCodeIncompleteError, match="5 times in a row"):
        stream_of(Script(*steps, forever())).wait()


def test_a_step_that_ends_for_no_known_reason_is_not_the_end_to_a_budget() -> None:
    stream = stream_of(Script(*asked_again(1), forever()), max_cost=0.0002)

    with pytest.raises(OpenCodeBudgetError) as caught:
        stream.wait()

    assert (caught.value.limit_name, caught.value.limit) == ("max_cost", 0.0002)


def test_a_run_at_its_last_step_that_is_not_done_is_stopped() -> None:
    steps = [[TOOL_USE, step("tool-calls") | {"sessionID": "ses_1"}] for _ in range(9)]
    stream = stream_of(Script(*steps, forever()), max_steps=4)

    with pytest.raises(OpenCodeBudgetError, match="max_steps of 4 reached") as caught:
        stream.wait()

    error = caught.value
    assert (error.limit_name, error.limit, error.spent) == ("max_steps", 4, 4)
    assert (stream.result.status, stream.result.turns) == ("over_budget", 4)


def test_a_step_that_calls_a_tool_is_not_the_last_whatever_its_reason() -> None:
    source = Script(*calling(TOOL_USE, 2, "stop"), forever())

    with pytest.raises(OpenCodeBudgetError, match="max_steps of 2 reached"):
        stream_of(source, max_steps=2).wait()


def test_a_step_that_gives_structured_output_is_the_last() -> None:
    output = call("StructuredOutput", status="completed", input={"n": 1})
    source = Script(*calling(TOOL_USE, 1, "stop"), *calling(output, 1, "stop"))

    assert stream_of(source, max_steps=2).wait().status == "ok"


def test_a_run_that_is_done_with_its_last_step_is_ok() -> None:
    source = Script([step("tool-calls")], [step()])

    assert stream_of(source, max_steps=2).wait().status == "ok"


def test_max_tokens_counts_tokens_of_all_kinds() -> None:
    tokens = {"input": 1, "output": 2, "reasoning": 4, "cache": {"read": 8, "write": 16}}
    block = [{"type": "step_finish", "part": {"reason": "tool-calls", "tokens": tokens}}]

    def error_of(limit: int) -> OpenCodeError | None:
        try:
            stream_of(Script(block, [step()]), max_tokens=limit).wait()
        except OpenCodeBudgetError as error:
            return error
        return None

    error = error_of(30)
    assert isinstance(error, OpenCodeBudgetError)
    assert (error.limit_name, error.limit, error.spent) == ("max_tokens", 30, 31)
    assert error_of(31) is None


@pytest.mark.parametrize("keep_events", [True, False])
def test_tokens_without_a_price_are_warned_of_once_where_dollars_are_to_bind(
    keep_events: bool,
) -> None:
    tokens = {"total": 120, "input": 100, "output": 20}
    part = {"reason": "stop", "cost": 0, "tokens": tokens}
    block = [{"type": "step_finish", "part": part}]
    stream = stream_of(Script(block, block), max_cost=1.0, keep_events=keep_events)

    kinds = [event["type"] for event in stream]

    assert kinds == ["step_finish", "warning", "step_finish"]
    (warning,) = stream.result.warnings
    assert warning.startswith("120 tokens were counted at $0.00, so max_cost does not bind")
    assert "max_tokens binds" in warning


def test_a_sub_agent_without_a_price_is_warned_of_in_a_run_that_has_one() -> None:
    tokens = {"total": 120, "input": 100, "output": 20}
    free = {"reason": "stop", "cost": 0, "tokens": tokens}
    child = {"type": "step_finish", "sessionID": "ses_2", "part": free}
    paid = {"type": "step_finish", "sessionID": "ses_1", "part": {**free, "cost": 0.1}}
    going_on = {**paid, "part": {**paid["part"], "reason": "tool-calls"}}

    result = stream_of(Script([going_on], [child], [paid]), max_cost=1.0).wait()

    assert result.total_cost == pytest.approx(0.2)
    (warning,) = result.warnings
    assert warning.startswith("120 tokens were counted at $0.00")


def test_a_run_whose_steps_all_have_a_price_is_not_warned_of() -> None:
    steps = []
    for session in ("ses_1", "ses_2", "ses_3", "ses_2", "ses_1"):
        part = {"reason": "stop", "cost": 0.1, "tokens": {"total": 120}}
        steps.append([{"type": "step_finish", "sessionID": session, "part": part}])

    assert stream_of(Script(*steps), max_cost=1.0).wait().warnings == []


def test_without_a_limit_of_dollars_nobody_is_warned_of_a_free_model() -> None:
    part = {"reason": "stop", "cost": 0, "tokens": {"total": 120}}
    source = Script([{"type": "step_finish", "part": part}])

    assert stream_of(source, max_tokens=1000).wait().warnings == []


def test_a_run_that_is_done_is_not_taken_away_for_its_price() -> None:
    assert stream_of(Script([step("stop", 5.0)]), max_cost=1.0).wait().total_cost == 5.0


@pytest.mark.parametrize(
    "limits",
    [
        {"timeout_s": 0},
        {"timeout_s": -1},
        {"timeout_s": float("nan")},
        {"timeout_s": 10**400},
        {"timeout_s": "5"},
        {"timeout_s": True},
        {"idle_timeout_s": float("inf")},
        {"max_cost": -0.01},
        {"max_steps": 0},
        {"max_steps": 1.5},
        {"max_tokens": True},
        {"startup_retries": 1.5},
        {"startup_retries": None},
        {"startup_retry_delay_s": -1},
    ],
    ids=lambda limits: str(limits)[:24],
)
def test_a_limit_that_makes_no_sense_is_refused_by_name(limits: dict[str, Any]) -> None:
    with pytest.raises(OpenCodeConfigError, match=next(iter(limits))):
        Limits(**limits)


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"count": -1}, "retries is -1"),
        ({"count": 1.5}, "retries is 1.5"),
        ({"count": True}, "retries is True"),
        ({"delay_s": float("inf")}, "delay_s is inf"),
        ({"on": ValueError}, "on is <class 'ValueError'>"),
        ({"on": [OpenCodeTimeoutError]}, "on is [<class"),
    ],
    ids=lambda wrong: str(wrong)[:24],
)
def test_a_retry_that_makes_no_sense_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(OpenCodeConfigError) as caught:
        Retry(**wrong)

    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    "error, is_tried_again",
    [
        (OpenCodeTimeoutError("late"), True),
        (OpenCodeError("the job's worker was lost"), True),
        (refused_with(429), True),
        (refused_with(503), True),
        (refused_with(402), False),
        (OpenCodeConfigError("blank"), False),
        (OpenCodeBudgetError("spent", limit_name="max_cost"), False),
        (OpenCodeCancelledError("left"), False),
    ],
    ids=str,
)
def test_what_may_pass_by_itself_is_tried_again(error: OpenCodeError, is_tried_again: bool) -> None:
    assert Retry().applies_to(error) == is_tried_again


@pytest.mark.parametrize(
    "error",
    [
        OpenCodeCancelledError("left"),
        OpenCodeBudgetError("spent", limit_name="max_total_cost"),
    ],
    ids=str,
)
def test_what_ended_with_its_batch_is_not_tried_again_even_if_it_is_named(
    error: OpenCodeError,
) -> None:
    assert not Retry(on=OpenCodeError).applies_to(error)


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
