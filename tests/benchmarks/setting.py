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
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import platformdirs
import psutil

from opencode_sync import OpenCodeError, resolve_binary
from opencode_sync.process.data_dirs import DataDirectories
from opencode_sync.process.versions import binary_version

RIVAL = "py-opencode-wrapper"
RIVAL_VERSIONS = ("0.1.2", "0.3.8")
SAMPLING_S = 0.05
MARK = "OPENCODE_SYNC_BENCHMARK"  # a contender's name, in the environment of all it starts
ROOT = Path(__file__).resolve().parents[2]


class CannotRun(Exception):
    """A contender that does not do a task, with the reason."""


@dataclass(frozen=True)
class Answer:
    """What a task took, and what came of it."""

    wall_s: float
    cpu_s: float
    peak_mib: float
    answer: Any


class Contender:
    """A worker's process; answers one task at a time."""

    def __init__(self, name: str, argv: list[str], home: Path) -> None:
        self.name = name
        workspace = home / "workspace"
        workspace.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=workspace,
            env=_environment(home, workspace) | {MARK: name},
        )

    def ask(self, task: str, *, with_memory: bool = False, **arguments: Any) -> Answer:
        """Have *task* done.

        Args:
            with_memory: Watch the memory of the worker and all below it, which takes some CPU.

        Raises:
            CannotRun: In the worker's words.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with _peak_memory(self._process.pid, with_memory) as peak:
            stdin.write(json.dumps({"task": task, "arguments": arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        told = json.loads(line or '{"error": "it ended"}')
        if "error" in told:
            raise CannotRun(f"{self.name}: {told['error']}")
        return Answer(told["wall_s"], told["cpu_s"], peak.mib, told["answer"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


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
class _Peak:
    mib: float = 0.0


@contextmanager
def _peak_memory(pid: int, is_wanted: bool) -> Iterator[_Peak]:
    """The most that a process and all below it held, pages that several share counted for each."""
    peak = _Peak()
    done = threading.Event()

    def watch() -> None:
        worker = psutil.Process(pid)
        while not done.wait(SAMPLING_S):
            resident = 0
            for process in [worker, *worker.children(recursive=True)]:
                try:
                    resident += process.memory_info().rss
                except psutil.Error:  # it has just ended
                    continue
            peak.mib = max(peak.mib, resident / 2**20)

    if not is_wanted:
        yield peak
        return
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


@dataclass
class Setting:
    """What the benchmarks share."""

    is_quick: bool
    root: Path
    binary: str | None
    rivals: dict[str, str] = field(default_factory=dict)  # name -> its Python, or why there is none
    _contenders: ExitStack = field(default_factory=ExitStack)

    @property
    def workspace(self) -> Path:
        """Where contenders have their runs work."""
        return self.root / "workspace"

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
        module, python = name, sys.executable
        if name in self.rivals:
            module, python = "rival", self.rivals[name]
            if not os.path.exists(python):
                raise CannotRun(f"{name}: {python}")
        argv = [python, "-m", f"tests.benchmarks.workers.{module}"]
        contender = Contender(name, argv, self.root)
        self._contenders.callback(contender.close)
        return contender

    def contenders(self, *names: str) -> dict[str, Contender]:
        return {name: self.contender(name) for name in names}

    def rounds(self, full: int, quick: int) -> int:
        return quick if self.is_quick else full

    def end_contenders(self) -> None:
        """End their processes, after a benchmark."""
        self._contenders.close()

    def describe(self) -> dict[str, str]:
        """The machine and the versions."""
        memory_gib = psutil.virtual_memory().total / 2**30
        return {
            "cores": str(os.cpu_count()),
            "memory": f"{memory_gib:.0f} GiB",
            "processor": _processor(),
            "system": f"{platform.system()} {platform.release()}",
            "Python": platform.python_version(),
            "opencode-sync": _own_version(),
            "opencode": binary_version(self.binary) if self.binary else "none",
            **{name: _told(python) for name, python in self.rivals.items()},
        }


def _told(python: str) -> str:
    return "installed" if os.path.exists(python) else python


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
        made = Setting(is_quick, root, binary, rivals)
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


def _own_version() -> str:
    try:
        return metadata.version("opencode-sync-sdk")
    except metadata.PackageNotFoundError:
        from opencode_sync import __version__

        return __version__


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = (
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
            return next(names, platform.processor())
    except OSError:
        return platform.processor() or platform.machine()
