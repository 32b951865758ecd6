"""Where a job is carried out, and what it has cost however it ends."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from opencode_sync import (
    Job,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeOutputError,
    OpenCodeProcessError,
    RunResult,
)
from opencode_sync.batch import job
from opencode_sync.batch.job import Listener, Task, Work
from opencode_sync.core.events import Event
from tests.api.test_repair import COST, GOOD, Answering
from tests.scripted import ScriptedRunner

ROOT = Path(__file__).parents[2]

# Newer Pythons warn of fork in a process that has threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def processes(n: int, way: str) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(n, mp_context=multiprocessing.get_context(way))


# --- executors -----------------------------------------------------------------------------------


@pytest.fixture(params=["threads", "fork", "spawn"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with ThreadPoolExecutor(2) if request.param == "threads" else processes(2, request.param) as e:
        yield e


def test_jobs_run_on_an_executor_of_the_users_own(
    runner: ScriptedRunner, executor: Executor
) -> None:
    jobs = ["a", Job("fail", key="k"), "refused c", "hold d", "hold e"]

    with runner.map(jobs, executor=executor, on_error="return") as batch:
        good, bad, refused = next(batch), next(batch), next(batch)

    assert isinstance(good, RunResult)
    assert (good.answer, good.index) == ("A", 0)
    assert isinstance(bad, OpenCodeProcessError)
    assert (bad.index, bad.key, bad.prompt) == (1, "k", "fail")
    assert bad.result is not None
    assert bad.result.answer == "FAIL"
    assert isinstance(refused, RunResult)
    assert (batch.report.rate_limits, batch.report.lowest_workers) == (1, 1)
    assert executor.submit(int, "3").result(timeout=10) == 3  # those that held on have ended


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_a_pool_that_loses_a_worker_loses_no_finished_result(
    runner: ScriptedRunner, tmp_path: Path, way: str
) -> None:
    path = tmp_path / "batch.jsonl"
    given: list[object] = []

    with processes(1, way) as pool:
        jobs = ["a", "b", "die", "c"]
        batch = runner.map(jobs, executor=pool, checkpoint=path, on_error="return")
        with pytest.raises(OpenCodeError, match=r"worker was lost|takes no more jobs"):
            given.extend(batch)

    assert [end.answer for end in given if isinstance(end, RunResult)] == ["A", "B"]
    assert len(path.read_text().splitlines()) == 2


def test_an_executor_that_was_shut_down_is_an_error(runner: ScriptedRunner) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()

    with pytest.raises(OpenCodeError, match="the executor takes no more jobs"):
        list(runner.map(["a"], executor=pool))


def test_a_task_that_is_pickled_only_after_the_stop_is_not_begun() -> None:
    work = Work(ScriptedRunner(), Listener())
    work.stop("the batch was closed")

    remote = pickle.loads(pickle.dumps(work))

    assert not os.path.exists(remote.liveness.path)
    assert isinstance(remote(Task(0, "a", ".")).end, OpenCodeCancelledError)


# Executors that leave something in their process, and what the death of a worker ends.
OTHERS = {
    "multiprocessing": "pool",  # by a fork server
    "loky": "pool",
    "distributed": "job",
    "parsl": "job",
    "mpi4py": "program",  # as MPI defines it
}
WITH_ANOTHER = """
import sys
from tests.scripted import ScriptedRunner

def executor_of(package):
    if package == "multiprocessing":
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        return ProcessPoolExecutor(1, get_context("forkserver"))
    if package == "loky":
        from loky import ProcessPoolExecutor
        return ProcessPoolExecutor(1)
    if package == "distributed":
        from distributed import Client
        return Client(n_workers=1, threads_per_worker=1, dashboard_address=":0").get_executor()
    if package == "parsl":
        from parsl import Config, HighThroughputExecutor
        from parsl.concurrent import ParslPoolExecutor
        nodes = HighThroughputExecutor(address="127.0.0.1", max_workers_per_node=1)
        return ParslPoolExecutor(Config(executors=[nodes]))
    from mpi4py.futures import MPIPoolExecutor
    return MPIPoolExecutor(1)

def tell(*words):
    print(*words, flush=True)

if __name__ == "__main__":
    executor, runner = executor_of(sys.argv[1]), ScriptedRunner()
    options = dict(executor=executor, max_workers=1, on_error="return")
    with runner.map(["a", "hold b", "c"], **options) as batch:
        tell(next(batch).answer)
    tell("cancelled")
    batch = runner.map(["d", "e", "die", "f"], checkpoint="batch.jsonl", **options)
    for end in batch:
        tell(getattr(end, "answer", "lost"))
    executor.shutdown()
