"""Prompts one after another in one session, and what they cost together.

    send(), stream() --one at a time--> the runner's stream, in the session --> totals

Runs one turn at a time. For what else a session can be asked, see `session`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ._asking import OnPermission, OnQuestion, answers_of
from ._turntaking import Account, TurnTaking
from .core.config import RunConfig
from .core.errors import OpenCodeCancelledError, OpenCodeConfigError
from .core.lifetime import Pinned
from .core.request import NO_ANSWERS, StrPath, absolute, checked_config, directory
from .core.result import RunResult, TokenUsage
from .core.schema import output_schema
from .core.stream import Limits, RunStream

if TYPE_CHECKING:
    from ._sessions import Sessions

_ABORTED = "the session was aborted"
CLOSED = "the session was closed"


class Host(Protocol):
    """Where a conversation takes place: a runner."""

    _keeps_sessions: bool

    @property
    def _begin(self) -> Callable[..., RunStream]: ...

    def _kept_sessions(self, cfg: RunConfig) -> Sessions:
        """What is asked about sessions, besides prompts.

        Raises:
            OpenCodeConfigError: If there is nobody to ask.
        """

    def _checked(self, run_cfg: RunConfig | None, *, may_ask: bool = False) -> RunConfig: ...


class Conversation(Pinned):
    """What sends prompts, one at a time."""

    _instead = "resume it there by its session_id"

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
        """To resume the conversation by; None before the first event of a new one."""
        if self._session_id is not None:
            return self._session_id
        if (stream := self._under_way()) is not None and stream.session_id is not None:
            return stream.session_id
        begins_anew = self._cfg.fork or self._cfg.continue_session
        return None if begins_anew else self._cfg.session_id

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
        max_steps: int | None = None,
        max_tokens: int | None = None,
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
            max_cost, max_steps, max_tokens: For this turn; all that is not explained here is as
                for ``run``.

        Raises:
            OpenCodeError: As ``run`` does. The conversation can go on.
        """
        with self.stream(
            prompt,
            run_cfg=run_cfg,
            timeout_s=timeout_s,
            idle_timeout_s=idle_timeout_s,
            max_cost=max_cost,
            max_steps=max_steps,
            max_tokens=max_tokens,
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
        max_steps: int | None = None,
        max_tokens: int | None = None,
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
            timeout_s=timeout_s,
            idle_timeout_s=idle_timeout_s,
            max_cost=max_cost,
            max_steps=max_steps,
            max_tokens=max_tokens,
            max_retries=max_retries,
            retry_delay_s=retry_delay_s,
            max_repairs=max_repairs,
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
        if (stream := self._under_way()) is not None:
            stream.cancel(reason)

    # -- turns ---------------------------------------------------------------------------------

    def _settings(self, run_cfg: RunConfig | None) -> RunConfig:
        """Of the next turn, which goes on where the last one ended."""
        cfg = checked_config(run_cfg, self._cfg)
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

    def _under_way(self) -> RunStream | None:
        return None if (ref := self._stream) is None else ref()

    def _begun(self, stream: RunStream) -> None:
        self._stream = weakref.ref(stream)
        self._account = self._account.going_on(stream.result)
        if self._is_closed:  # close() looks for the stream after it has said so
            raise OpenCodeCancelledError(CLOSED)

    def _ended(self, stream: RunStream, release: Callable[[], None]) -> None:
        self._session_id = stream.session_id or self._session_id
        self._account = self._account.with_turn(stream.result)
        self._stream = None
        release()

    def _check_open(self) -> None:
        if self._is_closed:
            raise OpenCodeConfigError("this Session is closed: resume it by its session_id")
