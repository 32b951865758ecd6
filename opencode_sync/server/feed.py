"""The messages that a server sends by itself, sorted by session.

    server --> /global/event --> reader thread --+--> mailbox of a session --> receive()
                                                 +--> mailbox of another       (its caller's thread)

A mailbox gets the messages about its session and its sub-agents' sessions, in order. The stream
has no replay: when it breaks or falls silent it is opened again, and each mailbox gets a GAP, after
which its receiver asks the server for the state. When the server is gone, every waiting thread gets
the error.

The reader is a daemon thread that only reads: it takes no lock of ours and runs no user code. Knows
how messages are addressed, nothing of what they mean.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from ..core import lifetime
from ..core.errors import OpenCodeServerError
from ..core.reading import called_session, mapping
from .connection import CONNECT_S, MAX_BYTES, Connection

_log = logging.getLogger("opencode_sync")

PATH = "/global/event"  # all directories; "/event" has one

SILENCE_S = 30.0  # the server sends a heartbeat every 10 s
REOPEN_S = 5.0  # how long a broken stream is opened again; a server boots in 1.5 s
PAUSE_S = 0.05  # before a broken stream is opened again; doubled at each failure
JOIN_S = 2.0  # bound on waiting for the reader

MAX_WAITING = 4 * MAX_BYTES  # characters of messages that a mailbox keeps

# Types of messages that we make ourselves.
REFUSED = "provider.refused"  # what preload.js saw of a provider's refusal
ANSWER = "answer"  # the end of a request whose response comes only when all is done
WAKE = "wake"  # says nothing: wakes who waits


class Message(NamedTuple):
    """What the server says: *type* and *properties* are OpenCode's."""

    session_id: str
    type: str
    properties: Mapping[str, Any]


GAP = Message("", "gap", {})
"""Messages may be missing here: ask for the state. The messages after it may repeat some of it."""


class Mailbox:
    """The messages about one session and its sub-agents' sessions.

    One thread receives.

    Attributes:
        session_id: The session.
        sessions: The session and its sub-agents' sessions that are known, oldest first.
    """

    def __init__(self, routes: dict[str, Mailbox], session_id: str) -> None:
        # Its put() is reentrant, so that a finaliser can use it in any thread.
        # Has messages with their sizes, and at the end why the server is gone.
        self._queue: lifetime.Queue[tuple[Message, int] | str] = lifetime.Queue()
        # Written by the reader alone, and by the receiver alone: the difference is what waits.
        self._put_size = self._taken_size = 0
        self._is_full = False
        self.sessions: dict[str, None] = {}  # an ordered set, whose single operations are atomic
        self._routes = routes
        self._closed = False
        self.session_id = session_id
        self.follow(session_id)

    def follow(self, session_id: str) -> None:
        """Take the messages about this session too."""
        self.sessions[session_id] = None
        self._routes[session_id] = self
        if self._closed:  # in the meantime, while the reader was adding a sub-agent
            self._routes.pop(session_id, None)

    def wait(self, timeout: float | None) -> None:
        """Return when there is something to receive; an interruption loses nothing.

        Raises:
            queue.Empty: If nothing came for *timeout* seconds.
        """
        self._queue.wait(timeout)

    def receive(self, timeout: float | None) -> list[Message]:
        """Return all messages that have come, at least one.

        Raises:
            queue.Empty: If none came for *timeout* seconds.
            OpenCodeServerError: If the server is gone; from then on every time.
        """
        messages: list[Message] = []
        self.wait(timeout)
        item = self._queue.get_nowait()
        with suppress(queue.Empty):
            while not isinstance(item, str):
                messages.append(item[0])
                self._taken_size += item[1]
                item = self._queue.get_nowait()
            self._queue.put(item)  # for the next call, and all after it
            if not messages:
                raise OpenCodeServerError(item)
        return messages

    def put(self, message: Message, size: int = 0) -> None:
        """Add *message*; from any thread.

        If too much waits already it is dropped, and a GAP is put in its place.

        Args:
            size: Its characters; 0 for a message that is never dropped.
        """
        if size and self._put_size - self._taken_size + size > MAX_WAITING:
            if not self._is_full:
                self._is_full = True
                self._queue.put((GAP, 0))
            return
        if size:
            self._is_full = False
            self._put_size += size
        self._queue.put((message, size))

    def fail(self, reason: str) -> None:
        """Have :meth:`receive` raise, after the messages that have come; from any thread."""
        self._queue.put(reason)

    def close(self) -> None:
        """Take no more messages. Idempotent, from any thread."""
        self._closed = True
        for session_id, mailbox in list(self._routes.copy().items()):
            if mailbox is self:
                self._routes.pop(session_id, None)


