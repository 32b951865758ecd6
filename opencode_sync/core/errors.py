"""Everything that opencode_sync raises on purpose.

    OpenCodeError
     +- OpenCodeBinaryNotFoundError   also FileNotFoundError: no such program, or it cannot be run
     +- OpenCodeConfigError           also ValueError: refused before anything was started
     +- OpenCodeProcessError          the run failed: exit status, stderr, events, the reason
     +- OpenCodeIncompleteError       the answer is not whole: the output or the model broke off
     +- OpenCodeTimeoutError          also TimeoutError: total or idle, it says which
     +- OpenCodeCancelledError        also concurrent.futures.CancelledError
     +- OpenCodeBudgetError           max_cost, max_steps or another budget was spent
     +- OpenCodePermissionError       a denied tool has run, or could have
     +- OpenCodeOutputError           structured output that does not fit its schema
     +- OpenCodeServerError           the server did not start, died, or refused

Each carries ``.result``, what the run had produced until then, or None if no run had begun. Each
pickles with all its attributes and compares equal to its copy.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from .text import error_html, error_lines, printable, strip_ansi

if TYPE_CHECKING:
    from .events import Event
    from .result import RunResult

_STDERR_TAIL = 2_000  # characters


class OpenCodeError(Exception):
    """The base of every error of this package.

    Its text may quote a provider or a tool, so control characters for a terminal are left out.

    Attributes:
        result: What the run had produced, or None if no run had begun.
        prompt, index, key, metadata: Which job of a batch this was; None outside of a batch.
    """

    def __init__(self, message: str, *, result: RunResult | None = None) -> None:
        super().__init__(printable(message))
        self.result = result
        self.prompt: str | None = None
        self.index: int | None = None
        self.key: str | None = None
        self.metadata: Any = None

    def _repr_html_(self) -> str:
        """For notebooks: the error as a value."""
        return error_html(self)

    def _render_traceback_(self) -> list[str]:
        """For IPython: the error as it is raised, in brief."""
        return error_lines(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, OpenCodeError)
        return self.args == other.args and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), str(self)))


def kind_of(error_type: str, name: object = None, status_code: object = None) -> str:
    """What an error is counted under, such as ``"OpenCodeProcessError (APIError 401)"``.

    Args:
        name, status_code: What the ``error`` event of its run says, if there was one.
    """
    status = f" {status_code}" if status_code else ""
    return f"{error_type} ({name}{status})" if name else error_type


def _restore(
    cls: type[OpenCodeError], args: tuple[Any, ...], state: dict[str, Any]
) -> OpenCodeError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class OpenCodeBinaryNotFoundError(OpenCodeError, FileNotFoundError):
    """The opencode program was not found, or cannot be run."""


class OpenCodeConfigError(OpenCodeError, ValueError):
    """A setting, prompt, workspace or call was refused before anything was started."""


class OpenCodeProcessError(OpenCodeError):
    """The run ended with an error: a non-zero exit status, or an ``error`` event.

    Attributes:
        exit_code: The exit status; negative is the number of the signal that ended the process.
            None if there was no process (a turn on a server).
        stderr: All of stderr, with its colours.
        events: The events until the end.
        raw_stdout_lines: The lines of stdout, unparsed.
        reason: OpenCode's own words for what went wrong, or None.
    """

    def __init__(
        self,
        exit_code: int | None,
        stderr: str = "",
        events: Sequence[Event] = (),
        raw_stdout_lines: Sequence[str] = (),
        *,
        reason: str | None = None,
        result: RunResult | None = None,
    ) -> None:
        message = _ending(exit_code)
        if why := strip_ansi(reason or "").strip():
            message += f": {why}"
        tail = stderr_tail(stderr)
        if tail and tail != why:
            message += f"\n{tail}"
        super().__init__(message, result=result)
        self.exit_code = exit_code
        self.stderr = stderr
        self.events = list(events)
        self.raw_stdout_lines = list(raw_stdout_lines)
        self.reason = reason


def stderr_tail(stderr: str) -> str:
    """The end of *stderr*, without its colours, for an error's text."""
    return strip_ansi(stderr)[-_STDERR_TAIL:].strip()


def _ending(exit_code: int | None) -> str:
    return f"opencode {exit_words(exit_code)}" if exit_code else "opencode reported an error"


def exit_words(status: int) -> str:
    """Return how a process with this exit status has ended; a negative one is a signal."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = f" ({signal.Signals(-status).name})"
    except ValueError:  # a real-time signal
        name = ""
    return f"was ended by signal {-status}{name}"


class OpenCodeIncompleteError(OpenCodeError):
    """The answer is not whole; ``.result`` has the part that came.

    The output broke off, though OpenCode exited with status 0. Or the model's answer broke off: at
    its output limit, by a content filter, or for a reason that the provider did not give. Or such
    answers came one after another, and the run was stopped since OpenCode would go on asking.
    """


class OpenCodeTimeoutError(OpenCodeError, TimeoutError):
    """A time limit passed; the run and its tools were stopped.

    Attributes:
        limit: ``"timeout_s"`` or ``"idle_timeout_s"``.
        limit_s: The limit in seconds.
        elapsed_s: Seconds since the run's process started.
    """

    def __init__(
        self,
        message: str,
        *,
        limit: str = "timeout_s",
        limit_s: float | None = None,
        elapsed_s: float | None = None,
        result: RunResult | None = None,
    ) -> None:
        super().__init__(message, result=result)
        self.limit = limit
        self.limit_s = limit_s
        self.elapsed_s = elapsed_s


class OpenCodeCancelledError(OpenCodeError, CancelledError):
    """The run was cancelled, or its client was closed during it."""


class OpenCodeBudgetError(OpenCodeError):
    """A budget was spent before the run was done; the run and its tools were stopped.

    Attributes:
        limit_name: ``"max_cost"``, ``"max_tokens"`` or ``"max_steps"`` of a run;
            ``"max_total_cost"`` or ``"max_total_tokens"`` of a batch.
        limit: The budget: US dollars, tokens, or steps of the model.
        spent: The amount spent when this was noticed, in the same unit.
    """

    def __init__(
        self,
        message: str,
        *,
        limit_name: str = "max_cost",
        limit: float | None = None,
        spent: float | None = None,
        result: RunResult | None = None,
    ) -> None:
        super().__init__(message, result=result)
        self.limit_name = limit_name
        self.limit = limit
        self.spent = spent


class OpenCodePermissionError(OpenCodeError):
    """A denied tool has run, or nothing would have stopped it.

    Attributes:
        tool: The tool that has run; None if OpenCode did not look for what is denied.
    """

    def __init__(
        self, message: str, *, tool: str | None = None, result: RunResult | None = None
    ) -> None:
        super().__init__(message, result=result)
        self.tool = tool


class OpenCodeOutputError(OpenCodeError):
    """Structured output that does not fit its schema, even after the repairs.

    Attributes:
        errors: What the validator says, one entry a fault.
        text: The answer that was validated.
    """

    def __init__(
        self,
        message: str,
        *,
        errors: Sequence[str] = (),
        text: str = "",
        result: RunResult | None = None,
    ) -> None:
        super().__init__(message, result=result)
        self.errors = list(errors)
        self.text = text


class OpenCodeServerError(OpenCodeError):
    """The server did not start, died, or refused a request.

    Attributes:
        status_code: The HTTP status of the refusal, or None.
    """

    def __init__(
        self, message: str, *, status_code: int | None = None, result: RunResult | None = None
    ) -> None:
        super().__init__(message, result=result)
        self.status_code = status_code
