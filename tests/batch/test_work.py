"""How much work a run makes, counted and not timed: what grows here would show in the benchmarks.

A program counts what it does in a child process of its own, for audit hooks stay.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.standin import write_standin

RUNS = 5
MANY = 11_000  # events

_PROGRAM = """
import collections, json, os, sys, threading, tracemalloc
from opencode_sync import OpenCodeClient

RUNS, MANY, binary, workspace = *map(int, sys.argv[1:3]), *sys.argv[3:]
counts, is_counting = collections.Counter(), False

def note(name, arguments):
    if is_counting and name in ("open", "os.listdir", "subprocess.Popen"):
        path = "" if name == "subprocess.Popen" else str(arguments[0])
        counts[f"{name} /proc" if path.startswith("/proc") else name] += 1
        counts["our environment"] += path == f"/proc/{os.getpid()}/environ"

def start(thread, start=threading.Thread.start):
    counts["thread"] += is_counting
    start(thread)

def prompt(n, kind="text"):
    event = {"type": kind, "sessionID": "ses_1", "part": {"text": "some words"}}
    line = json.dumps(event) + chr(10)
    return f"step(reason='tool-calls'); sys.stdout.write({line!r} * {n}); step()"

def stream(client, n, **keeping):
    # The texts of events would stay: of them final_text is made.
    with client.stream(prompt(n, "new_type"), workspace, **keeping) as stream:
        for _ in stream:
            pass
    return stream.result

def held(client, **keeping):
    tracemalloc.start()
    result = stream(client, MANY, **keeping)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size

with OpenCodeClient(binary) as client:
    client.run("step(text='once, for what is made once')", workspace)
    sys.addaudithook(note)
    threading.Thread.start = start
    is_counting = True
    for _ in range(RUNS):
        client.run("step(text='hello')", workspace)
    is_counting = False
    held_without = held(client, keep_events=False, keep_raw=False)
    held_raw = held(client, keep_events=False)
    output = len("\\n".join(stream(client, MANY, keep_events=False).raw_stdout_lines))
print(json.dumps({
    "per_run": {name: count / RUNS for name, count in counts.items()},
    "held_without": held_without, "held_raw": held_raw, "output": output,
}))
"""


@dataclass(frozen=True)
class Work:
    """What was counted.

    Attributes:
        per_run: Of what a run does in this process, how much.
        held_without, held_raw: Bytes of memory after a stream of MANY events of which nothing was
            kept, and after one whose raw lines were.
        output: Bytes that its child wrote.
    """

    per_run: dict[str, float]
    held_without: int
    held_raw: int
    output: int


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    directory = tmp_path_factory.mktemp("work")
    binary = write_standin(directory / "opencode")
    arguments = [*map(str, (RUNS, MANY)), str(binary), str(directory)]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        check=True,
    )
    return Work(**json.loads(done.stdout))


def test_a_run_starts_one_process_and_two_threads(work: Work) -> None:
    assert work.per_run["subprocess.Popen"] == 1
    assert work.per_run["thread"] == 2


def test_a_run_opens_three_files(work: Work) -> None:
    # Prompt, stdout and stderr; each shows twice, as open() and as the os.open() in it.
    assert work.per_run["open"] <= 6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_run_looks_at_the_processes_once_or_twice(work: Work) -> None:
    # That nothing was left; again where one was just starting or ending.
    assert 1 <= work.per_run["os.listdir /proc"] <= 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_run_does_not_look_into_processes_that_are_older(work: Work) -> None:
    assert work.per_run["open /proc"] > 0
    assert work.per_run["our environment"] == 0


def test_of_events_that_are_not_kept_nothing_stays(work: Work) -> None:
    assert work.held_without < 100_000 < work.output


def test_raw_lines_are_kept_once(work: Work) -> None:
    copies = (work.held_raw - work.held_without) / work.output

    assert 0.9 < copies < 2  # a str of each short line beside its characters
