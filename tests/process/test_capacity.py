"""How many runs at a time: what the machine carries, and the gate around start-ups."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from opencode_sync import OpenCodeCancelledError
from opencode_sync.process import capacity
from opencode_sync.process.capacity import Gate

GIB = 2**30
LONG_S = 20.0

# --- workers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cores, gib, container, workers",
    [
        pytest.param(2, 64, {}, 4, id="two for each core"),
        pytest.param(16, 64, {}, capacity.MOST, id="more is for the user to ask for"),
        pytest.param(16, 3, {}, 5, id="as far as memory goes"),
        pytest.param(16, 0, {}, 1, id="at least one"),
        pytest.param(16, 64, {"cpu.max": "150000 100000\n"}, 4, id="a container's cores"),
        pytest.param(
            16, 64, {"memory.max": 4 * GIB, "memory.current": 2 * GIB}, 3, id="its memory"
        ),
        pytest.param(
            16,
            64,
            {"cpu.max": "max 100000", "memory.max": "max", "memory.current": 1},
            capacity.MOST,
            id="a container without limits",
        ),
    ],
)
def test_as_many_workers_as_the_machine_carries(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cores: int,
    gib: int,
    container: dict[str, object],
    workers: int,
) -> None:
    monkeypatch.setattr(capacity, "_CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    memory = SimpleNamespace(available=gib * GIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    for name, value in container.items():
        (tmp_path / name).write_text(str(value))

    assert capacity.workers_for_processes() == workers


# --- the gate ------------------------------------------------------------------------------------


def never() -> bool:
    return False


def test_no_more_than_the_limit_are_inside() -> None:
    gate = Gate(2)
    inside, most = 0, 0
    lock = threading.Lock()
    both = threading.Barrier(2)

    def enter() -> None:
        nonlocal inside, most
        with gate.slot(never):
            with lock:
                inside += 1
                most = max(most, inside)
            both.wait(LONG_S)  # passes only with a second one inside
            with lock:
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)

    assert most == 2


@pytest.mark.parametrize("limit", [0, None])
def test_without_a_limit_all_are_let_through(limit: int | None) -> None:
    gate = Gate(limit)

    with gate.slot(never), gate.slot(never), gate.slot(never):
        pass


def test_a_slot_is_given_back_when_the_block_raises() -> None:
    gate = Gate(1)
    with pytest.raises(KeyboardInterrupt), gate.slot(never):
        raise KeyboardInterrupt

    with gate.slot(never):
        pass


def test_a_ctrl_c_right_after_a_slot_was_taken_loses_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(1)
    assert gate._semaphore is not None
    acquire = gate._semaphore.acquire

    def interrupted(timeout: float) -> bool:
        is_held = acquire(timeout=timeout)
        signal.raise_signal(signal.SIGINT)
        return is_held

    monkeypatch.setattr(gate._semaphore, "acquire", interrupted)
    with pytest.raises(KeyboardInterrupt), gate.slot(never):
        pass

    assert acquire(timeout=0)


def test_a_wait_ends_soon_after_a_cancel() -> None:
    gate = Gate(1)
    cancelled = threading.Event()
    threading.Timer(0.1, cancelled.set).start()
    started = time.monotonic()

    with (
        gate.slot(never),
        pytest.raises(OpenCodeCancelledError, match="before it had started"),
        gate.slot(cancelled.is_set),
    ):
        pass

    assert time.monotonic() - started < LONG_S
