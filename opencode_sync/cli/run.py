"""``opencode-sync run``: one prompt, printed as text, as JSON, or as it comes.

    options --> RunConfig --client.stream()--> stdout: the text, the stream or the JSON
                                               stderr: warnings, tools, the outcome

The run uses the user's own OpenCode database, so that opencode itself can go on with its session.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack

from ..api.client import OpenCodeClient
from ..core import lifetime
from ..core.errors import OpenCodeConfigError
from ..core.events import to_json
from ..core.result import RunResult
from ..core.text import is_terminal, outcome, printable
from ..display.stream import live
from .options import (
    DONE,
    FAILED,
    add_file_option,
    add_run_options,
    json_object,
    limits,
    needs_permission,
    run_config,
    tell,
)


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
