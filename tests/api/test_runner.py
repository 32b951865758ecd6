"""The verbs of both runners: their options, their way to a process or a server, and their ends."""

from __future__ import annotations

import asyncio
import copy
import inspect
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NoReturn

import pytest

from opencode_sync import (
    Job,
    OpenCodeBudgetError,
    OpenCodeCancelledError,
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeProcessError,
    OpenCodeServer,
    RunResult,
    Session,
)
from tests.faults import standin_client
from tests.scripted import ScriptedRunner
from tests.standin import write_serving

ROOT = Path(__file__).parents[2]
PACKAGE = str(ROOT / "opencode_sync")
WITHIN_S = 30.0


@pytest.fixture
def runner() -> Iterator[ScriptedRunner]:
    with ScriptedRunner(max_workers=2) as runner:
        yield runner


# --- options -------------------------------------------------------------------------------------

PROMPT = "spend 9 steps"
Ask = Callable[..., Any]
VERBS: dict[str, Ask] = {
    "run": lambda runner, **options: runner.run(PROMPT, **options),
    "stream": lambda runner, **options: runner.stream(PROMPT, **options).wait(),
    "submit": lambda runner, **options: runner.submit(PROMPT, **options).result(WITHIN_S),
    "map": lambda runner, **options: list(runner.map([PROMPT], **options)),
    "send": lambda runner, **options: Session(runner).send(PROMPT, **options),
    "Session.stream": lambda runner, **options: Session(runner).stream(PROMPT, **options).wait(),
}


@pytest.mark.parametrize("ask", VERBS.values(), ids=VERBS)
def test_each_verb_takes_options_and_refuses_bad_ones_before_anything_starts(
    runner: ScriptedRunner, ask: Ask
) -> None:
    with pytest.raises(OpenCodeConfigError, match="timeout_s is -1: use a number above 0"):
        ask(runner, timeout_s=-1)
    with pytest.raises(OpenCodeConfigError, match="schema is 'Bird': use a class"):
        ask(runner, schema="Bird")
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'timeout'"):
        ask(runner, timeout=60)
    before = list(runner.begun)
    with pytest.raises(OpenCodeBudgetError) as caught:
        ask(runner, max_steps=2)

    assert before == []
    assert caught.value.result is not None
    assert (caught.value.result.status, caught.value.result.turns) == ("over_budget", 2)


def test_an_option_of_another_verb_is_refused(runner: ScriptedRunner) -> None:
    with pytest.raises(TypeError, match=r"Runner\.run\(\) got an .* 'keep_events'"):
        runner.run(PROMPT, keep_events=False)  # type: ignore[call-arg]


def test_a_job_takes_limits_of_its_own(runner: ScriptedRunner) -> None:
    with pytest.raises(OpenCodeBudgetError, match="max_steps of 2"):
        list(runner.map([Job(PROMPT, max_steps=2)], max_steps=5))


def test_help_shows_each_parameter_and_explains_it() -> None:
    for verb in (OpenCodeClient.run, OpenCodeClient.map):
        explained = (verb.__doc__ or "") + (OpenCodeClient.run.__doc__ or "")
        for name in inspect.signature(verb).parameters:
            assert name == "self" or f" {name}" in explained


# --- the way of a prompt -------------------------------------------------------------------------


class Reached(BaseException):
    """What was called is not to go on."""


def frames_of_ours(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.name for frame in frames if frame.filename.startswith(PACKAGE)]


def test_a_prompt_passes_seven_frames_to_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: object, **__: object) -> NoReturn:
        raise Reached

    with standin_client(tmp_path) as client:
        client.run("well", tmp_path)
        monkeypatch.setattr(subprocess, "Popen", reached)
        with pytest.raises(Reached) as caught:
            client.run("well", tmp_path)
        monkeypatch.undo()

    assert len(frames_of_ours(caught.value)) <= 7, frames_of_ours(caught.value)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OpenCodeServer]:
    """A stand-in's; what its prompts mean stands at the head of serving.py."""
    with OpenCodeServer(write_serving(tmp_path / "opencode")) as server:
        yield server


