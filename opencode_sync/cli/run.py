"""``opencode-sync run``: options become a RunConfig, a result becomes text, JSON or a stream."""

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
from ..core.text import outcome, printable
from ..display.stream import live
from .options import DONE, FAILED, add_file_option, add_run_options, json_object, run_config, tell


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
    """Run the prompt, and return the exit status; raises what the run raises."""
    prompt = _read_stdin() if options.prompt == "-" else options.prompt
    cfg = run_config(options).replace(session_id=options.session)
    # With the user's own database, so that the session is in his opencode, and in the next run;
    # without a gate, since this is the only run here.
    with OpenCodeClient(isolate_db=False, startup_concurrency=None) as client, ExitStack() as end:
        # A run that has been started is told of, also where a Ctrl-C comes at once.
        with lifetime.deferred():
            stream = client.stream(
                prompt,
                options.workspace,
                run_cfg=cfg,
                timeout_s=options.timeout,
                idle_timeout_s=options.idle_timeout,
                max_cost=options.max_cost,
                max_steps=options.max_steps,
                max_tokens=options.max_tokens,
                schema=options.schema and json_object("--schema", options.schema),
                keep_raw=False,
            )
            end.callback(_show, stream.result, options)
            end.enter_context(stream)
        if options.stream:
            live(stream, notes=sys.stderr)
        else:
            stream.wait()
    return _ended(stream.result)


def _show(result: RunResult, options: argparse.Namespace) -> None:
    """Print what the run came to, in so far as it has not been shown."""
    if options.json:
        print(to_json(result.to_dict()))
    elif not options.stream and (text := _text(result, options.schema)):
        # As in live(): a terminal is told nothing that it would obey.
        print(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
    if not options.stream:  # live() has shown them as they came
        for message in result.warnings:
            tell(f"warning: {message}")
    session = f", session {result.session_id}" if result.session_id else ""
    print(printable(f"{outcome(result)}{session}"), file=sys.stderr)


def _text(result: RunResult, schema: str | None) -> str:
    if schema is None or result.status not in ("ok", "denied"):
        return result.final_text
    return json.dumps(result.parsed, ensure_ascii=False)


def _ended(result: RunResult) -> int:
    if result.finish_reason != "tool-calls":
        return DONE
    # No error to OpenCode: it ended the run there, without an answer.
    tools = ", ".join(dict.fromkeys(result.denied_tools)) or "a tool"
    tell(f"the run ended where the use of {tools} was refused: see --permission")
    return FAILED


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise OpenCodeConfigError(f"the prompt on stdin is not UTF-8: {error}") from None
