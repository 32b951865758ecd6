"""A stream's life, on sources that do as the test says: no process, no clock but ours."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeBinaryNotFoundError,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    RunStream,
)
from opencode_sync.core.lifetime import CancelScope
from tests.core.scripts import Script, forever, step, stream_of, text

LONG_S = 20.0
ROOT = Path(__file__).parents[2]


def wait_for_cancel(stream: RunStream) -> None:
    with pytest.raises(OpenCodeCancelledError):
        stream.wait()


# --- events and the end --------------------------------------------------------------------------


def test_events_come_in_order_and_stay_in_the_result() -> None:
    stream = stream_of(Script([text("a"), text("b")], [], [step()]))

    events = list(stream)

    assert events == [text("a"), text("b"), step()]
    assert stream.result.events == events
    assert stream.result.status == "ok"
    assert stream.session_id == "ses_1"


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


def test_events_need_not_be_kept() -> None:
    stream = stream_of(Script([text("a"), step()]), keep_events=False)

    assert len(list(stream)) == 2
    assert stream.result.events == []
    assert stream.result.final_text == "a"


def test_a_source_is_closed_once_and_who_is_told_of_the_end_is_told_once() -> None:
    source, told = Script([step()]), list[RunStream]()
    stream = stream_of(source, on_end=told.append)

    assert stream.wait() is stream.result
    stream.close()

    assert (source.settles, source.closes, told) == (1, 1, [stream])


def test_the_one_who_is_told_of_the_beginning_can_cancel_it() -> None:
    source = Script([step()])

    stream = stream_of(source, on_begin=RunStream.cancel)

    with pytest.raises(OpenCodeCancelledError):
        stream.wait()
    assert source.stops >= 1


# --- attempts ------------------------------------------------------------------------------------


def failing(**options: Any) -> Script:
    return Script(error=OpenCodeProcessError(1, "locked"), repeats=True, **options)


def test_a_failed_start_is_repeated() -> None:
    stream = stream_of(failing(), failing(), Script([step()]), startup_retry_delay_s=0)

    assert stream.wait().attempts == 3


def test_what_a_failed_attempt_has_cost_counts() -> None:
    first = failing()
    first.parts = [[step("stop", 0.5)]]

    stream = stream_of(first, Script([step("stop", 0.25)]), startup_retry_delay_s=0)

    assert stream.wait().total_cost == 0.75


def test_what_must_not_be_repeated_is_not() -> None:
    source = Script(error=OpenCodeProcessError(1))

    with pytest.raises(OpenCodeProcessError):
        stream_of(source, Script([step()]), startup_retry_delay_s=0).wait()


def test_attempts_are_counted_out() -> None:
    with pytest.raises(OpenCodeProcessError) as caught:
        stream_of(*(failing() for _ in range(9)), startup_retries=3, startup_retry_delay_s=0).wait()

    assert caught.value.result is not None
    assert caught.value.result.attempts == 4


def test_the_wait_for_the_next_attempt_ends_with_the_deadline() -> None:
    stream = stream_of(failing(), Script([step()]), timeout_s=0.1, startup_retry_delay_s=600)

    with pytest.raises(OpenCodeTimeoutError):
        stream.wait()


def test_the_wait_for_the_next_attempt_is_not_idleness() -> None:
    stream = stream_of(failing(), Script([step()]), idle_timeout_s=0.05, startup_retry_delay_s=0.15)

    assert stream.wait().status == "ok"


def test_the_wait_for_the_next_attempt_ends_at_once_on_cancel() -> None:
    stream = stream_of(failing(), Script([step()]), startup_retry_delay_s=600)
    threading.Timer(0.1, stream.cancel).start()

    with pytest.raises(OpenCodeCancelledError) as caught:
        stream.wait()

    assert caught.value.result is stream.result


def test_an_attempt_that_cannot_be_opened_ends_the_run_with_its_result() -> None:
    def vanished(scope: CancelScope) -> Script:
        raise OpenCodeConfigError("the workspace has vanished")

    stream = stream_of(failing(), vanished, startup_retry_delay_s=0)

    with pytest.raises(OpenCodeConfigError, match="vanished") as caught:
        stream.wait()

    assert caught.value.result is stream.result
    assert stream.wait_ended(0)


# --- ending from outside -------------------------------------------------------------------------


def test_leaving_the_block_ends_the_run() -> None:
    source = Script([text("a")], forever())

    with stream_of(source) as stream:
        next(stream)

    assert source.stopped.is_set()
    assert stream.result.status == "cancelled"
    assert list(stream) == []


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
    stream = stream_of(
        failing(), Script([text("a")], [step()]), startup_retry_delay_s=0, log_file=log
    )

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


@pytest.mark.parametrize(
    "log_file, words",
    [
        ("missing/log", "No such file"),
        (".", "'.': Is a directory"),
        (7, "is 7: use the path of a file"),
        ("a\0b", "use the path of a file"),
        ("~nobody-of-that-name/log", "no such home"),
    ],
    ids=repr,
)
def test_a_log_that_cannot_be_written_is_refused(log_file: Any, words: str) -> None:
    with pytest.raises(OpenCodeConfigError, match=f"log_file.*{words}"):
        stream_of(Script(), log_file=log_file)


# --- what is told to logging ---------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    return [re.sub(r"[\d.]+ s\b", "N s", line) for line in lines]


def test_each_start_retry_and_end_is_logged_without_the_words_of_the_child(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="opencode_sync")

    stream_of(failing(), Script([text("pineapple")], [step()]), startup_retry_delay_s=0).wait()

    assert told(caplog) == [
        "INFO run 1 (pid 2) started, attempt 1",
        "WARNING run 1 (pid 2) failed to start (exit status None), once more in N s",
        "INFO run 1 (pid 2) started, attempt 2",
        "INFO run 1 (pid 2) ended after N s: ok",
    ]


def test_a_limit_is_logged_as_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OpenCodeTimeoutError):
        stream_of(Script(forever()), timeout_s=0.01).wait()

    assert told(caplog) == ["WARNING run 1 (pid 2) ended after N s: timed_out (timeout_s)"]


def test_a_cancel_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="opencode_sync")
    stream = stream_of(Script(forever()))

    stream.cancel("the user left")

    assert told(caplog)[1:] == [
        "INFO run 1 (pid 2) is stopped: the user left",
        "INFO run 1 (pid 2) ended after N s: cancelled",
    ]


def test_nothing_is_printed_where_logging_was_not_asked_for() -> None:
    program = """
