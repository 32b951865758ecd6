"""Why a run of ``opencode run`` went wrong, in words.

    did not start        --> start_error()
    exit status, stderr  --> reason()           the provider's words, where there are any
    exit status 0        --> what_is_missing()

Knows what OpenCode 1.18.33 and earlier ones say at their end; nothing of processes under way.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence

from ._logs import no_space, refused_by_bun, unwritable_home
from ._versions import ask_version, is_of_the_machine, no_process
from .core.config import unencodable
from .core.errors import (
    OpenCodeBinaryNotFoundError,
    OpenCodeConfigError,
    OpenCodeError,
    stderr_tail,
    strip_ansi,
)
from .core.reading import why_cut
from .core.result import RunResult

_LONGEST_USAGE = 50_000

# What a start-up says that lost a race for a database; it has done nothing by then.
_STARTUP_FAILURES = (
    "database is locked",
    "sqlite_busy",
    "sqliteerror",
    "journal_mode",
    "disk i/o error",
    "locking protocol",
    "failed query: ",  # what it is goes on: "create table", "insert into", ...
)


def may_be_repeated(stderr: str) -> bool:
    """Whether a start-up that printed nothing else lost a race for its database."""
    said = stderr[-_LONGEST_USAGE:].lower()
    return any(words in said for words in _STARTUP_FAILURES)


def reason(
    result: RunResult, argv: Sequence[str], env: Mapping[str, str], logged_cause: str | None
) -> str | None:
    """What a run that failed ended of, if that is known.

    Args:
        env: What it was started with.
        logged_cause: What its log tells.
    """
    if result.error is None:
        stderr = result.stderr
        known = _unknown_flag(argv, stderr) or unwritable_home(stderr) or refused_by_bun(stderr)
        return known or no_space(env)
    is_unknown = result.error.name == "UnknownError"
    if result.error.message and not is_unknown:
        return str(result.error)
    # "Unexpected server error. Check server logs": the log has the cause, if anything.
    if logged_cause and logged_cause != "UnknownError: UnknownError":
        words = logged_cause if is_unknown else f"{result.error}: {logged_cause}"
        return _with_space(words, env)
    return _with_space(f"{result.error}{_likely_cause(argv)}", env)


def _with_space(words: str, env: Mapping[str, str]) -> str:
    return "; ".join(filter(None, (words, no_space(env))))


def what_is_missing(result: RunResult, n_lines: int, env: Mapping[str, str]) -> str:
    """What a run lacks that ended with success, and the end of what it said on stderr.

    Args:
        n_lines: How many it printed.
        env: What it was started with.
    """
    if result.truncated:
        what = f"the output broke off in the middle of its line {n_lines}"
    elif not n_lines:
        what = "opencode exited with status 0, but printed nothing"
    elif (cut := why_cut(result.finish_reason)) is not None:
        return cut
    else:
        last = result.finish_reason or "none"
        what = f"opencode exited with status 0, but without a closing step (last reason: {last})"
    what = _with_space(what, env)
    # Versions up to 1.2 exit with status 0 after an error, which only stands there.
    tail = stderr_tail(result.stderr)
    return f"{what}\n{tail}" if tail else what


def start_error(error: OSError | ValueError, binary: str, workspace: str) -> OpenCodeError:
    """The error for a process that the system would not start."""
    if isinstance(error, UnicodeEncodeError):
        return OpenCodeConfigError(f"a setting cannot be passed to opencode: {unencodable(error)}")
    if isinstance(error, ValueError):  # a NUL byte in an argument or a variable
        return OpenCodeConfigError(f"opencode cannot be started: {error}")
    if error.filename == workspace:
        vanished = error.errno == errno.ENOENT
        what = "has vanished" if vanished else f"cannot be worked in: {error.strerror}"
        return OpenCodeConfigError(f"workspace {workspace!r} {what}")
    if error.filename == binary and not is_of_the_machine(error):
        return OpenCodeBinaryNotFoundError(f"{binary!r} cannot be run: {error.strerror}")
    return no_process(error)


def _likely_cause(argv: Sequence[str]) -> str:
    """An unknown command is the one failure that OpenCode has no word about, anywhere."""
    if "--command" not in argv:
        return ""
    return f" (is there a command {argv[argv.index('--command') + 1]!r}?)"


def _unknown_flag(argv: Sequence[str], stderr: str) -> str | None:
    """Where OpenCode answered with its usage alone: the flag of ours that is not in it."""
    usage = strip_ansi(stderr[:_LONGEST_USAGE])
    if "Options:" not in usage or "--help" not in usage:
        return None
    flags = [word.partition("=")[0] for word in argv[2:] if word.startswith("-")]
    unknown = [flag for flag in flags if flag not in usage.replace(",", " ").split()]
    if not unknown:
        return None
    return f"opencode {_version(argv[0])} does not know {', '.join(unknown)}"


def _version(binary: str) -> str:
    version, _ = ask_version(binary)
    return version or "of unknown version"
