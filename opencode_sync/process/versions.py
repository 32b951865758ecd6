"""Questions to a program: which version it is, and which variants a model has there.

    a program --> remembered in this process --> on the disk --> ``PROGRAM --version`` --+
    a server ---> what it says of itself ------------------------------------------------+--> check

A program is asked once; as long as its file stays the same, a further run only looks at the file.
OpenCode 2 takes the arguments of a run, but hands the prompt to a background service of the user's,
which does not know the run's permissions and configuration: so an unknown version is not started.
OpenCode ignores an unknown variant without a word: so the program is asked for those too.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from ..core.errors import (
    OpenCodeBinaryNotFoundError,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeProcessError,
)
from ..core.records import replacing
from ..core.request import Request
from .command import TESTED_VERSION, VERSION, managed_path, version_numbers
from .data_dirs import temporary_prefix
from .stderr import no_space

OLDEST_KNOWN = "1.17"
KNOWN_VERSIONS = f"{OLDEST_KNOWN} up to, not including, 2"

VERSION_TIMEOUT_S = 60.0  # it takes 0.6 s on an idle machine
VARIANTS_TIMEOUT_S = 20.0  # it takes 2 s there
SCRIPT_MARK = b"#!"
SLICE_S = 0.05  # how soon a wait for an answer notices that the run was cancelled

_OF_THE_MACHINE = {
    errno.E2BIG, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETXTBSY
}  # fmt: skip
_HOMES = ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")
_CANCELLED = "the run was cancelled before it had started"

_log = logging.getLogger("opencode_sync")
_asking = threading.RLock()  # so that threads that start at once ask once
_known: dict[str, tuple[list[int], str]] = {}  # path -> identity of the file, and its version
_logged: set[str] = set()
_variants: dict[tuple[str | None, ...], list[str] | None] = {}  # of a model, somewhere


def fault_of(version: str) -> str:
    """Why OpenCode *version* is not used, naming it and the known ones; "" where it is used."""
    numbers = version_numbers(version)
    if numbers is None:
        return f"{version[:100]!r} is not a version of OpenCode (known: {KNOWN_VERSIONS})"
    if numbers >= (2,):
        return f"OpenCode {version} is newer than the known versions ({KNOWN_VERSIONS})"
    return ""


def doubt_of(version: str) -> str:
    """What to warn of in a *version* that is used nevertheless; "" for nothing."""
    if not is_older(version, OLDEST_KNOWN):
        return ""
    return f"older than {OLDEST_KNOWN}, and may lose events"


def is_older(version: str, than: str) -> bool:
    """Whether *version* comes before another one; False where one of them cannot be read."""
    one, other = version_numbers(version), version_numbers(than)
    return one is not None and other is not None and one < other


def check_program_version(program: str, cancelled: Callable[[], bool] = lambda: False) -> list[str]:
    """Refuse a program whose version is not known, before a run of it.

    A file is asked once, which takes 0.6 s; its answer is kept in the user's cache directory. A
    script may start something else tomorrow, and so may a version manager's program: their answers
    are kept for this process alone.

    Args:
        cancelled: Asked while the program is waited for.

    Returns:
        Sentences for ``RunResult.warnings``; the log has them once per program.

    Raises:
        OpenCodeConfigError: If it is OpenCode 2 or later, or its answer is not a version.
        OpenCodeBinaryNotFoundError: If it cannot be run, or does not answer.
        OpenCodeCancelledError: If *cancelled* comes true.
    """
    try:
        file = _identity(program)
    except OSError:
        return []  # it has gone; its start will fail and say so
    version = _version_of(program, file, cancelled)
    if fault := fault_of(version):
        raise OpenCodeConfigError(
            f"{program!r} was not started: {fault}: {how_to_replace()}, or use any_version=True at "
            "your own risk"
        )
    return _warnings(program, version)


def check_server_version(server: str, version: str) -> list[str]:
    """Refuse a *server*, a URL or our own one's program, whose version is not known."""
    if fault := fault_of(version):
        raise OpenCodeConfigError(
            f"nothing was sent to the server {server}: {fault}: use another one, or "
            "any_version=True at your own risk"
        )
    return _warnings(server, version)


def how_to_replace() -> str:
    """What to do about a program that is not used: install the managed copy beside it."""
    try:
        variable = f"OPENCODE_BINARY={managed_path(TESTED_VERSION)}"
    except OpenCodeConfigError:  # there is no home
        variable = "OPENCODE_BINARY"
    return f"run 'opencode-sync install' and set {variable}"


