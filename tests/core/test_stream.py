"""A stream's life, on sources that do as the test says: no process, no clock but ours."""

from __future__ import annotations

import gc
import json
import os
import pickle
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeBudgetError,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    RunResult,
    RunStream,
)
from opencode_sync.api.runner import Runner
from opencode_sync.core.lifetime import CancelScope
from opencode_sync.core.limits import Limits
from opencode_sync.core.request import Request, RunSettings

LONG_S = 20.0


def step(reason: str = "stop", cost: float = 0.0) -> dict[str, Any]:
    return {"type": "step_finish", "part": {"reason": reason, "cost": cost}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "sessionID": "ses_1", "part": {"text": words}}


RETRY: dict[str, Any] = {"type": "retry", "message": "429 slow down"}


class Script:
    """A source that gives *parts* in turn.

    A list of events is given at once, an Event is waited for, a callable is called, and an
    exception raised. After the last part it has ended.
    """

    label = "run 1 (pid 2)"
    session_id: str | None = None

    def __init__(self, *parts: Any, error: OpenCodeError | None = None, repeats: bool = False):
        self.parts = list(parts)
        self.error = error
        self.repeats = repeats
        self.started_at = time.monotonic()
        self.stopped = threading.Event()
        self.stops = 0
        self.closes = 0
        self.settles = 0

    @property
    def is_over(self) -> bool:
        return self.stopped.is_set() or not any(isinstance(p, threading.Event) for p in self.parts)

    def receive(self, timeout: float | None) -> Sequence[Any] | None:
        if self.stopped.is_set() or not self.parts:
            return None
        part = self.parts[0]
        if isinstance(part, threading.Event):
            end = None if timeout is None else time.monotonic() + timeout
            while not part.wait(0.005):
                if self.stopped.is_set():
                    return None
                if end is not None and time.monotonic() >= end:
                    raise queue.Empty
            part = []
        self.parts.pop(0)
        if isinstance(part, BaseException):
            raise part
        if callable(part):
            part()
            return []
        return part  # type: ignore[no-any-return]

    def stop(self) -> None:
        self.stops += 1
        self.stopped.set()

    def settle(self, result: RunResult) -> OpenCodeError | None:
        self.settles += 1
        return self.error

    def may_repeat(self, result: RunResult) -> bool:
        return self.repeats

    def close(self) -> None:
        self.closes += 1


class Scripts(Runner):
    """Opens sources one after another; a callable among them is called with the scope."""

    def __init__(self, *sources: Any) -> None:
        super().__init__()
        self._sources = iter(sources)

    def _open(self, request: Request, scope: CancelScope, keep_raw: bool) -> Script:
        source = next(self._sources)
        return source(scope) if callable(source) else source  # type: ignore[no-any-return]


Told = Callable[[RunStream], None]


def stream_of(
    *sources: Any, on_begin: Told | None = None, on_end: Told | None = None, **options: Any
) -> RunStream:
    settings = RunSettings.of(options)
    return Scripts(*sources).begin("Go", "/", settings, on_begin=on_begin, on_end=on_end)


def wait_for_cancel(stream: RunStream) -> None:
    with pytest.raises(OpenCodeCancelledError):
        stream.wait()


def forever() -> threading.Event:
    return threading.Event()


# --- events and the end --------------------------------------------------------------------------


def test_events_come_in_order_and_stay_in_the_result() -> None:
    stream = stream_of(Script([text("a"), text("b")], [], [step()]))

    events = list(stream)

    assert events == [text("a"), text("b"), step()]
    assert stream.result.events == events
    assert stream.result.status == "ok"
    assert stream.session_id == "ses_1"


def test_an_event_is_given_before_the_next_one_is_waited_for() -> None:
    stream = stream_of(Script([text("a")], forever()))

    with stream:
        assert next(stream) == text("a")


