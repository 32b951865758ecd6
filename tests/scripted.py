"""A runner without processes: what a prompt says is what happens, at once.

"hello"        answers "HELLO", for 0.01 dollars and 10 tokens
"mute ..."     answers nothing
"fail ..."     ends with an APIError 401, after a step that was paid for
"flaky N ..."  ends N times with an APIError 503, after a step that was paid for, then answers
"hold ..."     says a word, then nothing until release() or the end of its run
"work ..."     takes a step with a tool, for the same, and then holds
"spend N ..."  takes N such steps, and answers
"free ..."     answers for nothing, with as many tokens
"refused ..."  is refused with a 429 once, then answers
"turned ..."   ends with an APIError 429, with nothing done
"broken ..."   raises what no run should raise
"die ..."      ends its whole process

A model of the provider "out" refuses with a 429, and wants to be left alone for an hour.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from opencode_sync.api.runner import Request, Runner
from opencode_sync.core.errors import OpenCodeError, OpenCodeProcessError
from opencode_sync.core.events import Event
from opencode_sync.core.lifetime import CancelScope
from opencode_sync.core.result import RunResult

STEP_COST = 0.01
STEP_TOKENS = 10


class ScriptedRunner(Runner):
    """Records what it was asked for.

    Attributes:
        begun: The requests, in the order of their coming.
        most: How many ran at the same time, at most.
    """

    def __init__(self, max_workers: int | None = None, **settings: Any) -> None:
        super().__init__(max_workers=max_workers, **settings)
        self.begun: list[Request] = []
        self.most = 0
        self._running = 0
        self._changed = threading.Condition()
        self._holding: list[_Source] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return ScriptedRunner, (self._max_workers,)

    @property
    def prompts(self) -> list[str]:
        """The prompts that were begun, in order."""
        with self._changed:
            return [request.prompt for request in self.begun]

    def wait_for(self, n: int, within_s: float = 10.0) -> None:
        """Wait until *n* runs have begun in all."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.begun) >= n, within_s):
                raise TimeoutError(f"{len(self.begun)} of {n} have begun: {self.begun}")

    def release(self) -> None:
        """Let those that hold go on."""
        with self._changed:
            holding, self._holding = self._holding, []
        for source in holding:
            source.answer()

    def _open(self, request: Request, scope: CancelScope, keep_raw: bool) -> _Source:
        with self._changed:
            self.begun.append(request)
            self._running += 1
            self.most = max(self.most, self._running)
            is_out = str(request.cfg.model).startswith("out/")
            n = [each.prompt for each in self.begun].count(request.prompt)
            is_down = request.prompt.startswith("flaky") and n <= int(request.prompt.split()[1])
            source = _Source(request.prompt, self._ended, is_out=is_out, is_down=is_down)
            if request.prompt.startswith(("hold", "work")):
                self._holding.append(source)
            self._changed.notify_all()
        return source

    def _ended(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()


class _Source:
    is_over = False
    session_id = None

    def __init__(
        self,
        prompt: str,
        on_close: Callable[[], None],
        *,
        is_out: bool = False,
        is_down: bool = False,
    ) -> None:
        self.started_at = time.monotonic()
        self.label = f"run of {prompt!r}"
        self._prompt = prompt
        self._on_close = on_close
        self._is_down = is_down
        self._blocks: queue.SimpleQueue[list[Event] | None] = queue.SimpleQueue()
        if prompt.startswith("die"):
            os._exit(1)
        if prompt.startswith("broken"):
            raise ZeroDivisionError("broken script")
        start: Any = {"type": "step_start", "sessionID": "ses_1"}
        self._say(start)
        refusal: Any = {"type": "retry", "statusCode": 429, "message": "slow down"}
        if is_out:
            self._say({**refusal, "retry_after_s": 3600.0})
            return
        if prompt.startswith("refused"):
            self._say(refusal)
        n_steps = (
            int(prompt.split()[1]) if prompt.startswith("spend") else prompt.startswith("work")
        )
        for _ in range(n_steps):
            state = {"status": "completed", "input": {}, "output": "x"}
            used: Any = {"type": "tool_use", "part": {"tool": "bash", "state": state}}
            self._say(used)
            self._finish_step("tool-calls")
        if prompt.startswith("hold"):
            self._say({"type": "text", "part": {"text": "wait"}})
        elif not prompt.startswith("work"):
            self.answer()

    def _say(self, event: Event) -> None:
        self._blocks.put([event])

    def answer(self) -> None:
        if self._prompt.startswith("turned"):
            self._fail(429, "too many requests")
            return
        text = "" if self._prompt.startswith("mute") else self._prompt.upper()
        self._say({"type": "text", "part": {"text": text}})
        self._finish_step("stop")
        if self._prompt.startswith("fail"):
            self._fail(401, "bad key")
        if self._is_down:
            self._fail(503, "down")
        self._blocks.put(None)

    def _fail(self, status: int, message: str) -> None:
        error: Any = {"name": "APIError", "data": {"message": message, "statusCode": status}}
        self._say({"type": "error", "error": error})
        self._blocks.put(None)

    def _finish_step(self, reason: str) -> None:
        tokens = {"total": STEP_TOKENS, "input": 7, "output": 3}
        cost = 0 if self._prompt.startswith("free") else STEP_COST
        step: Any = {"reason": reason, "cost": cost, "tokens": tokens}
        self._say({"type": "step_finish", "part": step})

    def receive(self, timeout: float | None) -> Sequence[Event] | None:
        block = self._blocks.get(timeout=timeout)
        if block is None:
            self._blocks.put(None)
        return block

    def stop(self) -> None:
        with contextlib.suppress(queue.Empty):  # what was not said yet is not said any more
            while True:
                self._blocks.get_nowait()
        self._blocks.put(None)

    def settle(self, result: RunResult) -> OpenCodeError | None:
        if result.error is None:
            return None
        return OpenCodeProcessError(1, "", result.events, reason=str(result.error), result=result)

    def may_repeat(self, result: RunResult) -> bool:
        return False

    def take_back(self) -> str | None:
        return None

    def close(self) -> None:
        self._on_close()
