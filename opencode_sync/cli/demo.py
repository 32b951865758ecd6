"""``opencode-sync demo``: the real opencode at work, with a scripted model in place of a provider.

    find_program()   an installed opencode that runs, else the managed copy, installed now
    run              calls a tool and edits a file
    stream           is printed as it comes
    four_at_once     four prompts in parallel, with one client

Each part checks its results. No part needs a key or, once opencode is installed, a network.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from ..api.client import OpenCodeClient
from ..core.errors import OpenCodeBinaryNotFoundError, OpenCodeError
from ..core.result import RunResult
from ..core.text import table, tools_used
from ..display.stream import tool_line
from ..process.command import TESTED_VERSION, resolve_binary
from ..process.data_dirs import temporary_prefix
from ..process.install import install
from ..process.versions import binary_version, check_program_version, fault_of, is_older
from ..testing import Answer, ChatRequest, Reply, ScriptedModel, tool_call

TIMEOUT_S = 180.0  # of a run, which takes some 3 s on a quiet machine
WATCH_S = 60.0  # how long the model waits until its first words are shown

_FIX = "Fix the spelling in hello.txt."
_FIXED = "I fixed one word in hello.txt."
_LOOK = "What is in this directory?"
_FOUND = "One file, hello.txt. You saw my tool call before this answer."
_CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima"}

_STEP_TOKENS = 120  # of each answer of the scripted model: 100 in, 20 out
_STEP_DOLLARS = 100e-6 * 1 + 20e-6 * 10  # at 1 and 10 dollars per million

Say = Callable[[str], None]


def demo(say: Say = print) -> list[str]:
    """Show a run, a stream and four runs at once; return a message for each failed check.

    Raises:
        OpenCodeBinaryNotFoundError: If opencode is not installed and cannot be installed.
    """
    program = find_program(say)
    with TemporaryDirectory(
        prefix=f"{temporary_prefix()}demo-", ignore_cleanup_errors=True
    ) as name:
        script = _Script(Path(name).resolve())
        with (
            ScriptedModel(script.answer) as model,
            OpenCodeClient(program, run_cfg=model.run_config()) as client,
        ):
            say(f"The model is a script at {model.base_url}: no key, no cost.")
            show = _Show(client, script, say)
            for part in (show.run, show.stream, show.four_at_once):
                try:
                    part()
                except OpenCodeError as error:
                    show.faults.append(f"{part.__name__}: {error}")
    show.costs()
    return show.faults


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
    elif fault := fault_of(version) or _age_of(version):
        say(f"{program}: {fault}")
        return str(install(report=say))
    say(f"opencode {version}: {program}")
    return program


def _age_of(version: str) -> str:
    is_old = is_older(version, TESTED_VERSION)
    return f"version {version} is older than {TESTED_VERSION}" if is_old else ""


class _Script:
    """Answers by the prompt and by the number of tool results so far."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.file = workspace / "hello.txt"
        self.is_watched = threading.Event()
        self.was_watched_in_time = False

    def answer(self, request: ChatRequest) -> Answer:
        step = len(request.tool_results)
        if request.prompt == _FIX:
            edit = {"filePath": str(self.file), "oldString": "wrold", "newString": "world"}
            look = tool_call("bash", command="cat hello.txt", description="Show hello.txt")
            return (look, tool_call("edit", **edit), _FIXED)[step]
        if request.prompt == _LOOK:
            look = tool_call("bash", command="ls", description="List the files")
            return (Reply.calls(look, text="Let me look."), Reply([self._wait, _FOUND]))[step]
        country = request.prompt.removeprefix("Name the capital of ").removesuffix(".")
        return _CAPITALS[country]

    def _wait(self) -> None:
        self.was_watched_in_time = self.is_watched.wait(WATCH_S)


@dataclass
class _Show:
    """The parts of the demo, their results, and the failed checks."""

    client: OpenCodeClient
    script: _Script
    say: Say
    faults: list[str] = field(default_factory=list)
    results: list[tuple[str, RunResult]] = field(default_factory=list)

    def run(self) -> None:
        self.say(f"\n1. One run.\n   > {_FIX}")
        self.script.file.write_text("Hello, wrold!\n")
        result = self.client.run(_FIX, self.script.workspace, timeout_s=TIMEOUT_S)
        for call in result.tool_calls:
            self.say(f"   {tool_line(call)}")
        text = self.script.file.read_text()
        self.say(f"   {result.answer}\n   hello.txt now holds {text!r}")
        self._check("run", result, answer=_FIXED, tools=["bash", "edit"])
        self._expect("run", "hello.txt", text, "Hello, world!\n")

    def stream(self) -> None:
        self.say(f"\n2. A stream, printed as it comes.\n   > {_LOOK}")
        with self.client.stream(_LOOK, self.script.workspace, timeout_s=TIMEOUT_S) as stream:
            for event in stream:
                if event["type"] == "tool_use":
                    self.say(f"   {tool_line(event)}")
                elif event["type"] == "text":
                    self.say(f"   {event['part']['text']}")
                    self.script.is_watched.set()
        self._check("stream", stream.result, answer=_FOUND, tools=["bash"])
        seen = self.script.was_watched_in_time
        self._expect("stream", "the first words were shown during the run", seen, True)

    def four_at_once(self) -> None:
        self.say("\n3. Four prompts in parallel.")
        prompts = [f"Name the capital of {country}." for country in _CAPITALS]
        started = time.monotonic()
        workspace, workers = self.script.workspace, len(prompts)
        batch = self.client.map(prompts, workspace, max_workers=workers, timeout_s=TIMEOUT_S)
        results = list(batch)
        took_s, work_s = time.monotonic() - started, sum(result.duration_s for result in results)
        for number, (result, answer) in enumerate(zip(results, _CAPITALS.values(), strict=True), 1):
            self.say(f"   > {result.prompt}  {result.answer}.")
            self._check(f"prompt {number} of 4", result, answer=answer, tools=[])
        self.say(f"   {work_s:.1f} s of runs in {took_s:.1f} s.")

    def costs(self) -> None:
        """Print what each run cost."""
        rows: list[Sequence[str]] = [("", "steps", "tokens", "dollars", "seconds")]
        rows += [_costs(name, [result]) for name, result in self.results]
        rows.append(_costs("together", [result for _, result in self.results]))
        self.say("\n" + "\n".join(table(rows)))

    def _check(self, name: str, result: RunResult, *, answer: str, tools: list[str]) -> None:
        """Keep *result*, and record a fault for each value that is not as expected."""
        self.results.append((name, result))
        steps = len(tools) + 1
        self._expect(name, "status", result.status, "ok")
        self._expect(name, "answer", result.answer, answer)
        self._expect(name, "tools", tools_used(result), tools)
        self._expect(name, "tokens", result.token_usage.total, _STEP_TOKENS * steps)
        dollars = round(_STEP_DOLLARS * steps, 6)
        self._expect(name, "dollars", round(result.total_cost, 6), dollars)

    def _expect(self, name: str, what: str, found: object, expected: object) -> None:
        if found != expected:
            self.faults.append(f"{name}: {what}: {found!r}, not {expected!r}")


def _costs(name: str, results: Sequence[RunResult]) -> Sequence[str]:
    return (
        name,
        str(sum(result.turns for result in results)),
        f"{sum(result.token_usage.total for result in results):,}",
        f"{sum(result.total_cost for result in results):.4f}",
        f"{sum(result.duration_s for result in results):.1f}",
    )
