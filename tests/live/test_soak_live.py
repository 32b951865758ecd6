"""Fifty turns of a warm server, some of them left, cancelled or lost: nothing is left."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opencode_sync import OpenCodeCancelledError, OpenCodeServer
from opencode_sync.api.runner import Runner
from opencode_sync.testing import Answer, ChatRequest, ScriptedModel
from tests.live.warm import config, shell
from tests.test_soak import (
    Soak,
    cancel_it,
    leave_it,
    lose_it,
    temporary,
    wait_for_it,
)

pytestmark = [
    pytest.mark.timeout(300),
]

TURNS = 50

__all__ = ["temporary"]  # a fixture


def answer(request: ChatRequest) -> Answer:
    if request.prompt == "leave a process" and not request.tool_results:
        return shell("setsid sleep 907 > /dev/null 2>&1 & echo started")
    return f"re {request.prompt}"


def test_after_fifty_turns_everything_is_as_it_was(
    opencode_binary: str, workspace: Path, temporary: Path
) -> None:
    soak = Soak(temporary, TURNS)

    @contextmanager
    def begin() -> Iterator[Runner]:
        # The model keeps its requests.
        with (
            ScriptedModel(answer) as model,
            OpenCodeServer(opencode_binary, run_cfg=config(model)) as server,
        ):
            # OpenCode 1.18.33 prepares a directory with the first prompt there. Where that one is
            # aborted meanwhile, others end with "All fibers interrupted".
            server.run("say a word", workspace)
            yield server

    def one_turn(runner: Runner, seed: int) -> None:
        dice = random.Random(seed)
        ways = (wait_for_it, leave_it, cancel_it, lose_it)
        way = dice.choices(ways, weights=(6, 1, 2, 1))[0]
        prompt = dice.choice(["say a word", "say another", "say more", "leave a process"])
        try:
            soak.outcomes.add(way(runner.stream(prompt, workspace, timeout_s=120), dice))
        except OpenCodeCancelledError:
            soak.outcomes.add("cancelled")

    soak.run(begin, one_turn)

    told = soak.outcomes.counts
    assert told.total() == TURNS + soak.first
    assert {"ok", "left", "lost"} <= set(told) <= {"ok", "left", "cancelled", "lost"}
