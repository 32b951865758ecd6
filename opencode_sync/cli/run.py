"""``opencode-sync run``: one prompt, printed as text, as JSON, or as it comes.

Here is also what ``map`` and ``chat`` share with it: options, messages, exit statuses.

    options --> RunConfig --client.stream()--> stdout: the text, the stream or the JSON
                                               stderr: warnings, tools, the outcome

The run uses the user's own OpenCode database, so that opencode itself can go on with its session.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..api.client import OpenCodeClient
from ..core import lifetime
from ..core.config import RunConfig
from ..core.errors import OpenCodeConfigError
from ..core.events import to_json
from ..core.result import RunResult
from ..core.text import is_terminal, outcome, printable
from ..display.stream import live

DONE, FAILED, REFUSED, TIMED_OUT, INTERRUPTED = 0, 1, 2, 124, 130


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help=argparse.SUPPRESS)
    add_run_options(parser)
    add_file_option(parser)
    add = parser.add_argument
    add("--max-cost", metavar="USD", type=float, help="stop when it has cost more")
    add("--max-tokens", metavar="N", type=int, help="stop when it has used more")
    add("--schema", metavar="FILE", help="JSON Schema; prints the answer as JSON that fits it")
    add("-s", "--session", metavar="ID", help="continue this session of your own opencode")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print the whole result as JSON")
    shape.add_argument("--stream", action="store_true", help="print text as it comes")


def run(options: argparse.Namespace) -> int:
    """Run the prompt, and return the exit status. Raises the run's error."""
    prompt = _read_stdin() if options.prompt == "-" else options.prompt
    cfg = run_config(options).replace(session_id=options.session)
    # The user's own database keeps the session for opencode itself and for the next run. This is
    # the only run here, so starts need no limit.
    with OpenCodeClient(isolate_db=False, startup_concurrency=None) as client, ExitStack() as end:
        # Once the run has started, its outcome is printed, even if Ctrl-C comes at once.
        with lifetime.deferred():
            stream = client.stream(
                prompt,
                options.workspace,
                run_cfg=cfg,
                schema=options.schema and json_object("--schema", options.schema),
                keep_raw=False,
                **limits(options),
            )
            end.callback(_show, stream.result, options)
            end.enter_context(stream)
        if options.stream:
            live(stream, notes=sys.stderr)
        else:
            stream.wait()
    return _status(stream.result)


def _show(result: RunResult, options: argparse.Namespace) -> None:
    """Print the result, except for what ``live`` has shown already."""
    if options.json:
        print(to_json(result.to_dict()))
    elif not options.stream and (text := _text(result, options.schema)):
        # As in live(): a terminal gets no escape sequences.
        print(printable(text) if is_terminal(sys.stdout) else text)
    sys.stdout.flush()
    if not options.stream:  # live() has shown them
        for message in result.warnings:
            tell(f"warning: {message}")
        for each in result.tried:
            tell(f"did not answer: {each}")
    session = f", session {result.session_id}" if result.session_id else ""
    print(printable(f"{outcome(result)}{session}"), file=sys.stderr)


def _text(result: RunResult, schema: str | None) -> str:
    if schema is None or result.status not in ("ok", "denied"):
        return result.final_text
    return json.dumps(result.parsed, ensure_ascii=False)


def _status(result: RunResult) -> int:
    if not needs_permission(result):
        return DONE
    tools = ", ".join(dict.fromkeys(result.denied_tools)) or "a tool"
    tell(f"the run ended when it was refused the use of {tools}: see --permission")
    return FAILED


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise OpenCodeConfigError(f"the prompt on stdin is not UTF-8: {error}") from None


# --- what the commands share ----------------------------------------------------------------------


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
