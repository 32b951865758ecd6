"""A real 429 with its headers, as far as the pause of a batch; on both runners."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from opencode_sync.api.runner import Runner
from opencode_sync.testing import Reply
from tests.live.warm import WITHIN_S, Script

HOUR_S = 3600.0


@pytest.mark.only("server")
def test_a_retry_event_says_how_long_the_provider_wants_to_be_left_alone(
    runner: Runner, workspace: Path, script: Script
) -> None:
    headers = {"Retry-After-Ms": str(1000 * HOUR_S)}
    script.to("Refused", Reply("slow down", status=429, headers=headers))

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
