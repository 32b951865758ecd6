"""What a server says of its sessions."""

from __future__ import annotations

from typing import Any

import pytest

from opencode_sync import OpenCodeServerError
from opencode_sync.server.sessions import stored_messages


class Stored:
    """A connection to a server that cannot give the messages up to the one at *unreadable*."""

    def __init__(self, messages: int, unreadable: int | None = None) -> None:
        self._messages = [{"number": number} for number in range(messages)]
        self._unreadable = unreadable

    def objects(self, path: str, *, limit: int | None, **settings: Any) -> list[dict[str, int]]:
        messages = self._messages[-limit:] if limit else self._messages
        if {"number": self._unreadable} in messages:
            raise OpenCodeServerError("Expected OutputFormatJsonSchema", status_code=400)
        return messages


@pytest.mark.parametrize(
    "stored, messages",
    [
        (Stored(3), [0, 1, 2]),
        (Stored(5, unreadable=2), [3, 4]),
        (Stored(5, unreadable=4), []),
        (Stored(0), []),
    ],
    ids=["all readable", "in the middle", "the last", "none"],
)
def test_of_messages_those_after_an_unreadable_one_are_read(
    stored: Any, messages: list[int]
) -> None:
    found, last = (stored_messages(stored, "ses_1", "/", limit=limit) for limit in (None, 1))

    assert [message["number"] for message in found] == messages
    assert [message["number"] for message in last] == messages[-1:]
