"""One prompt: its options, what is checked of it, and where the events of an attempt come from.

    options of a verb --> RunSettings --+
    prompt, workspace, RunConfig -------+--> Request --> Source: a process, or a turn on a server
                                               ^           |
                                               |           v answer
                                               +------ SchemaReview, where it does not fit

An option is declared in one of the TypedDicts, has its default in Limits or RunSettings, and is
explained in the docstring of ``Runner.run`` or ``Runner.map``. Starts nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, TypeVar, cast, get_type_hints

from .config import NO_CURRENT_DIRECTORY, RunConfig, check_flag, checked_path
from .errors import OpenCodeConfigError, OpenCodeError, OpenCodeOutputError
from .events import Event
from .limits import Limits, Retry
from .reading import OUTPUT_TOOL, Tried, mapping, part_of
from .result import ErrorInfo, RunResult, is_cut_off
from .schema import Fit, OutputSchema, SchemaMismatch, output_schema
from .secrets import Secrets

StrPath = str | os.PathLike[str]
OnError = Literal["raise", "return"]
OnMismatch = Literal["raise", "rerun", "keep"]


# --- the options of a prompt ---------------------------------------------------------------------


class JobOptions(TypedDict, total=False):
    """Options of a run, and of a batch for each of its jobs; ``Runner.run`` explains them."""

    run_cfg: RunConfig | None
    timeout_s: float | None
    idle_timeout_s: float | None
    max_cost: float | None
    max_steps: int | None
    max_tokens: int | None
    startup_retries: int
    startup_retry_delay_s: float
    schema: Any
    max_repairs: int
    max_retries: int  # these two are former names, see RENAMED
    retry_delay_s: float


class RunOptions(JobOptions, total=False):
    """Options of ``run``, ``submit`` and ``Session.send``."""

    log_file: StrPath | None


class StreamOptions(RunOptions, total=False):
    """Options of ``stream``."""

    keep_events: bool
    keep_raw: bool


class BatchOptions(JobOptions, total=False):
    """Options of ``map``, which explains them."""

    max_total_cost: float | None
    max_total_tokens: int | None
    max_workers: int | None
    buffersize: int | None
    ordered: bool
    progress: bool | Literal["always"]
    progress_interval_s: float
    checkpoint: StrPath | None
    retries: int | Retry
    retry_failed: bool
    on_mismatch: OnMismatch
    executor: Executor | None
    adaptive: bool
    keep_events: bool
    keep_raw: bool


@dataclass(frozen=True)
class RunSettings:
    """What the options of one run come to, checked.

    Attributes:
        run_cfg: None for the runner's own.
        output: What the answer has to look like.
        passed_over: Models that are out for other jobs of the batch, and so not asked.
    """

    limits: Limits = field(default_factory=Limits)
    run_cfg: RunConfig | None = None
    output: OutputSchema | None = None
    log_file: StrPath | None = None
    keep_events: bool = True
    keep_raw: bool = True
    passed_over: Sequence[Tried] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> RunSettings:
        """Those of *options* that concern one run, with defaults for the rest.

        Raises:
            OpenCodeConfigError: If one of them makes no sense.
        """
        for flag in ("keep_events", "keep_raw"):
            check_flag(flag, options.get(flag, True))
        limits = {name: options[name] for name in _LIMITS if name in options}
        own = {name: options[name] for name in _SETTINGS if name in options}
        return cls(limits=Limits(**limits), output=output_schema(options.get("schema")), **own)


_LIMITS = [
    each.name for each in dataclasses.fields(Limits) if each.name in JobOptions.__annotations__
]
_SETTINGS = ["run_cfg", "log_file", "keep_events", "keep_raw"]

BATCH_DEFAULTS: BatchOptions = {
    "max_total_cost": None,
    "max_total_tokens": None,
    "max_workers": None,
    "buffersize": None,
    "ordered": True,
    "progress": False,
    "progress_interval_s": 30.0,
    "checkpoint": None,
    "retries": 0,
    "retry_failed": True,
    "on_mismatch": "raise",
    "executor": None,
    "adaptive": True,
}
RENAMED = {"max_retries": "startup_retries", "retry_delay_s": "startup_retry_delay_s"}

_DEFAULTS: dict[str, Any] = {
    **{each.name: each.default for each in dataclasses.fields(Limits)},
    **{each.name: each.default for each in dataclasses.fields(RunSettings)},
    "schema": None,
    **BATCH_DEFAULTS,
    **{old: getattr(Limits, new) for old, new in RENAMED.items()},
}

_Verb = TypeVar("_Verb", bound=Callable[..., Any])


def shows(options: Any) -> Callable[[_Verb], _Verb]:
    """Give a verb that takes ``**options`` the signature with a parameter for each of *options*.

    Type checkers and editors read them from ``Unpack``; ``help()``, IPython and Jupyter from this.
    """

    def with_signature(verb: _Verb) -> _Verb:
        signature = inspect.signature(verb)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        keywords = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_DEFAULTS[name],
                annotation=getattr(annotation, "__forward_arg__", annotation),
            )
            for name, annotation in options.__annotations__.items()
        ]
        whole = signature.replace(parameters=[*own, *keywords])
        verb.__signature__ = whole  # type: ignore[attr-defined]
        # For typing.get_type_hints(), which does not look at the signature.
        verb.__annotations__.pop("options")
        verb.__annotations__.update(get_type_hints(options))
        return verb

    return with_signature


def check_keywords(verb: Callable[..., Any], options: Mapping[str, object]) -> None:
    """Raise the TypeError of Python for those of *options* that *verb* does not show.

    Former names are replaced by the present ones, with a warning for who called the verb.
    """
    names = inspect.signature(verb).parameters
    for old, new in RENAMED.items():
        if old not in options or old not in names:
            continue
        warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=3)
        own = cast(dict[str, Any], options)
        own.setdefault(new, own.pop(old))
    for unknown in options.keys() - names:
        from difflib import get_close_matches

        similar = get_close_matches(unknown, names, 1)
        hint = f". Did you mean {similar[0]!r}?" if similar else ""
        raise TypeError(
            f"{verb.__qualname__}() got an unexpected keyword argument {unknown!r}{hint}"
        )


# --- the prompt itself ---------------------------------------------------------------------------


PermissionAnswer = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""The body of the reply to a permission request, given the request's."""
QuestionAnswer = Callable[[Mapping[str, Any]], "Mapping[str, Any] | None"]
"""The same for a question; None declines it."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Who answers the requests of a run; None for the answer that its settings give."""

    permission: PermissionAnswer | None = None
    question: QuestionAnswer | None = None


