"""Batches of real runs."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

from opencode_sync import (
    OpenCodeClient,
)
from opencode_sync.testing import Reply
from tests.live.warm import MakeModel

ROOT = Path(__file__).parent.parent.parent

# Prints what it got on stdout; the bar is on stderr, which is a terminal.
SCRIPT = """
import sys
from opencode_sync import OpenCodeClient, OpenCodeError
from opencode_sync.testing import Reply, ScriptedModel

def answer(request):
    if "bad" in request.prompt:
        return Reply.failure(401, "bad key")
    return f"You said {request.prompt}."

with ScriptedModel(answer) as model, OpenCodeClient(sys.argv[1]) as client:
    cfg = model.run_config()
    jobs = ["one", "bad two", "three"]
    batch = client.map(jobs, run_cfg=cfg, max_workers=2, on_error="return", progress=True)
    for end in batch:
        is_error = isinstance(end, OpenCodeError)
        print(end.index, str(end).partition("\\n")[0] if is_error else end.answer)
    print(batch.report.done, batch.report.failed, batch.report.errors)
"""


def test_three_prompts_one_of_which_fails_with_a_bar_on_a_terminal(
    opencode_binary: str, workspace: Path
) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 150, 0, 0))
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        child = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, opencode_binary],
            cwd=workspace,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
        )
        os.close(theirs)
        shown: list[bytes] = []
        reader = threading.Thread(target=_read, args=(terminal, shown))
        reader.start()
        out, _ = child.communicate(timeout=110)
        reader.join(10)

    assert out.splitlines() == [
        "0 You said one.",
        "1 opencode exited with status 1: APIError 401: bad key",
        "2 You said three.",
        "2 1 {'OpenCodeProcessError (APIError 401)': 1}",
    ]
    last = b"".join(shown).decode().rstrip().rpartition("\r")[2]
    assert "3/3" in last
    assert "1 failed" in last


def _read(terminal: object, into: list[bytes]) -> None:
    try:
        while data := terminal.read(65536):  # type: ignore[attr-defined]
            into.append(data)
    except OSError:  # the other end is closed
        pass


def test_cancelling_a_future_ends_a_real_run(
    client: OpenCodeClient, workspace: Path, scripted: MakeModel
) -> None:
    model = scripted(Reply.hang("Working"))
    future = client.submit("Work", workspace, run_cfg=model.run_config())
    model.wait_for_requests(1, timeout_s=60)

    assert future.cancel()

    assert future.cancelled()
    model.wait_until_idle(10)
