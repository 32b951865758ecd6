"""What must hold of the wheel where it is installed alone: no extras, no source beside it.

    python -I -W error tests/installed.py

The Python is that of the environment; CI calls it. With -I neither the working directory nor the
script's own is on the path, so that what is imported is what was installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

SOURCE = Path(__file__).parent.parent / "opencode_sync"
WITHIN_S = 60.0
EXTRAS = ("pydantic", "jsonschema", "referencing", "jinja2", "distributed", "pytest")


def shipped() -> set[str]:
    """Files of the wheel, as paths from where it is installed; what pip itself wrote left out."""
    files = distribution("opencode-sync-sdk").files or []
    return {
        file.as_posix()
        for file in files
        if file.parts[0] != ".." and file.suffix != ".pyc" and ".dist-info" not in file.parts[0]
    }


def printed(*words: str) -> str:
    """What the installed command prints; it must succeed and say nothing on stderr."""
    program = Path(sys.executable).parent / "opencode-sync"
    done = subprocess.run([program, *words], capture_output=True, text=True, check=True)
    assert not done.stderr, done.stderr
    return done.stdout


def check_nothing_but_the_package_is_shipped_and_all_of_it() -> None:
    source = {
        f"opencode_sync/{path.relative_to(SOURCE).as_posix()}"
        for path in SOURCE.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }

    assert shipped() == source, sorted(shipped() ^ source)


def check_the_extras_are_not_here() -> None:
    assert not [name for name in EXTRAS if find_spec(name)]


def check_every_module_can_be_imported() -> None:
    for file in sorted(shipped()):
        if file.endswith(".py"):
            module = import_module(file.removesuffix(".py").replace("/", "."))
            assert SOURCE not in Path(str(module.__file__)).parents, module


def check_every_public_name_is_there() -> None:
    package = import_module("opencode_sync")

    for name in package.__all__:
        assert getattr(package, name) is not None


def check_what_needs_an_extra_says_which() -> None:
    package = import_module("opencode_sync")
    said = ""

    try:
        package.results_to_html([], "page.html")
    except package.OpenCodeConfigError as error:
        said = str(error)

    assert "opencode-sync-sdk[report]" in said


def check_the_command_tells_its_version_and_its_use() -> None:
    assert printed("--version") == f"opencode-sync {distribution('opencode-sync-sdk').version}\n"
    assert "opencode-sync" in printed("--help")


# A stand-in for OpenCode that tells where it and its tool are, and never ends.
ENDLESS = """#!/bin/sh
sleep 600 &
echo "$$ $!" > pids.new
mv pids.new pids
wait
"""
SCRIPT = """
import sys
import opencode_sync
opencode_sync.OpenCodeClient(sys.argv[1], any_version=True).run("Work", sys.argv[2])
"""


def check_the_watchdog_cleans_up_after_a_script_that_is_killed() -> None:
    # The watchdog is started by the path of its file and hides what fails in it: where it was not
    # installed, or cannot load what it needs, only this tells.
    with TemporaryDirectory() as name:
        place = Path(name)
        binary, told, temporary = place / "opencode", place / "pids", place / "tmp"
        binary.write_text(ENDLESS)
        binary.chmod(0o755)
        temporary.mkdir()
        env = {**os.environ, "TMPDIR": str(temporary)}
        script = subprocess.Popen([sys.executable, "-I", "-c", SCRIPT, binary, place], env=env)
        wait_until(told.exists)
        pids = [int(pid) for pid in told.read_text().split()]
        assert any(temporary.iterdir())

        script.kill()
        script.wait()

        wait_until(lambda: not any(map(is_running, pids)))
        wait_until(lambda: not any(temporary.iterdir()))


def is_running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WITHIN_S:g} s"
        time.sleep(0.05)


if __name__ == "__main__":
    checks = [check for name, check in list(globals().items()) if name.startswith("check_")]
    for check in checks:
        check()
        print("holds:", check.__name__.removeprefix("check_").replace("_", " "))
