"""A batch over a Dask cluster: two worker processes, real runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import OpenCodeClient, OpenCodeProcessError, RunResult
from opencode_sync.testing import Answer, ChatRequest, Reply, tool_call
from tests.live.warm import MakeModel

distributed = pytest.importorskip("distributed")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Dask client of two worker processes."""
    with (
        # Dask's own has a thread that never ends.
        ThreadPoolExecutor(1) as offloading,
        monkeypatch.context() as patch,
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        cluster.get_client() as client,
    ):
        patch.setattr("distributed.utils._offload_executor", offloading)
        yield client


def test_a_batch_over_a_cluster_brings_back_results_and_errors_and_a_killed_worker_costs_none(
    client: OpenCodeClient, workspace: Path, scripted: MakeModel, cluster: Any, tmp_path: Path
) -> None:
    def answer(request: ChatRequest) -> Answer:
        if request.prompt == "hang":
            return "done" if killed else Reply.hang("thinking")
        if request.prompt == "fail":
            return Reply.failure(401, "bad key") if request.tool_results else hello
        return f"You said {request.prompt}."

    hello = tool_call("bash", command="echo hello", description="Say hello")
    killed: list[int] = []
    model = scripted(answer)
    batch = client.map(
        ["one", "fail", "hang"],
        workspace,
        run_cfg=model.run_config(),
        executor=cluster.get_executor(),
        checkpoint=tmp_path / "batch.jsonl",
        on_error="return",
    )

    result, error = next(batch), next(batch)
    model.wait_for_requests(4, timeout_s=60)
    killed.append(_pid_of_busy_worker(cluster))
    os.kill(killed[0], signal.SIGKILL)
    [last] = batch

    assert isinstance(result, RunResult)
    assert (result.answer, result.index, error.index) == ("You said one.", 0, 1)
    assert isinstance(error, OpenCodeProcessError)
    assert error.reason == "APIError 401: bad key"
    assert error.result is not None
    assert [call["part"]["state"]["output"] for call in error.result.tool_calls] == ["hello\n"]  # type: ignore[typeddict-item]
    assert isinstance(last, RunResult)
    assert last.answer == "done"
    assert len((tmp_path / "batch.jsonl").read_text().splitlines()) == 3


def _pid_of_busy_worker(cluster: Any) -> int:
    pids: dict[str, int] = cluster.run(os.getpid)
    (busy,) = (address for address, tasks in cluster.processing().items() if tasks)
    return pids[busy]
