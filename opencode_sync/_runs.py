"""Runs one at a time: the verbs run and stream, and the runs under way.

    run(prompt, ...) --------> stream(prompt, ...) --wait()--> RunResult
    stream(prompt, ...) --> Request --> _open() of the subclass --> RunStream
                               ^                                       |
                               +--- a further turn <--- SchemaReview --+

A subclass says how one request becomes a source of events; everything else is the same for a
process per run and for a server. The verbs for many runs are in the room of the runner.
"""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from ._repair import SchemaReview
from .core.config import RunConfig, validate_config_for_run
from .core.denials import Tripwire
from .core.errors import OpenCodeCancelledError, OpenCodeConfigError
from .core.future import cancel_together
from .core.lifetime import CancelScope
from .core.mcp import check_names
from .core.request import NO_ANSWERS, Answers, Request, StrPath, checked_config, directory
from .core.result import RunResult
from .core.schema import OutputSchema, output_schema
from .core.secrets import Secrets
from .core.stream import Limits, OpenSource, RunStream, Source

if TYPE_CHECKING:
    from ._sessions import Sessions

CLOSE_S = 8.0  # bound on waiting for other threads' runs to end; stopping one takes 5 s at most

NEEDS_SERVER = (
    "needs a server: a process per turn asks nobody, and ends with its turn; use a session of "
    "OpenCodeServer"
)
_CLOSED = "the runner was closed"

_R = TypeVar("_R", bound="Runs")