class EventStream:
    """The messages of one server, as long as it lives."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        # A plain dict, whose single operations are atomic: the reader must not wait for a lock,
        # and a finaliser cannot wait for one that its own thread holds.
        self._routes: dict[str, Mailbox] = {}
        self._opened = lifetime.Flag()  # at least once; or lost before
        self._closing = lifetime.Flag()
        self._is_reading = False
        self._reader: threading.Thread | None = None

    def open(self, scope: lifetime.CancelScope) -> None:
        """Start reading; no message is missed after the return. Call it once.

        Args:
            scope: Ends the waiting too.

        Raises:
            OpenCodeServerError: If the server refuses or does not answer.
        """
        self._reader = threading.Thread(
            target=self._guarded, name=f"opencode-{self._connection.label}-events", daemon=True
        )
        self._reader.start()
        if not scope.wait(self._opened, CONNECT_S + SILENCE_S):
            self.lose(f"the server at {self._connection.url} did not open an event stream")
        if self._connection.lost is not None:
            raise OpenCodeServerError(self._connection.lost)

    def mailbox(self, session_id: str) -> Mailbox:
        """Return a mailbox for the messages about *session_id* from now on."""
        mailbox = Mailbox(self._routes, session_id)
        if self._connection.lost is not None:
            mailbox.fail(self._connection.lost)
        return mailbox

    def put(self, message: Message, size: int = 0) -> None:
        """Give *message* to its mailbox; without one it is dropped."""
        if mailbox := self._routes.get(message.session_id):
            mailbox.put(message, size)

    def lose(self, reason: str) -> None:
        """Record that the server is gone, and wake the waiting threads. The first reason counts."""
        if self._connection.lost is None:
            _log.debug("%s: %s", self._connection.label, reason)
            self._connection.lost = reason
        for mailbox in self._mailboxes():
            mailbox.fail(self._connection.lost)
        self._opened.set()

    def close(self) -> None:
        """End the reader, and cut the current requests; waiting threads get the error."""
        self._closing.set()
        self.lose(f"the connection to {self._connection.url} was closed")
        self._connection.cut()
        # A finaliser may run in any thread, the reader itself included.
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(JOIN_S)

    # -- the reader thread ---------------------------------------------------------------------

    def _guarded(self) -> None:
        try:
            self._read()
        except BaseException as error:  # noqa: BLE001 - raised where the callers wait
            self.lose(f"{threading.current_thread().name}: {error!r}")

    def _read(self) -> None:
        pause_s, give_up_at = PAUSE_S, time.monotonic()  # the first try is not repeated
        while self._connection.lost is None:
            self._is_reading = False
            try:
                self._read_stream()
                reason = f"the server at {self._connection.url} ended the event stream"
            except OpenCodeServerError as error:
                reason = str(error)
                if error.status_code is not None and error.status_code < 500:
                    return self.lose(reason)
            except (ValueError, RecursionError) as error:  # not OpenCode's events
                return self.lose(f"the event stream cannot be read: {error}")
            if self._is_reading:
                _log.debug("%s: event stream broke: %s", self._connection.label, reason)
                pause_s, give_up_at = PAUSE_S, time.monotonic() + REOPEN_S
            if time.monotonic() >= give_up_at:
                return self.lose(reason)
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, 1.0)

    def _read_stream(self) -> None:
        """Deliver the messages of one connection until it ends."""
        for data in self._connection.events(PATH, SILENCE_S):
            if not self._is_reading:
                self._is_reading = True
                if self._opened.is_set():  # not for the first time
                    for mailbox in self._mailboxes():
                        mailbox.put(GAP)
                self._opened.set()
            self._deliver(data)

    def _deliver(self, data: str) -> None:
        # Most messages come a second time, in full length, as a record for other servers.
        start = data.find('"payload":') + len('"payload":')
        if data.startswith('{"type":"sync"', start):
            return
        payload = mapping(mapping(json.loads(data)).get("payload"))
        kind, properties = str(payload.get("type")), mapping(payload.get("properties"))
        parent, child = _kinship(kind, properties)
        if child and child not in self._routes and (mailbox := self._routes.get(parent)):
            mailbox.follow(child)
        self.put(Message(str(properties.get("sessionID")), kind, properties), len(data))

    def _mailboxes(self) -> set[Mailbox]:
        return set(tuple(self._routes.values()))  # noqa: C414 - tuple() is atomic, set() is not


def _kinship(kind: str, properties: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return a parent's session, and that of its sub-agent if the message is about one."""
    if kind == "session.created":
        info = mapping(properties.get("info"))
        return str(info.get("parentID")), str(info.get("id"))
    # A sub-agent that is resumed is not created; the tool call names its session.
    return str(properties.get("sessionID")), called_session(properties)
