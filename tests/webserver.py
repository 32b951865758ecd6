"""A web server that answers what the test says, in the place of OpenCode's.

GET /global/event --> a Feed, through which the test sends events
anything else     --> what the test has put down for it, and a record in ``requests``
"""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

WITHIN_S = 30
CONNECTED = {"payload": {"type": "server.connected", "properties": {}}}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


@dataclass(frozen=True)
class Answer:
    """Attributes:
    body: Bytes as they are, pieces of them one by one, or anything else as JSON.
    """

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Feed:
    """One connection to the event stream."""

    def __init__(self) -> None:
        self._chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.send(CONNECTED)

    def send(self, event: Any) -> None:
        """As OpenCode writes it: no blanks between the tokens."""
        data = event if isinstance(event, str) else json.dumps(event, separators=(",", ":"))
        event_bytes = f"data: {data}\n\n".encode()
        self._chunks.put(b"%x\r\n%s\r\n" % (len(event_bytes), event_bytes))

    def say(self, session_id: str, kind: str, **properties: Any) -> None:
        payload = {"type": kind, "properties": {"sessionID": session_id, **properties}}
        self.send({"directory": "/w", "project": "global", "payload": payload})

    def end(self) -> None:
        """End it as a server does that is done."""
        self._chunks.put(b"0\r\n\r\n")
        self._chunks.put(None)

    def cut(self) -> None:
        """End it as a server does that is killed."""
        self._chunks.put(None)

    def write_to(self, write: Callable[[bytes], object]) -> None:
        while (chunk := self._chunks.get()) is not None:
            write(chunk)


class WebServer:
    """On loopback, one thread per connection; a context manager."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answers: dict[str, Answer | Callable[[], Answer]] = {}
        self._feeds: queue.SimpleQueue[Feed] = queue.SimpleQueue()
        self._all_feeds: list[Feed] = []
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def next_feed(self) -> Feed:
        """The next connection to the event stream; waits until there is one."""
        return self._feeds.get(timeout=WITHIN_S)

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As if killed: nothing listens, and no connection is left. Idempotent."""
        self._server.shutdown()
        for feed in self._all_feeds:
            feed.cut()
        self._server.cut()
        self._server.server_close()
        if self._thread.is_alive():
            self._thread.join(WITHIN_S)

    def open_feed(self) -> Feed:
        feed = Feed()
        self._all_feeds.append(feed)
        self._feeds.put(feed)
        return feed

    def answer_to(self, request: Request) -> Answer:
        self.requests.append(request)
        answer = self.answers.get(request.path, Answer())
        return answer if isinstance(answer, Answer) else answer()


class _Server(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, owner: WebServer) -> None:
        self.owner = owner
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        owner, target = self.server.owner, urlsplit(self.path)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if target.path == "/global/event" and target.path not in owner.answers:
            self._stream(owner.open_feed())
            return
        answer = owner.answer_to(
            Request(
                self.command,
                target.path,
                dict(parse_qsl(target.query, keep_blank_values=True)),
                {name.lower(): value for name, value in self.headers.items()},
                json.loads(body) if body else None,
            )
        )
        body = answer.body
        if not isinstance(body, (bytes, Iterator)):
            body = json.dumps(body).encode()
        with suppress(OSError):  # the client is gone
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if isinstance(body, bytes):
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            else:
                self.close_connection = True  # the body's end
                self.end_headers()
                for piece in body:
                    self.wfile.write(piece)

    do_POST = do_DELETE = do_PATCH = do_GET

    def _stream(self, feed: Feed) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(OSError):  # the client is gone
            feed.write_to(self.wfile.write)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass
