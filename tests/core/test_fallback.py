"""When a run leaves a model for the next one, and what of the first one stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    ErrorInfo,
    OpenCodeBudgetError,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    RunConfig,
    RunResult,
    RunStream,
    Tried,
    aggregate_run_result,
    parse_event_line,
)
from opencode_sync.core.request import Request, RunSettings
from tests.core.scripts import Script, Scripts, forever, step, text

CFG = RunConfig(model="a/one", fallback_models=("b/two", "c/three"))
ANSWER = [text("fine"), step()]


def failing(status: int | None = None, name: str = "APIError", message: str = "no") -> Script:
    """A source that ends with an ``error`` event."""
    data = {"message": message} if status is None else {"message": message, "statusCode": status}
    event = {"type": "error", "error": {"name": name, "data": data}}
    said = ErrorInfo(name, message, status)
    return Script([event], error=OpenCodeProcessError(1, reason=str(said)))


def refused(*retries: dict[str, Any], before: Sequence[Any] = ()) -> Script:
    """A source whose requests are refused, and which goes on asking."""
    return Script([*before], *([retry] for retry in retries), forever())


def retry(status: int | None = None, wait_s: float | None = None) -> dict[str, Any]:
    event: dict[str, Any] = {"type": "retry", "message": "slow down"}
    if status is not None:
        event |= {"statusCode": status, "message": f"{status} slow down"}
    return event if wait_s is None else {**event, "retry_after_s": wait_s}


def started(
    *sources: Any, cfg: RunConfig = CFG, passed_over: Sequence[Tried] = (), **options: Any
) -> RunStream:
    settings = RunSettings.of({"run_cfg": cfg, "startup_retry_delay_s": 0, **options})
    return Scripts(*sources).begin("Go", "/", replace(settings, passed_over=passed_over))


def asked(stream: RunStream) -> list[str | None]:
    return [request.cfg.model for request in requests_of(stream)]


def requests_of(stream: RunStream) -> list[Request]:
    assert isinstance(stream._runner, Scripts)
    return stream._runner.requests


def failed(stream: RunStream) -> tuple[OpenCodeError, RunResult]:
    with pytest.raises(OpenCodeError) as caught:
        stream.wait()
    assert caught.value.result is stream.result
    return caught.value, stream.result


# --- when ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out",
    [
        *(lambda status=status: failing(status) for status in (401, 402, 403, 404, 429, 500, 529)),
        lambda: failing(),
        lambda: failing(name="ProviderAuthError"),
        lambda: failing(name="UnknownError", message="Model not found: a/one. Did you mean ..."),
        lambda: failing(400, message="Your credit balance is too low to access the API"),
        lambda: refused(retry(429, 31)),
        lambda: refused(retry(503, 3600)),
        lambda: refused(retry(429, 1), retry(429, 1)),
        lambda: refused(retry(500), retry(500)),
        lambda: refused(retry(), retry()),
    ],
    ids=[
        *("401", "402", "403", "404", "429 at the end", "500 at the end", "529 at the end"),
        *(
            "unreachable at the end",
            "no key",
            "unknown model",
            "no credits",
            "429 for long",
            "503 for long",
        ),
        *("429 twice", "500 twice", "broken connection twice"),
    ],
)
def test_a_model_that_is_out_is_left_for_the_next_one(out: Any) -> None:
    source = out()

    stream = started(source, Script(ANSWER))
    result = stream.wait()

    assert (result.status, result.answer, result.model) == ("ok", "fine", "b/two")
    assert [each.model for each in result.tried] == ["a/one"]
    assert asked(stream) == ["a/one", "b/two"]
    assert (source.closes, result.attempts) == (1, 2)


@pytest.mark.parametrize(
    "out, told",
    [
        ((400, "APIError", "credit balance is too low"), "APIError 400: credit balance is too low"),
        ((401, "APIError", "bad key"), "APIError 401: bad key"),
        ((None, "UnknownError", "Model not found: a/one"), "UnknownError: Model not found: a/one"),
    ],
    ids=["400", "401", "unknown model"],
)
def test_what_the_provider_says_is_told_once(out: Any, told: str) -> None:
    stream = started(failing(*out), Script(ANSWER))

    assert str(stream.wait().tried[0].error) == told


@pytest.mark.parametrize(
    "source, message",
    [
        (lambda: failing(400, message="too long"), "too long"),
        (lambda: failing(name="ContextOverflowError", message="too long"), "too long"),
        (lambda: Script(error=OpenCodeProcessError(1, reason="no space")), "no space"),
    ],
    ids=["400", "another error", "no error event"],
)
def test_an_error_that_is_not_the_models_is_raised(source: Any, message: str) -> None:
    stream = started(source())

    error, result = failed(stream)

    assert message in str(error)
    assert (result.tried, asked(stream)) == ([], ["a/one"])


@pytest.mark.parametrize(
    "parts",
    [
        ([retry(429, 30)], [retry(429)]),  # the second one comes when the next request is asked
        ([retry(500)],),
    ],
    ids=["between two answers", "once"],
)
def test_a_refusal_that_passes_is_waited_out(parts: Sequence[Any]) -> None:
    between = [part for refusal in parts for part in (refusal, [step("unknown")])]

    stream = started(Script(*between, ANSWER))
    result = stream.wait()

    assert (result.model, result.tried) == ("a/one", [])


def test_an_answer_that_came_after_the_refusals_counts_however_late_it_is_read() -> None:
    stream = started(Script([retry(500), retry(500), *ANSWER]))

    assert stream.wait().answer == "fine"
    assert asked(stream) == ["a/one"]


def test_without_fallback_models_nothing_is_left() -> None:
    stream = started(failing(401), cfg=RunConfig(model="a/one"))

    _, result = failed(stream)

    assert (result.model, result.tried) == ("a/one", [])


@pytest.mark.parametrize(
    "acted",
    [
        {"type": "tool_use", "part": {"tool": "bash", "state": {"status": "completed"}}},
        {"type": "sub_agent", "childID": "ses_2"},
    ],
    ids=["tool", "sub-agent"],
)
def test_once_a_tool_has_run_the_model_is_not_left(acted: dict[str, Any]) -> None:
    source = failing(401)
    source.parts.insert(0, [acted, retry(429, 3600), retry(429, 3600)])

    stream = started(source)
    error, result = failed(stream)

    assert "no" in str(error)
    assert (result.tried, asked(stream)) == ([], ["a/one"])


def test_a_tool_that_ends_while_the_model_is_being_left_keeps_the_run_from_starting_anew() -> None:
    class Late(Script):
        def stop(self) -> None:
            super().stop()
            self.stopped.clear()
            part = {"tool": "bash", "state": {"status": "completed"}}
            self.parts = [[{"type": "tool_use", "part": part}]]

    stream = started(Late([retry(429, 3600)], forever()))
    error, result = failed(stream)

    assert "slow down" in str(error)
    assert len(result.tool_calls) == 1
    assert [each.model for each in result.tried] == ["a/one"]


# --- the last model ------------------------------------------------------------------------------


def test_where_all_are_out_the_error_is_the_last_ones_and_tried_is_full() -> None:
    stream = started(failing(401), refused(retry(429, 3600)), failing(403, message="mine"))

    error, result = failed(stream)

    assert "mine" in str(error)
    assert str(result.error) == "APIError 403: mine"
    assert result.status == "error"
    assert [(each.model, each.error.status_code) for each in result.tried] == [
        ("a/one", 401),
        ("b/two", 429),
        ("c/three", 403),
    ]


def test_the_last_model_is_not_waited_for_when_it_asks_for_a_long_pause() -> None:
    stream = started(failing(401), failing(401), refused(retry(429, 3600)))

    error, result = failed(stream)

    assert isinstance(error, OpenCodeProcessError)
    assert str(error) == "opencode reported an error: APIError 429: slow down"
    assert result.error == ErrorInfo("APIError", "slow down", 429)
    assert result.tried[-1] == Tried("c/three", result.error, retry_after_s=3600)


def test_a_pause_that_was_asked_for_before_an_answer_is_not_that_of_a_later_error() -> None:
    first = failing(401)
    first.parts = [[retry(429, 20)], [step("unknown")], *first.parts]

    stream = started(first, Script(ANSWER))

    assert stream.wait().tried[0].retry_after_s is None


def test_the_last_model_may_refuse_as_often_as_opencode_asks() -> None:
    last = Script(*([retry(429, 1)] for _ in range(5)), ANSWER)

    stream = started(failing(401), failing(401), last)

    assert stream.wait().model == "c/three"


def test_a_cancellation_while_the_last_model_is_being_left_is_one() -> None:
    class Slow(Script):
        def stop(self) -> None:
            super().stop()
            if self.stops == 1:
                stream.cancel("enough")

    stream = started(failing(401), failing(401), Slow([retry(429, 3600)], forever()))
    error, result = failed(stream)

    assert isinstance(error, OpenCodeCancelledError)
    assert result.status == "cancelled"


def test_a_secret_that_a_refusal_repeats_is_told_nowhere() -> None:
    provider = {"a": {"options": {"apiKey": "sk-1234567890"}}}
    cfg = RunConfig(
        model="a/one", fallback_models=("a/two",), config_overrides={"provider": provider}
    )
    refusal = {**retry(429, 3600), "message": "429 no more for sk-1234567890"}

    stream = started(*(refused(refusal) for _ in "12"), cfg=cfg)
    error, result = failed(stream)

    assert "no more for ***" in str(error)
    assert "sk-1234567890" not in f"{error} {result.to_dict()}"


# --- what counts, and what stays -----------------------------------------------------------------


def test_all_attempts_count_and_each_models_share_is_told() -> None:
    first = refused(retry(500), retry(500), before=[step("unknown", 0.5)])
    second = failing(402)
    second.parts.insert(0, [step("unknown", 0.25)])

    stream = started(first, second, Script([text("fine"), step("stop", 1.0)]))
    result = stream.wait()

    assert result.total_cost == 1.75
    assert [each.total_cost for each in result.tried] == [0.5, 0.25]
    assert (result.turns, result.attempts) == (3, 3)


def test_the_texts_of_a_model_that_was_left_are_not_the_answer_and_its_events_stay() -> None:
    half = {**text("Half an"), "sessionID": "ses_0"}
    first = refused(retry(), retry(), before=[half])

    stream = started(first, Script(ANSWER))
    events = list(stream)
    result = stream.result

    assert [event["type"] for event in events] == [
        "text",
        "retry",
        "fallback",
        "text",
        "step_finish",
    ]
    assert result.events == events
    assert (result.final_text, result.session_id) == ("fine", "ses_1")
    assert result.sub_agents == []


def test_a_log_file_gives_the_same_result(tmp_path: Path) -> None:
    log = tmp_path / "log"

    stream = started(failing(401), Script(ANSWER), log_file=log)
    result = stream.wait()

    lines = log.read_text().splitlines()
    again = aggregate_run_result(events=[parse_event_line(line) for line in lines])
    assert (again.tried, again.model, again.status) == (result.tried, "b/two", "ok")


def test_tried_survives_being_saved() -> None:
    stream = started(refused(retry(429, 3600)), Script(ANSWER))
    result = stream.wait()

    again = RunResult.from_dict(result.to_dict())

    assert again == result
    assert again.tried == result.tried
    assert result.to_dict()["tried"] == [asdict(result.tried[0])]
    assert str(again.tried[0]) == "a/one (APIError 429: slow down)"


def test_the_time_limit_is_one_for_all_models() -> None:
    sources = [refused(retry(500), retry(500)), Script(forever())]

    stream = started(*sources, timeout_s=0.3)
    error, result = failed(stream)

    assert isinstance(error, OpenCodeTimeoutError)
    assert "retried" not in str(error)
    assert [each.model for each in result.tried] == ["a/one"]


def test_a_budget_that_the_first_model_has_spent_keeps_the_next_from_being_asked() -> None:
    first = failing(402)
    first.parts.insert(0, [step("stop", 0.5)])  # at its price it may end, and not go on

    stream = started(first, max_cost=0.25)
    error, result = failed(stream)

    assert isinstance(error, OpenCodeBudgetError)
    assert (asked(stream), result.status) == (["a/one"], "over_budget")


def test_a_cancellation_while_the_model_is_being_left_ends_the_run() -> None:
    def cancel() -> None:
        stream.cancel("enough")

    class Slow(Script):
        def stop(self) -> None:
            super().stop()
            if self.stops == 1:
                cancel()

    stream = started(Slow([retry(429, 3600)], forever()), Script(ANSWER))
    error, _ = failed(stream)

    assert isinstance(error, OpenCodeCancelledError)
    assert asked(stream) == ["a/one"]


def test_the_prompt_is_sent_again_in_the_session_that_it_was_taken_out_of() -> None:
    first = failing(401)
    first.take_back = lambda: "ses_9"  # type: ignore[method-assign]

    stream = started(first, Script(ANSWER))
    stream.wait()

    assert [request.cfg.session_id for request in requests_of(stream)] == [None, "ses_9"]


def test_a_file_that_is_gone_by_the_time_the_next_model_is_asked_is_an_error(
    tmp_path: Path,
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("notes")

    stream = started(
        Script(file.unlink, *failing(401).parts, error=failing(401).error),
        cfg=replace(CFG, files=(file,)),
    )
    error, result = failed(stream)

    assert isinstance(error, OpenCodeConfigError)
    assert "no file" in str(error)
    assert (result.status, asked(stream)) == ("error", ["a/one"])


@pytest.mark.parametrize(
    "source", [lambda: failing(401), lambda: refused(retry(429, 3600))], ids=["401", "429"]
)
@pytest.mark.parametrize("model", ["d/own", "b/two"])
def test_a_model_that_only_a_command_names_is_the_only_one(source: Any, model: str) -> None:
    first = source()
    settle = first.settle

    def settle_with_model(result: RunResult) -> OpenCodeError | None:
        result.model = model
        return settle(result)  # type: ignore[no-any-return]

    first.settle = settle_with_model
    known = Tried("b/two", ErrorInfo("APIError", "slow down", 429))

    stream = started(first, passed_over=(known,))
    error, result = failed(stream)

    assert isinstance(error, OpenCodeProcessError)
    assert (result.status, result.model) == ("error", model)
    assert [each.model for each in result.tried] == [model]
    assert asked(stream) == ["a/one"]


# --- models that a batch passes over -------------------------------------------------------------


def test_a_model_that_is_known_to_be_out_is_passed_over() -> None:
    known = Tried("a/one", ErrorInfo("APIError", "slow down", 429), 0.5, 3000.0)

    stream = started(Script(ANSWER), passed_over=(known,))
    result = stream.wait()

    assert asked(stream) == ["b/two"]
    assert result.tried == [Tried("a/one", known.error, 0.0, 3000.0, was_asked=False)]
    assert str(result.tried[0]) == "a/one (passed over: APIError 429: slow down)"


def test_the_last_model_is_asked_even_if_it_is_known_to_be_out() -> None:
    info = ErrorInfo("APIError", "slow down", 429)
    known = [Tried(model, info) for model in ("a/one", "b/two", "c/three")]

    stream = started(Script(ANSWER), passed_over=known)

    assert stream.wait().model == "c/three"
    assert asked(stream) == ["c/three"]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fallback_models": ("b/two",)}, "fallback_models is set without model"),
        (
            {"model": "a/one", "fallback_models": ("two",)},
            "fallback_models 'two' names no provider",
        ),
        ({"model": "a/one", "fallback_models": ("a/one",)}, "'a/one' is there twice"),
        ({"model": "a/one", "fallback_models": ("b/two", "b/two")}, "'b/two' is there twice"),
        ({"model": "a/one", "fallback_models": 2}, "fallback_models is of type int: use strings"),
        ({"model": "a/one", "fallback_models": (None,)}, "fallback_models is of type NoneType"),
        ({"model": "a/one", "fallback_models": ("",)}, "fallback_models '' is blank"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_fallback_models_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OpenCodeConfigError, match=message):
        started(cfg=RunConfig(**settings))


def test_a_list_of_fallback_models_is_taken_and_a_lone_name_is_one_model() -> None:
    assert RunConfig(fallback_models=["b/two"]).fallback_models == ("b/two",)  # type: ignore[arg-type]
    assert RunConfig(fallback_models="b/two").fallback_models == ("b/two",)  # type: ignore[arg-type]
