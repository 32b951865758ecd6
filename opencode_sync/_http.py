"""HTTP to one OpenCode server.

    any thread -----> request() -------------> pooled client ---------+--> server
    helper thread --> events(), in_background() --> own connections --+

Short requests share a pool. What is read for long has connections of its own, which cut() ends from
another thread. Knows requests and answers, nothing of prompts, sessions or processes.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlsplit

from ._secrets import config_refusal
from .errors import OpenCodeConfigError, OpenCodeServerError

if TYPE_CHECKING:  # imported where it is used: it takes 0.1 s
    import httpx2

USER = "opencode"  # OpenCode's own default

CONNECT_S = 5.0
REQUEST_S = 60.0
# The first request in a directory reads its configuration: 1 to 4 s were seen. Where there is a
# .opencode, OpenCode installs by npm into it before it answers: 90 s on a slow network.
FIRST_S = 300.0


class Connection:
    """One server, reached by HTTP. Safe to share between threads; not across a fork.

    Attributes:
        url: Where it is, without credentials.
        label: Its host and port.
        password: What it asks for, or None.
        lost: Why it is gone, once somebody knows; requests that fail then say so.
    """

    def __init__(
        self, url: str, *, username: str | None = None, password: str | None = None
    ) -> None:
        """Connects nowhere yet. Credentials may stand in *url* too; the arguments come first.

        Raises:
            OpenCodeConfigError: If *url* is none of HTTP.
        """
        import httpx2

        parts = _parsed(url)
        self.label = parts.netloc.rpartition("@")[2]
        self.url = parts._replace(netloc=self.label).geturl().rstrip("/")
        self.lost: str | None = None
        username = username or unquote(parts.username or "") or USER
        password = password if password is not None else unquote(parts.password or "")
        _check_credentials(username, password)
        self.password = password or None
        self._settings: dict[str, Any] = {
            "base_url": self.url,
            "auth": httpx2.BasicAuth(username, password) if password else None,
            # The environment's proxy, and credentials in a .netrc, are not meant for us.
            "trust_env": False,
            # Certificates take 70 ms to load, and without TLS are of no use.
            "verify": parts.scheme == "https",
        }
        self._client = self._make_client()
        self._long_client = self._make_client(max_keepalive_connections=0)
        self._local = threading.local()
        self._long_sockets: dict[int, socket.socket] = {}  # by thread, which has one at a time
        self._is_cut = False

    def _make_client(self, **limits: Any) -> httpx2.Client:
        import httpx2

        # OpenCode keeps idle connections open as long as we do.
        bounds = httpx2.Limits(keepalive_expiry=None, **limits)
        return httpx2.Client(limits=bounds, **self._settings)

    def __repr__(self) -> str:
        return f"<Connection to {self.url}>"

    def get(self, path: str, **params: Any) -> Any:
        """The answer to a GET; see :meth:`request`."""
        return self.request("GET", path, **params)

    def post(self, path: str, body: Any = None, **params: Any) -> Any:
        """The answer to a POST; see :meth:`request`."""
        return self.request("POST", path, body, **params)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout_s: float = REQUEST_S,
        **params: Any,
    ) -> Any:
        """The answer, parsed as JSON, or None where it is empty.

        Args:
            body: Goes out as JSON; None for none.
            timeout_s: Bound on each wait for the server.
            params: For the query; what is None is left out.

        Raises:
            OpenCodeServerError: If the server refuses, with its status and words, or does not
                answer.
        """
        with self._pool() as client, self._translated(method, path):
            response = client.request(
                method,
                path,
                content=_json(body),
                headers=_JSON if body is not None else None,
                params={name: value for name, value in params.items() if value is not None},
                timeout=_timeout(timeout_s),
            )
        return _answer(response)

    def in_background(
        self, path: str, body: Any, then: Callable[[OpenCodeServerError | None], None]
    ) -> None:
        """POST what the server answers only when all is done, without waiting for it.

        *then* is called in a helper thread, with what went wrong or None.
        """

        def post() -> None:
            error: OpenCodeServerError | None = None
            try:
                with self._translated("POST", path), self._cuttable() as long:
                    response = self._long_client.post(
                        path, content=_json(body), headers=_JSON, timeout=_timeout(None), **long
                    )
                _answer(response)
            except OpenCodeServerError as refusal:
                error = refusal
            then(error)

        name = f"opencode-{self.label}-request"
        threading.Thread(target=post, name=name, daemon=True).start()

    def events(self, path: str, silence_s: float) -> Iterator[str]:
        """The data of each server-sent event, until the server ends the stream.

        Raises:
            OpenCodeServerError: If the server refuses, or nothing came for *silence_s* seconds,
                or the stream broke.
        """
        with (
            self._translated("GET", path),
            self._cuttable() as long,
            self._long_client.sse(
                path,
                timeout=_timeout(silence_s),
                max_event_size=None,  # an answer of 8 MB is one event
                **long,
            ) as source,
        ):
            if source.response.status_code != 200:
                source.response.read()
                _answer(source.response)
            for event in source:
                yield event.data

    def cut(self) -> None:
        """End the long requests, and those yet to come; from any thread."""
        self._is_cut = True
        for connected in list(self._long_sockets.values()):
            _shut_down(connected)

    def close(self) -> None:
        """Give the connections back; nobody is to use them any more."""
        self.cut()
        self._client.close()
        self._long_client.close()

    @contextmanager
    def _pool(self) -> Iterator[httpx2.Client]:
        """The pooled client; or another, where a finaliser interrupts this thread's own request.

        Then this very thread may hold the pool's locks, and its lists be half changed.
        """
        if getattr(self._local, "is_busy", False):
            with self._make_client() as client:
                yield client
            return
        self._local.is_busy = True
        try:
            yield self._client
        finally:
            self._local.is_busy = False

    @contextmanager
    def _cuttable(self) -> Iterator[dict[str, Any]]:
        """Arguments of a request that :meth:`cut` can end."""
        me = threading.get_ident()

        def trace(step: str, info: Mapping[str, Any]) -> None:
            if step.endswith(("connect_tcp.complete", "start_tls.complete")):
                connected = info["return_value"].get_extra_info("socket")
                self._long_sockets[me] = connected
                if self._is_cut:
                    _shut_down(connected)

        try:
            yield {"extensions": {"trace": trace}}
        finally:
            self._long_sockets.pop(me, None)

    @contextmanager
    def _translated(self, method: str, path: str) -> Iterator[None]:
        """Have what httpx2 raises leave as OpenCodeServerError."""
        import httpx2

        try:
            yield
        # RuntimeError is what a closed client raises.
        except (httpx2.HTTPError, httpx2.InvalidURL, RuntimeError) as error:
            words = str(error) or type(error).__name__
            reason = self.lost or f"the server at {self.url} does not answer: {words}"
            raise OpenCodeServerError(f"{reason} ({method} {path})") from error


_JSON = {"Content-Type": "application/json"}


def _json(body: Any) -> bytes | None:
    return None if body is None else json.dumps(body).encode()


def _parsed(url: str) -> SplitResult:
    with suppress(ValueError, TypeError, AttributeError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts
    # Not the value itself: a password may stand in it.
    raise OpenCodeConfigError("the server's URL is none of HTTP: use 'http://HOST:PORT'")


def _check_credentials(*words: str) -> None:
    try:
        for word in words:
            word.encode()
    except (AttributeError, UnicodeEncodeError):  # whose text would show it
        raise OpenCodeConfigError(
            "the server's user name or password is no text: use a str that UTF-8 can encode"
        ) from None


def _timeout(read_s: float | None) -> httpx2.Timeout:
    import httpx2

    return httpx2.Timeout(REQUEST_S, connect=CONNECT_S, read=read_s)


def _shut_down(connected: socket.socket) -> None:
    # Closing would leave a thread that reads from it waiting; this wakes it. Not the method of an
    # SSL socket, which would pull the session away from under the reader.
    with suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _answer(response: httpx2.Response) -> Any:
    request, status = response.request, response.status_code
    where = f"{request.method} {request.url.path}"
    if not response.is_success:
        words = "wrong or missing password" if status == 401 else _refusal(response)
        raise OpenCodeServerError(
            f"the server refused {where}: {status} {words}", status_code=status
        )
    if not response.content:
        return None
    try:
        return response.json()
    except ValueError:
        # OpenCode shows its web page where it knows no such path.
        raise OpenCodeServerError(
            f"the server answered {where} with no JSON: is it OpenCode 1.18 or later?"
        ) from None


def _refusal(response: httpx2.Response) -> str:
    """The server's own words for a refusal; OpenCode has several shapes of them."""
    with suppress(ValueError):
        body = response.json()
        if (fault := config_refusal(body)) is not None:
            return fault
        if isinstance(body, dict):
            data = body.get("data")
            words = data.get("message") if isinstance(data, dict) else body.get("message")
            if words:
                return str(words)
    return response.text.strip()[:500] or response.reason_phrase
