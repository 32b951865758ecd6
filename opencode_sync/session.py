"""Conversations: prompts one after another in one session.

    send(), stream() --one at a time--> the runner's stream, in the session --> totals
    fork(), messages(), revert(), ... --> Sessions, on a server

The session is made with the first prompt, and stays where it is when this is left. Knows turns and
whose turn it is; nothing of processes and servers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from ._asking import OnPermission, OnQuestion, answers_of
from ._request import NO_ANSWERS, StrPath, absolute, directory
from ._schema import output_schema
from ._turntaking import Account, TurnTaking
from .config import RunConfig
from .errors import OpenCodeCancelledError, OpenCodeConfigError, OpenCodeError
from .result import RunResult, TokenUsage
from .stream import Limits, RunStream

if TYPE_CHECKING:
    from ._sessions import Sessions

SUMMARY_S = 600.0  # bound on a summary, where the conversation has no timeout_s

_ABORTED = "the session was aborted"
_CLOSED = "the session was closed"


class Host(Protocol):
    """Where a conversation takes place: a runner."""

    @property
    def _begin(self) -> Callable[..., RunStream]: ...

    def _kept_sessions(self, cfg: RunConfig) -> Sessions:
        """What is asked about sessions, besides prompts.

        Raises:
            OpenCodeConfigError: If there is nobody to ask.
        """

    def _checked(self, run_cfg: RunConfig | None, *, may_ask: bool = False) -> RunConfig: ...


class Session:
    """A conversation; made by ``session()`` of a server or a client.

    A context manager, safe to share between threads: prompts that are sent at the same time take
    turns, and each gets its own answer. Leaving it ends the turn under way. The session itself
    stays, and is resumed by its ``session_id``.
    """

    def __init__(
        self,
        host: Host,
        workspace: StrPath = ".",
        *,
        session_id: str | None = None,
        title: str | None = None,
        run_cfg: RunConfig | None = None,
        on_permission: OnPermission | None = None,
        on_question: OnQuestion | None = None,
        timeout_s: float | None = None,
        delete: bool = False,
        may_ask: bool = True,
    ) -> None:
        """For the arguments, see ``OpenCodeServer.session``.

        Args:
            may_ask: *host* passes on what OpenCode asks.
        """
        self._host = host
        self._workspace = absolute(workspace)
        directory(self._workspace)
        self._answers = answers_of(on_permission, on_question) if may_ask else NO_ANSWERS
        cfg = host._checked(run_cfg, may_ask=may_ask)
        if title is not None:
            cfg = cfg.replace(title=title)
        if session_id is not None:
            cfg = cfg.replace(session_id=session_id, continue_session=False)
        self._cfg = cfg
        self._timeout_s = Limits(timeout_s).timeout_s
        self._deletes = delete
        # Where its own prompts have led; until then, the settings say where it begins.
        self._session_id: str | None = None
        self._turn = TurnTaking()
        self._stream: weakref.ref[RunStream] | None = None
        # In one piece, so that it is read and replaced in one.
        self._account = Account()
        self._is_closed = False

    @property
    def session_id(self) -> str | None:
        """To resume the conversation by; None before the first prompt of a new one."""
        if self._session_id is None and not (self._cfg.fork or self._cfg.continue_session):
            return self._cfg.session_id
        return self._session_id

    @property
    def total_cost(self) -> float:
        """US dollars of all turns so far, the one under way included.

        Of this object's: what a session had cost before it was resumed or forked is not in it.
        """
        return self._account.cost

    @property
    def token_usage(self) -> TokenUsage:
        """Tokens, counted as ``total_cost`` is."""
        return self._account.usage

    def send(
        self,
        prompt: str,
        *,
        run_cfg: RunConfig | None = None,
        timeout_s: float | None = None,
        idle_timeout_s: float | None = None,
        max_cost: float | None = None,
        log_file: StrPath | None = None,
        max_retries: int = 2,
        retry_delay_s: float = 1.0,
        schema: Any = None,
        max_repairs: int = 1,
    ) -> RunResult:
        """Say *prompt*, and return the answer; waits for its turn first.

        Args:
            run_cfg: Settings for this turn, in place of the conversation's as a whole.
            timeout_s: Seconds for this turn, from its start; None for the conversation's own. The
                time that a function takes to answer a request counts.
            max_cost: For this turn; all that is not explained here is as for ``run``.

        Raises:
            OpenCodeError: As ``run`` does. The conversation can go on.
        """
        with self.stream(
            prompt,
            run_cfg=run_cfg,
            timeout_s=timeout_s,
            idle_timeout_s=idle_timeout_s,
            max_cost=max_cost,
            log_file=log_file,
            max_retries=max_retries,
            retry_delay_s=retry_delay_s,
            schema=schema,
            max_repairs=max_repairs,
        ) as stream:
            return stream.wait()

    def stream(
        self,
        prompt: str,
        *,
        run_cfg: RunConfig | None = None,
        timeout_s: float | None = None,
        idle_timeout_s: float | None = None,
        max_cost: float | None = None,
        log_file: StrPath | None = None,
        max_retries: int = 2,
        retry_delay_s: float = 1.0,
        schema: Any = None,
        max_repairs: int = 1,
        keep_events: bool = True,
        keep_raw: bool = True,
    ) -> RunStream:
        """Say *prompt*, and give the events as they come; arguments as for :meth:`send`.

        It is this prompt's turn until the stream has ended.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        limits = Limits(
            timeout_s, idle_timeout_s, max_cost, max_retries, retry_delay_s, max_repairs
        )
        output = output_schema(schema)
        release = self._turn.take()
        try:
            self._check_open()
            return self._host._begin(
                prompt,
                self._workspace,
                limits,
                run_cfg=self._settings(run_cfg),
                output=output,
                answers=self._answers,
                log_file=log_file,
                keep_events=keep_events,
                keep_raw=keep_raw,
                on_begin=self._begun,
                on_end=lambda stream: self._ended(stream, release),
            )
        except BaseException:
            release()
            raise

    def abort(self, reason: str = _ABORTED) -> None:
        """End the turn under way with its tools; who waits for it gets OpenCodeCancelledError.

        Returns when the tools are gone. From any thread; without effect between turns.
        """
        if (ref := self._stream) is not None and (stream := ref()) is not None:
            stream.cancel(reason)

    def fork(self, message_id: str | None = None) -> Session:
        """Another conversation with the same past and settings, which leaves this one alone.

        Args:
            message_id: Copy what was before this message; None for all of it. Needs a server.
        """
        with self._in_turn() as session_id:
            fork = Session.__new__(Session)
            fork.__dict__.update(self.__dict__)
            fork._turn, fork._stream, fork._account = TurnTaking(), None, Account()
            # Its title is the original's, with "(fork #1)" after it.
            cfg = self._cfg.replace(title=None, continue_session=False, fork=False)
            try:
                kept = self._host._kept_sessions(self._cfg)
            except OpenCodeConfigError:
                if message_id is not None:
                    raise
                # Without a server it is made with its first prompt.
                fork._session_id, fork._cfg = None, cfg.replace(session_id=session_id, fork=True)
                return fork
            fork_id = kept.fork(session_id, self._directory(), message_id=message_id)
            fork._session_id, fork._cfg = fork_id, cfg.replace(session_id=fork_id)
            return fork

    def messages(self) -> list[dict[str, Any]]:
        """All messages so far, each ``{"info": ..., "parts": ...}`` as OpenCode keeps them."""
        if self.session_id is None:
            return []
        kept = self._host._kept_sessions(self._cfg)
        return kept.messages(self.session_id, self._directory())

    def summarize(self, model: str | None = None) -> None:
        """Have the past summed up: from now on, the model is told the summary in its place.

        Args:
            model: ``"provider/model"``; None for the settings' or the last one used.
        """
        with self._in_turn() as session_id:
            kept, directory = self._host._kept_sessions(self._cfg), self._directory()
            last = kept.last_message(session_id, directory)
            of_last = f"{last.get('providerID')}/{last.get('modelID')}"
            model = model or self._cfg.model or of_last
            kept.summarize(session_id, directory, model, self._timeout_s or SUMMARY_S)
            self._account = self._account.with_message(kept.last_message(session_id, directory))

    def revert(self, message_id: str | None = None) -> None:
        """Take back a prompt and all after it, with what they did to files.

        Args:
            message_id: The prompt's, see :meth:`messages`; None for the last one.
        """
        with self._in_turn() as session_id:
            kept, directory = self._host._kept_sessions(self._cfg), self._directory()
            if message_id is None:
                messages = kept.messages(session_id, directory)
                prompts = [each for each in messages if each["info"].get("role") == "user"]
                if not prompts:
                    raise OpenCodeConfigError("the session has no prompt to take back")
                message_id = str(prompts[-1]["info"]["id"])
            kept.revert(session_id, directory, message_id)

    def unrevert(self) -> None:
        """Give back what :meth:`revert` took; without effect after a further prompt."""
        with self._in_turn() as session_id:
            self._host._kept_sessions(self._cfg).unrevert(session_id, self._directory())

    def close(self) -> None:
        """End the turn under way; the session stays, unless *delete* was asked for. Idempotent."""
        was_closed, self._is_closed = self._is_closed, True
        self.abort(_CLOSED)
        if self._deletes and not was_closed and self.session_id is not None:
            kept = self._host._kept_sessions(self._cfg)
            kept.delete(self.session_id, self._directory())

    def __enter__(self) -> Session:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            with suppress(OpenCodeError):  # the one that is under way says more
                self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"${self.total_cost:g} spent"
        return f"<Session {self.session_id or 'not begun'} in {self._workspace!r}, {state}>"

    # -- turns ---------------------------------------------------------------------------------

    def _settings(self, run_cfg: RunConfig | None) -> RunConfig:
        """Of the next turn, which goes on where the last one ended."""
        cfg = self._cfg if run_cfg is None else run_cfg
        if not isinstance(cfg, RunConfig):
            raise OpenCodeConfigError(f"run_cfg is {type(cfg).__name__}: use a RunConfig")
        start = self._cfg
        if self._session_id is None:
            return cfg.replace(
                title=start.title,
                session_id=start.session_id,
                continue_session=start.continue_session,
                fork=start.fork,
            )
        return cfg.replace(
            session_id=self._session_id,
            continue_session=False,
            fork=False,
            title=None,
            share=None,
        )

    def _begun(self, stream: RunStream) -> None:
        self._stream = weakref.ref(stream)
        self._account = self._account.going_on(stream.result)
        if self._is_closed:  # close() looks for the stream after it has said so
            raise OpenCodeCancelledError(_CLOSED)

    def _ended(self, stream: RunStream, release: Callable[[], None]) -> None:
        self._session_id = stream.session_id or self._session_id
        self._account = self._account.with_turn(stream.result)
        self._stream = None
        release()

    @contextmanager
    def _in_turn(self) -> Iterator[str]:
        """In a turn of one's own, which needs a session that has begun: its id."""
        release = self._turn.take()
        try:
            self._check_open()
            if self.session_id is None:
                raise OpenCodeConfigError("the session has not begun: send a prompt first")
            yield self.session_id
        finally:
            release()

    def _directory(self) -> str:
        return self._cfg.remote_dir or str(directory(self._workspace))

    def _check_open(self) -> None:
        if self._is_closed:
            raise OpenCodeConfigError("this Session is closed: resume it by its session_id")
