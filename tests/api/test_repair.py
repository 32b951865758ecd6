"""Answers held against a schema: repaired, refused, and counted over all turns; no process."""

from __future__ import annotations

import gc
import multiprocessing
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    Job,
    OpenCodeBudgetError,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeOutputError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    RunConfig,
    RunResult,
    RunStream,
)
from opencode_sync.api.runner import Runner
from opencode_sync.core.events import Event
from opencode_sync.core.lifetime import CancelScope
from opencode_sync.core.request import Request, SchemaReview
from opencode_sync.core.schema import OutputSchema

GOOD, BAD, WORDS = '{"legs": 2}', '{"legs": "two"}', "I would rather not."
CUT, WHOLE_BUT_CUT = '{"legs": 2, "wi', '```json\n{"legs": 2}\n```'  # at the output limit
COST = 0.25


@dataclass
class Bird:
    legs: int


REQUEST = Request("Describe it", Path("/"), RunConfig(), OutputSchema(Bird))


class Answering(Runner):
    """Answers prompts one after another, with what it was made with or what a prompt says."""

    def __init__(self, *answers: Any) -> None:
        super().__init__(max_workers=2)
        self.answers = list(answers)
        self.requests: list[Request] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Answering, tuple(self.answers)

    def _open(self, request: Request, scope: CancelScope, keep_raw: bool) -> _Source:
        self.requests.append(request)
        answer = self.answers.pop(0) if self.answers else request.prompt
        if isinstance(answer, OpenCodeError):
            raise answer
        return _Source(answer)

    @property
    def prompts(self) -> list[str]:
        return [request.prompt for request in self.requests]


class _Source:
    """One turn: words, the tool's arguments, an error at its end, or silence till it is stopped."""

    label = "turn"
    session_id = None

    def __init__(self, answer: str | dict[str, Any] | threading.Event) -> None:
        self.started_at = time.monotonic()
        self._answer = answer
        self._stopped = threading.Event()
        self._blocks: list[Event] = [{"type": "step_start", "sessionID": "ses_1"}]
        if isinstance(answer, str):
            self._blocks.append({"type": "text", "part": {"text": answer}})
        reason = "length" if answer in (CUT, WHOLE_BUT_CUT) else "stop"
        self._blocks.append({"type": "step_finish", "part": {"reason": reason, "cost": COST}})

    @property
    def is_over(self) -> bool:
        return not isinstance(self._answer, threading.Event) or self._stopped.is_set()

    def receive(self, timeout: float | None) -> Sequence[Event] | None:
        if isinstance(self._answer, threading.Event):
            self._answer.set()
            if not self._stopped.wait(timeout):
                raise queue.Empty
            return None
        return [self._blocks.pop(0)] if self._blocks else None

    def stop(self) -> None:
        self._stopped.set()

    def settle(self, result: RunResult) -> OpenCodeError | None:
        result.stderr = f"stderr of {self._answer}\n"
        result.raw_stdout_lines = [*result.raw_stdout_lines, "line"]
        result._json = self._answer if isinstance(self._answer, dict) else None
        if result.finish_reason == "length":  # as both real sources have it
            return OpenCodeIncompleteError("cut off at the output limit", result=result)
        if self._answer == "lock":
            return OpenCodeProcessError(1, "database is locked", result=result)
        return None

    def may_repeat(self, result: RunResult) -> bool:
        return self._answer == "lock"

    def take_back(self) -> str | None:
        return None

    def close(self) -> None:
        pass


# --- what is parsed ------------------------------------------------------------------------------


def test_an_answer_that_fits_is_parsed_and_nothing_more_is_asked() -> None:
    runner = Answering(f"Here:\n```json\n{GOOD}\n```")

    result = runner.run("Describe it", schema=Bird)

    assert result.parsed == Bird(2)
    assert runner.prompts == [result.prompt] == ["Describe it"]


def test_what_a_tool_took_down_comes_before_words() -> None:
    runner = Answering({"legs": 2})

    assert runner.run("Describe it", schema=Bird).parsed == Bird(2)


def outputs(*values: object) -> list[Any]:
    """Calls of the tool for structured output, all in one answer."""
    return [
        {
            "type": "tool_use",
            "part": {
                "tool": "StructuredOutput",
                "messageID": "msg_1",
                "state": {"status": "completed", "input": value},
            },
        }
        for value in values
    ]


def test_a_tool_that_took_down_different_values_at_once_has_none_that_is_the_answer() -> None:
    result = RunResult(tool_calls=outputs({"legs": 2}, {"legs": 4}))
    result._json = {"legs": 4}
    result.session_id = "ses_1"

    further = SchemaReview(REQUEST, 1).repair(result)

    assert further is not None
    assert "StructuredOutput was called with 2 different values at once" in further.prompt
    assert result.parsed is None


def test_a_tool_may_take_down_the_same_value_twice_and_another_one_later() -> None:
    (later,) = outputs({"legs": 2})
    later["part"]["messageID"] = "msg_2"
    result = RunResult(tool_calls=[*outputs({"legs": 4}), later, later])
    result._json = {"legs": 2}

    assert SchemaReview(REQUEST, 1).repair(result) is None
    assert result.parsed == Bird(2)


