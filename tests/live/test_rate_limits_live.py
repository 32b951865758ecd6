"""A real 429 with its headers, as far as the pause of a batch; on both runners."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from opencode_sync.api.runner import Runner
from opencode_sync.testing import Reply
from tests.live.warm import WITHIN_S, Script

pytestmark = [
    pytest.mark.timeout(240),
]

HOUR_S = 3600.0


def _in_an_hour() -> Mapping[str, str]:
    return {
        "Retry-After": format_datetime(
            datetime.now(timezone.utc) + timedelta(seconds=HOUR_S), usegmt=True
        )
    }


@pytest.mark.parametrize(
    "headers",
    [
        lambda: {"Retry-After": "3600"},
        pytest.param(_in_an_hour, marks=pytest.mark.only("server")),
        pytest.param(lambda: {"Retry-After-Ms": "3600000"}, marks=pytest.mark.only("server")),
    ],
    ids=["seconds", "date", "milliseconds"],
)
def test_a_retry_event_says_how_long_the_provider_wants_to_be_left_alone(
    runner: Runner, workspace: Path, script: Script, headers: Any
) -> None:
    script.to("Refused", Reply("slow down", status=429, headers=headers()))

    with runner.stream("Refused", workspace, timeout_s=WITHIN_S) as stream:
        event: Mapping[str, Any] = next(e for e in stream if e["type"] == "retry")

    assert event["statusCode"] == 429
    assert event["retry_after_s"] == pytest.approx(HOUR_S, abs=WITHIN_S)


def test_a_batch_starts_nothing_until_the_provider_wants_to_be_asked_again(
    runner: Runner, workspace: Path, script: Script
) -> None:
    was_refused = threading.Event()
    script.to("Refused", Reply.failure(429, "slow down", retry_after_s=HOUR_S))
    script.to("Held", Reply(["do", was_refused, "ne"]))
    script.to("Next", "next")
    batch = runner.map(["Refused", "Held", "Next"], workspace, ordered=False, max_workers=2)

    def watch() -> None:
        while not batch.report.rate_limits and not was_refused.wait(0.05):
            pass
        was_refused.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with batch:
        first = next(batch)

        assert first.answer == "done"
        assert batch._dispatch is not None
        assert batch._dispatch._throttle.pause_s() > WITHIN_S
        assert "Next" not in [request.prompt for request in script.requests]
    watcher.join()