class Runs(abc.ABC):
    """What starts runs and knows those under way."""

    _keeps_sessions = False  # where they can be asked about

    def __init__(self, run_cfg: RunConfig | None = None) -> None:
        self._run_cfg = checked_config(run_cfg, RunConfig())
        # A plain dict, whose single operations are atomic: see UnderWay.
        self._streams: dict[int, weakref.ref[RunStream]] = {}
        self._closed = False

    def run(
        self,
        prompt: str,
        workspace: StrPath = ".",
        *,
        run_cfg: RunConfig | None = None,
        timeout_s: float | None = None,
        idle_timeout_s: float | None = None,
        max_cost: float | None = None,
        max_steps: int | None = None,
        max_tokens: int | None = None,
        log_file: StrPath | None = None,
        max_retries: int = 2,
        retry_delay_s: float = 1.0,
        schema: Any = None,
        max_repairs: int = 1,
    ) -> RunResult:
        """Run one prompt to its end.

        Args:
            prompt: Reaches the model byte for byte.
            workspace: The directory that OpenCode works in.
            run_cfg: Settings, in place of this runner's own as a whole.
            timeout_s: Seconds from the start of the process, over all attempts. On a server: from
                when the run is handed to it, its own start included if it has none yet.
            idle_timeout_s: Seconds without an event or a log line.
            max_cost: US dollars; a run that exceeds it is stopped at that step, also at a step of
                a sub-agent.
            max_steps: Steps of the model, those of sub-agents not among them. A run that has
                taken them and is not done is stopped; nobody tells the model beforehand.
            max_tokens: Tokens of all kinds: input, output, reasoning, and what the cache read and
                wrote. As for *max_cost*, and where no prices are known the one that binds.
            log_file: Gets each event as a line of JSON as it comes, and a line for each attempt.
                Truncated at the start of the run.
            max_retries: Further attempts after a start-up failure that is safe to repeat.
            retry_delay_s: Seconds between attempts.
            schema: What the answer has to look like, to be validated and given as ``parsed``: a
                pydantic model class, a dataclass, a ``TypedDict`` or another type, or a JSON
                Schema as a mapping. Its value is the last fenced block of the answer, else the
                whole answer, else the one value in it that fits.
            max_repairs: How often an answer that does not fit is sent back in the same session,
                with the validator's words. All that is counted is counted over all turns.

        Raises:
            OpenCodeConfigError: Refused before anything was started.
            OpenCodeOutputError: No answer did fit *schema*.
            OpenCodeError: One of its subclasses, with what was got as ``.result``. Whichever way
                it ends, the process and its tools are gone. A denied tool is no error: it stands
                in the result's ``status`` and ``denied_tools``.
        """
        with self.stream(
            prompt,
            workspace,
            run_cfg=run_cfg,
            timeout_s=timeout_s,
            idle_timeout_s=idle_timeout_s,
            max_cost=max_cost,
            max_steps=max_steps,
            max_tokens=max_tokens,
            log_file=log_file,
            max_retries=max_retries,
            retry_delay_s=retry_delay_s,
            schema=schema,
            max_repairs=max_repairs,
        ) as stream:
            return stream.wait()

    def stream(
        self,
        prompt: str,
        workspace: StrPath = ".",
        *,
        run_cfg: RunConfig | None = None,
        timeout_s: float | None = None,
        idle_timeout_s: float | None = None,
        max_cost: float | None = None,
        max_steps: int | None = None,
        max_tokens: int | None = None,
        log_file: StrPath | None = None,
        max_retries: int = 2,
        retry_delay_s: float = 1.0,
        schema: Any = None,
        max_repairs: int = 1,
        keep_events: bool = True,
        keep_raw: bool = True,
    ) -> RunStream:
        """Start one prompt, and give its events as they come; arguments as for :meth:`run`.

        Args:
            keep_events: Keep the events in ``.result`` too.
            keep_raw: Keep the raw lines in ``.result`` too.

        Raises:
            OpenCodeConfigError: Refused before anything was started. What goes wrong later is
                raised by the iteration, after the last event.
        """
        self._check_open()
        limits = Limits(
            timeout_s=timeout_s,
            idle_timeout_s=idle_timeout_s,
            max_cost=max_cost,
            max_steps=max_steps,
            max_tokens=max_tokens,
            max_retries=max_retries,
            retry_delay_s=retry_delay_s,
            max_repairs=max_repairs,
        )
        return self._begin(
            prompt,
            workspace,
            limits,
            run_cfg=run_cfg,
            output=output_schema(schema),
            log_file=log_file,
            keep_events=keep_events,
            keep_raw=keep_raw,
        )

    def _begin(
        self,
        prompt: str,
        workspace: StrPath,
        limits: Limits,
        *,
        run_cfg: RunConfig | None = None,
        output: OutputSchema | None = None,
        answers: Answers = NO_ANSWERS,
        log_file: StrPath | None = None,
        keep_events: bool = True,
        keep_raw: bool = True,
        on_begin: Callable[[RunStream], None] | None = None,
        on_end: Callable[[RunStream], None] | None = None,
    ) -> RunStream:
        """Start one prompt.

        Args:
            answers: To what is asked in the meantime.
            on_begin: Gets the stream before anything is started.
            on_end: Gets it when it has ended, in whichever thread.
        """
        cfg = self._checked(run_cfg, may_ask=answers is not NO_ANSWERS)
        secrets = Secrets(self._run_cfg, cfg)
        warnings = check_names(cfg.build_opencode_config_dict(), self._mcp_servers())
        request = Request(
            prompt,
            directory(workspace),
            cfg,
            output,
            answers,
            secrets=secrets,
            warnings=warnings,
        )
        held_against_schema = SchemaReview(request, limits.max_repairs)

        def opening(request: Request) -> OpenSource:
            return lambda scope: self._open(request, scope, keep_raw)

        def review(result: RunResult) -> OpenSource | None:
            further = held_against_schema(result)
            return None if further is None else opening(further)

        def remember(stream: RunStream) -> None:
            self._streams[id(stream)] = weakref.ref(stream)
            if self._closed:  # close() looks for streams after it has said so
                raise OpenCodeCancelledError(_CLOSED)
            if on_begin is not None:
                on_begin(stream)

        def forget(stream: RunStream) -> None:
            self._streams.pop(id(stream), None)
            if on_end is not None:
                on_end(stream)

        return RunStream(
            opening(request),
            RunResult(prompt=prompt, workspace=str(request.workspace)),
            limits,
            counts_opening=self._counts_opening(cfg),
            log_file=log_file,
            keep_events=keep_events,
            review=None if output is None else review,
            secrets=secrets,
            tripwire=Tripwire(cfg),
            on_begin=remember,
            on_end=forget,
        )

    def close(self) -> None:
        """End the runs under way; their callers get OpenCodeCancelledError. Idempotent."""
        self._closed = True
        streams = [stream for ref in list(self._streams.values()) if (stream := ref())]
        cancel_together(streams, _CLOSED)
        for stream in streams:
            stream.wait_ended(CLOSE_S)

    def __enter__(self: _R) -> _R:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abc.abstractmethod
    def _open(self, request: Request, scope: CancelScope, keep_raw: bool) -> Source:
        """Start one attempt at *request*; what waits in it ends with *scope*."""

    def _prepare(self, cfg: RunConfig) -> None:  # noqa: B027 - mostly nothing
        """Start what a batch of runs with *cfg* needs, or raise what would fail all of them."""

    def _counts_opening(self, cfg: RunConfig) -> bool:
        """Whether the time that a run takes to open counts for its limits."""
        return False

    def _kept_sessions(self, cfg: RunConfig) -> Sessions:
        """What is asked about sessions, besides prompts; OpenCodeConfigError where nobody is."""
        raise OpenCodeConfigError(f"this {NEEDS_SERVER}")

    def _check(self, cfg: RunConfig, *, may_ask: bool = False) -> None:
        """Refuse settings that this kind of runner cannot follow."""
        validate_config_for_run(cfg, may_ask=may_ask, mcp_servers=self._mcp_servers())

    def _mcp_servers(self) -> Iterable[str]:
        """Names of those that a run on a server has, since the server was started with them."""
        return self._run_cfg.build_opencode_config_dict().get("mcp") or ()

    def _checked(self, run_cfg: RunConfig | None, *, may_ask: bool = False) -> RunConfig:
        cfg = checked_config(run_cfg, self._run_cfg)
        self._check(cfg, may_ask=may_ask)
        return cfg

    def _check_open(self) -> None:
        if self._closed:
            raise OpenCodeConfigError(f"this {type(self).__name__} is closed: make a new one")
