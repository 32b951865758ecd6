"""``opencode-sync run``: options become a RunConfig, a result becomes text, JSON or a stream."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ._markup import outcome
from .client import OpenCodeClient
from .config import RunConfig
from .display import live
from .errors import OpenCodeConfigError
from .result import RunResult

_UNFINISHED = 1


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What a run and a batch of runs have in common."""
    add = parser.add_argument
    add("-w", "--workspace", metavar="DIR", default=".", help="where to work (default: here)")
    add("-m", "--model", metavar="P/M", help="provider/model")
    add("--agent", metavar="NAME", help="name of the agent")
    add("--config", metavar="FILE", help="OpenCode configuration (JSON), laid over your own")
    add("--permission", metavar="JSON", help="""such as '{"edit": "deny"}', or allow""")
    add(
        "-f", "--file", metavar="F", dest="files", action="append", default=[],
        help="attach a file; may be given again",
    )  # fmt: skip
    add("--timeout", metavar="S", type=float, help="seconds for a run")
    add("--idle-timeout", metavar="S", type=float, help="seconds without a sign of life")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help=argparse.SUPPRESS)
    add_run_options(parser)
    add = parser.add_argument
    add("--max-cost", metavar="USD", type=float, help="stop when it has cost more")
    add("-s", "--session", metavar="ID", help="continue this session of your own opencode")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print the whole result as JSON")
    shape.add_argument("--stream", action="store_true", help="print text as it comes")


def run(options: argparse.Namespace) -> int:
    """Run the prompt, and return the exit status; raises what the run raises."""
    prompt = _read_stdin() if options.prompt == "-" else options.prompt
    cfg = run_config(options).replace(session_id=options.session)
    # With the user's own database, so that the session is in his opencode, and in the next run.
    with OpenCodeClient(isolate_db=False) as client:
        stream = client.stream(
            prompt,
            options.workspace,
            run_cfg=cfg,
            timeout_s=options.timeout,
            idle_timeout_s=options.idle_timeout,
            max_cost=options.max_cost,
            keep_raw=False,
        )
        try:
            if options.stream:
                live(stream, notes=sys.stderr)
            else:
                with stream:
                    stream.wait()
        finally:
            result = stream.result
            if options.json:
                print(json.dumps(result.to_dict()))
            elif not options.stream and result.final_text:
                print(result.final_text)
            sys.stdout.flush()
            session = f", session {result.session_id}" if result.session_id else ""
            print(f"{outcome(result)}{session}", file=sys.stderr)
    return _ended(result)


def _ended(result: RunResult) -> int:
    if result.finish_reason != "tool-calls":
        return 0
    # No error to OpenCode: it ended the run there, without an answer.
    tools = ", ".join(dict.fromkeys(result.denied_tools)) or "a tool"
    print(
        f"opencode-sync: the run ended where the use of {tools} was refused: see --permission",
        file=sys.stderr,
    )
    return _UNFINISHED


def run_config(options: argparse.Namespace) -> RunConfig:
    """The settings that *options* name.

    Raises:
        OpenCodeConfigError: Names the file or option, and what is wrong with it.
    """
    return RunConfig(
        agent=options.agent,
        model=options.model,
        # In a shell a path counts from where one is, not from the workspace.
        files=tuple(os.path.abspath(os.path.expanduser(file)) for file in options.files),
        config_overrides=options.config and _object_in(Path(options.config)),
        permission=options.permission and _permission(options.permission),
    )


def _object_in(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise OpenCodeConfigError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise OpenCodeConfigError(f"--config {path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise OpenCodeConfigError(f"--config {path}: a JSON object is needed")
    return value


def _permission(text: str) -> Any:
    if text in ("allow", "deny", "ask"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise OpenCodeConfigError(f"--permission {text!r} is no JSON: {error}") from None


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise OpenCodeConfigError(f"the prompt on stdin is not UTF-8: {error}") from None
