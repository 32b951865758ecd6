"""Conversations: prompts one after another in one session.

    send(), stream() -- one at a time --> the runner's stream, in the session --> totals
    fork(), messages(), revert(), ... --> Sessions, on a server

The session is made with the first prompt, and is kept when its Session object is closed. Knows
nothing of processes and HTTP.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..core.config import RunConfig, validate_config_for_run
from ..core.errors import OpenCodeCancelledError, OpenCodeConfigError, OpenCodeError
from ..core.lifetime import SLICE_S, Pinned
from ..core.limits import Limits
from ..core.reading import number_of, usage_of
from ..core.request import (
    NO_ANSWERS,
    RunOptions,
    RunSettings,
    StreamOptions,
    StrPath,
    absolute,
    check_keywords,
    checked_config,
    directory,
    shows,
)
from ..core.result import RunResult, TokenUsage
from ..core.stream import RunStream
from ..core.text import money
from .permissions import OnPermission, OnQuestion, answers_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..server.sessions import Sessions
    from .runner import Runner

SUMMARY_S = 600.0  # bound on a summary, where the session has no timeout_s
_CLOSED = "the session was closed"


class Session(Pinned):
    """A conversation; made by ``session()`` of a server or a client.

    A context manager, safe to share between threads: prompts that are sent at the same time are
    answered one after another. Leaving the block ends the prompt under way. The session itself
    stays, and can be resumed by its ``session_id``.
    """

    _instead = "resume it there by its session_id"

    def __init__(
        self,
        runner: Runner,
        workspace: StrPath = ".",
        *,
        session_id: str | None = None,
        title: str | None = None,
        run_cfg: RunConfig | None = None,
        on_permission: OnPermission | None = None,
        on_question: OnQuestion | None = None,
        timeout_s: float | None = None,
        delete: bool = False,
    ) -> None:
        """For the arguments, see ``session`` of a server."""
        self._runner, self._may_ask = runner, runner._keeps_sessions
        self._workspace = absolute(workspace)
        directory(self._workspace)
        self._on_permission, self._on_question = on_permission, on_question
        self._answers = answers_of(on_permission, on_question) if self._may_ask else NO_ANSWERS
        cfg = runner._checked(run_cfg, may_ask=self._may_ask)
        if title is not None:
            cfg = cfg.replace(title=title)
        if session_id is not None:
            cfg = cfg.replace(session_id=session_id, continue_session=False)
        self._cfg = cfg
        self._timeout_s = Limits(timeout_s).timeout_s
        self._deletes = delete
        # Where its own prompts have led; until then, the settings say where it begins.
        self._session_id: str | None = None
        self._stream: weakref.ref[RunStream] | None = None
        # What its prompts have cost, and the result of the one under way: one tuple, so that a
        # thread which reads it never sees half of a change.
        self._totals: tuple[float, TokenUsage, RunResult | None] = (0.0, TokenUsage(), None)
        self._is_closed = False
        # One prompt at a time; it begins in one thread, and ends in any.
        self._lock = threading.Lock()
        self._holder: threading.Thread | None = None
        self._held: list[object] = []  # the key to the lock, as long as it is held

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
        """US dollars of all prompts so far, the one under way included.

        Counts what this object has sent: what a session had cost before it was resumed or forked
        is not included.
        """
        cost, _, live = self._totals
        return cost if live is None else cost + live.total_cost

    @property
    def token_usage(self) -> TokenUsage:
        """Tokens, counted as ``total_cost`` is."""
        _, usage, live = self._totals
        return usage if live is None else usage + live.token_usage

    @shows(RunOptions)
    def send(self, prompt: str, **options: Unpack[RunOptions]) -> RunResult:
        """Send *prompt*, and return the answer; waits until earlier prompts are answered.

        Arguments that are not explained here are those of ``run``, for this prompt.

        Args:
            run_cfg: Settings for this prompt, in place of the session's as a whole.
            timeout_s: Seconds for this prompt, from its start; None for the session's own. The
                time that a callback takes to answer a request counts.

        Raises:
            OpenCodeError: As ``run`` does. The conversation can go on.
        """
        check_keywords(Session.send, options)
        with self._begin(prompt, options) as stream:
            return stream.wait()

    @shows(StreamOptions)
    def stream(self, prompt: str, **options: Unpack[StreamOptions]) -> RunStream:
        """Send *prompt*, and give the events as they come; arguments as for :meth:`send`.

        Other prompts wait until the stream has ended.

        Args:
            keep_events: Keep the events in ``.result`` too.
            keep_raw: Keep the raw lines in ``.result`` too.
        """
        check_keywords(Session.stream, options)
        return self._begin(prompt, options)

    def abort(self, reason: str = "the session was aborted") -> None:
        """End the prompt under way with its tools; who waits for it gets OpenCodeCancelledError.

        Returns when the tools are gone. From any thread; without effect between prompts.
        """
        if (stream := self._under_way()) is not None:
            stream.cancel(reason)

    def fork(self, message_id: str | None = None) -> Session:
        """Return another conversation with the same past and settings; this one is left alone.

        Args:
            message_id: Copy what was before this message; None for all of it. Needs a server.
        """
        with self._in_session() as session_id:
            # OpenCode gives it the original's title, with "(fork #1)" after it.
            cfg = self._cfg.replace(title=None, continue_session=False, session_id=session_id)
            if self._may_ask or message_id is not None:
                fork_id = self._kept().fork(session_id, self._directory(), message_id=message_id)
                cfg = cfg.replace(session_id=fork_id, fork=False, share=None)
            else:
                cfg = cfg.replace(fork=True)  # it is made with its first prompt
            return Session(
                self._runner,
                self._workspace,
                run_cfg=cfg,
                on_permission=self._on_permission,
                on_question=self._on_question,
                timeout_s=self._timeout_s,
                delete=self._deletes,
            )

    def messages(self) -> list[dict[str, Any]]:
        """All messages so far, each ``{"info": ..., "parts": ...}`` as OpenCode keeps them."""
        if self.session_id is None:
            return []
        return self._kept().messages(self.session_id, self._directory())

    def summarize(self, model: str | None = None) -> None:
        """Have the past summed up: from now on, the model is given the summary in its place.

        Args:
            model: ``"provider/model"``; None for the settings' or the last one used.
        """
        if model is not None:
            validate_config_for_run(RunConfig(model=model))
        with self._in_session() as session_id:
            kept, directory = self._kept(), self._directory()
            last = kept.last_message(session_id, directory)
            of_last = f"{last.get('providerID')}/{last.get('modelID')}"
            model = model or self._cfg.model or of_last
            kept.summarize(session_id, directory, model, self._timeout_s or SUMMARY_S)
            summary = kept.last_message(session_id, directory)
            self._count(number_of(summary.get("cost")), usage_of(summary.get("tokens")))

    def revert(self, message_id: str | None = None, *, all_files: bool = True) -> list[str]:
        """Take back a prompt and all after it, with what they did to files.

        OpenCode restores files from its snapshots. It has none outside of a git repository, with
        ``lean=True`` or the setting ``snapshot`` off, in a repository inside of another, and of
        files that git ignores or that are elsewhere.

        Args:
            message_id: The prompt's, see :meth:`messages`; None for the last one, and for the one
                before it the next time.
            all_files: False takes the messages back even where files cannot be restored.

        Returns:
            Paths of the files that were restored. Files that a command changed outside of the
            workspace are not among them.

        Raises:
            OpenCodeConfigError: If there is no such prompt; or, before anything is taken back, if a
                tool has changed, or may have changed, files without a snapshot.
        """
        with self._in_session() as session_id:
            kept, directory = self._kept(), self._directory()
            message_id = message_id or kept.last_prompt(session_id, directory)
            if message_id is None:
                raise OpenCodeConfigError("the session has no prompt to take back")
            return kept.revert(session_id, directory, message_id, all_files=all_files)

    def unrevert(self) -> None:
        """Give back what :meth:`revert` took.

        Raises:
            OpenCodeConfigError: If nothing is taken back; after a further prompt it is lost.
        """
        with self._in_session() as session_id:
            self._kept().unrevert(session_id, self._directory())

    def close(self) -> None:
        """End the prompt under way; the session stays, unless *delete* was given. Idempotent."""
        was_closed, self._is_closed = self._is_closed, True
        self.abort(_CLOSED)
        if self._deletes and not was_closed and self.session_id is not None:
            self._kept().delete(self.session_id, self._directory())

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
        state = "closed" if self._is_closed else f"{money(self.total_cost)} spent"
        return f"<Session {self.session_id or 'not begun'} in {self._workspace!r}, {state}>"

    # -- one prompt at a time ------------------------------------------------------------------

    def _acquire(self) -> object:
        """Wait until no prompt is under way; returns the key for :meth:`_release`.

        Raises:
            OpenCodeConfigError: If this thread would wait for itself.
        """
        if self._holder is threading.current_thread():
            raise OpenCodeConfigError(
                "this thread has a prompt of the session under way: let its stream end first"
            )
        while not self._lock.acquire(timeout=SLICE_S):  # so that a signal is noticed
            pass
        self._holder, key = threading.current_thread(), object()
        self._held.append(key)
        return key

    def _release(self, key: object) -> None:
        """Let the next prompt begin; without effect where *key* was used before."""
        with suppress(ValueError):
            self._held.remove(key)  # by one thread alone
            self._holder = None
            self._lock.release()

    @contextmanager
    def _in_session(self) -> Iterator[str]:
        """Hold up prompts, in a session that has begun: its id."""
        key = self._acquire()
        try:
            self._check_open()
            if self.session_id is None:
                raise OpenCodeConfigError("the session has not begun: send a prompt first")
            yield self.session_id
        finally:
            self._release(key)

    def _begin(self, prompt: str, options: RunOptions) -> RunStream:
        if options.get("timeout_s") is None:
            options = {**options, "timeout_s": self._timeout_s}
        settings = RunSettings.of(options)
        key = self._acquire()
        try:
            self._check_open()
            return self._runner.begin(
                prompt,
                self._workspace,
                dataclasses.replace(settings, run_cfg=self._next_cfg(settings.run_cfg)),
                answers=self._answers,
                on_begin=self._stream_begins,
                on_end=functools.partial(self._stream_ended, key),
            )
        except BaseException:
            self._release(key)
            raise

    def _next_cfg(self, run_cfg: RunConfig | None) -> RunConfig:
        """The settings of the next prompt, which goes on where the last one ended."""
        cfg, start = checked_config(run_cfg, self._cfg), self._cfg
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

    def _stream_begins(self, stream: RunStream) -> None:
        self._stream = weakref.ref(stream)
        cost, usage, _ = self._totals
        self._totals = cost, usage, stream.result
        if self._is_closed:  # close() looks for the stream after it has set this
            raise OpenCodeCancelledError(_CLOSED)

    def _stream_ended(self, key: object, stream: RunStream) -> None:
        self._session_id = stream.session_id or self._session_id
        self._count(stream.result.total_cost, stream.result.token_usage)
        self._stream = None
        self._release(key)

    def _count(self, cost: float, usage: TokenUsage) -> None:
        before, used, _ = self._totals
        self._totals = before + cost, used + usage, None

    def _check_open(self) -> None:
        if self._is_closed:
            raise OpenCodeConfigError("this Session is closed: resume it by its session_id")

    def _kept(self) -> Sessions:
        return self._runner._kept_sessions(self._cfg)

    def _directory(self) -> str:
        return self._cfg.remote_dir or str(directory(self._workspace))
