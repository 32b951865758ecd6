"""What a server is asked about its sessions, besides prompts.

Knows requests and answers; nothing of turns.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ..core.denials import OUTPUT_TOOL
from ..core.errors import OpenCodeConfigError, OpenCodeServerError
from ..core.reading import denied_tool, number_of
from .connection import FIRST_S, MAX_LIST_BYTES, REQUEST_S, Requests
from .feed import mapping

MOST = 10_000  # sessions to be listed; by default OpenCode gives 100


@dataclass(frozen=True)
class SessionInfo:
    """A session that a server keeps.

    Attributes:
        session_id: To resume it by.
        title: Its title.
        workspace: The directory that it works in.
        parent_id: Of a sub-agent's session, the one that it works for.
        total_cost: US dollars of all its turns, without its sub-agents'.
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
    """Of one server; *directory* is always the one that the session works in."""

    def __init__(self, connection: Requests) -> None:
        self._connection = connection

    def all(self, directory: str | None = None) -> list[SessionInfo]:
        """Those of *directory* or of all, the last used first."""
        # Without a directory, /session gives those of one project alone.
        path = "/session" if directory else "/experimental/session"
        found = self._objects(path, directory=directory, limit=MOST)
        return [_info(each) for each in found]

    def latest(self, directory: str) -> str | None:
        """The last used, but for sub-agents'."""
        found = self._objects("/session", directory=directory, roots="true", limit=1)
        return id_of(found[0]) if found else None

    def known(self, session_id: str, directory: str) -> dict[str, Any]:
        """The session's description; raises OpenCodeConfigError if there is none."""
        # An id of another form makes the server fail, not refuse.
        if session_id.startswith("ses"):
            try:
                return self._connection.object(
                    "GET", path_of(session_id), timeout_s=FIRST_S, directory=directory
                )
            except OpenCodeServerError as error:
                if error.status_code != 404:
                    raise
        raise OpenCodeConfigError(f"session {session_id!r} is unknown to the server")

    def resolved(self, directory: str) -> str | None:
        """*directory* as the server calls it, without links; None where it has none."""
        try:
            where = self._connection.get("/path", timeout_s=FIRST_S, directory=directory)
        except OpenCodeServerError as error:
            if error.status_code is None:
                raise
            return None
        own = mapping(where).get("directory")
        return own if isinstance(own, str) else None

    def messages(self, session_id: str, directory: str) -> list[dict[str, Any]]:
        """All messages, oldest first; see :func:`stored_messages`."""
        try:
            return stored_messages(self._connection, session_id, directory)
        except OpenCodeServerError:
            self.known(session_id, directory)
            raise

    def last_prompt(self, session_id: str, directory: str) -> str | None:
        """Id of the last prompt that is not taken back; None where there is none."""
        taken_back = _taken_back(self.known(session_id, directory))
        last = None
        for message in self.messages(session_id, directory):
            info = mapping(message.get("info"))
            if taken_back is not None and info.get("id") == taken_back:
                break
            if info.get("role") == "user":
                last = str(info.get("id"))
        return last

    def last_message(self, session_id: str, directory: str) -> dict[str, Any]:
        """The description of the last message; {} where there is none."""
        path = path_of(session_id, "/message")
        stored = self._objects(path, directory=directory, limit=1)
        return dict(mapping(stored[0].get("info"))) if stored else {}

    def fork(
        self,
        session_id: str,
        directory: str,
        *,
        message_id: str | None = None,
        rules: Sequence[Any] = (),
    ) -> str:
        """A copy, as it was before *message_id*, with the same rules and *rules*.

        Without one it is a copy of all but what is taken back.
        """
        session = self.known(session_id, directory)
        if message_id is not None:
            self._check_message(session_id, message_id, directory)
        else:
            message_id = _taken_back(session)
        body = {} if message_id is None else {"messageID": message_id}
        path = path_of(session_id, "/fork")
        made = self._connection.object("POST", path, body, directory=directory)
        fork_id = id_of(made)
        # A fork begins without any rules.
        if rules := [*rules_of(session), *rules]:
            self.change(fork_id, directory, permission=rules)
        return fork_id

    def change(self, session_id: str, directory: str, **changes: Any) -> None:
        """Set a title; add rules."""
        self._connection.request("PATCH", path_of(session_id), changes, directory=directory)

    def share(self, session_id: str, directory: str) -> None:
        """Make it public."""
        self._connection.post(path_of(session_id, "/share"), directory=directory)

    def summarize(self, session_id: str, directory: str, model: str, timeout_s: float) -> None:
        """Have *model* put a summary in the place of the past, as far as it is concerned."""
        provider, _, name = model.partition("/")
        body = {"providerID": provider, "modelID": name}
        path = path_of(session_id, "/summarize")
        self._connection.post(path, body, timeout_s=timeout_s, directory=directory)

    def revert(
        self, session_id: str, directory: str, message_id: str, *, all_files: bool
    ) -> list[str]:
        """Take back *message_id* and all after it; returns the files that were restored.

        Raises:
            OpenCodeConfigError: If some files cannot be restored and *all_files* are to be.
        """
        self._check_message(session_id, message_id, directory)
        messages = self.messages(session_id, directory)
        taken = _taken_back(self.known(session_id, directory))
        files, _ = _changes(_between(messages, message_id), directory)
        # Of what is taken back already, it was said then.
        _, lost = _changes(_between(messages, message_id, taken), directory)
        if lost and all_files:
            raise OpenCodeConfigError(
                f"OpenCode cannot restore what was changed by {', '.join(lost)}: it has no "
                "snapshot of that (no git repository, lean=True, or a repository inside of "
                "another); pass all_files=False to take the messages back all the same"
            )
        body = {"messageID": message_id}
        path = path_of(session_id, "/revert")
        reverted = mapping(self._connection.post(path, body, directory=directory))
        if not mapping(reverted.get("revert")).get("snapshot"):
            if files and all_files:  # those that a server made which kept snapshots
                raise OpenCodeServerError(
                    "OpenCode took the messages back, but restored no files, since it keeps no "
                    f"snapshots any more: {', '.join(files)}"
                )
            return []
        return files

    def unrevert(self, session_id: str, directory: str) -> None:
        """Give back what was taken back.

        Raises:
            OpenCodeConfigError: If nothing is, or there was a prompt since.
        """
        if _taken_back(self.known(session_id, directory)) is None:
            raise OpenCodeConfigError(
                "there is nothing to give back: nothing was reverted, or a prompt came after it"
            )
        self._connection.post(path_of(session_id, "/unrevert"), directory=directory)

    def delete(self, session_id: str, directory: str) -> None:
        """Remove it, if it is there."""
        with suppress(OpenCodeConfigError):
            self.known(session_id, directory)
            self._connection.request("DELETE", path_of(session_id), directory=directory)

    def _check_message(self, session_id: str, message_id: str, directory: str) -> None:
        # Of an unknown one, OpenCode makes a fork of the whole, and a revert of nothing.
        path = path_of(session_id, f"/message/{quote(message_id, safe='')}")
        try:
            self._connection.get(path, timeout_s=FIRST_S, directory=directory)
        except OpenCodeServerError as error:
            if is_prompt_with_format(error):
                return
            if error.status_code is None or error.status_code >= 500:
                raise
            raise OpenCodeConfigError(
                f"message {message_id!r} is unknown to session {session_id!r}"
            ) from None

    def _objects(self, path: str, **params: Any) -> list[dict[str, Any]]:
        return self._connection.objects(path, timeout_s=FIRST_S, **params)


