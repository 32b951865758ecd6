"""What the rooms for HTTP and events rely on, with the real ``opencode serve``."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from opencode_sync.core.errors import OpenCodeServerError
from opencode_sync.process.command import build_env
from opencode_sync.server import feed
from opencode_sync.server.connection import Connection
from opencode_sync.server.feed import EventStream, Mailbox, Message
from opencode_sync.testing import Answer, ChatRequest, Reply, ScriptedModel, tool_call

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes")

PASSWORD = "a-secret-word"
WITHIN_S = 60


@dataclass
class Served:
    """An ``opencode serve``, a model that answers as the test says, and a connection to it."""

    process: subprocess.Popen[str]
    url: str
    workspace: Path
    answers: dict[str, Callable[[ChatRequest], Answer]] = field(default_factory=dict)

    def connect(self, **credentials: Any) -> Connection:
        return Connection(self.url, **{"password": PASSWORD, **credentials})


@pytest.fixture(scope="module")
def served(opencode_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    workspace = root / "workspace"
    workspace.mkdir()
    answers: dict[str, Callable[[ChatRequest], Answer]] = {}
    with ScriptedModel(lambda request: answers[request.prompt](request)) as model:
        homes = {f"XDG_{name}_HOME": str(root / name) for name in ("DATA", "CONFIG", "STATE")}
        # Each connection to the model ends with its request, and so within its test.
        options = {"options": {"headers": {"Connection": "close"}}}
        overrides = {"provider": {"scripted": options}}
        env = build_env(model.run_config(extra_env=homes, config_overrides=overrides), os.environ)
        env |= {"OPENCODE_SERVER_PASSWORD": PASSWORD, "PWD": str(workspace)}
        process = subprocess.Popen(
            [opencode_binary, "serve", "--port", "0"],
            cwd=workspace,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            yield Served(process, _url(process), workspace, answers)
        finally:
            process.kill()
            process.communicate()


def _url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if "listening on" in line:
            return line.split()[-1]
    raise AssertionError("opencode serve ended without listening")


@pytest.fixture
def connection(served: Served) -> Iterator[Connection]:
    connection = served.connect()
    yield connection
    connection.close()


@pytest.fixture
def stream(connection: Connection) -> Iterator[EventStream]:
    stream = EventStream(connection)
    stream.open()
    yield stream
    stream.close()


@pytest.fixture
def begin(
    served: Served, connection: Connection, stream: EventStream
) -> Callable[[str], tuple[str, Mailbox]]:
    """Send a prompt in a session of its own."""

    def begin(prompt: str) -> tuple[str, Mailbox]:
        session_id = connection.post("/session", {"title": "T"}, directory=str(served.workspace))[
            "id"
        ]
        mailbox = stream.mailbox(session_id)
        parts = [{"type": "text", "text": prompt}]
        assert connection.post(f"/session/{session_id}/prompt_async", {"parts": parts}) is None
        return session_id, mailbox

    return begin


Begin = Callable[[str], tuple[str, Mailbox]]


def until(mailbox: Mailbox, is_last: Callable[[Message], bool]) -> list[Message]:
    """The messages up to the first that *is_last*, and those that came with it."""
    messages: list[Message] = []
    while not any(map(is_last, messages)):
        messages += mailbox.receive(WITHIN_S)
    return messages


def until_idle(mailbox: Mailbox, session_id: str) -> list[Message]:
    return until(mailbox, lambda m: (m.session_id, m.type) == (session_id, "session.idle"))


def test_a_turn_goes_from_the_user_s_message_to_idle(served: Served, begin: Begin) -> None:
    served.answers["hello"] = lambda request: "hi there"

    session_id, mailbox = begin("hello")
    messages = until_idle(mailbox, session_id)

    roles = [m.properties["info"]["role"] for m in messages if m.type == "message.updated"]
    parts = [m.properties["part"] for m in messages if m.type == "message.part.updated"]
    assert roles[0] == "user"
    assert set(roles[1:]) == {"assistant"}
    assert [part["type"] for part in parts] == [
        *("text", "step-start", "text", "text", "step-finish")
    ]
    assert parts[3]["text"] == "hi there"
    assert parts[3]["time"]["end"]


def test_a_delta_comes_before_the_model_has_finished(served: Served, begin: Begin) -> None:
    released = threading.Event()
    served.answers["slowly"] = lambda request: Reply(["first ", released, "second"])

    session_id, mailbox = begin("slowly")
    deltas = until(mailbox, lambda m: m.type == "message.part.delta")
    released.set()
    rest = until_idle(mailbox, session_id)

    assert [m.properties["delta"] for m in deltas if m.type == "message.part.delta"] == ["first "]
    assert [m.properties["delta"] for m in rest if m.type == "message.part.delta"] == ["second"]


def test_a_sub_agent_s_messages_come_with_its_parent_s(served: Served, begin: Begin) -> None:
    def delegate(request: ChatRequest) -> Answer:
        if request.tool_results:
            return "parent done"
        return tool_call("task", description="look", prompt="look around", subagent_type="general")

    served.answers["delegate"] = delegate
    served.answers["look around"] = lambda request: "child done"

    session_id, mailbox = begin("delegate")
    messages = until_idle(mailbox, session_id)

    texts = [
        (m.session_id == session_id, m.properties["part"]["text"])
        for m in messages
        if m.type == "message.part.updated" and m.properties["part"].get("time", {}).get("end")
    ]
    assert texts == [(False, "child done"), (True, "parent done")]


def test_an_answer_of_8_mb_comes_in_one_message(served: Served, begin: Begin) -> None:
    answer = "x" * 8_000_000
    served.answers["much"] = lambda request: answer

    session_id, mailbox = begin("much")
    messages = until_idle(mailbox, session_id)

    sizes = [
        len(m.properties["part"].get("text", ""))
        for m in messages
        if m.type == "message.part.updated"
    ]
    assert max(sizes) == len(answer)


@pytest.mark.parametrize("password", ["wrong", ""], ids=["wrong", "none"])
def test_without_the_password_nothing_is_answered(served: Served, password: str) -> None:
    connection = served.connect(password=password)
    stream = EventStream(connection)

    try:
        with pytest.raises(OpenCodeServerError, match="401") as caught:
            connection.get("/global/health")
        with pytest.raises(OpenCodeServerError, match="401"):
            stream.open()
    finally:
        stream.close()
        connection.close()

    assert caught.value.status_code == 401


def test_an_unknown_session_is_refused_in_the_server_s_words(connection: Connection) -> None:
    session_id = "ses_00000000000000000000000000"

    with pytest.raises(OpenCodeServerError, match=f"404 Session not found: {session_id}"):
        connection.get(f"/session/{session_id}")


def test_a_killed_server_fails_who_waits(  # the last test: it ends the server
    served: Served, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "REOPEN_S", 0.2)
    released = threading.Event()
    served.answers["hold"] = lambda request: Reply(["held", released])
    _, mailbox = begin("hold")
    until(mailbox, lambda m: m.type == "message.part.delta")

    served.process.kill()

    try:
        with pytest.raises(OpenCodeServerError, match="does not answer"):
            while True:
                mailbox.receive(WITHIN_S)
    finally:
        released.set()
