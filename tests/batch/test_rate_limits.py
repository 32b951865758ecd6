"""A batch against a provider that allows three requests at a time, with a runner that asks it."""

from __future__ import annotations

import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import pytest

from opencode_sync.api.runner import Request, Runner
from opencode_sync.batch import dispatch
from opencode_sync.batch.job import Listener, Outcome, Task, carry_out
from opencode_sync.core.errors import OpenCodeError, OpenCodeProcessError
from opencode_sync.core.events import Event
from opencode_sync.core.lifetime import CancelScope
from opencode_sync.core.result import RunResult
from opencode_sync.process.stderr import asked_to_wait_s
from opencode_sync.testing import Reply, ScriptedModel

ALLOWED = 3
RETRY_AFTER_S = 0.1


class AskingRunner(Runner):
    """Asks the model once for each prompt, and again after a 429, as OpenCode does."""

    def __init__(self, model: ScriptedModel, tries: int) -> None:
        super().__init__()
        self._url = f"{model.base_url}/chat/completions"
        self._model = model.name
        self._tries = tries

    def _open(self, request: Request, scope: CancelScope, keep_raw: bool) -> _Asking:
        return _Asking(self._url, self._model, request.prompt, self._tries)


class _Asking:
    is_over = False
    session_id = None
    label = "a request"

    def __init__(self, url: str, model: str, prompt: str, tries: int) -> None:
        self.started_at = time.monotonic()
        messages = [{"role": "user", "content": prompt}]
        body = json.dumps({"model": model, "messages": messages}).encode()
        self._request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        self._tries = tries
        self._blocks: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        for attempt in range(1, self._tries + 1):
            try:
                with urllib.request.urlopen(self._request, timeout=10) as response:
                    text = json.load(response)["choices"][0]["message"]["content"]
            except urllib.error.HTTPError as error:
                with error:
                    headers = {name.lower(): value for name, value in error.headers.items()}
                wait_s = asked_to_wait_s(headers["retry-after"], headers["retry-after-ms"])
                assert wait_s is not None
                if attempt == self._tries:
                    data = {
                        "message": "too many requests",
                        "statusCode": error.code,
                        "responseHeaders": headers,
                    }
                    self._blocks.put(
                        [{"type": "error", "error": {"name": "APIError", "data": data}}]
                    )
                    break
                event = {"type": "retry", "statusCode": error.code, "retry_after_s": wait_s}
                self._blocks.put([event])
                time.sleep(wait_s)
            else:
                self._blocks.put([{"type": "text", "part": {"text": text}}])
                self._blocks.put([{"type": "step_finish", "part": {"reason": "stop"}}])
                break
        self._blocks.put(None)

    def receive(self, timeout: float | None) -> Sequence[Event] | None:
        block = self._blocks.get(timeout=timeout)
        if block is None:
            self._blocks.put(None)
        return block

    def stop(self) -> None:
        self._thread.join()

    def settle(self, result: RunResult) -> OpenCodeError | None:
        return OpenCodeProcessError(1, result=result) if result.error else None

    def may_repeat(self, result: RunResult) -> bool:
        return False

    def close(self) -> None:
        self._thread.join()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "REPEAT_S", RETRY_AFTER_S)


def ask(n: int, *, tries: int, **options: Any) -> tuple[list[Any], int, Any]:
    """The ends of *n* jobs, how many requests it took, and the report."""
    reply = Reply("done", delay_s=0.05)
    with (
        ScriptedModel(reply, max_concurrent=ALLOWED, retry_after_s=RETRY_AFTER_S) as model,
        AskingRunner(model, tries) as runner,
    ):
        batch = runner.map(map(str, range(n)), on_error="return", **options)
        ends = list(batch)
        return ends, len(model.requests) + len(model.refused_requests), batch.report


def test_a_batch_slows_down_instead_of_being_refused_again_and_again() -> None:
    ends, requests, report = ask(30, tries=6, max_workers=12)

    assert [type(end) for end in ends] == [RunResult] * 30
    assert requests < 60
    assert report.rate_limits == requests - 30
    assert report.lowest_workers <= ALLOWED


def test_jobs_that_failed_of_too_many_requests_are_run_again() -> None:
    ends, requests, report = ask(30, tries=1, max_workers=12)

    assert [type(end) for end in ends] == [RunResult] * 30
    assert requests < 60
    assert (report.failed, report.retried) == (0, requests - 30)


def test_they_fail_where_that_is_switched_off() -> None:
    ends, _, report = ask(30, tries=1, max_workers=12, adaptive=False)

    assert report.failed > 0
    assert report.errors == {"OpenCodeProcessError (APIError 429)": report.failed}
    assert any(isinstance(end, OpenCodeProcessError) for end in ends)


class _Heard(Listener):
    """What a batch hears of refusals."""

    def __init__(self) -> None:
        self.waits_s: list[float | None] = []

    def refused(self, index: int, retry_after_s: float | None) -> None:
        self.waits_s.append(retry_after_s)


def carried_out(tries: int, *replies: Reply) -> tuple[list[float | None], Outcome]:
    """What was heard, and how the job ended."""
    heard = _Heard()
    with ScriptedModel(replies) as model, AskingRunner(model, tries) as runner:
        outcome = carry_out(runner, Task(0, "Hi", "."), lambda stream: None, heard)
    return heard.waits_s, outcome


def test_a_batch_hears_how_long_the_provider_wants_to_be_left_alone() -> None:
    waits_s, outcome = carried_out(2, Reply.failure(429, "no", retry_after_s=0.05), Reply("yes"))

    assert waits_s == [0.05]
    assert outcome.retry_after_s is None  # it has answered since


def test_so_it_does_of_the_refusal_that_a_job_fails_of() -> None:
    waits_s, outcome = carried_out(1, Reply.failure(429, "no", retry_after_s=7))

    assert waits_s == [7]
    assert (outcome.was_refused, outcome.retry_after_s) == (True, 7)
