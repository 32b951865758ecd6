"""A warm server of the real opencode, with a model that each test tells what to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import OpenCodeClient, OpenCodeServer, RunConfig
from opencode_sync.testing import Answer, ChatRequest, ScriptedModel, tool_call

CONNECTIONS = 12  # more than any test uses at once


@dataclass
class Script:
    """What the model answers to each prompt, and what it was asked."""

    answers: dict[str, Callable[[ChatRequest], Answer]] = field(default_factory=dict)
    requests: list[ChatRequest] = field(default_factory=list)

    def __call__(self, request: ChatRequest) -> Answer:
        self.requests.append(request)
        told = (answer for begin, answer in self.answers.items() if _says(request, begin))
        return next(told, lambda request: f"re {request.prompt}")(request)

    def to(self, prompt: str, *replies: Answer) -> str:
        """Answer *prompt*, and what begins with it, with *replies*: one for each step."""
        self.answers[prompt] = lambda request: replies[
            min(len(_results_since_prompt(request)), len(replies) - 1)
        ]
        return prompt

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


def shell(command: str) -> Answer:
    return tool_call("bash", command=command, description="A command")


def config(model: ScriptedModel, **changes: Any) -> RunConfig:
    # Each connection to the model ends with its request, and so within its test.
    options = {"scripted": {"options": {"headers": {"Connection": "close"}}}}
    commands = {"greet": {"template": "say hello to $ARGUMENTS", "description": "Greets"}}
    overrides = {"provider": options, "command": commands}
    return model.run_config(config_overrides=overrides, **changes)


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def model(script: Script) -> Iterator[ScriptedModel]:
    with ScriptedModel(script) as model:
        yield model


@pytest.fixture(scope="module")
def server(opencode_binary: str, model: ScriptedModel) -> Iterator[OpenCodeServer]:
    with OpenCodeServer(opencode_binary, run_cfg=config(model)) as server:
        open_connections(server)
        yield server


@pytest.fixture
def client(opencode_binary: str, model: ScriptedModel) -> Iterator[OpenCodeClient]:
    with OpenCodeClient(opencode_binary, run_cfg=config(model)) as client:
        yield client


@pytest.fixture(params=["server", "process"])
def runner(request: pytest.FixtureRequest, server: OpenCodeServer, client: OpenCodeClient) -> Any:
    """Both runners, one after the other."""
    return server if request.param == "server" else client


def open_connections(server: OpenCodeServer) -> None:
    """All that tests will use, at once, so that none of them opens one that stays."""
    with ExitStack() as requests:
        client = server._fleet.current().link.connection._client
        begun = [
            requests.enter_context(client.stream("GET", "/global/health"))
            for _ in range(CONNECTIONS)
        ]
        for response in begun:
            response.read()


@pytest.fixture(scope="module")
def workspace(server: OpenCodeServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")