def stored_messages(
    connection: Requests,
    session_id: str,
    directory: str,
    *,
    limit: int | None = None,
    timeout_s: float = REQUEST_S,
) -> list[dict[str, Any]]:
    """What a server has stored of a session, oldest first.

    OpenCode cannot give a prompt with a format (1.18.33), as it is while its turn goes on: then
    this is what comes after it.

    Args:
        limit: That many of the newest; None for all.
    """

    def newest(limit: int | None) -> list[dict[str, Any]] | None:
        try:
            return connection.objects(
                path_of(session_id, "/message"),
                directory=directory,
                limit=limit,
                timeout_s=timeout_s,
                max_bytes=MAX_LIST_BYTES,
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
    """The messages from *first* on, and before *end*; both are ids."""

    def is_not(message_id: str | None) -> Callable[[Any], bool]:
        return lambda message: mapping(mapping(message).get("info")).get("id") != message_id

    return itertools.takewhile(is_not(end), itertools.dropwhile(is_not(first), messages))


def _changes(messages: Iterable[Any], directory: str) -> tuple[list[str], list[str]]:
    """The files that OpenCode has snapshots of, and what else has, or may have, changed files.

    A step with a snapshot has a ``patch`` with the files that were changed in it. OpenCode has
    none of files in another repository inside of its own, and does not say so.
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
    """The path of requests about a session."""
    return f"/session/{quote(session_id, safe='')}{what}"


def id_of(session: Mapping[str, Any]) -> str:
    """The id of a session that the server describes."""
    session_id = session.get("id")
    if isinstance(session_id, str):
        return session_id
    raise OpenCodeServerError(
        f"the server described a session with the id {session_id!r}: is it OpenCode 1.17 or later?"
    )


def rules_of(session: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The permission rules of a session that the server describes."""
    rules = session.get("permission")
    if not isinstance(rules, list):
        return []
    return [rule for rule in rules if isinstance(rule, dict) and "permission" in rule]


def is_prompt_with_format(error: OpenCodeServerError) -> bool:
    """Whether a message was refused for being one, see :func:`stored_messages`."""
    return error.status_code == 400 and "OutputFormat" in str(error)


def _taken_back(session: Any) -> str | None:
    """Of a session's description: the first message that a revert took, until the next prompt."""
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
