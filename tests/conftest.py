"""What every test stands on: a home of its own, the real binary, and nothing left behind.

Before the first test, with the developer's own environment, the real opencode is looked for, and
installed once per machine, if a test needs it. From then on the tests see a new home, an
empty temporary directory, and no configuration or credentials of the developer.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from opencode_sync.core.errors import OpenCodeBinaryNotFoundError, OpenCodeError
from opencode_sync.process.command import TESTED_VERSION, managed_binary
from opencode_sync.process.data_dirs import DataDirectories
from opencode_sync.process.install import install
from opencode_sync.process.versions import binary_version, fault_of, is_older
from tests import leaks

_BINARY = pytest.StashKey["str | OpenCodeError"]()  # its path, or why there is none


# --- in several processes ------------------------------------------------------------------------

# More than the cores: a test of the real opencode waits as much as it works.
WORKERS = 2 * (os.cpu_count() or 1)
# They measure, or take the whole machine for a while, and so run in one worker after another.
ALONE = ("tests/test_soak.py", "tests/live/test_soak_live.py", "tests/benchmarks/")
# Each of their tests starts a program of its own, and shares nothing that is dear.
EACH = ("tests/test_readme.py", "tests/examples/")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Use workers of pytest-xdist unless files are named, or -n says how many."""
    # The option is there where xdist is; a worker has none of its own.
    is_open = getattr(config.option, "numprocesses", 0) is None
    if is_open and not hasattr(config, "workerinput") and ".py" not in "".join(config.args):
        config.option.numprocesses = WORKERS
        config.option.loadscopereorder = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run tests that share fixtures in one worker: those of a module, or of one of its runners."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(ALONE):
                return "alone"
            if nodeid.startswith(EACH):
                return nodeid
            module, _, test = nodeid.partition("::")
            _, _, parameters = test.partition("[")
            runner, _, _ = parameters.rstrip("]").partition("-")
            return f"{module} {runner}" if runner in ("process", "server") else module

    return Scheduling(config, log)


# --- the real opencode ---------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(
                f"{item.nodeid}: workers know a test by an id without addresses"
            )
        if _needs_binary(item):
            item.add_marker("live")
    if hasattr(config, "workerinput"):  # what takes long is begun first
        items.sort(key=lambda item: (not item.nodeid.startswith(ALONE), not _needs_binary(item)))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    # Not in the fixture: an installation may take longer than a test is given, and npm is to see
    # the developer's own settings.
    config = session.config
    if any(map(_needs_binary, session.items)) and not config.getoption("collectonly"):
        try:
            config.stash[_BINARY] = _find_or_install(report=config.get_terminal_writer().line)
        except OpenCodeError as error:
            config.stash[_BINARY] = error


@pytest.fixture(scope="session")
def opencode_binary(pytestconfig: pytest.Config) -> str:
    """Path of the real opencode: OPENCODE_BINARY, or on PATH, or the managed copy.

    Where there is none, the tests that ask for it are skipped; where CI is set, they fail.
    """
    found = pytestconfig.stash.get(_BINARY, None)
    if isinstance(found, str):
        return found
    if found is None:
        pytest.fail("name opencode_binary among the arguments of the test, or of its fixture")
    reason = f"no opencode to test with: {found}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _needs_binary(item: pytest.Item) -> bool:
    return "opencode_binary" in getattr(item, "fixturenames", ())


def _find_or_install(report: Callable[[str], None]) -> str:
    if chosen := os.environ.get("OPENCODE_BINARY"):
        return _checked(chosen)
    for candidate in (shutil.which("opencode"), managed_binary()):
        # One that is too old or broken stands in nobody's way.
        with suppress(OpenCodeError):
            if candidate:
                return _checked(candidate)
    return _checked(install(report=report))


def _checked(binary: str | os.PathLike[str]) -> str:
    """*binary*, if it runs and is the tested version or a later one of the same series."""
    version = binary_version(binary)
    if fault_of(version) or is_older(version, TESTED_VERSION):
        raise OpenCodeBinaryNotFoundError(
            f"{os.fspath(binary)} is version {version}: the tests need {TESTED_VERSION} or later"
        )
    return os.path.abspath(binary)


# --- signals as in a terminal --------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _signals_as_in_a_terminal() -> Iterator[None]:
    """What a shell's "&" and nohup have this process ignore, all children would ignore too."""
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    if hasattr(signal, "SIGHUP"):
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- an environment without the developer --------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root = tmp_path_factory.mktemp("machine")
    home, temporary = root / "home", root / "tmp"
    home.mkdir()
    # OpenCode was at work in it before: into an empty one it would install by npm, which a server
    # waits for.
    DataDirectories(root / "used").empty_config().rename(home / ".config")
    temporary.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        # What npm and pip are told in the developer's home (a mirror, a proxy) still holds.
        for variable, file in (
            ("NPM_CONFIG_USERCONFIG", Path.home() / ".npmrc"),
            ("PIP_CONFIG_FILE", Path.home() / ".config/pip/pip.conf"),
        ):
            if variable not in os.environ and file.is_file():
                patch.setenv(variable, str(file))
        for variable in list(os.environ):
            if _is_the_developers(variable):
                patch.delenv(variable)
        patch.setenv("HOME", str(home))
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", None)  # gettempdir() looks at TMPDIR again
        patch.setenv(leaks.SESSION, leaks.MARK)
        # Coverage is of this process: in all that tests start it would double what it costs.
        patch.delenv("COVERAGE_PROCESS_START", raising=False)
        yield


def _is_the_developers(variable: str) -> bool:
    # A provider's key would let a test that went astray spend money.
    return (
        (variable.startswith("OPENCODE_") and variable not in ("OPENCODE_BINARY", leaks.SESSION))
        or (variable.startswith("XDG_") and variable.endswith("_HOME"))
        or variable.endswith(("_API_KEY", "_AUTH_TOKEN"))
    )


# --- nothing left behind -------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _nothing_outlives_the_session(_own_environment: None) -> Iterator[None]:
    """Set up before all that is shared by tests, and so checked after it."""
    yield from _leaving_nothing("the tests")


@pytest.fixture(autouse=True)
def _nothing_outlives_a_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set up after what is shared by tests, and before what a test has of its own.

    Something shared that is first asked for by `request.getfixturevalue` comes too late for that:
    it counts as left behind by that test.
    """
    yield from _leaving_nothing(request.node.name)


def _leaving_nothing(owner: str) -> Iterator[None]:
    before = leaks.footprint()
    yield
    if left := leaks.left_behind(before, leaks.SETTLE_S):
        report = str(left)
        left.kill()
        pytest.fail(f"{owner} left behind:\n{report}", pytrace=False)
