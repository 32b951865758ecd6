"""Conversations: prompts one after another in one session.

    send(), stream() ----------------> see the room of the conversation
    fork(), messages(), revert(), ... --> Sessions, on a server

The session is made with the first prompt, and stays where it is when this is left. Knows nothing of
processes and servers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from ._conversation import CLOSED, Conversation
from ._turntaking import Account, TurnTaking
from .core.config import RunConfig, validate_config_for_run
from .core.errors import OpenCodeConfigError, OpenCodeError
from .core.request import directory

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