"""


@pytest.mark.parametrize("package", OTHERS)
def test_other_executors_cancel_a_batch_and_lose_no_finished_result_with_a_worker(
    tmp_path: Path, package: str
) -> None:
    pytest.importorskip(package)
    ends = OTHERS[package]
    # Parsl and MPI look for programs of theirs on PATH.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])

    child = subprocess.run(
        [sys.executable, "-c", WITH_ANOTHER, package],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        timeout=100,
        start_new_session=True,  # MPI's end of a program is that of its process group
    )

    after = {"pool": ["lost"], "job": ["lost", "F"], "program": []}[ends]
    assert child.stdout.split() == ["A", "cancelled", "D", "E", *after]
    assert (child.returncode == 0) == (ends == "job")
    saved = (tmp_path / "batch.jsonl").read_text().splitlines()
    assert len(saved) == 2 + after.count("F")


def test_a_class_that_a_worker_does_not_know_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", notebook := ModuleType("__main__"))
    exec(
        "from typing_extensions import TypedDict\nclass Dog(TypedDict):\n    legs: int",
        vars(notebook),
    )

    with processes(1, "spawn") as pool, Answering() as runner:
        (error,) = runner.map(
            [GOOD], schema=vars(notebook)["Dog"], executor=pool, on_error="return"
        )
        answer = pool.submit(abs, -3).result(timeout=30)

    assert isinstance(error, OpenCodeConfigError)
    assert "AttributeError: Can't get attribute 'Dog' on <module '__main__'" in str(error)
    assert answer == 3  # the pool goes on


SCRIPT = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from tests.scripted import ScriptedRunner

class Telling(ScriptedRunner):
    def __reduce__(self):
        return Telling, ()

    def _open(self, request, cancelled, keep_raw):
        print(request.prompt, flush=True)
        return super()._open(request, cancelled, keep_raw)

    def _ended(self):
        print("ended", flush=True)

pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
for result in Telling().map(["hold"], executor=pool):
    pass
"""


def test_when_the_batch_is_killed_its_runs_in_worker_processes_are_ended() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "hold\n"
        (worker,) = psutil.Process(child.pid).children()
        child.kill()

        assert child.stdout.readline() == "ended\n"
        worker.kill()  # a forked worker never notices that its pool is dead (CPython 3.11)


# --- what a job has cost -------------------------------------------------------------------------


@dataclass
class Crashing:
    """A user's class whose checks have a fault."""

    legs: int

    def __post_init__(self) -> None:
        _ = {4: "a dog"}[self.legs]


@dataclass
class Exiting:
    """One that ends the program, as a callback may."""

    legs: int

    def __post_init__(self) -> None:
        sys.exit("no such bird")


@dataclass
class Locked:
    """One whose values cannot be pickled."""

    legs: int

    def __post_init__(self) -> None:
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    "schema, kind",
    [(Crashing, OpenCodeOutputError), (Exiting, OpenCodeCancelledError)],
    ids=["raises KeyError", "exits"],
)
def test_a_job_that_ends_in_the_users_code_has_cost_what_it_has(schema: Any, kind: Any) -> None:
    with Answering() as runner:
        batch = runner.map([GOOD, GOOD], schema=schema, max_repairs=0, on_error="return")
        ends = list(batch)

    assert [type(end) for end in ends] == [kind, kind]
    assert [end.result.total_cost for end in ends if isinstance(end, OpenCodeError)] == [COST] * 2
    assert batch.report.total_cost == 2 * COST


def test_a_job_that_ends_by_a_fault_of_ours_has_cost_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fault(event: Event) -> bool:
        return bool(event["type"] == "step_finish" and 1 / 0)

    monkeypatch.setattr(job, "_is_refusal", fault)

    with Answering() as runner:
        batch = runner.map([GOOD], on_error="return")
        (error,) = batch

    assert isinstance(error, OpenCodeError)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert error.result is not None
    assert error.result.total_cost == batch.report.total_cost == COST


def test_a_value_that_cannot_leave_its_worker_process_is_an_error_with_its_cost() -> None:
    with Answering() as runner, processes(1, "spawn") as pool:
        batch = runner.map([GOOD], schema=Locked, executor=pool, on_error="return")
        (error,) = batch

    assert isinstance(error, OpenCodeOutputError)
    assert "cannot pickle" in str(error)
    assert error.result is not None
    assert (error.result.status, error.result.answer) == ("error", GOOD)
    assert error.result.total_cost == batch.report.total_cost == COST
