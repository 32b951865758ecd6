"""``opencode-sync`` and ``python -m opencode_sync``: reads the command line and runs a command.

    argv --> argparse --> a command's run(options) --> exit status

    0 done    1 a run failed    2 wrong usage or settings    124 timed out    130 interrupted

Results go to stdout, everything else to stderr. Without ``--debug`` an error is one message and
never a traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from .._version import __version__
from ..core.errors import (
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeTimeoutError,
)
from ..core.text import printable
from ..process.command import TESTED_VERSION
from . import chat, map, run
from .run import DONE, FAILED, INTERRUPTED, REFUSED, TIMED_OUT, tell


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that *argv* names (by default ``sys.argv``), and return the exit status.

    Raises:
        SystemExit: From argparse, for ``--help``, ``--version`` and wrong usage.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # we were started with it closed
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A model may write characters that the terminal's encoding lacks.
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(argv)
    with _log_lines(options.debug):
        try:
            return int(options.do(options))
        except KeyboardInterrupt:
            tell("interrupted")
            return INTERRUPTED
        except BrokenPipeError:
            # The reader of the pipe has gone. Python would fail again when it flushes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except Exception as error:  # noqa: BLE001 - the last place that can report it
            if options.debug:
                traceback.print_exc()
            elif isinstance(error, OpenCodeError):
                tell(str(error))
            else:
                tell(f"{type(error).__name__}: {error} (--debug shows where)")
            return _status(error)


def _status(error: Exception) -> int:
    if isinstance(error, OpenCodeConfigError):
        return REFUSED
    if isinstance(error, OpenCodeTimeoutError):
        return TIMED_OUT
    return INTERRUPTED if isinstance(error, OpenCodeCancelledError) else FAILED


class _PrintableFormatter(logging.Formatter):
    """Removes terminal escape sequences: a line may quote OpenCode."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def _log_lines(is_wanted: bool) -> Iterator[None]:
    """If wanted, show the package's log lines on stderr inside the block."""
    log = logging.getLogger("opencode_sync")
    if not is_wanted:
        yield
        return
    shown, level = logging.StreamHandler(), log.level
    shown.setFormatter(_PrintableFormatter())
    log.addHandler(shown)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(shown)
        log.setLevel(level)


# --- the command line ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Command:
    name: str
    argument: str
    does: str
    example: str
    add_options: Callable[[argparse.ArgumentParser], None]
    do: Callable[[argparse.Namespace], int]


def _install_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--version",
        metavar="V",
        dest="opencode_version",
        help=f"instead of {TESTED_VERSION}, the version this is tested with",
    )


def _demo(options: argparse.Namespace) -> int:
    from .demo import demo

    faults = demo()
    for fault in faults:
        tell(f"the demo failed: {fault}")
    if not faults:
        print("Everything worked.")
    return FAILED if faults else DONE


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fix", action="store_true", help="remove what crashes left behind")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _doctor(options: argparse.Namespace) -> int:
    from ..process.leftovers import Leftovers
    from .doctor import examine

    removed = ""
    if options.fix and (leftovers := Leftovers.find()):
        removed = str(leftovers)
        leftovers.remove()
    findings = []
    for finding in examine():
        findings.append(finding)
        if not options.json:
            print(printable(str(finding)), flush=True)
    if options.json:
        print(json.dumps({"findings": [vars(each) for each in findings], "removed": removed}))
    elif removed:
        print(f"removed {removed}")
    return FAILED if any(finding.state == "bad" for finding in findings) else DONE


def _install(options: argparse.Namespace) -> int:
    from ..process.install import install

    install(options.opencode_version)
    return DONE


_COMMANDS = (
    _Command("demo", "", "show what it does, without a key", "demo", lambda parser: None, _demo),
    _Command(
        "run",
        "PROMPT|-",
        "run one prompt and print the answer",
        'run "Explain this repo" --timeout 600',
        run.add_options,
        run.run,
    ),
    _Command(
        "map",
        "FILE|-",
        "run many prompts: a file's lines, or a table",
        "map prompts.txt --output results.jsonl --server",
        map.add_options,
        map.run,
    ),
    _Command(
        "chat",
        "",
        "talk with the agent",
        "chat --permission ask",
        chat.add_options,
        chat.run,
    ),
    _Command(
        "doctor", "", "check what runs need on this machine", "doctor", _doctor_options, _doctor
    ),
    _Command("install", "", "install OpenCode", "install", _install_options, _install),
)


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviated options, with errors of one line and 80 columns of help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: {message}; see '{self.prog} --help'\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """One line for each option, so that a command's help fits a screen."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **{**settings, "max_help_position": 26, "width": 80})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {action.metavar}"


def _parser() -> argparse.ArgumentParser:
    examples = "\n".join(f"  opencode-sync {command.example}" for command in _COMMANDS)
    parser = _Parser(
        prog="opencode-sync",
        description="Run the OpenCode coding agent from the shell.",
        epilog=f"examples:\n{examples}",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"opencode-sync {__version__}",
        help="show the version and exit",
    )
    names = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        added = names.add_parser(
            command.name,
            help=command.does,
            usage=f"opencode-sync {command.name} [OPTIONS] {command.argument}".rstrip(),
            description=f"{command.does[0].upper()}{command.does[1:]}.",
            epilog=f"example: opencode-sync {command.example}",
        )
        command.add_options(added)
        added.add_argument("--debug", action="store_true", help="show tracebacks and log lines")
        added.set_defaults(do=command.do)
    return parser
