"""``opencode-sync demo``: the real opencode at work, with a scripted model in place of a provider.

    find_program()   an installed opencode that runs, else the managed copy, installed now
    run()            calls a tool and edits a file
    stream()         is printed as it comes
    four_at_once()   four prompts in parallel, with one client

The results are checked. No part needs a key or, once opencode is installed, a network.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ..api.client import OpenCodeClient
from ..core.errors import OpenCodeBinaryNotFoundError, OpenCodeError
from ..core.result import RunResult
from ..core.text import table
from ..display.stream import tool_line
from ..process.command import TESTED_VERSION, resolve_binary
from ..process.data_dirs import temporary_prefix
from ..process.install import install
from ..process.versions import binary_version, check_program_version, fault_of, is_older
from ..testing import Answer, ChatRequest, Reply, ScriptedModel, tool_call

TIMEOUT_S = 180.0  # of a run, which takes some 3 s on a quiet machine

_FIX = "Fix the spelling in hello.txt."
_FIXED = "I fixed one word in hello.txt."
_LOOK = "What is in this directory?"
_FOUND = "One file, hello.txt. You saw my tool call before this answer."
_CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima"}

Say = Callable[[str], None]
Checked = tuple[str, RunResult, str]
"""A result with its name and the answer that is expected."""


def demo(say: Say = print) -> list[str]:
    """Show a run, a stream and four runs at once; return a message for each failed check.

    Raises:
        OpenCodeBinaryNotFoundError: If opencode is not installed and cannot be installed.
    """
    program = find_program(say)
    faults: list[str] = []
    results: list[tuple[str, RunResult]] = []
    with TemporaryDirectory(
        prefix=f"{temporary_prefix()}demo-", ignore_cleanup_errors=True
    ) as name:
        workspace = Path(name).resolve()
        with (
            ScriptedModel(lambda request: _answer(request, workspace)) as model,
            OpenCodeClient(program, run_cfg=model.run_config()) as client,
        ):
            say(f"The model is a script at {model.base_url}: no key, no cost.")
            for part in (run, stream, four_at_once):
                try:
                    for what, result, answer in part(client, workspace, say):
                        results.append((what, result))
                        if (result.status, result.answer) != ("ok", answer):
                            faults.append(f"{what}: {result.status}, {result.answer!r}")
                except OpenCodeError as error:
                    faults.append(f"{part.__name__}: {error}")
    rows: list[Sequence[str]] = [("", "steps", "tokens", "dollars", "seconds")]
    rows += [_costs(what, [result]) for what, result in results]
    rows.append(_costs("together", [result for _, result in results]))
    say("\n" + "\n".join(table(rows)))
    return faults


def find_program(say: Say) -> str:
    """The path of an opencode that runs, in a known version that is at least the tested one.

    If there is no such program, the managed copy is installed. The one that ``OPENCODE_BINARY``
    names is taken as it is.

    Raises:
        OpenCodeConfigError: If ``OPENCODE_BINARY`` names an unknown version.
    """
    try:
        program = resolve_binary()
        version = binary_version(program)
    except OpenCodeBinaryNotFoundError as error:
        if os.environ.get("OPENCODE_BINARY"):
            raise
        say(str(error).splitlines()[0].partition(": run ")[0])  # that command runs now
        return str(install(report=say))
    if os.environ.get("OPENCODE_BINARY"):
        check_program_version(program)
    elif (fault := fault_of(version)) or is_older(version, TESTED_VERSION):
        say(f"{program}: {fault or f'version {version} is older than {TESTED_VERSION}'}")
        return str(install(report=say))
    say(f"opencode {version}: {program}")
    return program


def _answer(request: ChatRequest, workspace: Path) -> Answer:
    """Answer by the prompt and by the number of tool results so far."""
    step = len(request.tool_results)
    if request.prompt == _FIX:
        file = str(workspace / "hello.txt")
        look = tool_call("bash", command="cat hello.txt", description="Show hello.txt")
        edit = tool_call("edit", filePath=file, oldString="wrold", newString="world")
        return (look, edit, _FIXED)[step]
    if request.prompt == _LOOK:
        look = tool_call("bash", command="ls", description="List the files")
        return (Reply.calls(look, text="Let me look."), _FOUND)[step]
    country = request.prompt.removeprefix("Name the capital of ").removesuffix(".")
    return _CAPITALS[country]


def run(client: OpenCodeClient, workspace: Path, say: Say) -> Iterator[Checked]:
    say(f"\n1. One run.\n   > {_FIX}")
    file = workspace / "hello.txt"
    file.write_text("Hello, wrold!\n")
    result = client.run(_FIX, workspace, timeout_s=TIMEOUT_S)
    for call in result.tool_calls:
        say(f"   {tool_line(call)}")
    text = file.read_text()
    say(f"   {result.answer}\n   hello.txt now holds {text!r}")
    if text != "Hello, world!\n":
        raise OpenCodeError(f"hello.txt holds {text!r}")
    yield "run", result, _FIXED


def stream(client: OpenCodeClient, workspace: Path, say: Say) -> Iterator[Checked]:
    say(f"\n2. A stream, printed as it comes.\n   > {_LOOK}")
    with client.stream(_LOOK, workspace, timeout_s=TIMEOUT_S) as events:
        for event in events:
            if event["type"] == "tool_use":
                say(f"   {tool_line(event)}")
            elif event["type"] == "text":
                say(f"   {event['part']['text']}")
    yield "stream", events.result, _FOUND


def four_at_once(client: OpenCodeClient, workspace: Path, say: Say) -> Iterator[Checked]:
    say("\n3. Four prompts in parallel.")
    prompts = [f"Name the capital of {country}." for country in _CAPITALS]
    started = time.monotonic()
    batch = client.map(prompts, workspace, max_workers=len(prompts), timeout_s=TIMEOUT_S)
    results = list(batch)
    took_s, work_s = time.monotonic() - started, sum(result.duration_s for result in results)
    for number, (result, answer) in enumerate(zip(results, _CAPITALS.values(), strict=True), 1):
        say(f"   > {result.prompt}  {result.answer}.")
        yield f"prompt {number} of 4", result, answer
    say(f"   {work_s:.1f} s of runs in {took_s:.1f} s.")


def _costs(name: str, results: Sequence[RunResult]) -> Sequence[str]:
    return (
        name,
        str(sum(result.turns for result in results)),
        f"{sum(result.token_usage.total for result in results):,}",
        f"{sum(result.total_cost for result in results):.4f}",
        f"{sum(result.duration_s for result in results):.1f}",
    )
