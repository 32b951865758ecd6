"""The demo: the real opencode does real work for a model that is a script.

    find_program()   one that is there and runs, else the managed copy, installed now
    run              calls a tool, edits a file
    stream           printed as it comes
    four at once     with one client

Each part is held against what it must have brought about. None needs a key or a network.
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
from ..core.config import RunConfig
from ..core.errors import OpenCodeBinaryNotFoundError, OpenCodeError
from ..core.result import RunResult
from ..core.text import table
from ..display.stream import event_line, tool_line, tool_name
from ..process.command import TESTED_VERSION, resolve_binary
from ..process.data_dirs import temporary_prefix
from ..process.install import install
from ..process.versions import binary_version, check_program_version, fault_of, is_older
from ..testing import Answer, ChatRequest, Reply, ScriptedModel, tool_call

TIMEOUT_S = 180.0  # for a run; it takes some 3 s where it has the machine for itself
WATCH_S = 60.0  # how long the model waits for its first words to be seen

_MEND = "Mend the spelling in hello.txt."
_MENDED = "I mended one word in hello.txt."
_LOOK = "What is in this directory?"
_FOUND = "One file, hello.txt. You saw me look before I knew."
_CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima"}

_STEP_TOKENS = 120  # of each answer of the scripted model: 100 in, 20 out
_STEP_DOLLARS = 100e-6 * 1 + 20e-6 * 10  # at 1 and 10 dollars per million

Say = Callable[[str], None]


def demo(say: Say = print) -> list[str]:
    """Show a run, a stream and four runs at once; return what did not work, in words.

    Raises:
        OpenCodeBinaryNotFoundError: If there is no opencode, and none can be installed.
    """
    program = find_program(say)
    with TemporaryDirectory(
        prefix=f"{temporary_prefix()}demo-", ignore_cleanup_errors=True
    ) as name:
        script = _Script(Path(name).resolve())
        with ScriptedModel(script.answer) as model, OpenCodeClient(program) as client:
            say(f"The model is a script at {model.base_url}: no key, no cost.")
            show = _Show(client, model.run_config(), script, say)
            for part in (show.run, show.stream, show.four_at_once):
                try:
                    part()
                except OpenCodeError as error:
                    show.faults.append(f"{part.__name__}: {error}")
    show.costs()
    return show.faults


def find_program(say: Say) -> str:
    """Path of an opencode that runs, of a known version that is not older than the tested one.

    Where there is none, the managed copy is installed. What ``OPENCODE_BINARY`` names is taken as
    it is.

    Raises:
        OpenCodeConfigError: If ``OPENCODE_BINARY`` names a version that is not known.
    """
    is_chosen = bool(os.environ.get("OPENCODE_BINARY"))
    try:
        program = resolve_binary()
        version = binary_version(program)
    except OpenCodeBinaryNotFoundError as error:
        if is_chosen:
            raise
        say(str(error).splitlines()[0].partition(": run ")[0])  # which is what happens now
        return str(install(report=say))
    if is_chosen:
        check_program_version(program)
    fault = fault_of(version)
    if is_chosen or not (fault or is_older(version, TESTED_VERSION)):
        say(f"opencode {version}: {program}")
        return program
    say(f"{program}: {fault or f'version {version} is older than {TESTED_VERSION}'}")
    return str(install(report=say))


class _Script:
    """What the model says, by the prompt and by how many tools have answered."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.file = workspace / "hello.txt"
        self.is_watched = threading.Event()
        self.was_watched_in_time = False

    def answer(self, request: ChatRequest) -> Answer:
        step = len(request.tool_results)
        if request.prompt == _MEND:
            edit = {"filePath": str(self.file), "oldString": "wrold", "newString": "world"}
            look = tool_call("bash", command="cat hello.txt", description="Show hello.txt")
            return (look, tool_call("edit", **edit), _MENDED)[step]
        if request.prompt == _LOOK:
            look = tool_call("bash", command="ls", description="List the files")
            return (Reply.calls(look, text="I look."), Reply([self._wait, _FOUND]))[step]
        country = request.prompt.removeprefix("Name the capital of ").removesuffix(".")
        return _CAPITALS[country]

    def _wait(self) -> None:
        self.was_watched_in_time = self.is_watched.wait(WATCH_S)


@dataclass
class _Show:
    """The parts of the demo, what they cost, and what did not work."""

    client: OpenCodeClient
    cfg: RunConfig
    script: _Script
    say: Say
    faults: list[str] = field(default_factory=list)
    results: list[tuple[str, RunResult]] = field(default_factory=list)

    def run(self) -> None:
        self.say(f"\n1. One run.\n   > {_MEND}")
        self.script.file.write_text("Hello, wrold!\n")
        result = self.client.run(
            _MEND, self.script.workspace, run_cfg=self.cfg, timeout_s=TIMEOUT_S
        )
        for call in result.tool_calls:
            self.say(f"   {tool_line(call)}")
        text = self.script.file.read_text()
        self.say(f"   {result.answer}\n   hello.txt now holds {text!r}")
        self._check("run", result, answer=_MENDED, tools=["bash", "edit"])
        self._expect("run", "hello.txt", text, "Hello, world!\n")

    def stream(self) -> None:
        self.say(f"\n2. A stream, printed as it comes.\n   > {_LOOK}")
        workspace = self.script.workspace
        with self.client.stream(_LOOK, workspace, run_cfg=self.cfg, timeout_s=TIMEOUT_S) as stream:
            for event in stream:
                if line := event_line(event):
                    self.say(f"   {line}")
                    self.script.is_watched.set()
        self._check("stream", stream.result, answer=_FOUND, tools=["bash"])
        seen = self.script.was_watched_in_time
        self._expect("stream", "the first words seen while the run went on", seen, True)

    def four_at_once(self) -> None:
        self.say("\n3. Four prompts in parallel.")
        prompts = [f"Name the capital of {country}." for country in _CAPITALS]
        started = time.monotonic()
        workspace = self.script.workspace
        results = list(
            self.client.map(
                prompts,
                workspace,
                run_cfg=self.cfg,
                timeout_s=TIMEOUT_S,
                max_workers=len(prompts),
            )
        )
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
        """Keep *result*, and note what is not as it must be."""
        self.results.append((name, result))
        steps = len(tools) + 1
        self._expect(name, "status", result.status, "ok")
        self._expect(name, "answer", result.answer, answer)
        self._expect(name, "tools", [tool_name(call) for call in result.tool_calls], tools)
        self._expect(name, "tokens", result.token_usage.total, _STEP_TOKENS * steps)
        dollars = round(_STEP_DOLLARS * steps, 6)
        self._expect(name, "dollars", round(result.total_cost, 6), dollars)

    def _expect(self, name: str, what: str, found: object, expected: object) -> None:
        if found != expected:
            self.faults.append(f"{name}: {what}: {found!r}, and not {expected!r}")


def _costs(name: str, results: Sequence[RunResult]) -> Sequence[str]:
    return (
        name,
        str(sum(result.turns for result in results)),
        f"{sum(result.token_usage.total for result in results):,}",
        f"{sum(result.total_cost for result in results):.4f}",
        f"{sum(result.duration_s for result in results):.1f}",
    )
