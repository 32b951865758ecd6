"""One turn as a source of events: what it asks the server, and when."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import OpenCodeIncompleteError, RunConfig, RunResult
from opencode_sync.core.events import Event
from opencode_sync.core.lifetime import CancelScope
from opencode_sync.core.request import Request
from opencode_sync.server import turn as _turn
from opencode_sync.server.connection import Connection
from opencode_sync.server.protocol import Translator
from opencode_sync.server.running import RunningServer
from opencode_sync.server.turn import Turn
from tests.interrupting import interrupt_once
from tests.webserver import WITHIN_S, Answer, Feed, WebServer

ROOT = "ses_root"
WHOLE = {"start": 1, "end": 2}


def message(message_id: str, role: str, *parts: Any, created: int = 10) -> dict[str, Any]:
    time = {"created": created} | ({"completed": 20} if role == "assistant" else {})
    info = {"id": message_id, "role": role, "time": time}
    return {"info": info, "parts": [{"messageID": message_id, **part} for part in parts]}


STORED = [
    message("msg_u", "user"),
    message("msg_a", "assistant", {"id": "prt_t", "type": "text", "text": "Hi", "time": WHOLE}),
]


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for bound in ("DOUBT_S", "LOOK_S"):
        monkeypatch.setattr(_turn, bound, 0.02)
    monkeypatch.setattr(_turn, "BEGUN_S", 0.2)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as server:
        server.answers["/global/health"] = Answer({"version": "1.18.33"})
        server.answers["/session/status"] = Answer({})
        server.answers[f"/session/{ROOT}/message"] = Answer([])
        for path in ("/permission", "/question"):
            server.answers[path] = Answer([])
        yield server


@pytest.fixture
def running(server: WebServer) -> Iterator[RunningServer]:
    running = RunningServer(Connection(server.url), at_work={}, scope=CancelScope())
    yield running
    running.close()


@pytest.fixture
def feed(server: WebServer, running: RunningServer) -> Feed:
    return server.next_feed()


@pytest.fixture
def begin(running: RunningServer) -> Iterator[Callable[[], Turn]]:
    turns: list[Turn] = []

    def begin() -> Turn:
        request, mailbox = Request("x", Path("/"), RunConfig()), running.feed.mailbox(ROOT)
        turns.append(Turn(running, request, CancelScope(), mailbox, "/w", {"parts": []}))
        turns[-1].send()
        return turns[-1]

    yield begin
    for turn in turns:
        turn.close()


Begin = Callable[[], Turn]


def say(feed: Feed, *entries: dict[str, Any]) -> None:
    for entry in entries:
        feed.say(ROOT, "message.updated", info=entry["info"])
        for part in entry["parts"]:
            feed.say(ROOT, "message.part.updated", part=part)


def rest_of(turn: Turn) -> list[Event]:
    events: list[Event] = []
    while (more := turn.receive(WITHIN_S)) is not None:
        events += more
    return events


def paths(server: WebServer, end: str = "") -> list[str]:
    return [request.path for request in server.requests if request.path.endswith(end)]


def is_busy(server: WebServer) -> None:
    server.answers["/session/status"] = Answer({ROOT: {"type": "busy"}})


def test_a_ctrl_c_while_messages_are_read_loses_none_of_them(
    begin: Begin, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = begin()
    interrupt_once(monkeypatch, Translator, "read")
    say(feed, *STORED)
    feed.say(ROOT, "session.status", status={"type": "idle"})

    with pytest.raises(KeyboardInterrupt):
        rest_of(turn)

    assert [event["type"] for event in rest_of(turn)] == ["text"]


def test_an_end_that_was_not_told_is_noticed(server: WebServer, begin: Begin, feed: Feed) -> None:
    server.answers[f"/session/{ROOT}/message"] = Answer(STORED)
    turn = begin()
    feed.say(ROOT, "message.updated", info=STORED[0]["info"])

    events = rest_of(turn)

    assert [event["part"]["text"] for event in events] == ["Hi"]


def test_a_silent_turn_that_is_busy_goes_on(server: WebServer, begin: Begin, feed: Feed) -> None:
    is_busy(server)
    turn = begin()
    say(feed, STORED[0])
    turn.receive(WITHIN_S)

    with pytest.raises(queue.Empty):
        turn.receive(0.3)

    assert not turn.is_over


def test_a_prompt_that_leaves_no_trace_is_given_up(
    begin: Begin, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_turn, "BEGIN_S", 0.1)
    turn, result = begin(), RunResult()

    assert turn.receive(WITHIN_S) is None
    assert isinstance(turn.settle(result), OpenCodeIncompleteError)
    assert result.session_id == ROOT


def test_a_gap_is_filled_from_what_the_server_has_stored(
    server: WebServer, begin: Begin, feed: Feed
) -> None:
    is_busy(server)
    turn = begin()
    say(feed, STORED[0])
    turn.receive(WITHIN_S)
    task = {"id": "prt_k", "type": "tool", "tool": "task"}
    task |= {"state": {"status": "completed", "metadata": {"sessionId": "ses_child"}}}
    child = message("msg_c", "assistant", {"id": "prt_c", "type": "step-start"}, created=30)
    root = [*STORED, message("msg_b", "assistant", task, created=25)]
    server.answers[f"/session/{ROOT}/message"] = Answer(root)
    server.answers["/session/ses_child/message"] = Answer([child])
    server.answers["/session/status"] = Answer({})

    feed.cut()
    events = rest_of(turn)

    assert [(event["type"], event["sessionID"]) for event in events] == [
        ("text", ROOT),
        ("sub_agent", ROOT),
        ("tool_use", ROOT),
        ("step_start", "ses_child"),
    ]


def test_a_request_that_was_missed_is_found_and_answered_once(
    server: WebServer, begin: Begin, feed: Feed
) -> None:
    is_busy(server)
    request = {"id": "per_1", "sessionID": ROOT, "permission": "bash"}
    other = {"id": "per_2", "sessionID": "ses_other"}
    server.answers["/permission"] = Answer([request, other])
    turn = begin()
    say(feed, STORED[0])
    turn.receive(WITHIN_S)

    feed.cut()
    events = turn.receive(WITHIN_S)
    server.next_feed().say(ROOT, "permission.asked", **{**request, "sessionID": ROOT})
    turn.receive(WITHIN_S)
    server.answers["/session/status"] = Answer({})
    rest_of(turn)

    assert events is not None
    assert [event["type"] for event in events] == ["permission"]
    assert paths(server, "/reply") == ["/permission/per_1/reply"]


def test_a_turn_that_cannot_be_followed_any_more_is_aborted(
    server: WebServer, begin: Begin, feed: Feed
) -> None:
    server.answers[f"/session/{ROOT}/message"] = Answer({"message": "broken"}, status=500)
    is_busy(server)  # or, after a while, it would count as ended
    turn = begin()
    say(feed, STORED[0])
    turn.receive(WITHIN_S)

    feed.cut()

    assert turn.receive(WITHIN_S) is None
    assert paths(server, "/abort") == [f"/session/{ROOT}/abort"]
    assert "500 broken" in str(turn.settle(RunResult()))


# --- stopping ------------------------------------------------------------------------------------


def test_stopping_aborts_a_turn_again_that_begins_only_then(
    server: WebServer, begin: Begin
) -> None:
    aborted = threading.Event()

    def abort() -> Answer:
        aborted.set()
        return Answer(True)

    server.answers[f"/session/{ROOT}/abort"] = abort
    server.answers["/session/status"] = lambda: Answer({ROOT: {}} if aborted.is_set() else {})

    begin().stop()

    assert len(paths(server, "/abort")) == 2


def test_a_turn_that_is_stopped_may_have_used_tools_that_it_was_not_told_of(begin: Begin) -> None:
    turn = begin()

    turn.stop()

    assert turn.has_used_tools


def test_stopping_a_turn_that_never_begins_is_bounded(server: WebServer, begin: Begin) -> None:
    begin().stop()

    assert len(paths(server, "/abort")) == 1


def test_stopping_a_turn_of_a_server_that_is_gone_is_harmless(
    server: WebServer, begin: Begin
) -> None:
    turn = begin()
    server.stop()

    turn.stop()

    assert turn.receive(WITHIN_S) is None


# --- requests ------------------------------------------------------------------------------------


def ask(feed: Feed, kind: str = "permission") -> None:
    say(feed, STORED[0])
    feed.say(ROOT, f"{kind}.asked", id="x_1")


def until_asked(turn: Turn) -> None:
    while not any(event["type"] in ("permission", "question") for event in turn.receive(5) or ()):
        pass


def test_a_question_that_nobody_answers_is_declined(
    server: WebServer, begin: Begin, feed: Feed
) -> None:
    is_busy(server)
    turn = begin()
    ask(feed, "question")
    until_asked(turn)

    with pytest.raises(queue.Empty):
        turn.receive(0.1)

    assert "/question/x_1/reject" in paths(server)


def test_an_answer_that_comes_too_late_is_harmless(
    server: WebServer, begin: Begin, feed: Feed
) -> None:
    is_busy(server)
    server.answers["/permission/x_1/reply"] = Answer({"message": "not found"}, status=404)
    turn = begin()
    ask(feed)
    until_asked(turn)

    with pytest.raises(queue.Empty):
        turn.receive(0.1)
