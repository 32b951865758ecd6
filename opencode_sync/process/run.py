"""One ``opencode run`` as a source of events.

    stdout of child.Process --> lines --> events.parse_block ------------+--> receive()
    stderr                  --> lines --> stderr.LogReader: retries, ... +
    exit status, both outputs -------------------------------------------> settle(): what went wrong

Says how the run went, in the provider's words where there are any. Knows what OpenCode 1.18.33 and
earlier versions print, and how they end; nothing of deadlines and retries.
"""

from __future__ import annotations

import errno
import logging
import queue
from collections.abc import Callable, Mapping, Sequence

from ..core import lifetime
from ..core.config import unencodable
from ..core.errors import (
    OpenCodeBinaryNotFoundError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeProcessError,
    stderr_tail,
)
from ..core.events import Event, error_event, is_cut, iter_parse_lines, warning_events
from ..core.reading import ARGUMENTS_ERROR, called_session, error_info, why_cut
from ..core.request import Request
from ..core.result import RunResult
from ..core.secrets import Secrets
from ..core.text import strip_ansi
from . import tree, watchdog
from .child import LineSplitter, Process
from .command import Command
from .data_dirs import Lease
from .stderr import (
    LogReader,
    no_agent,
    no_space,
    not_counted,
    refused_by_bun,
    split_told,
    unwritable_home,
)
from .versions import ask_version, is_of_the_machine, no_process

_log = logging.getLogger("opencode_sync")

# How long a refusal of the provider waits for the line that would tell that it is the last.
PENDING_S = 1.0

_STEPS = ("step_start", "tool_use")

_LONGEST_USAGE = 50_000

# What a start-up says that lost a race for a database. It has done nothing by then.
_STARTUP_FAILURES = (
    "database is locked",
    "sqlite_busy",
    "sqliteerror",
    "journal_mode",
    "disk i/o error",
    "locking protocol",
    "failed query: ",  # what it is goes on: "create table", "insert into", ...
)