NO_ANSWERS = Answers()
"""For a run that has nobody to ask."""


@dataclass(frozen=True)
class Request:
    """A prompt with its directory and settings, checked when made.

    Attributes:
        output: What the answer has to look like.
        answers: Who answers requests in the meantime.
        is_repair: It sends back an answer that did not fit; the session knows the schema.
        secrets: What none of its errors may tell; None for the secrets of its settings alone.
        warnings: Sentences on its settings, for the result.

    Raises:
        OpenCodeConfigError: For a prompt or a file that cannot be passed on.
    """

    prompt: str
    workspace: Path
    cfg: RunConfig
    output: OutputSchema | None = None
    answers: Answers = NO_ANSWERS
    is_repair: bool = False
    secrets: Secrets | None = None
    warnings: Sequence[str] = ()

    @property
    def instructed(self) -> str:
        """The prompt, with words for what the answer has to look like."""
        if self.output is None or self.is_repair:
            return self.prompt
        return f"{self.prompt}\n\n{self.output.instruction}"

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, self.cfg)
        for file in self.cfg.files:
            _check_file(file, self.workspace)
        if self.cfg.pure or not self.cfg.inherit_project_config:
            _check_plugins(self.workspace, "pure" if self.cfg.pure else "inherit_project_config")


def _check_plugins(workspace: Path, setting: str) -> None:
    """Refuse a workspace with plugins of its own for a run that should not load them.

    OpenCode 1.18.33 executes their files in spite of its settings, from the workspace up to the
    root of its repository.
    """
    for place in (workspace, *workspace.parents):
        directory = place / ".opencode"
        plugins = [*directory.glob("plugin/*.[jt]s"), *directory.glob("plugins/*.[jt]s")]
        if plugins and str(place) != os.path.expanduser("~"):  # plugins at home are the user's
            raise OpenCodeConfigError(
                f"{setting}: OpenCode would execute {str(plugins[0])!r} nevertheless: remove the "
                "workspace's plugins, or run it with its configuration"
            )
        if (place / ".git").exists():
            return


