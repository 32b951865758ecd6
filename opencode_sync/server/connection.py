"""HTTP to one OpenCode server.

    any thread ------> request() -----------------------+
    helper threads --> events(), in_background() -------+--> pool of connections --> server
                                                        |
    deadline, CancelScope.cancel(), cut(), close() -----+ end whatever is under way

A request has a time limit as a whole, however slowly the server responds, and goes over a socket
that is shut down when its scope is cancelled. Responses are bounded in size. Knows requests and
responses, nothing of prompts, sessions or processes.
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import SplitResult, unquote, urlsplit

from ..core.errors import OpenCodeConfigError, OpenCodeServerError
from ..core.lifetime import CancelScope
from ..core.secrets import config_refusal

if TYPE_CHECKING:  # imported where it is used: it takes 0.1 s
    import httpcore2
    import httpx2

USER = "opencode"  # OpenCode's own default

CONNECT_S = 5.0
REQUEST_S = 60.0
# The first request in a directory reads its configuration: 1 to 4 s were seen. Where there is a
# .opencode, OpenCode runs npm in it before it responds: 90 s on a slow network.
FIRST_S = 300.0

# One message can take 8 MB, and all messages of a turn are requested at once.
MAX_BYTES = 64_000_000
MAX_LIST_BYTES = 4 * MAX_BYTES
_PIECE = 65_536


class Connection:
    """One server, reached by HTTP. Safe to share between threads; not across a fork.

    Attributes:
        url: The server's URL, without credentials.
        label: Its host and port.
        password: The password that is sent, or None.
        lost: Why the server is gone, once that is known; requests that fail then say so.
        await_loss: Called when a request fails: returns when *lost* is known, if it will be soon.
        is_silent: Whether the last request got no response in time.
    """

    def __init__(
        self, url: str, *, username: str | None = None, password: str | None = None
    ) -> None:
        """Does not connect yet. *url* may hold credentials; the arguments take precedence.

        Raises:
            OpenCodeConfigError: If *url* is not an HTTP URL.
        """
        import httpx2

        parts = _parsed(url)
        self.label = parts.netloc.rpartition("@")[2]
        self.url = parts._replace(netloc=self.label).geturl().rstrip("/")
        self.lost: str | None = None
        self.await_loss: Callable[[], object] = lambda: None
        self.is_silent = False
        username = username or unquote(parts.username or "") or USER
        password = password if password is not None else unquote(parts.password or "")
        _check_credentials(username, password)
        self.password = password or None
        self._auth = httpx2.BasicAuth(username, password) if password else None
        # Loading certificates takes 70 ms, and plain HTTP needs none.
        self._tls = httpx2.create_ssl_context() if parts.scheme == "https" else None
        self._here = _Here()
        self._client = self._make_client()
        self._life = CancelScope()
        self._waiting: dict[int, _Call] = {}  # requests under way

    def _make_client(self) -> httpx2.Client:
        import httpcore2
        import httpx2

        transport = httpx2.HTTPTransport(verify=False)
        # The transport takes no network backend, which is where a total time limit can be kept.
        transport._pool = httpcore2.ConnectionPool(
            ssl_context=self._tls,
            max_connections=None,
            # OpenCode keeps idle connections open as long as we do.
            max_keepalive_connections=20,
            keepalive_expiry=None,
            network_backend=cast(Any, _Backend(httpcore2.SyncBackend(), self._here)),
        )
        return httpx2.Client(
            base_url=self.url,
            auth=self._auth,
            transport=transport,
            timeout=None,  # see _Call
            # The environment's proxy, and credentials in a .netrc, are not meant for us.
            trust_env=False,
        )

    def __repr__(self) -> str:
        return f"<Connection to {self.url}>"

    @property
    def is_waiting(self) -> bool:
        """Whether a request waits for its response."""
        return bool(self._waiting)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        scope: CancelScope | None = None,
        timeout_s: float = REQUEST_S,
        max_bytes: int = MAX_BYTES,
        keeps_open: bool = True,
        **params: Any,
    ) -> Any:
        """Return the response, parsed as JSON, or None where it is empty.

        Args:
            body: Sent as JSON; None for an empty body.
            scope: Ends the request too.
            timeout_s: Time limit of the whole request.
            max_bytes: Size limit of the response.
            keeps_open: Keep the connection for further requests.
            params: The query; those that are None are left out.

        Raises:
            OpenCodeServerError: If the server refuses, with its status and words, or does not
                respond in time.
        """
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if not keeps_open:
            headers["Connection"] = "close"
        with (
            self._calling(method, path, timeout_s, scope) as client,
            client.stream(
                method,
                path,
                content=None if body is None else json.dumps(body).encode(),
                headers=headers,
                params={name: value for name, value in params.items() if value is not None},
            ) as response,
        ):
            content = _read(response, max_bytes)
        self.is_silent = False
        return _parsed_response(response, content)

    def get(self, path: str, **params: Any) -> Any:
        """GET *path*; see :meth:`request`."""
        return self.request("GET", path, **params)

    def post(self, path: str, body: Any = None, **params: Any) -> Any:
        """POST to *path*; see :meth:`request`."""
        return self.request("POST", path, body, **params)

    def object(self, path: str, **params: Any) -> dict[str, Any]:
        """GET *path*, whose response must be a JSON object; see :meth:`request`."""
        response = self.get(path, **params)
        if isinstance(response, dict):
            return response
        raise _unexpected(path, "an object", response)

    def objects(self, path: str, **params: Any) -> list[dict[str, Any]]:
        """GET *path*, whose response must be a list of JSON objects; see :meth:`request`."""
        response = self.get(path, **params)
        if isinstance(response, list) and all(isinstance(each, dict) for each in response):
            return response
        raise _unexpected(path, "a list of objects", response)

    def in_background(
        self,
        path: str,
        body: Any,
        then: Callable[[OpenCodeServerError | None], None],
        *,
        timeout_s: float = math.inf,
        **settings: Any,
    ) -> None:
        """POST without waiting for the response, which comes only when all is done.

        *then* is called in a helper thread, with what went wrong or None.
        """

        def post() -> None:
            error: OpenCodeServerError | None = None
            try:
                self.post(path, body, timeout_s=timeout_s, **settings)
            except OpenCodeServerError as failure:
                error = failure
            then(error)

        name = f"opencode-{self.label}-request"
        threading.Thread(target=post, name=name, daemon=True).start()

    def events(self, path: str, silence_s: float) -> Iterator[str]:
        """Yield the data of each server-sent event, until the server ends the stream.

        Raises:
            OpenCodeServerError: If the server refuses, sends nothing for *silence_s* seconds, or
                the stream breaks.
            ValueError: If the response is not an event stream, or an event is larger than
                ``MAX_BYTES``.
        """
        import httpx2

        with (
            self._calling("GET", path, math.inf, is_stream=True) as client,
            client.sse(
                path, timeout=httpx2.Timeout(None, read=silence_s), max_event_size=MAX_BYTES
            ) as source,
        ):
            if source.response.status_code != 200:
                _parsed_response(source.response, _read(source.response, MAX_BYTES))
            try:
                for event in source:
                    yield event.data
            except httpx2.SSEError as error:
                raise ValueError(f"the server at {self.url} (GET {path}): {error}") from error

    def cut(self) -> None:
        """End the requests under way, and those yet to come; from any thread."""
        self._life.cancel()

    def close(self) -> None:
        """Close all sockets. Requests fail from now on."""
        self.cut()
        self._client.close()

    @contextmanager
    def _calling(
        self,
        method: str,
        path: str,
        timeout_s: float,
        scope: CancelScope | None = None,
        *,
        is_stream: bool = False,
    ) -> Iterator[httpx2.Client]:
        """Yield the client for one request, which ends in time or when it is cut.

        What httpx2 raises leaves as OpenCodeServerError.
        """
        import httpx2

        scope = CancelScope() if scope is None else scope
        # Not from what is left of the scope: reckoned anew, it could end a moment before.
        call = _Call(min(time.monotonic() + timeout_s, scope.deadline))
        # A finaliser may interrupt this thread's own request, while the thread holds the pool's
        # locks and its lists are half changed: the inner request gets a client of its own.
        outer = self._here.call
        client = self._client if outer is None else self._make_client()
        self._here.call = call
        if not is_stream:
            self._waiting[id(call)] = call
        try:
            with self._life.waking(call.cut), scope.waking(call.cut):
                yield client
                if call.is_cut:  # a response without a length may look whole then
                    raise httpx2.ReadError("the request was cut")
        # RuntimeError is what a closed client raises.
        except (httpx2.HTTPError, httpx2.InvalidURL, RuntimeError) as error:
            if isinstance(error, httpx2.TimeoutException):
                self.is_silent = True
            elif not is_stream and not call.is_cut:
                self.await_loss()
            words = str(error) or type(error).__name__
            reason = self.lost or f"the server at {self.url} does not answer: {words}"
            raise OpenCodeServerError(f"{reason} ({method} {path})") from error
        finally:
            self._here.call = outer
            self._waiting.pop(id(call), None)
            if outer is not None:
                client.close()


# -- time limits and cancellation, at the socket -------------------------------------------------


class _Call:
    """One request under way: its deadline, and its socket, which :meth:`cut` shuts down."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._socket: socket.socket | None = None
        self.is_cut = False

    def cut(self) -> None:
        self.is_cut = True
        connected = self._socket  # once: another thread changes it
        if connected is not None:
            # Closing would leave a thread that reads from it waiting; this wakes it. Not an SSL
            # socket's own method, which would pull the session away from under the reader.
            with suppress(OSError):
                socket.socket.shutdown(connected, socket.SHUT_RDWR)

    def bound(self, timeout: float | None, connected: socket.socket | None = None) -> float | None:
        """Return how long the next step may take, at most *timeout*; None for no limit."""
        import httpcore2

        self._socket = connected  # before the look at the flag: cut() does it the other way round
        if self.is_cut:
            raise httpcore2.ReadError("the request was cut")
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("timed out")
        shortest = left if timeout is None else min(left, timeout)
        return None if shortest == math.inf else shortest