class ProcessRun:
    """A started run; a :class:`~opencode_sync.core.request.Source`.

    One that is lost is stopped, since its process and its lease are.
    """

    def __init__(
        self,
        command: Command,
        request: Request,
        *,
        lease: Lease | None = None,
        keep_raw: bool = True,
        warnings: Sequence[str] = (),
    ) -> None:
        """Start *command* in the request's workspace.

        Args:
            request: What the command is for; its settings say what is kept of the log and of what
                tools leave running.
            lease: The run's data directory, given back by :meth:`close`.
            keep_raw: Keep stdout's lines for the result.
            warnings: What is known before the start; given first, as events.

        Raises:
            OpenCodeError: If it cannot be started; nothing is left behind.
        """
        self._argv, self._env = command.argv, command.env
        self._must_say = command.must_say
        self._workspace = str(request.workspace)
        self._keep_background = request.cfg.keep_background
        self._keep_raw = keep_raw
        self._keep_logs = bool(request.cfg.print_logs)
        self._secrets = request.secrets or Secrets()
        self._not_said: OpenCodeError | None = None
        self._logs = LogReader()
        self._stdout, self._stderr = LineSplitter(), LineSplitter()
        self._raw_blocks: list[bytes] = []
        self._stderr_lines: list[bytes] = []
        self._session: str | None = None
        self._delegated: set[str] = set()  # sessions of sub-agents, by the calls of them
        self._followed: set[str] = set()  # those that OpenCode reports
        self._ready = warning_events(warnings)
        self._n_lines = 0  # of stdout
        self._is_done = self._is_cut = False
        self._was_stopped = self._is_gone = False
        self._token = token = tree.run_token()
        try:
            self._process = Process(
                self._argv,
                cwd=self._workspace,
                env=self._env,
                stdin=_as_stdin(command.prompt),
                token=token,
            )
        except (OSError, ValueError) as error:
            raise start_error(error, self._argv[0], self._workspace) from error
        self.label = f"run {token.rpartition('.')[2]} (pid {self._process.pid})"
        self.started_at = self._process.started_at
        self._lease = lease  # last: where we are lost, the process is stopped before it goes

    def wait_started(self, timeout: float, cancelled: Callable[[], bool]) -> None:
        """Return at the first output or the end, when cancelled, or after *timeout* seconds."""
        self._process.wait_started(timeout, cancelled)

    @property
    def session_id(self) -> str | None:
        return self._session

    @property
    def is_over(self) -> bool:
        return self._process.returncode is not None

    def receive(self, timeout: float | None) -> list[Event] | None:
        """The next events; see :meth:`~opencode_sync.core.request.Source.receive`."""
        if not self._is_done and not self._ready:
            if self._logs.pending is not None:
                timeout = PENDING_S if timeout is None else min(timeout, PENDING_S)
            try:
                self._process.wait(timeout)
            except queue.Empty:
                if events := self._logs.take_pending():
                    return events
                raise
            # A Ctrl-C that comes while a block is read would lose its content.
            with lifetime.deferred():
                self._ready = self._next_events()
        events, self._ready = self._ready, []
        return events if events or not self._is_done else None

    def _next_events(self) -> list[Event]:
        try:
            block = self._process.receive(0)
        except queue.Empty:  # one of the outputs has ended
            return []
        if block is None:
            self._is_done = True
            return self._last_events()
        channel, data = block
        lines = (self._stdout if channel == "stdout" else self._stderr).feed(data)
        if lines is None:
            return []
        return self._events(lines) if channel == "stdout" else self._read_stderr(lines)

    def stop(self) -> None:
        """End it with its tools; see :meth:`~opencode_sync.core.request.Source.stop`."""
        if self._is_gone:
            return
        self._was_stopped = True
        self._process.stop()
        self._is_gone = True

    def settle(self, result: RunResult) -> OpenCodeError | None:
        """Complete *result* with exit status, stderr and raw lines, and say what went wrong."""
        if not self._was_stopped:
            if self._keep_background:
                with lifetime.deferred():
                    watchdog.spare(self._token)
            elif self._process.stop():
                _log.info("%s had left processes running; they were stopped", self.label)
        self._is_gone = True
        result.exit_code = self._process.returncode
        stderr = b"".join(line + b"\n" for line in self._stderr_lines)
        # Before an error quotes the end of it: half of a secret would not be recognised.
        result.stderr = self._secrets.cleaned(stderr.decode("utf-8", "replace"))
        blocks = (block.decode("utf-8", "replace") for block in self._raw_blocks)
        raw = [line for block in blocks for line in block.split("\n")]
        result.raw_stdout_lines = [*result.raw_stdout_lines, *raw]
        result.truncated = self._is_cut
        result.model = self._logs.model or result.model
        if self._not_said is not None:
            self._not_said.result = result
            return self._not_said
        if result.status == "error":
            return OpenCodeProcessError(
                result.exit_code,
                result.stderr,
                result.events,
                result.raw_stdout_lines,
                reason=reason(result, self._argv, self._env, self._logs.explanation),
                result=result,
            )
        if result.status == "incomplete":
            missing = what_is_missing(result, self._n_lines, self._env)
            return OpenCodeIncompleteError(missing, result=result)
        return None

    def may_repeat(self, result: RunResult) -> bool:
        """True for a start-up that lost a race for its database, before any event."""
        said = result.stderr[-_LONGEST_USAGE:].lower()
        has_lost = any(words in said for words in _STARTUP_FAILURES)
        return bool(result.exit_code) and not self._n_lines and has_lost

    def take_back(self) -> str | None:
        """Return None: there is no command for it."""
        return None

    def close(self) -> None:
        """Give back files and data directory; it is stopped if it still runs."""
        try:
            self._process.close()
        finally:
            if self._lease is not None:
                self._lease.release()

    # -- lines -----------------------------------------------------------------------------------

    def _events(self, lines: bytes) -> list[Event]:
        if self._keep_raw:
            self._raw_blocks.append(lines)
        events = list(iter_parse_lines(lines.split(b"\n")))
        self._n_lines += lines.count(b"\n") + 1
        if self._session is None:
            self._note_session(events)
        self._delegated.update(filter(None, map(called_session, events)))
        if self._must_say and any(event.get("type") in _STEPS for event in events):
            events += self._check_said()
        return events

    def _check_said(self) -> list[Event]:
        """Stop the run at its first step if our scripts in OpenCode do not say that they work."""
        must_say, self._must_say = self._must_say, {}
        for words, error in must_say.items():
            if not self._was_stopped and not self._process.has_written("stderr", words):
                self._not_said = error
                self.stop()
                return [error_event(error)]
        return []

    def _note_session(self, events: Sequence[Event]) -> None:
        for event in events:
            session = event.get("sessionID")
            if isinstance(session, str):
                self._session = session
                if self._lease is not None:
                    self._lease.remember(session, self._workspace)
                return

    def _last_events(self) -> list[Event]:
        """The events of what stands after the last newlines."""
        events = self._read_stderr(rest) if (rest := self._stderr.rest()) else []
        if rest := self._stdout.rest():
            last = self._events(rest)
            self._is_cut = is_cut(last[-1])
            events += last
        if unseen := self._delegated - self._followed:
            events += warning_events([not_counted(len(unseen))])
        return events

    def _read_stderr(self, lines: bytes) -> list[Event]:
        events: list[Event] = []
        for line in lines.split(b"\n"):
            text, said = split_told(line.decode("utf-8", "replace"))
            if said is not None:
                told = self._logs.read_told(said)
                self._followed.update(str(event.get("childID")) for event in told)
                events += told
                self._not_said = self._not_said or _refused_by_plugin(told)
                if not text:
                    continue
                line = text.encode()
            is_log, found = self._logs.read(text)
            if self._keep_logs or not is_log:
                self._stderr_lines.append(line)
            events += found
        if self._session is None:
            self._note_session(events)
        if self._logs.other_agent is not None and not self._was_stopped:
            events.append(no_agent(self._logs.other_agent))
            # The default agent has taken over, and may be allowed more than the one asked for.
            self.stop()
        return events