def _check_file(file: StrPath, workspace: Path) -> None:
    path, name = workspace / os.path.expanduser(file), os.fspath(file)
    if os.path.isdir(path):
        raise OpenCodeConfigError(
            f"files: {name!r} is a directory: name files, or have the prompt say where to look"
        )
    if not os.path.isfile(path):  # which, unlike Path.is_file, never raises
        raise OpenCodeConfigError(f"no file {name!r} (relative to {workspace})")
    if _names_an_image(path.name) and os.path.getsize(path) == 0:
        raise OpenCodeConfigError(f"files: {name!r} is empty, and so not an image: leave it out")


def _names_an_image(name: str) -> bool:
    import mimetypes

    return str(mimetypes.guess_type(name)[0]).startswith("image/")


def checked_config(given: object, default: RunConfig) -> RunConfig:
    """*given*, or *default* for None."""
    if given is None:
        return default
    if not isinstance(given, RunConfig):
        raise OpenCodeConfigError(f"run_cfg is {type(given).__name__}: use a RunConfig")
    return given


def absolute(workspace: StrPath) -> str:
    """The absolute path of *workspace*, for a worker in another directory or at another time."""
    if not isinstance(workspace, (str, os.PathLike)) or not os.fspath(workspace):
        return cast(str, workspace)  # refused where the run begins
    try:
        return os.path.abspath(os.path.expanduser(os.fspath(workspace)))
    except FileNotFoundError:
        raise OpenCodeConfigError(
            f"workspace {os.fspath(workspace)!r}: {NO_CURRENT_DIRECTORY}"
        ) from None


