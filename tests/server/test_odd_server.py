"""A server that answers as OpenCode never does: always an OpenCodeError, and bounded in memory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import OpenCodeError, OpenCodeServer, RunConfig
from opencode_sync.server import feed as _sse
from opencode_sync.server.connection import Connection
from opencode_sync.server.feed import GAP, EventStream
from tests.webserver import WITHIN_S, Answer, Feed, WebServer

SESSION = "ses_1"
WHOLE = {"start": 1, "end": 2}
ODD: list[Any] = [None, [], 3, "x", [None], [[]], {"id": []}, {"id": {}, "info": 3, "parts": 3}]


class OddServer:
    """Answers a prompt soundly, but for what the test replaces.

    Attributes:
        events: Messages of the turn, sent once the prompt is there, before its sound end.
    """

    def __init__(self, web: WebServer, workspace: Path) -> None:
        self.web = web
        self.events: list[tuple[str, Any]] = []
        self._feed: Feed | None = None
        self._times = itertools.count(10)
        session = {"id": SESSION, "directory": str(workspace), "permission": []}
        web.answers = {
            "/global/health": Answer({"version": "1.18.33"}),
            "/session": Answer(session),
            f"/session/{SESSION}": Answer(session),
            f"/session/{SESSION}/message": Answer([]),
            f"/session/{SESSION}/prompt_async": self._prompted,
            "/session/status": Answer({}),
            "/permission": Answer([]),
            "/question": Answer([]),
        }

    def connect(self) -> OpenCodeServer:
        server = OpenCodeServer.connect(self.web.url)
        assert server.version
        self._feed = self.web.next_feed()
        return server

    def _prompted(self) -> Answer:
        assert self._feed is not None
        for kind, properties in self.events:
            self._send(kind, properties)
        for role in ("user", "assistant"):
            message_id, created = f"msg_{next(self._times)}", next(self._times)
            times = {"created": created, "completed": created}
            info: dict[str, Any] = {"id": message_id, "role": role, "time": times}
            self._send("message.updated", {"info": info})
            if role == "user":
                continue
            part = {"id": f"prt_{created}", "messageID": message_id, "type": "text"}
            self._send("message.part.updated", {"part": {**part, "text": "Hi", "time": WHOLE}})
            step = {"messageID": message_id, "type": "step-finish", "reason": "stop"}
            self._send("message.part.updated", {"part": {**step, "id": f"prt_{created}_f"}})
        self._send("session.status", {"status": {"type": "idle"}})
        return Answer(b"", status=204)

    def _send(self, kind: str, properties: Any) -> None:
        assert self._feed is not None
        if isinstance(properties, dict):
            properties = {"sessionID": SESSION, **properties}
        self._feed.send({"directory": "/", "payload": {"type": kind, "properties": properties}})


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[OddServer]:
    with WebServer() as web:
        yield OddServer(web, tmp_path)


def ending(work: Callable[[], object]) -> str:
    """How it ended: "ok", or an error of ours; anything else is raised."""
    try:
        work()
    except OpenCodeError as error:
        return type(error).__name__
    return "ok"


def test_a_sound_answer_is_taken(odd: OddServer, tmp_path: Path) -> None:
    with odd.connect() as server:
        result = server.run("x", tmp_path)

    assert (result.status, result.answer) == ("ok", "Hi")


@pytest.mark.parametrize("answer", ODD, ids=json.dumps)
@pytest.mark.parametrize(
    "path",
    [
        "/global/health",
        "/session",
        f"/session/{SESSION}",
        f"/session/{SESSION}/message",
        "/session/status",
        "/permission",
        "/experimental/session",
    ],
)
def test_an_odd_answer_is_never_more_than_an_error_of_ours(
    odd: OddServer, tmp_path: Path, path: str, answer: Any
) -> None:
    odd.web.answers[path] = Answer(answer)
    going_on = (RunConfig(session_id=SESSION), RunConfig(session_id=SESSION, fork=True))

    if path == "/global/health":
        assert ending(lambda: OpenCodeServer.connect(odd.web.url).version) in OURS
        return
    with odd.connect() as server:
        for cfg in (RunConfig(), RunConfig(continue_session=True), *going_on):
            assert ending(lambda cfg=cfg: server.run("x", tmp_path, run_cfg=cfg)) in OURS
        with server.session(tmp_path, session_id=SESSION) as chat:
            for work in (chat.messages, chat.fork, chat.revert, server.sessions):
                assert ending(work) in OURS


OURS = {"ok", "OpenCodeServerError", "OpenCodeConfigError", "OpenCodeIncompleteError"}


def within(path: str, value: Any) -> Any:
    """*value* at *path*, with what makes OpenCode's messages of it around."""
    around: dict[str, Any] = {
        "info": {"id": "msg_1", "role": "assistant", "time": {"created": 20}},
        "part": {"id": "prt_1", "messageID": "msg_1", "type": "tool", "tool": "task"},
    }
    names = path.split(".")
    made: Any = value
    for depth in range(len(names) - 1, -1, -1):
        base = around.get(names[depth - 1], {}) if depth else {}
        made = {**base, names[depth]: made}
    return made


