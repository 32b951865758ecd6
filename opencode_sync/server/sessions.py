"""The sessions that a server keeps: list, read, fork, change, revert, delete.

    Sessions.METHOD(session_id, directory) --> requests --> SessionInfo, messages, ids

OpenCode answers some requests wrongly instead of refusing them (1.18.33), such as a fork at an
unknown message; they are checked here first. Knows requests and responses, nothing of turns.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ..core.errors import OpenCodeConfigError, OpenCodeServerError
from ..core.lifetime import CancelScope
from ..core.reading import OUTPUT_TOOL, denied_tool, mapping, number_of
from .connection import FIRST_S, MAX_LIST_BYTES, REQUEST_S, Connection

MOST = 10_000  # sessions in a list; by default OpenCode gives 100


@dataclass(frozen=True)
class SessionInfo:
    """A session that a server keeps.

    Attributes:
        session_id: Its id, to resume it by.
        title: Its title.
        workspace: The directory that it works in.
        parent_id: For a sub-agent's session, the session that it works for; else None.
        total_cost: US dollars, summed over its turns, without its sub-agents'.
        created_at, updated_at: Seconds since the epoch.
    """

    session_id: str
    title: str
    workspace: str
    parent_id: str | None
    total_cost: float
    created_at: float
    updated_at: float


class Sessions:
    """The sessions of one server; *directory* is always the one that the session works in."""

    def __init__(self, connection: Connection, scope: CancelScope | None = None) -> None:
        """
        Args:
            scope: Ends the requests.
        """
        self._connection, self._scope = connection, scope

    def all(self, directory: str | None = None) -> list[SessionInfo]:
        """Return those of *directory* or of all directories, the last used first."""
        # Without a directory, /session gives those of one project alone.
        path = "/session" if directory else "/experimental/session"
        found = self._connection.objects(path, limit=MOST, **self._in(directory, FIRST_S))
        return [_info(each) for each in found]

    def latest(self, directory: str) -> str | None:
        """Return the id of the last used one that is not a sub-agent's."""
        found = self._connection.objects(
            "/session", roots="true", limit=1, **self._in(directory, FIRST_S)
        )
        return id_of(found[0]) if found else None

    def known(self, session_id: str, directory: str) -> dict[str, Any]:
        """Return the session's description; raise OpenCodeConfigError if there is none."""
        # An id of another form makes the server fail, not refuse.
        if session_id.startswith("ses"):
            path = path_of(session_id)
            try:
                return self._connection.object(path, **self._in(directory, FIRST_S))
            except OpenCodeServerError as error:
                if error.status_code != 404:
                    raise
        raise OpenCodeConfigError(f"session {session_id!r} is unknown to the server")

    def resolved(self, directory: str) -> str | None:
        """Return *directory* as the server calls it, without links; None if it has none."""
        try:
            where = self._connection.get("/path", **self._in(directory, FIRST_S))
        except OpenCodeServerError as error:
            if error.status_code is None:
                raise
            return None
        own = mapping(where).get("directory")
        return own if isinstance(own, str) else None

    def messages(self, session_id: str, directory: str) -> list[dict[str, Any]]:
        """Return all messages, oldest first; see :func:`stored_messages`."""
        try:
            return stored_messages(self._connection, session_id, directory, scope=self._scope)
        except OpenCodeServerError:
            self.known(session_id, directory)
            raise

    def last_prompt(self, session_id: str, directory: str) -> str | None:
        """Return the id of the last prompt that is not reverted, or None."""
        reverted = _reverted_from(self.known(session_id, directory))
        last = None
        for message in self.messages(session_id, directory):
            info = mapping(message.get("info"))
            if reverted is not None and info.get("id") == reverted:
                break
            if info.get("role") == "user":
                last = str(info.get("id"))
        return last

    def last_message(self, session_id: str, directory: str) -> dict[str, Any]:
        """Return the description of the last message; {} if there is none."""
        path = path_of(session_id, "/message")
        stored = self._connection.objects(path, limit=1, **self._in(directory, FIRST_S))
        return dict(mapping(stored[0].get("info"))) if stored else {}

    def fork(
        self,
        session_id: str,
        directory: str,
        *,
        message_id: str | None = None,
        rules: Sequence[Any] = (),
    ) -> str:
        """Copy the session as it was before *message_id*; return the copy's id.

        Args:
            message_id: None for all messages that are not reverted.
            rules: Permission rules that the copy has beside the session's own.
        """
        session = self.known(session_id, directory)
        if message_id is not None:
            self._check_message(session_id, message_id, directory)
        else:
            message_id = _reverted_from(session)
        body = {} if message_id is None else {"messageID": message_id}
        path = path_of(session_id, "/fork")
        fork_id = id_of(self._connection.post(path, body, **self._in(directory)))
        # OpenCode gives a fork no rules.
        if rules := [*rules_of(session), *rules]:
            self.change(fork_id, directory, permission=rules)
        return fork_id

    def change(self, session_id: str, directory: str, **changes: Any) -> None:
        """Set ``title``; add the rules of ``permission``."""
        self._connection.request("PATCH", path_of(session_id), changes, **self._in(directory))

    def share(self, session_id: str, directory: str) -> None:
        """Make it public."""
        self._connection.post(path_of(session_id, "/share"), **self._in(directory))

    def summarize(self, session_id: str, directory: str, model: str, timeout_s: float) -> None:
        """Have *model* write a summary, which it gets instead of the earlier messages."""
        provider, _, name = model.partition("/")
        body = {"providerID": provider, "modelID": name}
        path = path_of(session_id, "/summarize")
        self._connection.post(path, body, **self._in(directory, timeout_s))

    def revert(
        self, session_id: str, directory: str, message_id: str, *, all_files: bool
    ) -> list[str]:
        """Take back *message_id* and all after it; return the files that were restored.

        Raises:
            OpenCodeConfigError: If *all_files* is set and some files cannot be restored.
        """
        self._check_message(session_id, message_id, directory)
        messages = self.messages(session_id, directory)
        end = _reverted_from(self.known(session_id, directory))
        files, _ = _changes(_between(messages, message_id), directory)
        # What is reverted already was checked then.
        _, lost = _changes(_between(messages, message_id, end), directory)
        if lost and all_files:
            raise OpenCodeConfigError(
                f"OpenCode cannot restore what was changed by {', '.join(lost)}: it has no "
                "snapshot of that (no git repository, lean=True, or a repository inside of "
                "another); pass all_files=False to take the messages back anyway"
            )
        body = {"messageID": message_id}
        path = path_of(session_id, "/revert")
        reverted = mapping(self._connection.post(path, body, **self._in(directory)))
        if not mapping(reverted.get("revert")).get("snapshot"):
            if files and all_files:  # changed on a server that kept snapshots
                raise OpenCodeServerError(
                    "OpenCode took the messages back, but restored no files, since it keeps no "
                    f"snapshots any more: {', '.join(files)}"
                )
            return []
        return files

    def unrevert(self, session_id: str, directory: str) -> None:
        """Undo a revert.

        Raises:
            OpenCodeConfigError: If nothing is reverted, or a prompt came after it.
        """
        if _reverted_from(self.known(session_id, directory)) is None:
            raise OpenCodeConfigError(
                "nothing to unrevert: nothing was reverted, or a prompt came after it"
            )
        self._connection.post(path_of(session_id, "/unrevert"), **self._in(directory))

    def delete(self, session_id: str, directory: str) -> None:
        """Remove it; does nothing if it does not exist."""
        with suppress(OpenCodeConfigError):
            self.known(session_id, directory)
            self._connection.request("DELETE", path_of(session_id), **self._in(directory))

    def _check_message(self, session_id: str, message_id: str, directory: str) -> None:
        # For an unknown one, OpenCode forks the whole session, and reverts nothing.
        path = path_of(session_id, f"/message/{quote(message_id, safe='')}")
        try:
            self._connection.get(path, **self._in(directory, FIRST_S))
        except OpenCodeServerError as error:
            if is_prompt_with_format(error):
                return
            if error.status_code is None or error.status_code >= 500:
                raise
            raise OpenCodeConfigError(
                f"message {message_id!r} is unknown to session {session_id!r}"
            ) from None

    def _in(self, directory: str | None, timeout_s: float = REQUEST_S) -> dict[str, Any]:
        """Return what all requests have in common."""
        return {"directory": directory, "timeout_s": timeout_s, "scope": self._scope}