def test_a_run_that_ends_with_an_error_after_its_answer_is_not_ok() -> None:
    with pytest.raises(OpenCodeConfigError, match="refers to what it does not hold") as caught:
        Answering(GOOD).run("Describe it", schema={"$ref": "#/definitions/bird"})

    result = caught.value.result
    assert result is not None
    assert (result.status, result.total_cost, result.parsed) == ("error", COST, None)
    assert RunResult.from_dict(result.to_dict()) == result


def test_the_prompt_is_sent_with_the_schema_and_a_repair_without() -> None:
    runner = Answering(BAD, GOOD)

    runner.run("Describe it", schema=Bird)

    first, repair = runner.requests
    assert first.instructed.startswith("Describe it\n\n")
    assert '"legs"' in first.instructed
    assert repair.instructed == repair.prompt


# --- repairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("misfit", [BAD, WORDS, {"legs": "two"}], ids=["bad", "words", "tool"])
def test_a_misfit_is_sent_back_in_the_same_session(misfit: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    runner = Answering(misfit, GOOD)
    cfg = RunConfig(files=("notes.txt",), title="Birds", continue_session=True, fork=True)

    result = runner.run("Describe it", tmp_path, run_cfg=cfg, schema=Bird)

    assert result.parsed == Bird(2)
    assert runner.requests[1].cfg == RunConfig(session_id="ses_1")
    assert runner.prompts[1].startswith("That answer does not fit")


def test_all_turns_are_counted_together() -> None:
    runner = Answering(BAD, GOOD)

    with runner.stream("Describe it", schema=Bird) as stream:
        events = list(stream)

    result = stream.result
    assert [event["type"] for event in events].count("step_finish") == result.turns == 2
    assert result.events == events
    assert result.total_cost == 2 * COST
    assert result.stderr == f"stderr of {BAD}\nstderr of {GOOD}\n"
    assert result.raw_stdout_lines == ["line", "line"]
    assert result.attempts == 1


@pytest.mark.parametrize(
    "misfit, repairs, words, text",
    [
        (BAD, 0, "its schema: ", BAD),
        (BAD, 1, "its schema after 1 repair: ", BAD),
        (BAD, 3, "its schema after 3 repairs: ", BAD),
        ({"legs": "two"}, 0, "its schema: ", BAD),
        (CUT, 1, "after 1 repair, and was cut off at the model's output limit", CUT),
    ],
    ids=["at once", "after one", "after three", "of the tool", "cut each time"],
)
def test_what_never_fits_is_an_error_after_as_many_repairs(
    misfit: Any, repairs: int, words: str, text: str
) -> None:
    runner = Answering(*[misfit] * (repairs + 1))

    with pytest.raises(OpenCodeOutputError, match=words) as caught:
        runner.run("Describe it", schema=Bird, max_repairs=repairs)

    error, result = caught.value, caught.value.result
    assert len(runner.requests) == repairs + 1
    assert (error.text.split("\n")[-1], len(error.errors)) == (text, 1)
    assert result is not None
    assert (result.status, result.parsed) == ("error", None)
    assert result.total_cost == (repairs + 1) * COST


def test_a_repair_whose_start_failed_is_tried_again_and_counts_no_attempt() -> None:
    runner = Answering(BAD, "lock", GOOD)

    result = runner.run("Describe it", schema=Bird, startup_retry_delay_s=0)

    assert result.parsed == Bird(2)
    assert runner.prompts[1] == runner.prompts[2]
    assert result.attempts == 1


def test_a_repair_that_cannot_be_begun_is_an_error_of_its_kind() -> None:
    refusal = OpenCodeConfigError("no such session")
    runner = Answering(BAD, refusal)

    with pytest.raises(OpenCodeConfigError) as caught:
        runner.run("Describe it", schema=Bird)

    assert caught.value.result is not None
    assert caught.value.result.status == "error"


# --- cut answers ---------------------------------------------------------------------------------


def test_a_cut_answer_is_sent_back_for_a_shorter_one() -> None:
    runner = Answering(CUT, GOOD)

    result = runner.run("Describe it", schema=Bird)

    assert (result.parsed, result.status, result.total_cost) == (Bird(2), "ok", 2 * COST)
    assert "cut off" in runner.prompts[1]
    assert "shorter" in runner.prompts[1]


def test_a_whole_value_is_taken_though_the_answer_was_cut_behind_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "birds.jsonl"
    with Answering(WHOLE_BUT_CUT) as runner:
        (first,) = runner.map(["Describe it"], schema=Bird, checkpoint=checkpoint)
        (again,) = runner.map(["Describe it"], schema=Bird, checkpoint=checkpoint)

    assert (first.parsed, first.status) == (Bird(2), "ok")
    assert again == first


# --- validators of the user's own ----------------------------------------------------------------


@dataclass
class Crashing:
    legs: int

    def __post_init__(self) -> None:
        _ = {4: "a dog"}[self.legs]


def test_what_a_validator_raises_is_sent_back_as_a_misfit_is() -> None:
    runner = Answering(GOOD, '{"legs": 4}')

    assert runner.run("Describe it", schema=Crashing).parsed == Crashing(4)
    assert "- $: the validator raised KeyError: 2" in runner.prompts[1]


def test_what_a_validator_raises_each_time_ends_the_run_with_its_cost_and_cause() -> None:
    with pytest.raises(OpenCodeOutputError, match="raised KeyError: 2") as caught:
        Answering(GOOD, GOOD).run("Describe it", schema=Crashing)

    assert caught.value.result is not None
    assert caught.value.result.total_cost == 2 * COST
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("schema, answer", [(Bird, BAD), (Crashing, GOOD)], ids=["misfit", "crash"])
def test_the_error_of_a_job_in_a_batch_keeps_no_stream_in_memory(schema: Any, answer: str) -> None:
    before = _streams_in_memory()

    with Answering() as runner:
        ends = list(runner.map([answer] * 3, schema=schema, max_repairs=0, on_error="return"))

    assert [type(end) for end in ends] == [OpenCodeOutputError] * 3
    assert _streams_in_memory() == before


def _streams_in_memory() -> int:
    gc.collect()
    return sum(isinstance(each, RunStream) for each in gc.get_objects())


# --- limits --------------------------------------------------------------------------------------


def test_the_time_limit_spans_all_turns() -> None:
    with pytest.raises(OpenCodeTimeoutError, match="timeout_s") as caught:
        Answering(BAD, threading.Event()).run("Describe it", schema=Bird, timeout_s=0.2)

    assert caught.value.result is not None
    assert caught.value.result.status == "timed_out"


def test_no_repair_is_begun_above_the_budget() -> None:
    runner = Answering(BAD, GOOD)

    with pytest.raises(OpenCodeBudgetError):
        runner.run("Describe it", schema=Bird, max_cost=COST / 2)

    assert len(runner.requests) == 1


def test_a_repair_is_cancelled_as_a_run_is() -> None:
    is_waiting = threading.Event()
    stream = Answering(BAD, is_waiting).stream("Describe it", schema=Bird)

    def cancel() -> None:
        is_waiting.wait()
        stream.cancel()

    canceller = threading.Thread(target=cancel)
    canceller.start()

    with pytest.raises(OpenCodeCancelledError):
        stream.wait()

    canceller.join()
    assert stream.result.status == "cancelled"


# --- batches -------------------------------------------------------------------------------------


def test_values_come_back_from_worker_processes() -> None:
    context = multiprocessing.get_context("spawn")

    with Answering() as runner, ProcessPoolExecutor(1, mp_context=context) as pool:
        results = list(runner.map([GOOD, GOOD], schema=Bird, executor=pool))

    assert [result.parsed for result in results] == [Bird(2), Bird(2)]


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_restores_values(tmp_path: Path) -> None:
    checkpoint = tmp_path / "birds.jsonl"
    with Answering() as runner:
        first = list(runner.map([GOOD], schema=Bird, checkpoint=checkpoint))
    with Answering() as runner:
        again = list(runner.map([GOOD], schema=Bird, checkpoint=checkpoint))

    assert runner.requests == []
    assert again == first
    assert again[0].parsed == Bird(2)


def test_a_checkpoint_of_another_schema_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "birds.jsonl"
    with Answering() as runner:
        list(runner.map([GOOD], schema=Bird, checkpoint=checkpoint))

        for other in (None, dict[str, int]):
            with pytest.raises(OpenCodeConfigError, match="another schema: on_mismatch"):
                list(runner.map([GOOD], schema=other, checkpoint=checkpoint))
        assert len(runner.requests) == 1


def test_a_saved_value_that_does_not_fit_any_more_is_an_error_or_run_again(tmp_path: Path) -> None:
    checkpoint = tmp_path / "birds.jsonl"
    with Answering() as runner:
        list(runner.map([GOOD], schema=Bird, checkpoint=checkpoint))
        saved = checkpoint.read_text().replace('"parsed": {"legs": 2}', '"parsed": {"legs": "two"}')
        checkpoint.write_text(saved)

        (end,) = runner.map([GOOD], schema=Bird, checkpoint=checkpoint, on_error="return")
        (again,) = runner.map([GOOD], schema=Bird, checkpoint=checkpoint, on_mismatch="rerun")

    assert "another schema, which its value does not fit: $.legs" in str(end)
    assert again.parsed == Bird(2)


def test_a_failure_in_a_checkpoint_is_restored_as_what_it_was(tmp_path: Path) -> None:
    checkpoint = tmp_path / "birds.jsonl"
    settings: dict[str, Any] = {"schema": Bird, "max_repairs": 0, "checkpoint": checkpoint}
    with Answering() as runner:
        for _ in range(2):
            (end,) = runner.map([Job(WORDS)], **settings, on_error="return", retry_failed=False)

    assert isinstance(end, OpenCodeOutputError)
    assert (end.errors, end.text) == (["the answer holds no JSON value"], WORDS)
    assert len(runner.requests) == 1
