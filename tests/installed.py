"""What must hold of the wheel where it is installed alone: no extras, no source beside it.

    python -I -W error tests/installed.py

The Python is that of the environment; CI calls it. With -I neither the working directory nor the
script's own is on the path, so that what is imported is what was installed.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "opencode_sync"
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


if __name__ == "__main__":
    checks = [check for name, check in list(globals().items()) if name.startswith("check_")]
    for check in checks:
        check()
        print("holds:", check.__name__.removeprefix("check_").replace("_", " "))