def _warnings(whose: str, version: str) -> list[str]:
    if not (doubt := doubt_of(version)):
        return []
    upgrade = f"run 'opencode upgrade {TESTED_VERSION}'"
    warning = f"{whose} is OpenCode {version}, {doubt}: {upgrade}."
    if warning not in _logged:
        _logged.add(warning)
        _log.warning("%s", warning)
    return [warning]


# --- asking --------------------------------------------------------------------------------------


def binary_version(binary: str | os.PathLike[str]) -> str:
    """What ``BINARY --version`` answers, such as ``"1.18.33"``. Takes 0.6 s.

    Raises:
        OpenCodeBinaryNotFoundError: If it does not run, or gives no answer within
            ``VERSION_TIMEOUT_S``.
    """
    answer, fault = ask_version(binary)
    if fault:
        raise OpenCodeBinaryNotFoundError(_does_not_run(binary, fault))
    return answer


def _does_not_run(program: str | os.PathLike[str], fault: str) -> str:
    return (
        f"{os.fspath(program)} does not run: {fault}\n"
        "Run 'opencode-sync install', or name another with binary= or OPENCODE_BINARY."
    )


def warn_of_variant(
    program: str,
    request: Request,
    env: Mapping[str, str],
    cancelled: Callable[[], bool] = lambda: False,
) -> list[str]:
    """A warning where the request's model has no such variant; nothing where that is unknown.

    A program is asked once for a model in a configuration, which takes 2 s; and again in another
    workspace where the variant was unknown, since a project's configuration may add some.

    Args:
        env: The run's environment, its configuration included.

    Raises:
        OpenCodeCancelledError: If *cancelled* comes true.
    """
    variant, workspace = request.cfg.variant, str(request.workspace)
    if variant is None:
        return []
    model = request.cfg.model or request.cfg.build_opencode_config_dict().get("model")
    if not isinstance(model, str):
        return []
    key = (program, model, env.get("OPENCODE_CONFIG_CONTENT"), env.get("XDG_CONFIG_HOME"))
    if variant in (_variants.get(key) or ()):
        return []
    here = (*key, workspace)
    if here not in _variants:
        with suppress(OSError):  # the run itself will tell
            _variants[here] = _ask_variants(program, model, env, workspace, cancelled)
            if _variants[here]:
                _variants[key] = _variants[here]
    known = _variants.get(here)
    return [] if known is None or variant in known else [unknown_variant(variant, model, known)]


def unknown_variant(variant: str, model: str, known: Sequence[str]) -> str:
    """The warning for a variant that OpenCode passes over without a word."""
    there = f"it has {', '.join(known)}" if known else "it has none"
    return f"The variant {variant!r} is unknown to the model {model!r} ({there}), and was ignored."


def _ask_variants(
    program: str, model: str, env: Mapping[str, str], workspace: str, cancelled: Callable[[], bool]
) -> list[str] | None:
    argv = [program, "models", model.partition("/")[0], "--verbose"]
    env = {**env, "PWD": workspace}
    _, listed, _ = _output_of(argv, workspace, env, VARIANTS_TIMEOUT_S, cancelled)
    # For each model a line with its name, followed by its description, as JSON over many lines.
    _, _, after = f"\n{listed}".partition(f"\n{model}\n")
    with suppress(ValueError, AttributeError, RecursionError):
        return list(json.JSONDecoder().raw_decode(after)[0].get("variants", {}))
    return None