def test_the_result_grows_with_the_events() -> None:
    with stream_of(Script([text("a")], [text("b")], forever())) as stream:
        next(stream)

        assert stream.result.final_text == "a"
        assert stream.result.status == "incomplete"


def test_the_error_comes_after_the_last_event_and_once() -> None:
    error = OpenCodeProcessError(1)
    stream = stream_of(Script([text("a")], error=error))

    assert next(stream) == text("a")
    with pytest.raises(OpenCodeProcessError) as caught:
        next(stream)

    assert caught.value.result is stream.result
    assert list(stream) == []


def test_waiting_gives_the_result() -> None:
    stream = stream_of(Script([text("a")], [step()]))

    assert stream.wait() is stream.result
    assert stream.result.final_text == "a"


def test_events_need_not_be_kept() -> None:
    stream = stream_of(Script([text("a"), step()]), keep_events=False)

    assert len(list(stream)) == 2
    assert stream.result.events == []
    assert stream.result.final_text == "a"


def test_a_source_is_closed_once() -> None:
    source = Script([step()])
    stream = stream_of(source)

    stream.wait()
    stream.close()

    assert (source.settles, source.closes) == (1, 1)


def test_the_one_who_is_told_of_the_end_is_told_once() -> None:
    told: list[RunStream] = []
    stream = stream_of(Script([step()]), on_end=told.append)

    stream.wait()
    stream.close()

    assert told == [stream]


def test_the_one_who_is_told_of_the_beginning_can_cancel_it() -> None:
    source = Script([step()])

    stream = stream_of(source, on_begin=RunStream.cancel)

    with pytest.raises(OpenCodeCancelledError):
        stream.wait()
    assert source.stops >= 1


# --- limits --------------------------------------------------------------------------------------


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


def test_events_that_keep_coming_do_not_hold_up_the_total_limit() -> None:
    source = Script(forever())
    source.receive = lambda timeout: None if source.stopped.is_set() else [text("x")]  # type: ignore[method-assign,assignment]

    with pytest.raises(OpenCodeTimeoutError):
        stream_of(source, timeout_s=0.1).wait()


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

    with pytest.raises(OpenCodeBudgetError, match=r"\$1 passed: \$1.2 spent after 3") as caught:
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
        {"max_retries": 1.5},
        {"max_retries": None},
        {"retry_delay_s": -1},
    ],
    ids=lambda limits: str(limits)[:24],
)
def test_a_limit_that_makes_no_sense_is_refused_by_name(limits: dict[str, Any]) -> None:
    with pytest.raises(OpenCodeConfigError, match=next(iter(limits))):
        Limits(**limits)


# --- attempts ------------------------------------------------------------------------------------


def failing(**options: Any) -> Script:
    return Script(error=OpenCodeProcessError(1, "locked"), repeats=True, **options)


def test_a_failed_start_is_repeated() -> None:
    stream = stream_of(failing(), failing(), Script([step()]), retry_delay_s=0)

    assert stream.wait().attempts == 3


def test_what_a_failed_attempt_has_cost_counts() -> None:
    first = failing()
    first.parts = [[step("stop", 0.5)]]

    stream = stream_of(first, Script([step("stop", 0.25)]), retry_delay_s=0)

    assert stream.wait().total_cost == 0.75


def test_what_must_not_be_repeated_is_not() -> None:
    source = Script(error=OpenCodeProcessError(1))

    with pytest.raises(OpenCodeProcessError):
        stream_of(source, Script([step()]), retry_delay_s=0).wait()


def test_attempts_are_counted_out() -> None:
    with pytest.raises(OpenCodeProcessError) as caught:
        stream_of(*(failing() for _ in range(9)), max_retries=3, retry_delay_s=0).wait()

    assert caught.value.result is not None
    assert caught.value.result.attempts == 4


def test_the_clock_runs_on_over_all_attempts() -> None:
    stream = stream_of(
        *(failing() for _ in range(999)), timeout_s=1.0, retry_delay_s=0.25, max_retries=999
    )

    with pytest.raises(OpenCodeTimeoutError, match="timeout_s"):
        stream.wait()

    assert 2 <= stream.result.attempts <= 6


