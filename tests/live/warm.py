"""What the tests of the real opencode have in common: a script for the model, and small words."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from opencode_sync import OpenCodeClient, OpenCodeServer, RunConfig
from opencode_sync.api.runner import Runner
from opencode_sync.testing import Answer, ChatRequest, ScriptedModel, ToolCall, tool_call

MakeModel = Callable[..., ScriptedModel]
MakeRunner = Callable[..., Runner]

WITHIN_S = 100.0  # a loaded machine takes its time
CONNECTIONS = 12  # more than any test uses at once


@dataclass
class Script:
    """What the model answers to each prompt, and what it was asked."""

    answers: dict[str, Callable[[ChatRequest], Answer]] = field(default_factory=dict)
    requests: list[ChatRequest] = field(default_factory=list)
    _told: dict[str, int] = field(default_factory=dict)  # how many requests had come before
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, request: ChatRequest) -> Answer:
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
        told = (answer for begin, answer in self.answers.items() if _says(request, begin))
        return next(told, lambda request: f"re {request.prompt}")(request)

    def to(self, prompt: str, *replies: Answer) -> str:
        """Answer *prompt*, and what begins with it, with *replies*: one for each step."""
        self._told[prompt] = len(self.requests)
        self.answers[prompt] = lambda request: replies[
            min(len(_results_since_prompt(request)), len(replies) - 1)
        ]
        return prompt

    def asked(self, prompt: str, times: int = 1) -> list[ChatRequest]:
        """The requests for *prompt* since to() was called for it, once there are as many."""

        def found() -> list[ChatRequest]:
            since = self.requests[self._told.get(prompt, 0) :]
            return [request for request in since if _says(request, prompt)]

        with self._changed:
            came = self._changed.wait_for(lambda: len(found()) >= times, WITHIN_S)
            assert came, f"{prompt!r} was not asked {times} times"
            return found()

    def clear(self) -> None:
        """Forget what was said in another module."""
        with self._changed:
            self.answers.clear()
            self.requests.clear()
            self._told.clear()

    @property
    def last(self) -> ChatRequest:
        return self.requests[-1]


def _says(request: ChatRequest, begin: str) -> bool:
    prompt = request.prompt
    # Text of attached files stands before what was asked, what we ask for ourselves behind it.
    return prompt == begin or prompt.startswith(f"{begin}\n") or prompt.endswith(f"\n{begin}")


def _results_since_prompt(request: ChatRequest) -> list[Any]:
    roles = [message["role"] for message in request.messages]
    since = len(roles) - roles[::-1].index("user")
    return [role for role in roles[since:] if role == "tool"]


def conversation(request: ChatRequest) -> list[str]:
    """What was said so far, by both."""
    texts = []
    for message in request.messages:
        content = message.get("content")
        is_text = isinstance(content, str)
        if message["role"] in ("user", "assistant") and content:
            texts.append(content if is_text else "".join(part["text"] for part in content))
    return texts


def shell(command: str) -> ToolCall:
    return tool_call("bash", command=command, description="A command")


def config(model: ScriptedModel, **changes: Any) -> RunConfig:
    # Each connection to the model ends with its request, and so within its test.
    options = {"scripted": {"options": {"headers": {"Connection": "close"}}}}
    return model.run_config(config_overrides={"provider": options}, **changes)


def make_configuration(workspace: Path) -> Path:
    """Make the directory of *workspace*'s own configuration, with nothing for npm to install."""
    directory = workspace / ".opencode"
    shutil.copytree(Path.home() / ".config" / "opencode", directory)
    return directory


def make_what_stays(runner: Runner) -> None:
    """Make what a runner makes once when it is first used: no test is to be blamed for it."""
    if isinstance(runner, OpenCodeServer):
        open_connections(runner)
    elif isinstance(runner, OpenCodeClient):
        runner._directories.empty_config()


def open_connections(server: OpenCodeServer) -> None:
    """All that tests will use, at once, so that none of them opens one that stays."""
    with ExitStack() as requests:
        client = server._servers.current().connection._client
        begun = [
            requests.enter_context(client.stream("GET", "/global/health"))
            for _ in range(CONNECTIONS)
        ]
        for response in begun:
            response.read()


GONE_S = 5.0  # what may pass after the end of a script that could do nothing itself
SLEEPS_S = (90901, 90902, 90903, 90904)
_LAST_WORDS = [[str(sleep_s)] for sleep_s in SLEEPS_S]


class Tools:
    """Sleeping processes: a plain child, one in another session, one without a parent, and one
    without a parent and without our mark in its environment.

    They are known by the ids that they write into *file*.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        (file.parent / "sleeper.sh").write_text("echo $$ >> $1; exec sleep $2\n")

    @property
    def call(self) -> Answer:
        first, second, third, fourth = (f"sh sleeper.sh {self._file.name} {n}" for n in SLEEPS_S)
        unmarked = f"(env -i setsid {fourth} >/dev/null 2>&1 &)"
        return shell(f"{unmarked}; (setsid sh -c '{first} & {second}' &); {third}")

    def wait_until_started(self) -> None:
        self._wait_until(
            lambda: self._file.exists() and len(self._pids()) == len(SLEEPS_S), WITHIN_S
        )

    def wait_until_gone(self) -> None:
        self._wait_until(lambda: not self.living(), GONE_S)

    def living(self) -> list[int]:
        """Those that have started and not ended."""
        found = []
        for pid in self._pids():
            with suppress(psutil.Error):  # gone, or a zombie
                found += [pid] if psutil.Process(pid).cmdline()[-1:] in _LAST_WORDS else []
        return found

    def _pids(self) -> list[int]:
        return [int(line) for line in self._file.read_text().split("\n")[:-1]]

    def _wait_until(self, holds: Callable[[], bool], within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < deadline, f"{self._file.name} after {within_s} s"
            time.sleep(0.01)  # nobody tells of a process that comes or goes
