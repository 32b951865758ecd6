"""An OpenAI-compatible chat server on loopback; its replies come from a callable.

    client --POST /v1/chat/completions--> connection thread --> admit() --> Reply
    client <--SSE chunks, or one JSON object-- the same thread

Each connection has a thread, and the server knows its socket: closing the sockets wakes every
thread that waits, so `stop` is immediate. This module knows OpenAI's chat format, nothing of
scripts and of OpenCode.
"""

from __future__ import annotations

import itertools
import json
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .replies import ChatRequest, Reply, finish_reason, wire_calls, wire_usage

_NO_HEADERS: Mapping[str, str] = {}
# Characters of text per SSE chunk. OpenCode takes 3 s longer for 8 MB in pieces of 16 kB.
_PIECE = 65_536
_GATE_POLL_S = 0.05  # while an answer waits for an event: how often it looks for its client
_ACCEPT_POLL_S = 0.02  # stop() waits at most this long; http.server's default is half a second


class ChatServer(ThreadingHTTPServer):
    """Answers on a free port, from its construction to `stop`.

    Args:
        models: Names of the models that it lists.
        admit: Returns the reply to a request, which is in flight from then on. The callables are
            called in the connections' threads.
        release: Called when a request is answered, or about to be, or its client has
            disconnected; once or twice for each request.
        report: Called with an exception of the user's code in the middle of an answer.
    """

    request_queue_size = 1024

    def __init__(
        self,
        models: Sequence[str],
        *,
        admit: Callable[[ChatRequest], Reply],
        release: Callable[[ChatRequest], None],
        report: Callable[[Exception], None],
    ) -> None:
        self.models, self.admit, self.release, self.report = models, admit, release, report
        self.stopping = threading.Event()
        self.numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, socket.socket] = {}
        super().__init__(("127.0.0.1", 0), _Connection)
        self._acceptor = self._thread("accept", self.serve_forever, _ACCEPT_POLL_S)
        self._acceptor.start()

    def stop(self, within_s: float) -> None:
        """Close all connections and wait for their threads, at most *within_s* seconds."""
        deadline = time.monotonic() + within_s
        self.stopping.set()
        self.shutdown()
        self.server_close()
        with self._lock:
            connections = dict(self._connections)
        for connection in connections.values():
            with suppress(OSError):  # closed already, by the client or by its thread
                connection.shutdown(socket.SHUT_RDWR)
        for thread in (self._acceptor, *connections):
            thread.join(max(0.0, deadline - time.monotonic()))

    def server_bind(self) -> None:
        # HTTPServer's looks up the host's name, which can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = self._thread("client", self.process_request_thread, request, client_address)
        with self._lock:
            thread.start()
            self._connections[thread] = request

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._connections[threading.current_thread()]

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # An OSError means that the client or stop() closed the connection.
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self.report(error)

    def _thread(self, role: str, target: Callable[..., None], *args: Any) -> threading.Thread:
        name = f"scripted-{self.server_port}-{role}"
        return threading.Thread(target=target, args=args, name=name, daemon=True)


