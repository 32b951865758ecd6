"""Shared by the commands: the options of a run, messages to the user, exit statuses."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..core.config import RunConfig
from ..core.errors import OpenCodeConfigError
from ..core.result import RunResult
from ..core.text import printable

DONE, FAILED, REFUSED, TIMED_OUT, INTERRUPTED = 0, 1, 2, 124, 130


def tell(text: str) -> None:
    """Print *text*, which may quote a model, as a message on stderr."""
    print(f"opencode-sync: {printable(text)}", file=sys.stderr, flush=True)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``run``, ``map`` and ``chat`` share."""
    add = parser.add_argument
    add("-w", "--workspace", metavar="DIR", default=".", help="where to work (default: here)")
    add("-m", "--model", metavar="P/M", help="provider/model")
    add("--fallback-model", metavar="P/M", dest="fallback_models", action="append", default=[],
        help="ask this one when the model is out; may be given again")  # fmt: skip
    add("--agent", metavar="NAME", help="name of the agent")
    add("--config", metavar="FILE", help="OpenCode configuration (JSON), merged over your own")
    add("--permission", metavar="JSON", help="""such as '{"edit": "deny"}', or allow""")
    add("--timeout", metavar="S", type=float, help="seconds for a run")
    add("--idle-timeout", metavar="S", type=float, help="seconds without an event or a log line")
    add("--max-steps", metavar="N", type=int, help="stop a run that takes more steps")


def add_file_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--file``, which may be given several times."""
    parser.add_argument(
        "-f", "--file", metavar="F", dest="files", action="append", default=[],
        help="attach a file; may be given again",
    )  # fmt: skip


def run_config(options: argparse.Namespace) -> RunConfig:
    """Make the settings that *options* name.

    Raises:
        OpenCodeConfigError: Names the file or option, and what is wrong with it.
    """
    return RunConfig(
        agent=options.agent,
        model=options.model,
        fallback_models=tuple(options.fallback_models),
        files=tuple(map(_attachment, getattr(options, "files", ()))),
        config_overrides=options.config and json_object("--config", options.config),
        permission=options.permission and _permission(options.permission),
    )


def limits(options: argparse.Namespace) -> dict[str, Any]:
    """The limits of one prompt, as arguments of ``stream``."""
    return {
        "timeout_s": options.timeout,
        "idle_timeout_s": options.idle_timeout,
        "max_cost": options.max_cost,
        "max_steps": options.max_steps,
        "max_tokens": options.max_tokens,
    }


def needs_permission(result: RunResult) -> bool:
    """Whether the run ended at a tool that was refused; OpenCode counts that as no error."""
    return result.finish_reason == "tool-calls"


def json_object(option: str, path: str) -> dict[str, Any]:
    """Read the JSON object in the file *path*, which was given as *option*.

    Raises:
        OpenCodeConfigError: Names both, and what is wrong.
    """
    try:
        value = json.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise OpenCodeConfigError(f"{option} {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise OpenCodeConfigError(f"{option} {path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise OpenCodeConfigError(f"{option} {path}: a JSON object is needed")
    return value


def _attachment(file: str) -> str:
    # In a shell a path is relative to the current directory, not to the workspace.
    path = os.path.abspath(os.path.expanduser(file))
    if not os.path.isfile(path):
        raise OpenCodeConfigError(f"--file {file}: no such file")
    return path


def _permission(text: str) -> Any:
    if text in ("allow", "deny", "ask"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OpenCodeConfigError(f"--permission {text!r} is not valid JSON: {error}") from None