def test_the_wait_for_the_next_attempt_ends_with_the_deadline() -> None:
    stream = stream_of(failing(), Script([step()]), timeout_s=0.1, retry_delay_s=600)

    with pytest.raises(OpenCodeTimeoutError):
        stream.wait()


def test_the_wait_for_the_next_attempt_is_not_idleness() -> None:
    stream = stream_of(failing(), Script([step()]), idle_timeout_s=0.05, retry_delay_s=0.15)

    assert stream.wait().status == "ok"


def test_the_wait_for_the_next_attempt_ends_at_once_on_cancel() -> None:
    stream = stream_of(failing(), Script([step()]), retry_delay_s=600)
    threading.Timer(0.1, stream.cancel).start()

    with pytest.raises(OpenCodeCancelledError) as caught:
        stream.wait()

    assert caught.value.result is stream.result


def test_an_attempt_that_cannot_be_opened_ends_the_run_with_its_result() -> None:
    def vanished(scope: CancelScope) -> Script:
        raise OpenCodeConfigError("the workspace has vanished")

    stream = stream_of(failing(), vanished, retry_delay_s=0)

    with pytest.raises(OpenCodeConfigError, match="vanished") as caught:
        stream.wait()

    assert caught.value.result is stream.result
    assert stream.wait_ended(0)


def test_a_first_attempt_that_cannot_be_opened_leaves_nothing(tmp_path: Path) -> None:
    def refused(scope: CancelScope) -> Script:
        raise OpenCodeConfigError("no")

    with pytest.raises(OpenCodeConfigError, match="no"):
        stream_of(refused, log_file=tmp_path / "log")


# --- ending from outside -------------------------------------------------------------------------


def test_leaving_the_block_ends_the_run() -> None:
    source = Script([text("a")], forever())

    with stream_of(source) as stream:
        next(stream)

    assert source.stopped.is_set()
    assert stream.result.status == "cancelled"
    assert list(stream) == []


def test_an_exception_in_the_block_ends_the_run_and_goes_on() -> None:
    source = Script([text("a")], forever())

    with pytest.raises(ZeroDivisionError), stream_of(source) as stream:
        for _ in stream:
            1 / 0  # noqa: B018

    assert source.closes == 1


def test_a_stream_that_nobody_holds_ends_at_once() -> None:
    source = Script([text("a")], forever())
    stream = stream_of(source)
    next(stream)

    del stream

    assert source.closes == 1


def test_a_stream_in_a_cycle_is_ended_by_the_collector() -> None:
    source = Script(forever())
    stream = stream_of(source)
    stream.itself = stream  # type: ignore[attr-defined]
    alive = weakref.ref(stream)
    del stream

    gc.collect()

    assert alive() is None
    assert source.closes == 1


def test_streams_in_cycles_end_in_whichever_thread_the_collector_runs() -> None:
    # Each stream's thread collects while it advances, and so ends others' streams in the midst
    # of its own work. A lock that a finaliser needs and the thread holds would show as a hang.
    lost: list[Script] = []

    def work() -> None:
        for _ in range(25):
            source = Script([text("a")], forever())
            lost.append(source)
            stream = stream_of(source)
            stream.itself = stream  # type: ignore[attr-defined]
            del stream
            stream_of(Script([text("b")], gc.collect, [step()])).wait()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    gc.freeze()  # what all tests before have left is not looked at each time
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S)
        gc.collect()
    finally:
        gc.unfreeze()

    assert not any(thread.is_alive() for thread in threads)
    assert all(source.closes == 1 for source in lost)


def test_cancelling_wakes_who_waits_with_the_reason() -> None:
    source = Script([text("so far")], forever())
    stream = stream_of(source)
    threading.Timer(0.05, stream.cancel, ["enough"]).start()

    with pytest.raises(OpenCodeCancelledError, match="enough") as caught:
        stream.wait()

    assert caught.value.result is stream.result
    assert stream.result.final_text == "so far"
    assert stream.result.status == "cancelled"


