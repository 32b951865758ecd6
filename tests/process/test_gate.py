"""The gate around start-ups."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from opencode_sync import OpenCodeCancelledError
from opencode_sync.process.capacity import Gate

LONG_S = 20.0


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