def stored_messages(
    connection: Connection,
    session_id: str,
    directory: str,
    *,
    limit: int | None = None,
    timeout_s: float = REQUEST_S,
    scope: CancelScope | None = None,
) -> list[dict[str, Any]]:
    """Return the newest *limit* messages that a server has stored of a session, oldest first.

    OpenCode cannot give a prompt with a format (1.18.33), which a prompt has while its turn goes
    on: then the messages after it are returned.

    Args:
        limit: None for all messages.
        timeout_s: Time limit of each request.
        scope: Ends the requests.
    """

    def newest(limit: int | None) -> list[dict[str, Any]] | None:
        try:
            return connection.objects(
                path_of(session_id, "/message"),
                directory=directory,
                limit=limit,
                timeout_s=timeout_s,
                max_bytes=MAX_LIST_BYTES,
                scope=scope,
            )
        except OpenCodeServerError as error:
            if not is_prompt_with_format(error):
                raise
            return None

    messages = newest(limit)
    if messages is not None:
        return messages
    messages = []
    for count in itertools.count(1):
        more = newest(count)
        if more is None or len(more) < count:
            break
        messages = more
    return messages


# Tools that change no files, and those that say which one they change (1.18.33).
_READING = frozenset(
    {"read", "glob", "grep", "list", "lsp", "webfetch", "websearch", "codesearch", "skill"}
    | {"todowrite", "todoread", "question", "plan_enter", "plan_exit", "invalid", OUTPUT_TOOL}
)
_WRITING = frozenset({"write", "edit"})