class _Here(threading.local):
    """The request that this thread has under way."""

    call: _Call | None = None

    def bound(self, timeout: float | None, stream: Any = None) -> float | None:
        if self.call is None:
            return timeout
        return self.call.bound(timeout, stream and stream.get_extra_info("socket"))


class _Backend:
    """A ``httpcore2.NetworkBackend`` that keeps to the limits of the thread's request."""

    def __init__(self, backend: httpcore2.NetworkBackend, here: _Here) -> None:
        self._backend, self._here = backend, here

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, **more: Any
    ) -> _Stream:
        bound = self._here.bound(CONNECT_S)
        return _Stream(self._backend.connect_tcp(host, port, bound, **more), self._here)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class _Stream:
    """A ``httpcore2.NetworkStream`` that does the same."""

    def __init__(self, stream: httpcore2.NetworkStream, here: _Here) -> None:
        self._stream, self._here = stream, here

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._here.bound(timeout, self._stream))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # In pieces: the timeout of one write holds for each send that it takes.
        for start in range(0, len(buffer), _PIECE):
            piece = buffer[start : start + _PIECE]
            self._stream.write(piece, self._here.bound(timeout, self._stream))

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> _Stream:
        bound = self._here.bound(CONNECT_S, self._stream)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, bound), self._here)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# -- URLs and responses --------------------------------------------------------------------------