def test_cancelling_while_nobody_waits_is_told_at_the_next_event() -> None:
    stream = stream_of(Script([text("a"), text("b")], forever()))
    next(stream)

    stream.cancel()

    assert stream.wait_ended(0)
    with pytest.raises(OpenCodeCancelledError):
        next(stream)
    assert stream.result.final_text == "a\n\nb"


def test_a_session_that_is_known_from_the_start_is_the_run_s_whoever_speaks_first() -> None:
    child: dict[str, Any] = {"type": "text", "sessionID": "ses_child", "part": {"text": "To you."}}
    source = Script([child], [text("Hi.")])
    source.session_id = "ses_1"

    with stream_of(source) as stream:
        result = stream.wait()

    assert (result.session_id, result.final_text) == ("ses_1", "Hi.")


def test_cancelling_returns_when_all_is_over() -> None:
    source = Script(forever())
    stream = stream_of(source)
    waiting = threading.Thread(target=wait_for_cancel, args=[stream])
    waiting.start()

    stream.cancel()

    assert source.stops >= 1
    assert stream.wait_ended(LONG_S)
    waiting.join(LONG_S)


def test_cancelling_a_run_that_has_ended_changes_nothing() -> None:
    stream = stream_of(Script([step()]))
    stream.wait()

    stream.cancel()

    assert stream.result.status == "ok"
    assert list(stream) == []


def test_cancelling_while_the_source_is_being_opened_stops_it() -> None:
    source = Script(forever())
    streams: list[RunStream] = []

    def slow(scope: CancelScope) -> Script:
        threading.Thread(target=streams[0].cancel).start()
        while not scope.is_cancelled():
            pass
        return source

    stream = stream_of(slow, on_begin=streams.append)

    with pytest.raises(OpenCodeCancelledError):
        stream.wait()
    assert source.closes == 1


def test_closing_while_another_thread_waits_is_a_cancel_for_it() -> None:
    stream = stream_of(Script(forever()))
    threading.Timer(0.05, stream.close).start()

    with pytest.raises(OpenCodeCancelledError, match="closed"):
        stream.wait()


def test_closing_while_another_thread_iterates_loses_nobody() -> None:
    for _ in range(200):
        stream = stream_of(Script(*[[text("a")] * 3 for _ in range(20)], forever()))
        closing = threading.Thread(target=stream.close)

        closing.start()
        try:
            for _ in stream:
                pass
        except OpenCodeCancelledError:
            pass
        closing.join(LONG_S)

        assert stream.wait_ended(0)


def test_only_one_thread_iterates() -> None:
    entered = threading.Event()
    stream = stream_of(Script(entered.set, forever()))
    waiting = threading.Thread(target=wait_for_cancel, args=[stream])
    waiting.start()
    entered.wait(LONG_S)

    with pytest.raises(OpenCodeConfigError, match="iterated already"):
        while True:  # the other one may be between two events
            next(stream)

    stream.cancel()
    waiting.join(LONG_S)


def test_ctrl_c_ends_the_run() -> None:
    source = Script([text("so far")], KeyboardInterrupt())
    stream = stream_of(source)

    with pytest.raises(KeyboardInterrupt):
        stream.wait()

    assert (source.stops, source.closes) == (1, 1)
    assert stream.result.status == "cancelled"
    assert stream.result.final_text == "so far"


def test_a_second_ctrl_c_while_stopping_still_lets_go_of_everything() -> None:
    source = Script(KeyboardInterrupt())
    source.stop = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    stream = stream_of(source)

    with pytest.raises(KeyboardInterrupt):
        stream.wait()

    assert source.closes == 1
    assert stream.wait_ended(0)


