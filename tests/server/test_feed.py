"""The server's messages: who gets which, and what happens when the stream ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from opencode_sync.core.errors import OpenCodeServerError
from opencode_sync.core.lifetime import CancelScope
from opencode_sync.server import feed as _sse
from opencode_sync.server.connection import Connection
from opencode_sync.server.feed import GAP, EventStream, Mailbox, Message
from tests.webserver import WITHIN_S, Answer, Feed, WebServer


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


@pytest.fixture
def connection(server: WebServer) -> Iterator[Connection]:
    connection = Connection(server.url)
    yield connection
    connection.close()


@pytest.fixture
def unopened(connection: Connection) -> Iterator[EventStream]:
    stream = EventStream(connection)
    yield stream
    stream.close()


@pytest.fixture
def stream(unopened: EventStream) -> EventStream:
    unopened.open(CancelScope())
    return unopened


@pytest.fixture
def feed(server: WebServer, stream: EventStream) -> Feed:
    return server.next_feed()


def take(mailbox: Mailbox, count: int) -> list[Message]:
    """The next *count* messages; more are a failure."""
    messages: list[Message] = []
    while len(messages) < count:
        messages += mailbox.receive(WITHIN_S)
    assert len(messages) == count
    return messages


def kinds(messages: list[Message]) -> list[str]:
    return [message.type for message in messages]


def test_each_session_gets_its_own_messages_alone_in_order(stream: EventStream, feed: Feed) -> None:
    a, b = stream.mailbox("ses_a"), stream.mailbox("ses_b")

    for number in range(50):
        feed.say("ses_a", "message.part.delta", delta=number)
        feed.say("ses_b", "one")
        feed.say("ses_c", "nobody's")

    messages = take(a, 50)
    assert messages[0] == Message("ses_a", "message.part.delta", {"sessionID": "ses_a", "delta": 0})
    assert [message.properties["delta"] for message in messages] == list(range(50))
    assert kinds(take(b, 50)) == ["one"] * 50


def test_second_copies_and_messages_of_unknown_shape_are_passed_over(
    stream: EventStream, feed: Feed
) -> None:
    mailbox = stream.mailbox("ses_a")
    copy = {"type": "sync", "syncEvent": {"aggregateID": "ses_a"}}

    feed.send({"directory": "/w", "payload": copy})
    for odd in ("[]", "7", "{}", '{"payload":null}', '{"payload":{"type":"x","properties":[]}}'):
        feed.send(odd)
    feed.say("ses_a", "quotes a copy", part={"input": {"payload": {"type": "sync"}}})

    assert kinds(take(mailbox, 1)) == ["quotes a copy"]


def test_a_sub_agent_s_messages_come_with_its_parent_s(stream: EventStream, feed: Feed) -> None:
    mailbox = stream.mailbox("ses_a")

    feed.say("ses_b", "session.created", info={"id": "ses_b", "parentID": "ses_a"})
    feed.say("ses_c", "session.created", info={"id": "ses_c", "parentID": "ses_b"})
    feed.say("ses_c", "permission.asked")
    feed.say("ses_a", "session.idle")

    messages = take(mailbox, 4)
    assert [message.session_id for message in messages] == ["ses_b", "ses_c", "ses_c", "ses_a"]


def test_a_sub_agent_that_is_taken_up_again_is_followed(stream: EventStream, feed: Feed) -> None:
    mailbox = stream.mailbox("ses_a")
    call = {"type": "tool", "tool": "task", "state": {"metadata": {"sessionId": "ses_old"}}}

    feed.say("ses_a", "message.part.updated", part={**call, "state": {"status": "pending"}})
    feed.say("ses_a", "message.part.updated", part=call)
    feed.say("ses_old", "permission.asked")

    assert kinds(take(mailbox, 3)) == ["message.part.updated"] * 2 + ["permission.asked"]
    assert list(mailbox.sessions) == ["ses_a", "ses_old"]


def test_a_sub_agent_with_a_mailbox_of_its_own_keeps_it(stream: EventStream, feed: Feed) -> None:
    parent, child = stream.mailbox("ses_a"), stream.mailbox("ses_b")

    feed.say("ses_b", "session.created", info={"id": "ses_b", "parentID": "ses_a"})
    feed.say("ses_a", "session.idle")

    assert kinds(take(child, 1)) == ["session.created"]
    assert kinds(take(parent, 1)) == ["session.idle"]


def test_a_closed_mailbox_gets_nothing_more(stream: EventStream, feed: Feed) -> None:
    mailbox = stream.mailbox("ses_a")
    feed.say("ses_b", "session.created", info={"id": "ses_b", "parentID": "ses_a"})
    take(mailbox, 1)
    mailbox.close()
    other = stream.mailbox("ses_c")

    feed.say("ses_a", "late")
    feed.say("ses_b", "late")
    feed.say("ses_c", "last")

    assert kinds(take(other, 1)) == ["last"]
    with pytest.raises(queue.Empty):
        mailbox.receive(0)


@pytest.mark.parametrize("end", [Feed.end, Feed.cut], ids=["ended", "cut"])
def test_a_stream_that_broke_is_opened_again_and_the_gap_told(
    server: WebServer, stream: EventStream, feed: Feed, end: object
) -> None:
    a, b = stream.mailbox("ses_a"), stream.mailbox("ses_b")
    feed.say("ses_a", "before")

    end(feed)  # type: ignore[operator]
    server.next_feed().say("ses_a", "after")

    assert kinds(take(a, 3)) == ["before", "gap", "after"]
    assert take(b, 1) == [GAP]


def test_a_stream_that_falls_silent_is_opened_again(
    server: WebServer, unopened: EventStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sse, "SILENCE_S", 0.1)
    unopened.open(CancelScope())
    server.next_feed()
    mailbox = unopened.mailbox("ses_a")

    server.next_feed()

    assert GAP in mailbox.receive(WITHIN_S)


def test_a_server_that_does_not_come_back_fails_all_who_wait(
    server: WebServer, stream: EventStream, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sse, "REOPEN_S", 0.1)
    mailboxes = [stream.mailbox(f"ses_{number}") for number in range(4)]

    server.stop()

    for mailbox in mailboxes:
        with pytest.raises(OpenCodeServerError, match="does not answer"):
            mailbox.receive(WITHIN_S)


def test_the_first_reason_of_a_loss_is_told_to_all_after_what_came_before(
    stream: EventStream, feed: Feed
) -> None:
    before = stream.mailbox("ses_a")
    before.put(Message("ses_a", "last", {}))

    stream.lose("the server was ended by signal 9")
    stream.lose("a later reason")

    assert kinds(before.receive(0)) == ["last"]
    for mailbox in (before, before, stream.mailbox("ses_b")):
        with pytest.raises(OpenCodeServerError, match=r"^the server was ended by signal 9$"):
            mailbox.receive(0)


def test_opening_fails_with_the_server_s_refusal(server: WebServer, unopened: EventStream) -> None:
    server.answers[_sse.PATH] = Answer(b"", status=503)

    with pytest.raises(OpenCodeServerError, match=f"refused GET {_sse.PATH}: 503"):
        unopened.open(CancelScope())


def test_a_refusal_while_opening_again_is_final(
    server: WebServer, stream: EventStream, feed: Feed
) -> None:
    server.answers[_sse.PATH] = Answer(b"", status=401)
    mailbox = stream.mailbox("ses_a")

    feed.cut()

    with pytest.raises(OpenCodeServerError, match="401"):
        mailbox.receive(WITHIN_S)


def test_closing_ends_the_reader_and_fails_who_waits(stream: EventStream, feed: Feed) -> None:
    mailbox = stream.mailbox("ses_a")
    before = threading.active_count()

    stream.close()

    assert threading.active_count() == before - 1
    with pytest.raises(OpenCodeServerError, match="was closed"):
        mailbox.receive(0)


def test_what_cannot_be_read_is_an_error_where_messages_are_awaited(
    stream: EventStream, feed: Feed
) -> None:
    mailbox = stream.mailbox("ses_a")

    feed.send("no JSON")

    with pytest.raises(OpenCodeServerError, match="cannot be read: Expecting value"):
        mailbox.receive(WITHIN_S)


def test_messages_that_nobody_takes_are_dropped_beyond_a_bound_and_the_gap_is_told(
    stream: EventStream, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sse, "MAX_WAITING", 1_000)
    mailbox, marker = stream.mailbox("ses_a"), stream.mailbox("ses_marker")
    for number in range(20):
        feed.say("ses_a", "message.part.delta", number=number, delta="x" * 200)
    feed.say("ses_marker", "session.status")
    marker.receive(WITHIN_S)

    before = mailbox.receive(WITHIN_S)
    feed.say("ses_a", "session.status")
    after = mailbox.receive(WITHIN_S)

    assert before[-1] is GAP
    numbers = [message.properties["number"] for message in before[:-1]]
    assert numbers == list(range(len(numbers)))
    assert 0 < len(numbers) < 5  # each of more than 200 characters
    assert [message.type for message in after] == ["session.status"]
