"""A server that answers as OpenCode never does: always an OpenCodeError."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import OpenCodeError, OpenCodeServer, OpenCodeServerError, RunConfig
from opencode_sync.server import running, sessions, turn
from tests.webserver import WITHIN_S, Answer, Feed, WebServer

SESSION = "ses_1"
WHOLE = {"start": 1, "end": 2}
ODD: list[Any] = [None, [], "x", [None], {"id": []}, {"id": {}, "info": 3, "parts": 3}]


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
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OddServer]:
    for bound in ("DOUBT_S", "LOOK_S", "BEGUN_S"):
        monkeypatch.setattr(turn, bound, 0.02)
    with WebServer() as web:
        yield OddServer(web, tmp_path)


def ending(work: Callable[[], object]) -> None:
    """Let it end well, or with an error of ours; anything else is raised."""
    with suppress(OpenCodeError):
        work()


def test_a_sound_answer_is_taken(odd: OddServer, tmp_path: Path) -> None:
    with odd.connect() as server:
        result = server.run("x", tmp_path)

    assert (result.status, result.answer) == ("ok", "Hi")


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
    odd: OddServer, tmp_path: Path, path: str
) -> None:
    going_on = (RunConfig(session_id=SESSION), RunConfig(session_id=SESSION, fork=True))
    server = OpenCodeServer.connect(odd.web.url) if path == "/global/health" else odd.connect()
    for answer in ODD:
        odd.web.answers[path] = Answer(answer)
        if path == "/global/health":
            ending(lambda: OpenCodeServer.connect(odd.web.url).version)
            continue
        for cfg in (RunConfig(), RunConfig(continue_session=True), *going_on):
            ending(lambda cfg=cfg: server.run("x", tmp_path, run_cfg=cfg))
        with server.session(tmp_path, session_id=SESSION) as chat:
            for work in (chat.messages, chat.fork, chat.revert, server.sessions):
                ending(work)
    server.close()


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


def test_odd_messages_do_no_harm_to_a_turn(odd: OddServer, tmp_path: Path) -> None:
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
    with odd.connect() as server:
        for value in ODD:
            odd.events = [(kind, value) for kind in paths]
            odd.events += [(kind, within(path, value)) for kind in paths for path in paths[kind]]

            ending(lambda: server.run("x", tmp_path, timeout_s=WITHIN_S))


@pytest.mark.parametrize("is_new", [True, False], ids=["new session", "latest session"])
def test_the_first_request_in_a_directory_has_a_limit_of_its_own(
    odd: OddServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    for module in (running, sessions):
        monkeypatch.setattr(module, "FIRST_S", 0.2)
    released = threading.Event()
    odd.web.answers["/session"] = lambda: Answer([] if released.wait(WITHIN_S) else None)

    with odd.connect() as server:
        cfg = RunConfig(continue_session=not is_new)
        with pytest.raises(OpenCodeServerError, match=r"timed out \(.* /session\)"):
            server.run("x", tmp_path, run_cfg=cfg)
        released.set()