def test_a_prompt_passes_eight_frames_to_its_first_request(
    server: OpenCodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx2

    caller, send = threading.current_thread(), httpx2.HTTPTransport.handle_request

    def reached(transport: Any, request: Any) -> Any:
        if threading.current_thread() is caller:
            raise Reached
        return send(transport, request)

    server.run("say hello")
    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", reached)
    with pytest.raises(Reached) as caught:
        server.run("say hello")
    monkeypatch.undo()

    assert len(frames_of_ours(caught.value)) <= 8, frames_of_ours(caught.value)


# --- a future ------------------------------------------------------------------------------------


def test_a_future_has_the_result(runner: ScriptedRunner) -> None:
    future = runner.submit("hello")

    assert future.result(timeout=WITHIN_S).answer == "HELLO"
    assert future.exception() is None
    assert (future.done(), future.cancelled(), future.cancel()) == (True, False, False)


@pytest.mark.parametrize(
    "prompt, kind",
    [("fail", OpenCodeProcessError), ("", OpenCodeConfigError), (["a"], OpenCodeConfigError)],
    ids=["failed", "refused", "of a wrong type"],
)
def test_a_future_raises_what_the_run_ended_with(
    runner: ScriptedRunner, prompt: Any, kind: type[OpenCodeError]
) -> None:
    future = runner.submit(prompt)

    with pytest.raises(kind) as caught:
        future.result(timeout=WITHIN_S)

    assert future.exception() is caught.value
    assert not future.cancelled()


def test_no_more_than_max_workers_run_at_a_time(runner: ScriptedRunner) -> None:
    futures = [runner.submit(str(n)) for n in range(20)]

    done, not_done = wait(futures, timeout=WITHIN_S)

    assert (len(done), not_done) == (20, set())
    assert runner.most <= 2


def test_cancel_ends_a_run_that_is_under_way(runner: ScriptedRunner) -> None:
    future = runner.submit("hold")
    heard = threading.Event()
    future.add_done_callback(lambda _: heard.set())
    runner.wait_for(1)

    assert future.cancel()

    assert (future.cancelled(), future.done(), future.running()) == (True, True, False)
    assert heard.is_set()
    with pytest.raises(OpenCodeCancelledError, match="the future was cancelled") as caught:
        future.result()
    assert caught.value.result is not None
    assert caught.value.result.final_text == "wait"
    with pytest.raises(CancelledError):
        future.exception()


def test_cancel_keeps_a_waiting_run_from_beginning(runner: ScriptedRunner) -> None:
    futures = [runner.submit(f"hold {n}") for n in range(3)]
    runner.wait_for(2)

    assert futures[2].cancel()

    with pytest.raises(OpenCodeCancelledError, match="before it began"):
        futures[2].result()
    runner.release()
    assert wait(futures, timeout=WITHIN_S).not_done == set()
    assert len(runner.begun) == 2


def test_an_event_loop_can_wait_for_a_future_and_cancel_it(runner: ScriptedRunner) -> None:
    held = runner.submit("hold")

    async def answer() -> str:
        waiting = asyncio.wrap_future(held)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return (await asyncio.wrap_future(runner.submit("hello"))).answer

    assert asyncio.run(answer()) == "HELLO"
    assert held.cancelled()


INTERRUPTED = """
import asyncio
from concurrent.futures import ThreadPoolExecutor
from tests.scripted import ScriptedRunner

class Telling(ScriptedRunner):
    def _open(self, request, scope, keep_raw):
        source = super()._open(request, scope, keep_raw)
        print("begun", flush=True)
        return source

    def _ended(self):
        print("ended", flush=True)

async def answer():
    return await asyncio.wrap_future(client.submit("hold"))

client = Telling()
"""
IN_ASYNCIO = "asyncio.run(answer())"
IN_A_POOL = """
with ThreadPoolExecutor() as executor, client:
    executor.submit(client.run, "hold").result()
"""


@pytest.mark.parametrize("code", [IN_ASYNCIO, IN_A_POOL], ids=["asyncio", "thread pool"])
def test_a_ctrl_c_in_asyncio_and_beside_a_pool_ends_the_run_and_the_program(code: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED + code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "begun\n"

        child.send_signal(signal.SIGINT)

        assert child.wait(WITHIN_S) == -signal.SIGINT
        assert child.stdout.readline() == "ended\n"


# --- closing -------------------------------------------------------------------------------------


def test_closing_the_runner_cancels_what_runs_and_what_waits(runner: ScriptedRunner) -> None:
    futures = [runner.submit(f"hold {n}") for n in range(5)]
    runner.wait_for(2)

    runner.close()
    runner.close()

    assert [future.cancelled() for future in futures] == [True] * 5
    uses: list[Callable[[], object]] = [
        lambda: runner.run("late"),
        lambda: runner.stream("late"),
        lambda: runner.submit("late"),
        lambda: runner.map(["late"]),
        runner.__enter__,
    ]
    for use in uses:
        with pytest.raises(OpenCodeConfigError, match="is closed: make a new one"):
            use()


def test_a_callback_may_close_the_runner(runner: ScriptedRunner) -> None:
    closed = threading.Event()

    def close(_: object) -> None:
        runner.close()
        closed.set()

    runner.submit("hello").add_done_callback(close)

    assert closed.wait(WITHIN_S)


Misuse = Callable[[ScriptedRunner], object]


def close_in_a_stream_s_loop(runner: ScriptedRunner) -> None:
    for _ in runner.stream("hold on"):
        runner.close()


def close_in_a_batch_s_loop(runner: ScriptedRunner) -> None:
    for _ in runner.map(["hello", "hold on"], ordered=False):
        runner.close()


def send_after_close(runner: ScriptedRunner) -> None:
    chat = Session(runner)
    runner.close()
    chat.send("hello")


@pytest.mark.parametrize(
    "misuse", [close_in_a_stream_s_loop, close_in_a_batch_s_loop, send_after_close]
)
def test_what_goes_on_after_the_runner_was_closed_is_told(
    runner: ScriptedRunner, misuse: Misuse
) -> None:
    with pytest.raises(OpenCodeCancelledError, match="the runner was closed"):
        misuse(runner)


PRELUDE = """
import itertools, sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from tests.scripted import ScriptedRunner

runner = ScriptedRunner(max_workers=2)
jobs = itertools.chain("a", map("hold {}".format, itertools.count()))
"""


@pytest.mark.parametrize(
    "script, status",
    [
        ("futures = [runner.submit(f'hold {n}') for n in range(9)]; runner.wait_for(2)", 0),
        ("future = runner.submit('hold'); runner.wait_for(1); sys.exit(3)", 3),
        ("for result in runner.map(jobs): 1 / 0", 1),
        ("batch = runner.map(jobs, executor=ThreadPoolExecutor(2)); next(batch)", 0),
        ("batch = runner.map(jobs, executor=ProcessPoolExecutor(2)); next(batch)", 0),
    ],
    ids=["submits", "submits and exits", "maps and fails", "maps on threads", "maps on processes"],
)
def test_a_script_that_leaves_runs_behind_ends_all_the_same(script: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script], cwd=ROOT, capture_output=True, timeout=60
    )

    assert done.returncode == status, done.stderr.decode()
    assert b"hold" not in done.stdout
    assert done.stderr == b"" or status == 1


# --- other threads, processes and loops ----------------------------------------------------------


@pytest.mark.parametrize("under_way", ["stream", "map", "submit", "session"])
@pytest.mark.parametrize(
    "copied", [pickle.dumps, copy.copy, copy.deepcopy], ids=lambda copied: copied.__name__
)
def test_what_is_under_way_stays_in_its_process(
    runner: ScriptedRunner, under_way: str, copied: Callable[[object], object]
) -> None:
    made: Any = {
        "stream": lambda: runner.stream("hello"),
        "map": lambda: runner.map(["hello"]),
        "submit": lambda: runner.submit("hello"),
        "session": lambda: Session(runner),
    }[under_way]()

    with pytest.raises(OpenCodeConfigError, match=r"cannot leave its process: (pass|resume)"):
        copied(made)
    if under_way == "map":
        made.close()  # or it warns that nobody iterates over it


def test_a_result_that_is_pickled_in_mid_run_is_what_has_come(runner: ScriptedRunner) -> None:
    with runner.stream("hold on") as stream:
        while not stream.result.final_text:
            next(stream)

        partial = pickle.loads(pickle.dumps(stream.result))

    assert (partial.status, partial.final_text) == ("incomplete", "wait")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_that_a_batch_is_not_its_own(runner: ScriptedRunner) -> None:
    batch = runner.map(["hello"])

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            next(batch)
        except OpenCodeConfigError as error:
            status = 0 if "belongs to the process that was forked from" in str(error) else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)

    assert status == 0
    assert next(batch).answer == "HELLO"