def _between(messages: Iterable[Any], first: str, end: str | None = None) -> Iterator[Any]:
    """Yield the messages from *first* on, and before *end*; both are ids."""
    is_inside = False
    for message in messages:
        message_id = mapping(mapping(message).get("info")).get("id")
        is_inside = is_inside or message_id == first
        if is_inside and message_id == end:
            return
        if is_inside:
            yield message


def _changes(messages: Iterable[Any], directory: str) -> tuple[list[str], list[str]]:
    """Return the files that OpenCode has snapshots of, and what else may have changed files.

    A step with a snapshot has a ``patch`` with the files that were changed in it. OpenCode has
    no snapshots of files in a repository inside of its own, and does not say so.
    """
    files: dict[str, None] = {}
    written: list[tuple[str, str]] = []
    lost: dict[str, None] = {}
    for message in messages:
        parts = [mapping(part) for part in mapping(message).get("parts") or ()]
        has_snapshot = any(part.get("snapshot") for part in parts)
        for part in parts:
            tool, state = str(part.get("tool")), mapping(part.get("state"))
            if part.get("type") == "patch":
                files.update(dict.fromkeys(part.get("files") or ()))
            elif part.get("type") != "tool" or tool in _READING or denied_tool({"part": part}):
                continue
            elif tool in _WRITING:
                path = os.path.join(directory, str(mapping(state.get("input")).get("filePath")))
                written += [(tool, path)] if state.get("status") == "completed" else []
            elif not has_snapshot:
                lost[tool] = None
    kept = {os.path.realpath(file) for file in files}
    unkept = [use for use in written if os.path.realpath(use[1]) not in kept]
    return list(files), [*lost, *dict.fromkeys(map(" ".join, unkept))]


def path_of(session_id: str, what: str = "") -> str:
    """Return the path of requests about a session."""
    return f"/session/{quote(session_id, safe='')}{what}"


def id_of(session: Any) -> str:
    """Return the id of a session that the server describes."""
    session_id = mapping(session).get("id")
    if isinstance(session_id, str):
        return session_id
    raise OpenCodeServerError(
        f"the server described a session with the id {session_id!r}: is it OpenCode 1.17 or later?"
    )


def rules_of(session: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the permission rules of a session that the server describes."""
    rules = session.get("permission")
    if not isinstance(rules, list):
        return []
    return [rule for rule in rules if isinstance(rule, dict) and "permission" in rule]


def is_prompt_with_format(error: OpenCodeServerError) -> bool:
    """Whether a message was refused for having a format, see :func:`stored_messages`."""
    return error.status_code == 400 and "OutputFormat" in str(error)


def _reverted_from(session: Any) -> str | None:
    """Return the first message that a revert took back, until the next prompt; else None."""
    message_id = mapping(mapping(session).get("revert")).get("messageID")
    return None if message_id is None else str(message_id)


def _info(session: Any) -> SessionInfo:
    session, times = mapping(session), mapping(mapping(session).get("time"))
    return SessionInfo(
        session_id=str(session.get("id")),
        title=str(session.get("title")),
        workspace=str(session.get("directory")),
        parent_id=session.get("parentID"),
        total_cost=number_of(session.get("cost")),
        created_at=number_of(times.get("created")) / 1000,
        updated_at=number_of(times.get("updated")) / 1000,
    )
