"""What a run says of its answer, with both runners: whole or cut, and whose words it is.

Each runner answers many prompts, and what one run shows is looked at by several tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeClient,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeServer,
    RunConfig,
    RunResult,
)
from opencode_sync.runner import Runner
from opencode_sync.testing import Reply, ScriptedModel
from tests.live.warm import Script, config, open_connections, shell

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes and shell"),
    pytest.mark.timeout(240),
]


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def cfg(script: Script) -> Iterator[RunConfig]:
    with ScriptedModel(script) as model:
        yield config(model)


@pytest.fixture(scope="module", params=[OpenCodeClient, OpenCodeServer], ids=["process", "server"])
def runner(
    request: pytest.FixtureRequest, opencode_binary: str, cfg: RunConfig
) -> Iterator[Runner]:
    with request.param(opencode_binary, run_cfg=cfg) as runner:
        if isinstance(runner, OpenCodeServer):
            open_connections(runner)
        yield runner


@pytest.fixture(scope="module")
def workspace(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


# --- cut answers ---------------------------------------------------------------------------------

CUT = Reply("cut in the mid", finish_reason="length")


@dataclass
class Batch:
    """A batch with a cut, a filtered, an empty and a whole answer, and the same once more."""

    first: list[RunResult | OpenCodeError]
    first_report: Any
    second: list[RunResult | OpenCodeError]


@pytest.fixture(scope="module")
def batch(
    runner: Runner, script: Script, workspace: Path, tmp_path_factory: pytest.TempPathFactory
) -> Batch:
    script.to("cut it", CUT)
    script.to("filter it", Reply("filtered", finish_reason="content_filter"))
    script.to("say nothing", Reply(""))
    # A step that is cut in the middle of a run: OpenCode runs its tool, and asks again.
    going_on = Reply("So far", tool_calls=[shell("echo hi")], finish_reason="length")  # type: ignore[list-item]
    script.to("go on", going_on, "The whole answer.")
    prompts = ["cut it", "filter it", "say nothing", "go on"]
    path = tmp_path_factory.mktemp("batch") / "jobs.jsonl"

    batch = runner.map(prompts, workspace, checkpoint=path, on_error="return", max_workers=2)
    first, report = list(batch), batch.report
    script.to("cut it", "whole this time")
    script.to("filter it", "whole this time")
    second = list(runner.map(prompts, workspace, checkpoint=path, on_error="return"))
    return Batch(first, report, second)


@pytest.mark.parametrize(
    "index, words, text",
    [
        (0, "cut off at the model's output limit", "cut in the mid"),
        (1, "cut off by the provider's content filter", "filtered"),
    ],
    ids=["at the output limit", "by a content filter"],
)
def test_a_cut_answer_is_an_error_that_says_why(
    batch: Batch, index: int, words: str, text: str
) -> None:
    error = batch.first[index]

    assert isinstance(error, OpenCodeIncompleteError)
    assert words in str(error)
    assert error.result is not None
    assert (error.result.status, error.result.final_text) == ("incomplete", text)
    assert error.result.total_cost > 0


def test_the_last_step_says_whether_the_answer_is_whole(batch: Batch) -> None:
    result = batch.first[3]

    assert isinstance(result, RunResult)
    assert (result.status, result.answer) == ("ok", "The whole answer.")


def test_cut_and_empty_answers_are_counted(batch: Batch) -> None:
    report = batch.first_report

    assert (report.done, report.failed, report.empty) == (2, 2, 1)
    assert sum(report.errors.values()) == 2
    assert all(kind.startswith("OpenCodeIncompleteError") for kind in report.errors)
    assert "1 with an empty answer" in str(report)


def test_a_resumed_batch_asks_for_cut_answers_again(batch: Batch) -> None:
    statuses = [end.status if isinstance(end, RunResult) else "failed" for end in batch.second]

    assert statuses == ["ok", "ok", "ok", "ok"]
    assert [end.answer for end in batch.second[:2]] == ["whole this time"] * 2  # type: ignore[union-attr]