# --- what is no batch ----------------------------------------------------------------------------

BATCHES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "str as jobs": ("well", {}, "jobs is str: use an iterable of prompts"),
    "one Job as jobs": (Job("well"), {}, "jobs is Job: use an iterable of prompts"),
    "dict as jobs": ({"well": 1}, {}, "jobs is dict: use an iterable of prompts"),
    "number as a job": ([7], {}, "job is int: use a str or a Job"),
    "number as a key": ([Job("well", key=7)], {}, "the job's key is of type int: use a str"),  # type: ignore[arg-type]
    "dict as a job's settings": (
        [Job("well", run_cfg={})],  # type: ignore[arg-type]
        {},
        "the job's run_cfg is of type dict: use a",
    ),
    "no buffer": (["well"], {"buffersize": 0}, "buffersize is 0: use 1 or more, or None"),
    "no workers": (["well"], {"max_workers": 0}, "max_workers is 0: use 1 or more, or None"),
    "on_error to ignore": (["well"], {"on_error": "ignore"}, "use 'raise' or 'return'"),
    "a word for progress": (["well"], {"progress": "yes"}, "use False or True or 'always'"),
    "budget of True": (["well"], {"max_total_cost": True}, "max_total_cost is True: use a number"),
    "half a token": (["well"], {"max_total_tokens": 1.5}, "max_total_tokens is 1.5: use 0 or more"),
    "class as executor": (["well"], {"executor": ThreadPoolExecutor}, "executor is type: use a"),
    "number as checkpoint": (["well"], {"checkpoint": 3}, "checkpoint is 3: use the path of a"),
    "NUL in the checkpoint": (["well"], {"checkpoint": "a\0b"}, "checkpoint is 'a\\x00b': use"),
    "directory as checkpoint": (["well"], {"checkpoint": "."}, "Is a directory"),
}


@pytest.mark.parametrize("jobs, options, message", BATCHES.values(), ids=BATCHES)
def test_what_is_no_batch_is_refused(
    runner: ScriptedRunner, jobs: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OpenCodeConfigError) as caught:
        list(runner.map(jobs, **options))

    assert message in str(caught.value)
    assert runner.begun == []


def test_jobs_that_ask_for_results_of_their_own_batch_are_told(runner: ScriptedRunner) -> None:
    def jobs() -> Iterator[str]:
        yield "hello"
        next(batch)

    batch = runner.map(jobs())

    with pytest.raises(OpenCodeConfigError, match="this batch is being iterated already"):
        list(batch)


def test_a_closed_batch_just_ends_and_a_cancelled_one_says_so(runner: ScriptedRunner) -> None:
    closed, cancelled = runner.map(["hello"] * 3), runner.map(["hello"] * 3)
    assert [type(next(batch)) for batch in (closed, cancelled)] == [RunResult] * 2

    closed.close()
    cancelled.cancel("enough")

    assert list(closed) == []
    with pytest.raises(OpenCodeCancelledError, match="enough"):
        next(cancelled)
