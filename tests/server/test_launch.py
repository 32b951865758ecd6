"""What a server's process prints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest

from opencode_sync.core.errors import OpenCodeServerError
from opencode_sync.core.lifetime import CancelScope
from opencode_sync.process.stderr import PRELOAD_PREFIX
from opencode_sync.server.feed import REFUSED, EventStream, Message
from opencode_sync.server.launch import ServerProcess


class Feed:
    def __init__(self) -> None:
        self.messages: list[Message] = []

    def put(self, message: Message) -> None:
        self.messages.append(message)


def test_what_our_plugins_print_is_passed_on_and_odd_lines_are_not() -> None:
    server = object.__new__(ServerProcess)  # its process is not needed to read a line
    feed = Feed()
    server.feed = cast(EventStream, feed)

    for told in (
        "[1]",
        '"status"',
        "[" * 100_000,
        '{"denials": true}',
        '{"session": "ses_1", "status": 429, "retry_after": "5", "retry_after_ms": null}',
        '{"type": "error", "sessionID": "ses_1", "error": {"name": "N"}}',
    ):
        server._take(PRELOAD_PREFIX + told)

    assert feed.messages == [
        Message("ses_1", REFUSED, {"status": 429, "retry_after_s": 5.0}),
        Message("ses_1", "session.error", {"error": {"name": "N"}}),
    ]


def test_the_last_words_of_a_server_that_ends_at_once_are_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "opencode"
    program.write_text("#!/bin/sh\nprintf 'no way'; exit 3\n")
    program.chmod(0o755)
    read = ServerProcess._read

    def read_late(server: ServerProcess) -> None:
        server._exited.wait(30)
        read(server)

    monkeypatch.setattr(ServerProcess, "_read", read_late)

    with pytest.raises(OpenCodeServerError, match="status 3 before it listened: no way"):
        ServerProcess(str(program), dict(os.environ), tmp_path, timeout_s=30, scope=CancelScope())
