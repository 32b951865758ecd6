"""A scripted model: test whole pipelines without a key, a network or costs.

    from opencode_sync import OpenCodeClient
    from opencode_sync.testing import ScriptedModel, tool_call

    model = ScriptedModel([tool_call("bash", command="ls", description="List"), "Two files."])
    with model, OpenCodeClient() as client:
        result = client.run("What is here?", run_cfg=model.run_config())

    assert result.answer == "Two files."
    assert model.requests[0].prompt == "What is here?"

It is an OpenAI-compatible chat server on loopback, with and without streaming, so any client can
use it.

    ChatRequest --> script --> Reply, ToolCall or str
         +--> requests, side_requests, refused_requests

This module knows how OpenCode is configured for the model and what OpenCode requests on its own;
`replies` has the values, `http` the server.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..core.config import RunConfig, merged
from ..core.result import TokenUsage
from .http import ChatServer
from .replies import Answer, ChatRequest, Chunk, Reply, ToolCall, as_reply, tool_call

__all__ = [
    "Answer",
    "ChatRequest",
    "Chunk",
    "Reply",
    "ScriptedModel",
    "TokenUsage",
    "ToolCall",
    "tool_call",
]

CLOSE_S = 1.0
"""How long `close` waits for callables of the user that hold an answer, in seconds."""

# OpenCode does not retry after this status; after a 500 it would retry silently for a minute.
_BROKEN_SCRIPT = 400
_PROVIDER = "scripted"
_TITLE = "Scripted conversation"
_TITLE_PROMPT = "You are a title generator"  # of OpenCode 1.18.33


class ScriptedModel:
    """A model that answers from a script: a context manager, safe to share between threads.

    Leaving the block raises the first of `errors`, unless the block itself raises.

    Args:
        replies: The answers. A list, or another iterable, is used up in order, one reply for
            each request; requests after its end fail (``itertools.cycle(replies)`` has no end).
            A single reply answers every request. A callable gets the `ChatRequest` and returns
            the reply; it may be called in several threads at once, and its exceptions are kept in
            `errors`.
        model: Name of the model.
        cost: US dollars per million tokens, under the keys of OpenCode's configuration
            (``input``, ``output``, ``cache_read``); None for 1, 10 and 0.1.
        max_concurrent: More requests than this at a time are refused with a 429.
        retry_after_s: After how many seconds a refused request may be repeated.

    Requests that OpenCode makes on its own, for the title of a session, never use up the script:
    `run_config` turns them off, and one that is made anyway gets a fixed answer.
    """

    def __init__(
        self,
        replies: Answer | Iterable[Answer] | Callable[[ChatRequest], Answer],
        *,
        model: str = "scripted",
        cost: Mapping[str, float] | None = None,
        max_concurrent: int | None = None,
        retry_after_s: float = 1.0,
    ) -> None:
        self.name = model
        self.cost = {"input": 1.0, "output": 10.0, "cache_read": 0.1} if cost is None else cost
        if isinstance(replies, (str, ToolCall, Reply)):
            replies = itertools.repeat(replies)
        self._answer = replies if callable(replies) else None
        self._script: Iterator[Answer] = iter(()) if callable(replies) else iter(replies)
        self._max_concurrent = max_concurrent
        self._retry_after_s = retry_after_s
        self._changed = threading.Condition()
        self._requests: list[ChatRequest] = []
        self._side_requests: list[ChatRequest] = []
        self._refused_requests: list[ChatRequest] = []
        self._errors: list[Exception] = []
        self._in_flight: set[ChatRequest] = set()
        self._max_in_flight = 0
        self._server: ChatServer | None = None

    def __repr__(self) -> str:
        where = self.base_url if self._server else "closed"
        return f"<ScriptedModel {self.name!r}, {where}, {len(self._requests)} requests>"

    def __enter__(self) -> ScriptedModel:
        return self.start()

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        self.close()
        if exc_type is None and self._errors:
            raise self._errors[0]

    def start(self) -> ScriptedModel:
        """Listen on a free port, and return self."""
        if self._server is None:
            self._server = ChatServer(
                (self.name, self._side_name),
                admit=self._admit,
                release=self._release,
                report=self._report,
            )
        return self

    def close(self) -> None:
        """Break off all answers and free the port; the recorded requests stay.

        If a callable of the user holds an answer, it waits for it, at most `CLOSE_S`.
        """
        server, self._server = self._server, None
        if server is not None:
            server.stop(CLOSE_S)

    @property
    def base_url(self) -> str:
        """The URL for clients; each start takes a new port.

        Raises:
            RuntimeError: The model is not started, or closed.
        """
        if self._server is None:
            raise RuntimeError("the model has no address: use it in a with block, or start() it")
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def run_config(self, **changes: Any) -> RunConfig:
        """Make a `RunConfig` with which OpenCode uses this model only.

        The user's own configuration is left out, and ``lean`` is set.

        Args:
            changes: Fields of `RunConfig`. *config_overrides* and *extra_env* are merged with
                those of the model; every other field replaces the model's.
        """
        config = merged(self._opencode_config(), changes.pop("config_overrides", None) or {})
        env = {**_no_proxy(), **(changes.pop("extra_env", None) or {})}
        ours: dict[str, Any] = {
            "model": f"{_PROVIDER}/{self.name}",
            "inherit_user_config": False,
            "lean": True,
        }
        return RunConfig(config_overrides=config, extra_env=env, **{**ours, **changes})

    def _opencode_config(self) -> dict[str, Any]:
        # The context is so large that no script fills it.
        limit = {"context": 100_000_000, "output": 32_000}
        models = {
            name: {
                "name": name,
                "cost": {"input": 0, "output": 0, **self.cost},
                "limit": limit,
                "attachment": True,
                "modalities": {"input": ["text", "image", "pdf"], "output": ["text"]},
                "reasoning": True,
                "tool_call": True,
            }
            for name in (self.name, self._side_name)
        }
        side = f"{_PROVIDER}/{self._side_name}"
        return {
            "provider": {
                _PROVIDER: {
                    "npm": "@ai-sdk/openai-compatible",
                    "name": "Scripted",
                    "options": {"baseURL": self.base_url, "apiKey": "no-key-needed"},
                    "models": models,
                }
            },
            "model": f"{_PROVIDER}/{self.name}",
            "small_model": side,
            "agent": {"title": {"disable": True}, "compaction": {"model": side}},
            "compaction": {"auto": False},
        }

    @property
    def _side_name(self) -> str:
        """The model that OpenCode is told to use for requests of its own."""
        return f"{self.name}-side"

    @property
    def requests(self) -> list[ChatRequest]:
        """The requests of conversations, in order; a repeated one is there again."""
        return list(self._requests)

    @property
    def side_requests(self) -> list[ChatRequest]:
        """The requests that OpenCode made on its own."""
        return list(self._side_requests)

    @property
    def refused_requests(self) -> list[ChatRequest]:
        """The requests that came while *max_concurrent* others were in flight."""
        return list(self._refused_requests)

    @property
    def errors(self) -> list[Exception]:
        """Exceptions of the user's callables; their requests fail with the exception's text."""
        return list(self._errors)

    @property
    def in_flight(self) -> int:
        """How many requests are being answered now."""
        return len(self._in_flight)

    @property
    def max_in_flight(self) -> int:
        """The largest number of requests that were answered at the same time."""
        return self._max_in_flight

    def wait_for_requests(self, n: int, timeout_s: float = 10.0) -> list[ChatRequest]:
        """Wait until *n* requests have come in total, and return them.

        Raises:
            TimeoutError: Fewer have come after *timeout_s* seconds; the message says how many.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._requests) >= n, timeout_s):
                raise TimeoutError(f"{len(self._requests)} of {n} requests after {timeout_s} s")
            return list(self._requests)

    def wait_until_idle(self, timeout_s: float = 10.0) -> None:
        """Wait until every request is answered, or its client has disconnected.

        Raises:
            TimeoutError: Some are still in flight after *timeout_s* seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._in_flight, timeout_s):
                raise TimeoutError(f"{len(self._in_flight)} in flight after {timeout_s} s")

    def _admit(self, request: ChatRequest) -> Reply:
        with self._changed:
            if request.model == self._side_name or request.system.startswith(_TITLE_PROMPT):
                self._side_requests.append(request)
                return Reply(_TITLE)
            if self._max_concurrent is not None and len(self._in_flight) >= self._max_concurrent:
                self._refused_requests.append(request)
                message = f"more than {self._max_concurrent} requests at a time"
                return Reply.failure(429, message, retry_after_s=self._retry_after_s)
            self._requests.append(request)
            self._in_flight.add(request)
            self._max_in_flight = max(self._max_in_flight, len(self._in_flight))
            self._changed.notify_all()
            if self._answer is None:
                # Under the lock, so that the replies follow the order of `requests`.
                return self._guarded(lambda: next(self._script))
        answer = self._answer
        return self._guarded(lambda: answer(request))

    def _guarded(self, answer: Callable[[], Answer]) -> Reply:
        try:
            return as_reply(answer())
        except StopIteration:
            return Reply.failure(_BROKEN_SCRIPT, "the script has no reply left")
        except Exception as error:  # noqa: BLE001 - the user's code; raised at the block's end
            self._report(error)
            return Reply.failure(_BROKEN_SCRIPT, f"the script raised {error!r}")

    def _release(self, request: ChatRequest) -> None:
        with self._changed:
            self._in_flight.discard(request)
            self._changed.notify_all()

    def _report(self, error: Exception) -> None:
        with self._changed:
            self._errors.append(error)


def _no_proxy() -> dict[str, str]:
    # OpenCode would use a proxy of the environment for 127.0.0.1 too, and wait a minute for it.
    names = ("NO_PROXY", "no_proxy")
    hosts = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return dict.fromkeys(names, f"{hosts},127.0.0.1".lstrip(","))
