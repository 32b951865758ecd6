"""``opencode-sync chat``: a conversation in the terminal, on a warm server.

    input() --prompt--> session.stream() --live()--> the screen
                               ^--- ask_in_terminal, while a tool waits for permission

Ctrl-C stops the current turn; at the prompt, Ctrl-C or Ctrl-D ends the conversation. Sessions are
kept and can be continued by their ids. If stdin is not a terminal, its lines are the prompts, and
requests for permission are rejected.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from ..api.permissions import ask_in_terminal
from ..api.session import Session
from ..core.errors import OpenCodeConfigError, OpenCodeError
from ..core.limits import Limits
from ..core.text import count, money, outcome
from ..display.stream import live
from ..process.command import managed_root
from .run import DONE, add_run_options, limits, run_config, tell

_HISTORY_LINES = 1_000


def add_options(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    add = parser.add_argument
    add("--max-cost", metavar="USD", type=float, help="stop an answer that costs more")
    add("--max-tokens", metavar="N", type=int, help="stop an answer that uses more")
    add("-s", "--session", metavar="ID", help="continue this session of an earlier chat")


def run(options: argparse.Namespace) -> int:
    """Talk until stdin ends, and return the exit status.

    Raises:
        OpenCodeError: The server does not start, or the session does not exist; or a turn failed
            and stdin is not a terminal.
        KeyboardInterrupt: Ctrl-C at the prompt.
    """
    from ..api.server import OpenCodeServer

    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    ask = ask_in_terminal if is_terminal else None
    settings = limits(options)
    Limits(**settings)  # raises before a server is started
    with (
        OpenCodeServer(run_cfg=run_config(options), data_dir=_data_path("chat")) as server,
        server.session(
            options.workspace,
            session_id=options.session,
            on_permission=ask,
            on_question=ask,
        ) as session,
    ):
        if options.session:
            messages = session.messages()  # raises for an unknown session
            tell(f"{count(len(messages), 'message')} so far")
        try:
            with _prompts(is_terminal) as prompts:
                for prompt in prompts:
                    _turn(session, prompt, settings, goes_on=is_terminal)
        finally:
            _tell_end(session)
    return DONE


def _turn(session: Session, prompt: str, settings: dict[str, Any], *, goes_on: bool) -> None:
    """Run one prompt and show its answer.

    Args:
        settings: Arguments of ``stream``.
        goes_on: Whether the conversation continues after an error.
    """
    try:
        result = live(session.stream(prompt, **settings), notes=sys.stderr)
        print(outcome(result), file=sys.stderr)
    except KeyboardInterrupt:
        if not goes_on:
            raise
        tell("interrupted; Ctrl-D ends the conversation")
    except OpenCodeError as error:
        if not goes_on:
            raise
        tell(str(error))


def _tell_end(session: Session) -> None:
    if session.session_id is not None:
        command = f"opencode-sync chat --session {shlex.quote(session.session_id)}"
        tell(f"{money(session.total_cost)}; to go on: {command}")


# --- prompts -------------------------------------------------------------------------------------


@contextmanager
def _prompts(is_terminal: bool) -> Iterator[Iterator[str]]:
    """Give an iterator over the typed prompts, or over the lines of stdin."""
    if not is_terminal:
        yield _lines(sys.stdin)
        return
    with _history(_data_path("chat-history")) as remember:
        yield _typed(remember)


def _lines(file: TextIO) -> Iterator[str]:
    try:
        for line in file:
            if line.strip():
                yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise OpenCodeConfigError(
            f"the prompts on stdin are not {error.encoding}: {error.reason}"
        ) from None


def _typed(remember: Callable[[str], None]) -> Iterator[str]:
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise
        if prompt.strip():
            remember(prompt)
            yield prompt


@contextmanager
def _history(path: Path) -> Iterator[Callable[[str], None]]:
    """Offer earlier prompts, kept in *path*, at the arrow keys; give a function that adds one."""
    try:
        import readline
    except ImportError:  # not in every Python
        yield lambda prompt: None
        return
    readline.set_auto_history(False)  # answers to questions do not belong there
    with suppress(OSError):  # the first chat, or a history that cannot be read
        readline.read_history_file(path)
    try:
        yield readline.add_history
    finally:
        readline.set_history_length(_HISTORY_LINES)
        with suppress(OSError):  # a lost history does not fail the chat
            # Created before readline writes it, so that only its owner can read it.
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(path)


def _data_path(name: str) -> Path:
    """A path in the user's data directory, which is created if need be."""
    directory = managed_root().parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OpenCodeConfigError(f"{str(directory)!r}: {error.strerror}") from None
    return directory / name
