"""Requests to a server: what goes out, what comes back, and what a refusal says."""

from __future__ import annotations

import base64
import itertools
import queue
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from opencode_sync.core.errors import OpenCodeConfigError, OpenCodeServerError
from opencode_sync.core.lifetime import CancelScope
from opencode_sync.server.connection import MAX_BYTES, Connection
from tests.webserver import WITHIN_S, Answer, WebServer

SECRET = "a-secret-word"


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


@pytest.fixture
def connect() -> Iterator[Callable[..., Connection]]:
    made = []

    def connect(url: str, **credentials: Any) -> Connection:
        made.append(Connection(url, **credentials))
        return made[-1]

    yield connect
    for connection in made:
        connection.close()


Connect = Callable[..., Connection]


def test_a_request_carries_its_body_and_query_and_gives_the_parsed_answer(
    server: WebServer, connect: Connect
) -> None:
    server.answers["/session"] = Answer({"id": "ses_1"})
    body = {"title": "\ud800"}  # JSON can have half a character

    answer = connect(server.url).post("/session", body, directory="/a b", workspace=None)

    (request,) = server.requests
    assert answer == {"id": "ses_1"}
    assert (request.method, request.path) == ("POST", "/session")
    assert request.query == {"directory": "/a b"}
    assert request.body == body
    assert "authorization" not in request.headers


@pytest.mark.parametrize(
    "url, credentials, user",
    [
        pytest.param("http://{}", {"password": SECRET}, "opencode", id="password"),
        pytest.param("http://{}", {"username": "me", "password": SECRET}, "me", id="both"),
        pytest.param("http://me:a%2Dsecret-word@{}/", {}, "me", id="in the URL"),
    ],
)
def test_credentials_go_out_with_each_request_and_show_nowhere(
    server: WebServer, connect: Connect, url: str, credentials: dict[str, str], user: str
) -> None:
    server.answers["/bad"] = Answer(status=404)
    connection = connect(url.format(server.url.removeprefix("http://")), **credentials)

    with pytest.raises(OpenCodeServerError) as caught:
        connection.get("/bad")

    expected = base64.b64encode(f"{user}:{SECRET}".encode()).decode()
    assert server.requests[0].headers["authorization"] == f"Basic {expected}"
    assert connection.url == server.url
    assert SECRET not in f"{connection!r} {connection.label} {caught.value!r}"


def test_a_proxy_of_the_environment_is_not_asked(
    server: WebServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)

    connect(server.url).get("/session")

    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body, words",
    [
        pytest.param({"name": "N", "data": {"message": "no session x"}}, "no session x", id="data"),
        pytest.param({"_tag": "T", "message": "no request x"}, "no request x", id="message"),
        pytest.param(["odd"], '["odd"]', id="list"),
        pytest.param(b"", "Not Found", id="empty"),
    ],
)
def test_a_refusal_has_the_status_and_the_words_of_the_server(
    server: WebServer, connect: Connect, body: Any, words: str
) -> None:
    server.answers["/session/x"] = Answer(body, status=404)

    with pytest.raises(OpenCodeServerError) as caught:
        connect(server.url).get("/session/x")

    assert str(caught.value) == f"the server refused GET /session/x: 404 {words}"
    assert caught.value.status_code == 404


def test_a_server_that_is_not_there_is_named_with_the_request_and_the_cause_if_it_is_known(
    server: WebServer, connect: Connect
) -> None:
    connection = connect(server.url)
    server.stop()

    with pytest.raises(OpenCodeServerError, match=rf"{server.url} .* refused \(POST /x\)"):
        connection.post("/x")
    connection.lost = "the server was ended by signal 9"
    with pytest.raises(OpenCodeServerError, match=r"^the server was ended by signal 9 \(GET /x\)"):
        connection.get("/x")


@pytest.mark.parametrize("url", ["", "localhost:4096", "ftp://host", "http://", "http://[", None])
def test_what_is_no_url_of_http_is_refused_at_once(connect: Connect, url: Any) -> None:
    with pytest.raises(OpenCodeConfigError, match="use 'http://HOST:PORT'"):
        connect(url)


def test_a_closed_connection_sends_nothing(server: WebServer, connect: Connect) -> None:
    connection = connect(server.url)
    connection.close()

    with pytest.raises(OpenCodeServerError, match="closed"):
        connection.get("/session")

    assert server.requests == []


def test_what_interrupts_a_request_can_make_one_of_its_own(
    server: WebServer, connect: Connect
) -> None:
    connection = connect(server.url)

    class Interruption:
        """Stands for a finaliser, which may run at any line."""

        def __str__(self) -> str:
            connection.post("/inner")
            return "x"

    connection.get("/outer", value=Interruption())

    assert [request.path for request in server.requests] == ["/inner", "/outer"]