def _output_of(
    argv: Sequence[str],
    cwd: str | None,
    env: Mapping[str, str] | None,
    timeout_s: float,
    cancelled: Callable[[], bool],
) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr of a command; no status if it was killed at the timeout.

    Args:
        env: None for ours with a temporary directory for all that OpenCode makes.

    Raises:
        OpenCodeCancelledError: If *cancelled* comes true before it ends.
        OpenCodeError: If no temporary file can be made.
        OSError: If it cannot be started.
    """
    with ExitStack() as stack:
        # Into files: what OpenCode writes to a pipe can be cut.
        try:
            out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            if env is None:
                scratch = tempfile.TemporaryDirectory(
                    prefix=f"{temporary_prefix()}version-", ignore_cleanup_errors=True
                )
                env = {**os.environ, **dict.fromkeys(_HOMES, stack.enter_context(scratch))}
        except OSError as error:
            raise OpenCodeError(
                f"no place for temporary files ({error.strerror}): set TMPDIR to one that can be "
                "written"
            ) from error
        process = subprocess.Popen(
            argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        deadline = time.monotonic() + timeout_s
        with process:
            try:
                while (status := process.poll()) is None and time.monotonic() < deadline:
                    if cancelled():
                        raise OpenCodeCancelledError(_CANCELLED)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(SLICE_S)
            finally:
                process.kill()  # without effect on one that has ended
        for file in (out, err):
            file.seek(0)
        said, complained = (file.read().decode("utf-8", "replace") for file in (out, err))
        return status, said, complained


def ask_version(
    program: str | os.PathLike[str], cancelled: Callable[[], bool] = lambda: False
) -> tuple[str, str]:
    """The answer to ``--version``, and the reason if there is none: one of the two is empty.

    Raises:
        OpenCodeCancelledError: If *cancelled* comes true before there is one.
        OpenCodeError: If the system starts no process, whatever its program.
    """
    path = os.fspath(program)
    # OpenCode does not start where the current directory has vanished.
    cwd = os.path.dirname(path) if os.path.isabs(path) else None
    try:
        status, out, err = _output_of([path, "--version"], cwd, None, VERSION_TIMEOUT_S, cancelled)
    except OSError as error:
        if is_of_the_machine(error):
            raise no_process(error) from error
        return "", error.strerror or str(error)
    if status is None:
        return "", f"no answer to --version within {VERSION_TIMEOUT_S:g} s"
    answer = out.strip()
    if match := VERSION.fullmatch(answer):
        answer = match["version"]
    if answer and not status:
        return answer, ""
    fault = str(OpenCodeProcessError(status, err)) if status else "an empty answer to --version"
    return "", "; ".join(filter(None, (fault, no_space(os.environ))))


def is_of_the_machine(error: OSError) -> bool:
    """Whether a program could not be started for a reason that has nothing to do with it."""
    return error.errno in _OF_THE_MACHINE or error.filename is None


def no_process(error: OSError) -> OpenCodeError:
    """The error for a process that the system would not start, whatever its program."""
    if error.errno == errno.E2BIG:
        return OpenCodeConfigError(
            "title or environment is too large for a process: make title, extra_env, "
            "config_overrides or the environment of this program smaller"
        )
    return OpenCodeError(f"opencode cannot be started: {error.strerror}")


# --- remembering ---------------------------------------------------------------------------------


def _version_of(program: str, file: list[int], cancelled: Callable[[], bool]) -> str:
    known_file, version = _known.get(program, (None, ""))
    if known_file == file:
        return version
    while not _asking.acquire(timeout=SLICE_S):
        if cancelled():
            raise OpenCodeCancelledError(_CANCELLED)
    try:
        known_file, version = _known.get(program, (None, ""))
        if known_file != file:
            version = _asked(program, file, cancelled)
            _known[program] = file, version
        return version
    finally:
        _asking.release()


def _asked(program: str, file: list[int], cancelled: Callable[[], bool]) -> str:
    record = None if _starts_another(program) else _record_of(program)
    if record is not None and (version := _read(record, file)):
        return version
    version, fault = ask_version(program, cancelled)
    if fault:
        raise OpenCodeBinaryNotFoundError(_does_not_run(program, fault))
    with suppress(OSError):  # a cache that cannot be written, or a program that has just gone
        if record is not None and _identity(program) == file:
            record.parent.mkdir(parents=True, exist_ok=True)
            with replacing(record) as new:
                new.write(json.dumps({"file": file, "version": version}).encode())
    return version


def _identity(program: str) -> list[int]:
    """Figures that change when another file takes the program's place."""
    status = os.stat(program)
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _starts_another(program: str) -> bool:
    """Whether it is a script, or a link to a version manager's program (Volta, mise)."""
    name, own_name = os.path.basename(program), os.path.basename(os.path.realpath(program))
    if own_name != name and "opencode" not in own_name.lower():
        return True
    with suppress(OSError), open(program, "rb") as file:
        return file.read(len(SCRIPT_MARK)) == SCRIPT_MARK
    return True


def _record_of(program: str) -> Path | None:
    """The file that keeps the answer of *program* between processes; None without a home."""
    from hashlib import sha256

    import platformdirs

    with suppress(RuntimeError):  # there is no home
        cache = platformdirs.user_cache_path("opencode-sync", appauthor=False)
        if cache.is_absolute():
            return cache / "versions" / sha256(os.fsencode(program)).hexdigest()[:32]
    return None


def _read(record: Path, file: list[int]) -> str:
    """The version that *record* has of *file*; "" where it has none, or is damaged."""
    try:
        kept = json.loads(record.read_bytes())
        return str(kept["version"]) if kept["file"] == file else ""
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""


def _renew() -> None:
    global _asking
    _asking = threading.RLock()  # a forked child has no thread that would release the old one


os.register_at_fork(after_in_child=_renew)