def directory(workspace: StrPath) -> Path:
    """The directory *workspace*, with links resolved.

    Raises:
        OpenCodeConfigError: If there is no such directory.
    """
    path = checked_path("workspace", workspace, "a directory")
    try:
        path = path.resolve()
        is_there, is_directory = path.exists(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OpenCodeConfigError(f"workspace {os.fspath(workspace)[:200]!r}: {reason}") from None
    if not is_directory:
        what = "is not a directory" if is_there else "does not exist"
        raise OpenCodeConfigError(f"workspace {str(path)!r} {what}")
    return path


def _check_prompt(prompt: str, cfg: RunConfig) -> None:
    if not isinstance(prompt, str):
        raise OpenCodeConfigError(f"prompt is {type(prompt).__name__}: use a str")
    if not prompt.strip() and cfg.command is None:
        raise OpenCodeConfigError("the prompt is blank")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise OpenCodeConfigError(f"the prompt cannot be encoded as UTF-8: {error}") from None


# --- where its events come from ------------------------------------------------------------------


class Source(Protocol):
    """One attempt under way. One thread receives; stop() may come from any."""

    @property
    def label(self) -> str:
        """For log lines, such as ``"run 3 (pid 4711)"``."""

    @property
    def started_at(self) -> float:
        """When its work began, a ``time.monotonic()`` instant."""

    @property
    def session_id(self) -> str | None:
        """The run's session, if it is known: the first event may be a sub-agent's."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended by itself; there may still be events to receive."""

    def receive(self, timeout: float | None) -> Sequence[Event] | None:
        """Return the next events, or None at the end; an empty sequence is a sign of life.

        Raises:
            queue.Empty: If nothing came for *timeout* seconds.
        """

    def stop(self) -> None:
        """End the attempt with its tools; bounded, idempotent."""

    def settle(self, result: RunResult) -> OpenCodeError | None:
        """Complete *result* after the end, and return what went wrong.

        Sets its exit status and stderr, and adds to its raw lines.
        """

    def may_repeat(self, result: RunResult) -> bool:
        """Whether the attempt failed before it did anything, for a reason that may pass."""

    def take_back(self) -> str | None:
        """Take the prompt out of its session after the end, and return the session's id.

        None where that is not possible: then the prompt is sent as it was before.
        """

    def close(self) -> None:
        """Give back files and directories; after the end."""


# --- its answer, and a repair --------------------------------------------------------------------


class SchemaReview:
    """Checks the answers of one run, which come one after another, against its schema."""

    def __init__(self, request: Request, max_repairs: int) -> None:
        self._request = request
        self._max_repairs = max_repairs
        self._n_repairs = 0

    def repair(self, result: RunResult) -> Request | None:
        """Set ``parsed`` of *result* and return None, or return what to ask for next.

        Raises:
            OpenCodeOutputError: If the answer does not fit, and no repair is left.
        """
        schema = self._request.output
        if schema is None:
            return None
        is_cut = is_cut_off(result)
        found = _value_in(result, schema, is_cut)
        if isinstance(found, SchemaMismatch):
            if self._n_repairs >= self._max_repairs or result.session_id is None:
                raise self._misfit(result, found, is_cut) from found.__cause__
            self._n_repairs += 1
            result._json = None
            return self._repair_request(
                result.session_id, schema.repair(found.faults, is_cut=is_cut)
            )
        result.parsed, result._json = found
        if is_cut:
            result.finish_reason = "stop"  # the value is whole, whatever was to follow it
        return None

    def _repair_request(self, session_id: str, prompt: str) -> Request:
        cfg = self._request.cfg.replace(
            session_id=session_id,
            continue_session=False,
            fork=False,
            command=None,
            files=(),
            title=None,
            share=None,
        )
        return dataclasses.replace(self._request, prompt=prompt, cfg=cfg, is_repair=True)

    def _misfit(
        self, result: RunResult, mismatch: SchemaMismatch, is_cut: bool
    ) -> OpenCodeOutputError:
        arguments, result._json = result._json, None
        text = result.answer if arguments is None else json.dumps(arguments, ensure_ascii=False)
        n = self._n_repairs
        after = f" after {n} repair{'s' * (n > 1)}" if n else ""
        cut = ", and was cut off at the model's output limit" if is_cut else ""
        faults = mismatch.faults
        message = f"the answer does not fit its schema{after}{cut}: {faults[0]}"
        result.error = ErrorInfo("StructuredOutputError", message)  # OpenCode's own name for it
        return OpenCodeOutputError(message, errors=faults, text=text, result=result)


def _value_in(result: RunResult, schema: OutputSchema, is_cut: bool) -> Fit | SchemaMismatch:
    """The value of the answer, or what is wrong with it."""
    try:
        # What the server's tool got; without it, the model may have answered in words.
        if result._json is None:
            return schema.find(result.answer, is_cut=is_cut)
        if (n := _n_outputs(result)) > 1:
            raise SchemaMismatch(f"{OUTPUT_TOOL} was called with {n} different values at once")
        return schema.take(result._json)  # the tool is called with whole JSON, or not at all
    except SchemaMismatch as mismatch:
        # Without the traceback, whose frames would keep the run's stream in memory.
        return mismatch.with_traceback(None)


def _n_outputs(result: RunResult) -> int:
    """How many different values the last answer gave to the tool; OpenCode keeps the last one."""
    message_id: object = None
    values: set[str] = set()
    for event in result.tool_calls:
        part = part_of(event)
        state = mapping(part.get("state"))
        if part.get("tool") == OUTPUT_TOOL and state.get("status") == "completed":
            if part.get("messageID") != message_id:
                message_id, values = part.get("messageID"), set()
            values.add(json.dumps(state.get("input"), sort_keys=True))
    return len(values)