def test_a_request_in_the_background_reports_its_end(server: WebServer, connect: Connect) -> None:
    server.answers["/refused"] = Answer({"data": {"message": "no command"}}, status=400)
    server.answers["/taken"] = Answer(b"", status=204)
    ends: queue.SimpleQueue[OpenCodeServerError | None] = queue.SimpleQueue()
    connection = connect(server.url)

    connection.in_background("/taken", {"command": "init"}, ends.put)
    assert ends.get(timeout=WITHIN_S) is None

    connection.in_background("/refused", {}, ends.put)
    assert "400 no command" in str(ends.get(timeout=WITHIN_S))


def test_events_come_whole_and_in_order(server: WebServer, connect: Connect) -> None:
    long = "x" * 8_000_000
    events = connect(server.url).events("/global/event", WITHIN_S)
    connected = next(events)
    feed = server.next_feed()
    for data in ("first", f'{{"text":"{long}"}}', "last"):
        feed.send(data)
    feed.end()

    rest = list(events)

    assert "server.connected" in connected
    assert rest == ["first", f'{{"text":"{long}"}}', "last"]


# --- bounds --------------------------------------------------------------------------------------


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set at the test's end: what answers slowly is to stop then."""
    event = threading.Event()
    yield event
    event.set()


def dribble(released: threading.Event, byte: bytes = b" ") -> Iterator[bytes]:
    while not released.wait(0.02):
        yield byte


def test_a_bound_is_on_the_whole_of_a_request(
    server: WebServer, connect: Connect, released: threading.Event
) -> None:
    server.answers["/slow"] = lambda: Answer(dribble(released))

    with pytest.raises(OpenCodeServerError, match="does not answer: timed out"):
        connect(server.url).request("GET", "/slow", timeout_s=0.5)


@pytest.mark.parametrize("by", ["its scope", "the connection"])
def test_a_request_can_be_cut(
    server: WebServer, connect: Connect, released: threading.Event, by: str
) -> None:
    reached = threading.Event()

    def hang() -> Answer:
        reached.set()
        return Answer(dribble(released))

    server.answers["/slow"] = hang
    connection, scope = connect(server.url), CancelScope()
    ends: queue.SimpleQueue[OpenCodeServerError | None] = queue.SimpleQueue()
    connection.get("/session", scope=scope)  # has ended, and is not concerned
    connection.in_background("/slow", {}, ends.put, scope=scope)
    assert reached.wait(WITHIN_S)

    if by == "its scope":
        scope.cancel()
        assert connection.get("/session") == {}
    else:
        connection.cut()

    assert isinstance(ends.get(timeout=WITHIN_S), OpenCodeServerError)
    with pytest.raises(OpenCodeServerError, match="cut"):
        connection.get("/session", scope=scope)


def test_a_request_that_its_scope_s_deadline_ends_does_not_end_before_it(
    server: WebServer, connect: Connect, released: threading.Event
) -> None:
    class Preempted(CancelScope):
        def left(self) -> float:
            time.sleep(0.2)  # as on a machine that has other work
            return super().left()

    server.answers["/slow"] = lambda: Answer(dribble(released))
    scope = Preempted(time.monotonic() + 0.5)

    with pytest.raises(OpenCodeServerError, match="timed out"):
        connect(server.url).get("/slow", scope=scope)

    assert time.monotonic() >= scope.deadline


def large() -> Iterator[bytes]:
    yield from itertools.repeat(b" " * 1_000_000, 1_000)


def bomb() -> Iterator[bytes]:
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    for piece in large():
        yield packer.compress(piece)


def test_an_answer_that_is_too_large_is_refused_and_not_kept(
    server: WebServer, connect: Connect
) -> None:
    server.answers["/large"] = lambda: Answer(bomb(), headers={"Content-Encoding": "gzip"})
    connection = connect(server.url)
    tracemalloc.start()

    try:
        with pytest.raises(OpenCodeServerError, match=r"GET /large with more than 64 MB"):
            connection.get("/large")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 3 * MAX_BYTES


def test_an_event_that_never_ends_is_refused(server: WebServer, connect: Connect) -> None:
    def endless() -> Answer:
        pieces = itertools.chain([b"data: "], large())
        return Answer(pieces, headers={"Content-Type": "text/event-stream"})

    server.answers["/global/event"] = endless

    with pytest.raises(ValueError, match=r"exceeded the 64000000 byte limit"):
        next(connect(server.url).events("/global/event", WITHIN_S))


ODD = {"null": None, "a page": b"<html>", "list": [[]], "deep": b"[" * 100_000}


@pytest.mark.parametrize("body", ODD.values(), ids=ODD)
def test_a_response_of_another_shape_is_an_error_that_names_the_request(
    server: WebServer, connect: Connect, body: Any
) -> None:
    server.answers["/session"] = Answer(body)
    connection = connect(server.url)

    with pytest.raises(OpenCodeServerError, match="answered GET /session with"):
        connection.object("/session")
    with pytest.raises(OpenCodeServerError, match="answered GET /session with"):
        connection.objects("/session")