class _Connection(BaseHTTPRequestHandler):
    """The connection of one client, in a thread of its own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 65_536
    server: ChatServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if not self.path.endswith("/models"):
            return self._refuse(404, f"no such path: {self.path}")
        models = [{"id": name, "object": "model"} for name in self.server.models]
        self._json(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.path.endswith("/chat/completions"):
            return self._refuse(404, f"no such path: {self.path}")
        try:
            body = json.loads(content)
        except ValueError as error:
            return self._refuse(400, f"the request is not valid JSON: {error}")
        if not isinstance(body, dict):
            return self._refuse(400, "the request is not a JSON object")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = ChatRequest(body, headers, time.time())
        reply = self.server.admit(request)
        try:
            self._answer(request, reply)
            self.wfile.flush()
        finally:
            self.server.release(request)

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.rfile.close()  # super() does not if the client has disconnected

    def _answer(self, request: ChatRequest, reply: Reply) -> None:
        self._pause(reply.delay_s)
        if reply.status >= 400:
            text = "".join(self._spoken(reply))
            self.server.release(request)
            self._refuse(reply.status, text, reply.headers)
        elif reply.ending != "finish" and not reply.text:
            self._break_off(reply)
        elif request.body.get("stream"):
            self._stream(request, reply)
        else:
            self._whole(request, reply)

    def _stream(self, request: ChatRequest, reply: Reply) -> None:
        frame = self._frame("chat.completion.chunk", request)

        def send(delta: Mapping[str, Any], ending: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": ending}
            self._event({**frame, "choices": [choice]})

        headers = {"Transfer-Encoding": "chunked", **reply.headers}
        self._head(reply.status, "text/event-stream", headers)
        send({"role": "assistant", "content": ""})
        if reply.reasoning:
            send({"reasoning_content": reply.reasoning})
        for text in self._spoken(reply):
            for start in range(0, len(text), _PIECE):
                send({"content": text[start : start + _PIECE]})
        if reply.ending != "finish":
            return self._break_off(reply)
        for index, call in enumerate(wire_calls(reply, frame["id"])):
            send({"tool_calls": [{"index": index, **call}]})
        # Before the client sees the end: when it sends its next request, this one must not count
        # as in flight.
        self.server.release(request)
        send({}, finish_reason(reply))
        if (request.body.get("stream_options") or {}).get("include_usage"):
            self._event({**frame, "choices": [], "usage": wire_usage(reply)})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _whole(self, request: ChatRequest, reply: Reply) -> None:
        frame = self._frame("chat.completion", request)
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._spoken(reply))}
        if reply.ending != "finish":
            return self._break_off(reply)
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.tool_calls:
            message["tool_calls"] = wire_calls(reply, frame["id"])
        choice = {"index": 0, "message": message, "finish_reason": finish_reason(reply)}
        self.server.release(request)
        answer = {**frame, "choices": [choice], "usage": wire_usage(reply)}
        self._json(reply.status, answer, reply.headers)

    def _spoken(self, reply: Reply) -> Iterator[str]:
        """Yield the parts of the text; between them, make the pauses and wait for the events."""
        for chunk in reply.chunks:
            if isinstance(chunk, str):
                yield chunk
            elif isinstance(chunk, (int, float)):
                self._pause(chunk)
            elif isinstance(chunk, threading.Event):
                self._hold(chunk)
            else:
                self._call(chunk)

    def _pause(self, seconds: float) -> None:
        """Wait; raises OSError as soon as the client or stop() closes the connection."""
        if seconds <= 0:
            return
        self.wfile.flush()
        self.connection.settimeout(seconds)
        try:
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError
        except TimeoutError:
            return
        finally:
            self.connection.settimeout(None)
        self.server.stopping.wait(seconds)  # the client has sent its next request already

    def _hold(self, gate: threading.Event) -> None:
        self.wfile.flush()
        while not gate.wait(_GATE_POLL_S):
            self._pause(0.001)

    def _call(self, gate: Callable[[], object]) -> None:
        self.wfile.flush()
        try:
            gate()
        except Exception as error:
            self.server.report(error)
            raise ConnectionAbortedError from error

    def _break_off(self, reply: Reply) -> None:
        self.wfile.flush()
        self.close_connection = True
        while reply.ending == "hang" and self.connection.recv(65_536):
            pass  # until the client, or stop(), closes the connection

    def _frame(self, kind: str, request: ChatRequest) -> dict[str, Any]:
        name = f"scripted-{next(self.server.numbers)}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": request.model}

    def _refuse(self, status: int, message: str, headers: Mapping[str, str] = _NO_HEADERS) -> None:
        error = {"message": message, "type": "scripted_failure", "code": status}
        self._json(status, {"error": error}, headers)

    def _json(self, status: int, value: object, headers: Mapping[str, str] = _NO_HEADERS) -> None:
        content = json.dumps(value).encode()
        self._head(status, "application/json", {"Content-Length": str(len(content)), **headers})
        self.wfile.write(content)

    def _head(self, status: int, content_type: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _event(self, value: object) -> None:
        self._chunk(b"data: %b\n\n" % json.dumps(value).encode())

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(content), content))