def test_a_signal_handler_may_cancel_the_stream_that_it_interrupts() -> None:
    stream = stream_of(Script(forever()))
    before = signal.signal(signal.SIGALRM, lambda *_: stream.cancel("the alarm"))

    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(OpenCodeCancelledError, match="the alarm"):
            stream.wait()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_signal_handler_does_not_wait_for_the_stream_that_it_interrupts() -> None:
    waited: list[bool] = []
    started = time.monotonic()

    # In the thread that advances the stream, as a handler of a signal is.
    stream = stream_of(Script(lambda: waited.append(stream.wait_ended(LONG_S)), [step()]))
    stream.wait()

    assert waited == [False]
    assert time.monotonic() - started < LONG_S


def test_a_fault_in_the_source_is_raised_where_it_is_waited_for() -> None:
    source = Script(ZeroDivisionError())

    with pytest.raises(ZeroDivisionError):
        stream_of(source).wait()

    assert source.closes == 1


def test_a_forked_child_leaves_the_run_alone() -> None:
    source = Script([text("a")], forever())
    stream = stream_of(source)

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with pytest.raises(OpenCodeConfigError, match="forked"):
                next(stream)
            stream.close()
            status = source.stops
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)

    assert status == 0
    assert next(stream) == text("a")
    stream.close()


def test_what_a_stopped_source_had_still_written_is_taken() -> None:
    source = Script(forever())
    left: list[Any] = [[text("the last words")], None]
    stream = stream_of(source)
    receive = source.receive
    source.receive = lambda timeout: left.pop(0) if source.stopped.is_set() else receive(timeout)  # type: ignore[method-assign]

    stream.cancel()

    assert stream.result.final_text == "the last words"


# --- the log file --------------------------------------------------------------------------------


def test_the_log_has_a_line_for_each_attempt_and_each_event(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    stream = stream_of(failing(), Script([text("a")], [step()]), retry_delay_s=0, log_file=log)

    stream.wait()

    kinds = [json.loads(line)["type"] for line in log.read_text().splitlines()]
    assert kinds == ["attempt", "attempt", "text", "step_finish"]


def test_an_event_is_in_the_log_before_it_is_given(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("of an earlier run")

    with stream_of(Script([text("a")], forever()), log_file=log) as stream:
        event = next(stream)

        assert json.loads(log.read_text().splitlines()[-1]) == event


def test_runs_that_share_a_log_do_not_write_over_one_another(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    long, short = text("a" * 1_000), text("b")

    with (
        stream_of(Script([long], [long], forever()), log_file=log) as first,
        stream_of(Script([short], [short], forever()), log_file=log) as second,
    ):
        for stream in (first, second, first, second):
            next(stream)

    events = [json.loads(line) for line in log.read_bytes().splitlines()]
    assert [event for event in events if event["type"] == "text"] == [long, short] * 2


def test_a_log_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OpenCodeConfigError, match=r"log_file .*: No such file"):
        stream_of(Script(), log_file=tmp_path / "missing" / "log")


@pytest.mark.parametrize("log_file", [7, "a\0b", "~nobody-of-that-name/log"], ids=repr)
def test_a_log_that_is_no_path_is_refused(log_file: Any) -> None:
    with pytest.raises(OpenCodeConfigError, match="log_file"):
        stream_of(Script(), log_file=log_file)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_the_log_stops_the_run_with_what_was_got() -> None:
    source = Script([text("a")], forever())

    with pytest.raises(OpenCodeError, match=r"/dev/full.*No space left"):
        stream_of(source, log_file="/dev/full")

    assert source.closes == 0  # it was not even started


# --- errors --------------------------------------------------------------------------------------


def test_an_error_pickles_with_its_result() -> None:
    stream = stream_of(Script([text("so far"), RETRY], forever()), timeout_s=0.05)
    with pytest.raises(OpenCodeTimeoutError) as caught:
        stream.wait()

    copy = pickle.loads(pickle.dumps(caught.value))

    assert copy == caught.value
    assert copy.result == stream.result
