"""A stand-in for ``opencode serve``: a script that answers the requests that we make.

The first word of a prompt says what its turn does:

    say WORDS    answers with them
    hold         begins to answer, and goes on until it is aborted
    tool         starts a process that outlives it, then does as hold
    ask          asks for permission, and answers with the reply
    gap WORDS    loses the event streams in the middle of the answer
    break        ends the turn with an error
    die          ends the server
    vanish       ends the server before it has answered that it took the prompt; noted in a file
                 "vanished" beside the sessions

Sessions are kept in the data directory. Environment: SERVING_START=silent|crash|slow|open,
SERVING_VERSION, and SERVING_TELLS, a file that is written when it was started.
"""

from __future__ import annotations

import base64
import ctypes
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

PASSWORD = os.environ.get("OPENCODE_SERVER_PASSWORD", "")
STORE = Path(os.environ.get("XDG_DATA_HOME", ".")) / "sessions.json"


def forget_password() -> None:
    """Write it over in the environment that others can read, as ours does with OpenCode's."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    if address := libc.getenv(b"OPENCODE_SERVER_PASSWORD"):
        ctypes.memset(address, ord("*"), len(PASSWORD))


numbers = itertools.count(time.time_ns() // 1_000_000)
lock = threading.RLock()
streams: list[queue.SimpleQueue[bytes]] = []
aborted: dict[str, threading.Event] = {}
replies: dict[str, queue.SimpleQueue[Any]] = {}
sessions: dict[str, dict[str, Any]] = json.loads(STORE.read_text()) if STORE.exists() else {}


def emit(kind: str, session_id: str, **properties: Any) -> None:
    payload = {"type": kind, "properties": {"sessionID": session_id, **properties}}
    event = json.dumps({"directory": "/", "payload": payload}, separators=(",", ":"))
    for stream in list(streams):
        stream.put(b"data: " + event.encode() + b"\n\n")


def save() -> None:
    with lock:
        STORE.write_text(json.dumps(sessions))


class Turn:
    """One prompt's turn, in a thread of its own."""

    def __init__(self, session_id: str, prompt: str) -> None:
        self.id, self.verb, _, self.words = session_id, *prompt.partition(" ")
        aborted[session_id] = threading.Event()
        threading.Thread(target=self.run, args=(prompt,), daemon=True).start()

    def message(self, role: str, **more: Any) -> dict[str, Any]:
        info = {"id": f"msg_{next(numbers)}", "role": role, "time": {"created": next(numbers)}}
        entry: dict[str, Any] = {"info": info | more, "parts": []}
        sessions[self.id]["messages"].append(entry)
        self.update(entry)
        return entry

    def update(self, entry: dict[str, Any]) -> None:
        save()
        emit("message.updated", self.id, info=entry["info"])

    def part(self, entry: dict[str, Any], kind: str, **more: Any) -> dict[str, Any]:
        part = {"id": f"prt_{next(numbers)}", "messageID": entry["info"]["id"], "type": kind} | more
        entry["parts"].append(part)
        emit("message.part.updated", self.id, part=part)
        return part

    def status(self, kind: str) -> None:
        sessions[self.id]["status"] = kind
        emit("session.status", self.id, status={"type": kind})

    def run(self, prompt: str) -> None:
        user = self.message("user")
        self.part(user, "text", text=prompt)
        self.status("busy")
        entry = self.message("assistant", parentID=user["info"]["id"])
        self.part(entry, "step-start")
        if self.verb == "break":
            return self.fail(entry, "ProviderError", "broken")
        if self.verb == "tool":
            marks = f"{os.environ['OPENCODE_SYNC_RUN']}/{self.id}"
            env = {**os.environ, "OPENCODE_SYNC_RUN": marks}
            tool = subprocess.Popen(["sleep", "600"], env=env, start_new_session=True)
            shown = Path(f"/proc/{tool.pid}/environ")
            while shown.exists() and marks.encode() not in shown.read_bytes():
                time.sleep(0.001)  # for a moment of its start a process shows none
        text = self.part(entry, "text", text="", time={"start": 1})
        emit("message.part.delta", self.id, partID=text["id"], field="text", delta=self.verb)
        words = self.answer()
        if words is None:
            return self.fail(entry, "MessageAbortedError", "Aborted")
        text |= {"text": words, "time": {"start": 1, "end": 2}}
        emit("message.part.updated", self.id, part=text)
        tokens = {"total": 120, "input": 100, "output": 20}
        self.part(entry, "step-finish", reason="stop", cost=0.5, tokens=tokens)
        self.end(entry, finish="stop")

    def answer(self) -> str | None:
        if self.verb == "die":
            os._exit(3)
        if self.verb in ("hold", "tool"):
            aborted[self.id].wait()
            return None
        if self.verb == "ask":
            request_id = f"per_{next(numbers)}"
            replies[request_id] = queue.SimpleQueue()
            emit("permission.asked", self.id, id=request_id, permission="bash", patterns=["ls"])
            return json.dumps(replies[request_id].get())
        if self.verb == "gap":
            for stream in streams:
                stream.put(b"")
            while streams:
                time.sleep(0.005)
        return self.words

    def fail(self, entry: dict[str, Any], name: str, message: str) -> None:
        error = {"name": name, "data": {"message": message}}
        emit("session.error", self.id, error=error)
        self.status("idle")
        self.end(entry, error=error)

    def end(self, entry: dict[str, Any], **more: Any) -> None:
        entry["info"] |= {**more, "time": {**entry["info"]["time"], "completed": next(numbers)}}
        self.update(entry)
        self.status("idle")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        target = urlsplit(self.path)
        query = dict(parse_qsl(target.query))
        wanted = "Basic " + base64.b64encode(f"opencode:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != wanted:
            return self.answer(None, 401)
        if target.path == "/global/event":
            return self.stream()
        data = json.loads(body) if body else {}
        answer = self.route(self.command, target.path.strip("/").split("/"), data, query)
        if answer is NotImplemented:
            return self.answer({"data": {"message": f"Session not found: {target.path}"}}, 404)
        self.answer(answer)

    do_POST = do_PATCH = do_GET

    def route(self, method: str, path: list[str], data: Any, query: dict[str, str]) -> Any:
        match path:
            case ["global", "health"]:
                return {"healthy": True, "version": os.environ.get("SERVING_VERSION", "1.18.33")}
            case ["session"] if method == "POST":
                session_id = f"ses_{next(numbers)}"
                directory = query["directory"]
                sessions[session_id] = {"id": session_id, "directory": directory, "messages": []}
                sessions[session_id] |= data
                save()
                return sessions[session_id]
            case ["session"]:
                return [
                    s for s in reversed(sessions.values()) if s["directory"] == query["directory"]
                ]
            case ["session", "status"]:
                busy = [s for s in sessions.values() if s.get("status", "idle") != "idle"]
                return {s["id"]: {"type": s["status"]} for s in busy}
            case ["permission", request_id, "reply"]:
                replies[request_id].put(data)
                return True
            case ["permission"] | ["question"]:
                return []
            case ["session", session_id, *verb] if session_id in sessions:
                return self.session(session_id, verb, data, query)
        return NotImplemented if path[0] == "session" else True

    def session(self, session_id: str, verb: list[str], data: Any, query: dict[str, str]) -> Any:
        session = sessions[session_id]
        match verb:
            case ["message"] if session["title"] == "fatal":
                os._exit(3)
            case ["message"]:
                return session["messages"][-int(query.get("limit", 1_000_000)) :]
            case ["prompt_async"]:
                prompt = data["parts"][-1]["text"]
                if prompt == "vanish":
                    with open(STORE.with_name("vanished"), "a") as file:
                        file.write(f"{session_id}\n")
                    os._exit(3)
                Turn(session_id, prompt)
                return None
            case ["abort"]:
                aborted.get(session_id, threading.Event()).set()
                return True
            case ["fork"]:
                fork = {**session, "id": f"ses_{next(numbers)}", "permission": None}
                sessions[fork["id"]] = json.loads(json.dumps(fork))
                return fork
        session |= data
        return session

    def answer(self, value: Any, status: int = 200) -> None:
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        mine: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        mine.put(b'data: {"payload":{"type":"server.connected","properties":{}}}\n\n')
        streams.append(mine)
        try:
            while chunk := mine.get():
                self.wfile.write(chunk)
                self.wfile.flush()
        finally:
            streams.remove(mine)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *args: object) -> None:
        pass  # a client that is gone


def main() -> None:
    start = os.environ.get("SERVING_START")
    if start == "crash":
        sys.exit("something is \x1b[31mwrong\x1b[0m")
    if told := os.environ.get("SERVING_TELLS"):
        Path(told).write_text("started")
    if start != "open":
        forget_password()
    if start in ("silent", "slow"):
        time.sleep(600 if start == "silent" else 1)
    for session in sessions.values():
        session["status"] = "idle"
    server = Server(("127.0.0.1", 0), Handler)
    print("Warning: a line before", flush=True)
    print(f"opencode server listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