from opencode_sync import OpenCodeTimeoutError
from tests.core.scripts import Script, forever, stream_of
try:
    stream_of(Script(forever()), timeout_s=0.01).wait()
except OpenCodeTimeoutError:
    pass
"""

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True
    )

    assert (done.stdout, done.stderr) == (b"", b"")


@pytest.mark.parametrize("way", [RunStream.wait, next], ids=["wait", "next"])
def test_who_waits_for_a_stream_that_another_thread_closes_is_told(
    way: Callable[[RunStream], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = RunStream._advance

    def closed_between_two_events(stream: RunStream) -> bool:
        goes_on = advance(stream)
        closing = threading.Thread(target=stream.close)
        closing.start()
        closing.join()
        return goes_on

    stream = stream_of(Script([], forever()))
    monkeypatch.setattr(RunStream, "_advance", closed_between_two_events)

    with pytest.raises(OpenCodeCancelledError, match="the stream was closed"):
        way(stream)

    assert stream.result.status == "cancelled"


@pytest.mark.parametrize(
    "error, status",
    [
        (OpenCodeBinaryNotFoundError("no such program"), "error"),
        (OpenCodeCancelledError("the runner was closed"), "cancelled"),
        (KeyboardInterrupt(), "cancelled"),
    ],
    ids=["not found", "cancelled", "Ctrl-C"],
)
def test_a_run_that_cannot_be_opened_has_the_status_of_its_error(
    error: BaseException, status: str
) -> None:
    def refuse(scope: CancelScope) -> Script:
        raise error

    begun: list[RunStream] = []
    with pytest.raises(type(error)):
        stream_of(refuse, on_begin=begun.append)

    assert begun[0].result.status == status