@pytest.mark.parametrize("value", ODD, ids=json.dumps)
def test_odd_messages_do_no_harm_to_a_turn(odd: OddServer, tmp_path: Path, value: Any) -> None:
    paths = {
        "message.updated": (
            *("info", "info.id", "info.role", "info.time", "info.error", "info.parentID"),
            *("info.time.created", "info.tokens", "info.cost", "info.structured", "info.summary"),
        ),
        "message.part.updated": (
            *("part", "part.id", "part.messageID", "part.type", "part.tool", "part.state"),
            *("part.state.metadata", "part.state.metadata.sessionId", "part.state.input"),
            *("part.time", "part.text", "part.cost", "part.tokens", "part.reason"),
            *("part.state.status", "part.state.time", "part.synthetic"),
        ),
        "message.part.delta": ("partID", "field", "delta"),
        "session.status": ("status", "status.type", "status.message", "status.attempt"),
        "session.error": ("error", "error.name", "error.data", "error.data.message"),
        "session.created": ("info", "info.id", "info.parentID"),
        "permission.asked": ("id", "permission", "patterns", "metadata", "tool"),
        "question.asked": ("id", "questions"),
    }
    odd.events = [(kind, value) for kind in paths]
    odd.events += [(kind, within(path, value)) for kind in paths for path in paths[kind]]

    with odd.connect() as server:
        how = ending(lambda: server.run("x", tmp_path, timeout_s=WITHIN_S))

    assert how in {*OURS, "OpenCodeProcessError"}


# --- memory --------------------------------------------------------------------------------------


def test_messages_that_nobody_takes_are_dropped_beyond_a_bound_and_the_gap_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_sse, "MAX_WAITING", 1_000)
    with WebServer() as web:
        connection = Connection(web.url)
        stream = EventStream(connection)
        stream.open()
        feed = web.next_feed()
        mailbox, marker = stream.mailbox(SESSION), stream.mailbox("ses_marker")
        for number in range(20):
            feed.say(SESSION, "message.part.delta", number=number, delta="x" * 200)
        feed.say("ses_marker", "session.status")
        marker.receive(WITHIN_S)

        before = mailbox.receive(WITHIN_S)
        feed.say(SESSION, "session.status")
        after = mailbox.receive(WITHIN_S)

        stream.close()
        connection.close()
    assert before[-1] is GAP
    numbers = [message.properties["number"] for message in before[:-1]]
    assert numbers == list(range(len(numbers)))
    assert 0 < len(numbers) < 5  # each of more than 200 characters
    assert [message.type for message in after] == ["session.status"]
