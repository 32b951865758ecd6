"""Prompts one after another in one session, and what they cost together.

    send(), stream() --one at a time--> the runner's stream, in the session --> totals

Runs one turn at a time. For what else a session can be asked, see `session`.

Whose turn it is in a conversation, and what its turns have cost.

Knows threads and results; nothing of sessions.

Conversations: prompts one after another in one session.

    send(), stream() ----------------> see the room of the conversation
    fork(), messages(), revert(), ... --> Sessions, on a server

The session is made with the first prompt, and stays where it is when this is left. Knows nothing of
processes and servers.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from ..core.config import RunConfig, validate_config_for_run
from ..core.errors import OpenCodeCancelledError, OpenCodeConfigError, OpenCodeError
from ..core.lifetime import Pinned
from ..core.reading import number_of, usage_of
from ..core.request import NO_ANSWERS, StrPath, absolute, checked_config, directory
from ..core.result import RunResult, TokenUsage
from ..core.schema import output_schema
from ..core.stream import Limits, RunStream
from .permissions import OnPermission, OnQuestion, answers_of

if TYPE_CHECKING:
    from ..server.sessions import Sessions


class TurnTaking:
    """One at a time; a turn begins in one thread, and ends in any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None

    def take(self) -> Callable[[], None]:
        """Wait for a turn; returns what ends it, once.

        Raises:
            OpenCodeConfigError: If this thread would wait for itself.
        """
        if self._owner is threading.current_thread():
            raise OpenCodeConfigError(
                "this thread has a turn of the session under way: let its stream end first"
            )
        self._lock.acquire()
        self._owner = threading.current_thread()
        held = [self._lock]

        def release() -> None:
            with suppress(IndexError):  # it was ended before
                lock = held.pop()
                self._owner = None
                lock.release()

        return release


@dataclass(frozen=True)
class Account:
    """What the turns have cost: those that have ended, and the one under way."""

    _cost: float = 0.0
    _usage: TokenUsage = field(default_factory=TokenUsage)
    _live: RunResult | None = None

    @property
    def cost(self) -> float:
        return self._cost + (self._live.total_cost if self._live is not None else 0.0)

    @property
    def usage(self) -> TokenUsage:
        live = self._live
        return self._usage if live is None else self._usage + live.token_usage

    def going_on(self, live: RunResult) -> Account:
        return Account(self._cost, self._usage, live)

    def with_turn(self, ended: RunResult) -> Account:
        return Account(self._cost + ended.total_cost, self._usage + ended.token_usage)

    def with_message(self, info: Mapping[str, Any]) -> Account:
        """With what the answer cost that *info* describes."""
        cost, usage = number_of(info.get("cost")), usage_of(info.get("tokens"))
        return Account(self._cost + cost, self._usage + usage)


_ABORTED = "the session was aborted"
CLOSED = "the session was closed"


class Host(Protocol):
    """Where a conversation takes place: a runner."""

    _keeps_sessions: bool

    @property
    def begin(self) -> Callable[..., RunStream]: ...

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
            return self._host.begin(
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


SUMMARY_S = 600.0  # bound on a summary, where the conversation has no timeout_s


class Session(Conversation):
    """A conversation; made by ``session()`` of a server or a client.

    A context manager, safe to share between threads: prompts that are sent at the same time take
    turns, and each gets its own answer. Leaving it ends the turn under way. The session itself
    stays, and is resumed by its ``session_id``.
    """

    def fork(self, message_id: str | None = None) -> Session:
        """Another conversation with the same past and settings, which leaves this one alone.

        Args:
            message_id: Copy what was before this message; None for all of it. Needs a server.
        """
        with self._in_turn() as session_id:
            fork = object.__new__(type(self))
            fork.__dict__.update(self.__dict__)
            fork._turn, fork._stream, fork._account = TurnTaking(), None, Account()
            # It gets the original's title, with "(fork #1)" after it.
            cfg = self._cfg.replace(title=None, continue_session=False, fork=False)
            if self._host._keeps_sessions or message_id is not None:
                kept = self._host._kept_sessions(self._cfg)
                fork_id = kept.fork(session_id, self._directory(), message_id=message_id)
                fork._session_id, fork._cfg = fork_id, cfg.replace(session_id=fork_id)
            else:
                # It is made with its first prompt.
                fork._session_id, fork._cfg = None, cfg.replace(session_id=session_id, fork=True)
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
        if model is not None:
            validate_config_for_run(RunConfig(model=model))
        with self._in_turn() as session_id:
            kept, directory = self._host._kept_sessions(self._cfg), self._directory()
            last = kept.last_message(session_id, directory)
            of_last = f"{last.get('providerID')}/{last.get('modelID')}"
            model = model or self._cfg.model or of_last
            kept.summarize(session_id, directory, model, self._timeout_s or SUMMARY_S)
            self._account = self._account.with_message(kept.last_message(session_id, directory))

    def revert(self, message_id: str | None = None, *, all_files: bool = True) -> list[str]:
        """Take back a prompt and all after it, with what they did to files.

        OpenCode restores files from its snapshots. It has none outside of a git repository, with
        ``lean=True`` or the setting ``snapshot`` off, in a repository inside of another, and of
        files that git ignores or that are elsewhere.

        Args:
            message_id: The prompt's, see :meth:`messages`; None for the last one, and for the one
                before it the next time.
            all_files: False takes the messages back also where files remain as they are.

        Returns:
            Paths of the files that were restored. What a command changed elsewhere is not told.

        Raises:
            OpenCodeConfigError: If there is no such prompt; or, with nothing taken back, if a tool
                has changed or may have changed files of which there is no snapshot.
        """
        with self._in_turn() as session_id:
            kept, directory = self._host._kept_sessions(self._cfg), self._directory()
            message_id = message_id or kept.last_prompt(session_id, directory)
            if message_id is None:
                raise OpenCodeConfigError("the session has no prompt to take back")
            return kept.revert(session_id, directory, message_id, all_files=all_files)

    def unrevert(self) -> None:
        """Give back what :meth:`revert` took.

        Raises:
            OpenCodeConfigError: If nothing is taken back; after a further prompt it is lost.
        """
        with self._in_turn() as session_id:
            self._host._kept_sessions(self._cfg).unrevert(session_id, self._directory())

    def close(self) -> None:
        """End the turn under way; the session stays, unless *delete* was asked for. Idempotent."""
        was_closed, self._is_closed = self._is_closed, True
        self.abort(CLOSED)
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
