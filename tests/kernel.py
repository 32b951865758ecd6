"""A notebook's kernel, driven cell by cell."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from jupyter_core.utils import ensure_event_loop

ROOT = Path(__file__).parent.parent
WITHIN_S = 90


class Kernel:
    """A running kernel, cell by cell."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self._notebook: Any = nbformat.v4.new_notebook()  # type: ignore[no-untyped-call]
        self.client = nbclient.NotebookClient(self._notebook, allow_errors=True, timeout=WITHIN_S)

    @classmethod
    @contextmanager
    def started(cls, workspace: Path, env: Mapping[str, str]) -> Iterator[Kernel]:
        """One that works in *workspace*, with this package at hand."""
        path = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        kernel = cls(workspace)
        with kernel.client.setup_kernel(env={**env, "PYTHONPATH": path}, cwd=str(workspace)):
            yield kernel
        ensure_event_loop().close()  # nbclient's own, which it keeps for ever

    def run(self, code: str) -> list[Any]:
        """The outputs of a cell with *code*."""
        cells = self._notebook.cells
        cells.append(nbformat.v4.new_code_cell(code.strip("\n")))  # type: ignore[no-untyped-call]
        return list(self.client.execute_cell(cells[-1], len(cells) - 1)["outputs"])

    def value(self, code: str) -> str:
        """What *code* is, as the notebook shows it in plain text."""
        (output,) = self.run(code)
        return str(output["data"]["text/plain"])

    def run_until(self, exists: Path, code: str) -> list[Any]:
        """The same, with the stop button pressed as soon as the file *exists*."""

        def press() -> None:
            while not has_ended.wait(0.05):
                if exists.exists():
                    os.killpg(group, signal.SIGINT)  # what the button does
                    return

        group = os.getpgid(int(self.value("os.getpid()")))
        has_ended = threading.Event()
        finger = threading.Thread(target=press)
        finger.start()
        try:
            return self.run(code)
        finally:
            has_ended.set()
            finger.join()
