"""How many runs the machine carries."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from opencode_sync.process import capacity

GIB = 2**30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """16 cores, 64 GiB free, no container; its control group's files go into the directory."""
    monkeypatch.setattr(capacity, "_CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    memory = SimpleNamespace(available=64 * GIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    return tmp_path


def test_two_for_each_core(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)

    assert capacity.workers_for_processes() == 4


def test_not_more_than_a_number_that_nobody_asked_for(machine: Path) -> None:
    assert capacity.workers_for_processes() == capacity.MOST == 32


def test_as_far_as_memory_goes(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=3 * GIB))

    assert capacity.workers_for_processes() == 5


def test_at_least_one(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))

    assert capacity.workers_for_processes() == 1


def test_a_container_has_its_share_of_the_cores(machine: Path) -> None:
    (machine / "cpu.max").write_text("150000 100000\n")

    assert capacity.workers_for_processes() == 4


def test_a_container_has_its_share_of_the_memory(machine: Path) -> None:
    (machine / "memory.max").write_text(f"{4 * GIB}\n")
    (machine / "memory.current").write_text(f"{2 * GIB}\n")

    assert capacity.workers_for_processes() == 3


def test_a_container_without_limits_is_the_machine(machine: Path) -> None:
    (machine / "cpu.max").write_text("max 100000\n")
    (machine / "memory.max").write_text("max\n")
    (machine / "memory.current").write_text("1\n")

    assert capacity.workers_for_processes() == 32