def _refused_by_plugin(told: Sequence[Event]) -> OpenCodeError | None:
    """The error that our plugin has ended a command with."""
    for error in (error_info(event.get("error")) for event in told):
        if error.name == ARGUMENTS_ERROR:
            return OpenCodeConfigError(error.message)
    return None


def _as_stdin(prompt: str) -> bytes:
    # OpenCode takes one byte order mark from the front of stdin (1.18.33).
    return (f"\ufeff{prompt}" if prompt.startswith("\ufeff") else prompt).encode()


# --- why a run went wrong -------------------------------------------------------------------------


def reason(
    result: RunResult, argv: Sequence[str], env: Mapping[str, str], logged_cause: str | None
) -> str | None:
    """Why a run failed, if that is known.

    Args:
        env: The environment that it was started with.
        logged_cause: The cause that its log tells.
    """
    if result.error is None:
        stderr = result.stderr
        known = _unknown_flag(argv, stderr) or unwritable_home(stderr) or refused_by_bun(stderr)
        return known or no_space(env)
    is_unknown = result.error.name == "UnknownError"
    if result.error.message and not is_unknown:
        return str(result.error)
    # "Unexpected server error. Check server logs": if anything has the cause, it is the log.
    if logged_cause and logged_cause != "UnknownError: UnknownError":
        words = logged_cause if is_unknown else f"{result.error}: {logged_cause}"
        return _with_space(words, env)
    return _with_space(f"{result.error}{_likely_cause(argv)}", env)


def _with_space(words: str, env: Mapping[str, str]) -> str:
    return "; ".join(filter(None, (words, no_space(env))))


def what_is_missing(result: RunResult, n_lines: int, env: Mapping[str, str]) -> str:
    """What is missing in a run that ended with success, and the end of its stderr.

    Args:
        n_lines: How many lines it printed.
        env: The environment that it was started with.
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
    # Versions up to 1.2 exit with status 0 after an error, which is only there.
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
    """A guess: an unknown command is the one failure that OpenCode says nothing about."""
    if "--command" not in argv:
        return ""
    return f" (is there a command {argv[argv.index('--command') + 1]!r}?)"


def _unknown_flag(argv: Sequence[str], stderr: str) -> str | None:
    """Where OpenCode only printed its usage: the flags of ours that are not in it."""
    usage = strip_ansi(stderr[:_LONGEST_USAGE])
    if "Options:" not in usage or "--help" not in usage:
        return None
    flags = [word.partition("=")[0] for word in argv[2:] if word.startswith("-")]
    unknown = [flag for flag in flags if flag not in usage.replace(",", " ").split()]
    if not unknown:
        return None
    version = ask_version(argv[0])[0] or "of unknown version"
    return f"opencode {version} does not know {', '.join(unknown)}"
