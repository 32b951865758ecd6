"""Where it is measured: the machine, the binary, the contenders.

    Setting.contender("ours") -------> Contender.ask("runs", ...) --> Answer
    Setting.contender("rival 0.1.2")

Each contender is a process that is kept for its benchmark, with an empty home. The rivals are
installed from PyPI into environments of their own in the user's cache, once.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import platformdirs
import psutil

from opencode_sync import OpenCodeError, resolve_binary
from opencode_sync.process.data_dirs import DataDirectories
from opencode_sync.process.versions import binary_version

RIVAL = "py-opencode-wrapper"
RIVAL_VERSIONS = ("0.1.2", "0.3.8")
MARK = "OPENCODE_SYNC_BENCHMARK"  # a contender's name, in the environment of all it starts
ROOT = Path(__file__).resolve().parents[2]


class CannotRun(Exception):
    """A contender that does not do a task, with the reason."""


@dataclass(frozen=True)
class Answer:
    """What a task took, and what came of it."""

    wall_s: float
    cpu_s: float
    answer: Any


class Contender:
    """A worker's process; answers one task at a time."""

    def __init__(self, name: str, argv: list[str], home: Path, workspace: Path) -> None:
        self.name = name
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=workspace,
            env=_environment(home, workspace) | {MARK: name},
        )

    def ask(self, task: str, **arguments: Any) -> Answer:
        """Have *task* done.

        Raises:
            CannotRun: In the worker's words.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"task": task, "arguments": arguments}) + "\n")
        stdin.flush()
        told = json.loads(stdout.readline() or '{"error": "it ended"}')
        if "error" in told:
            raise CannotRun(f"{self.name}: {told['error']}")
        return Answer(**told)

    def close(self) -> None:
        try:
            self._process.communicate(timeout=15)  # its stdin ends, and so does it
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def _environment(home: Path, workspace: Path) -> dict[str, str]:
    """Ours, without what leads opencode to the developer's files, models and keys.

    In a home that OpenCode was at work in before: into an empty one it would install by npm, in
    the background of each run until one lasts long enough.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENCODE_", "XDG_")) and not name.endswith("_API_KEY")
    }
    # PWD, since one of the rivals does not set it, and would work in the directory that we are in.
    ours = {"HOME": home, "XDG_CONFIG_HOME": DataDirectories(home / "used").empty_config()}
    ours |= {"PWD": workspace, "PYTHONPATH": ROOT}
    return env | {name: str(path) for name, path in ours.items()}


@dataclass
class Setting:
    """What the benchmarks share.

    Attributes:
        workspace: Where contenders have their runs work.
        rivals: Their Pythons by name, or why there is none.
    """

    is_quick: bool
    root: Path
    workspace: Path
    binary: str | None
    rivals: dict[str, str]
    _contenders: ExitStack = field(default_factory=ExitStack)

    def opencode(self) -> str:
        """The real binary.

        Raises:
            CannotRun: Where there is none.
        """
        if self.binary is None:
            raise CannotRun("no opencode here: set OPENCODE_BINARY, or run opencode-sync install")
        return self.binary

    def contender(self, name: str) -> Contender:
        """``"ours"``, ``"bare"``, or one of *rivals*, in a fresh process.

        Raises:
            CannotRun: Where the rival could not be installed.
        """
        python = self.rivals.get(name, sys.executable)
        if not os.path.exists(python):
            raise CannotRun(f"{name}: {python}")
        module = "rival" if name in self.rivals else name
        argv = [python, "-m", f"tests.benchmarks.workers.{module}"]
        contender = Contender(name, argv, self.root, self.workspace)
        self._contenders.callback(contender.close)
        return contender

    def contenders(self, *names: str) -> dict[str, Contender]:
        return {name: self.contender(name) for name in names}

    def size(self, full: int, quick: int) -> int:
        return quick if self.is_quick else full

    def end_contenders(self) -> None:
        """End their processes, after a benchmark."""
        self._contenders.close()

    def describe(self) -> str:
        """The moment, the machine and the versions, in one line."""
        opencode = binary_version(self.binary) if self.binary else "none"
        return (
            f"{datetime.now(timezone.utc):%Y-%m-%d}, {'quick' if self.is_quick else 'full'} sizes: "
            f"{os.cpu_count()} cores ({_processor()}), "
            f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.system()} "
            f"{platform.release()}, Python {platform.python_version()}, OpenCode {opencode}"
        )


@contextmanager
def setting(is_quick: bool) -> Iterator[Setting]:
    """Find the binary, install the rivals; everything that was made is removed at the end."""
    try:
        binary: str | None = resolve_binary()
    except OpenCodeError:
        binary = None
    versions = RIVAL_VERSIONS[-1:] if is_quick else RIVAL_VERSIONS
    rivals = {f"rival {version}": _rival_python(version) for version in versions}
    with tempfile.TemporaryDirectory(prefix="opencode-sync-benchmarks-") as directory:
        root = Path(directory).resolve()
        (root / "workspace").mkdir()
        made = Setting(is_quick, root, root / "workspace", binary, rivals)
        try:
            yield made
        finally:
            made.end_contenders()


def _rival_python(version: str) -> str:
    """The Python that has that version of the rival, or why there is none."""
    cache = platformdirs.user_cache_path("opencode-sync-benchmarks", appauthor=False)
    major, minor = sys.version_info[:2]
    home = cache / f"{RIVAL}-{version}-python{major}.{minor}"
    python = home / "bin" / "python"
    if python.exists():
        return str(python)
    commands = (
        [sys.executable, "-m", "venv", str(home)],
        [str(python), "-m", "pip", "install", "--quiet", f"{RIVAL}=={version}"],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(home, ignore_errors=True)
            reason = (done.stderr or done.stdout).strip().splitlines()
            return f"cannot be installed: {reason[-1] if reason else done.returncode}"
    return str(python)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "unknown")