def _parsed(url: str) -> SplitResult:
    with suppress(ValueError, TypeError, AttributeError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts
    # Without the value: it may hold a password.
    raise OpenCodeConfigError("the server's URL is not an HTTP URL: use 'http://HOST:PORT'")


def _check_credentials(*words: str) -> None:
    try:
        for word in words:
            word.encode()
    except (AttributeError, UnicodeEncodeError):  # whose text would show it
        raise OpenCodeConfigError(
            "the server's user name or password is not text: use a str that UTF-8 can encode"
        ) from None


def _read(response: httpx2.Response, max_bytes: int) -> bytes:
    """Read the body, in chunks of 1 MB at most, however small it is on the wire."""
    chunks: list[bytes] = []
    size = 0
    for chunk in response.iter_bytes():
        size += len(chunk)
        if size > max_bytes:
            raise OpenCodeServerError(
                f"the server answered {_where(response)} with more than {max_bytes // 1_000_000} MB"
            )
        chunks.append(chunk)
    return b"".join(chunks)


def _where(response: httpx2.Response) -> str:
    return f"{response.request.method} {response.request.url.path}"


def _parsed_response(response: httpx2.Response, content: bytes) -> Any:
    where, status = _where(response), response.status_code
    if not response.is_success:
        words = "wrong or missing password" if status == 401 else _refusal(response, content)
        raise OpenCodeServerError(
            f"the server refused {where}: {status} {words}", status_code=status
        )
    if not content:
        return None
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        # OpenCode sends its web page for a path that it does not know.
        raise OpenCodeServerError(
            f"the server answered {where} with something that is not JSON: "
            "is it OpenCode 1.17 or later?"
        ) from None


def _refusal(response: httpx2.Response, content: bytes) -> str:
    """Return the server's own words for a refusal; OpenCode has several shapes of them."""
    with suppress(ValueError, RecursionError):
        body = json.loads(content)
        if (fault := config_refusal(body)) is not None:
            return fault
        if isinstance(body, dict):
            data = body.get("data")
            words = data.get("message") if isinstance(data, dict) else body.get("message")
            if words:
                return str(words)[:2000]
    return content[:500].decode("utf-8", "replace").strip() or response.reason_phrase


def _unexpected(path: str, wanted: str, got: object) -> OpenCodeServerError:
    kind = "null" if got is None else type(got).__name__
    return OpenCodeServerError(
        f"the server answered GET {path} with {kind} where {wanted} was expected: "
        "is it OpenCode 1.17 or later?"
    )
