"""One prompt, checked: what a source is opened for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ._checks import NO_CURRENT_DIRECTORY, unencodable
from ._schema import OutputSchema
from ._secrets import Secrets
from .config import RunConfig
from .errors import OpenCodeConfigError

StrPath = str | os.PathLike[str]
PermissionAnswer = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""The body of the reply to a permission request, given the request's."""
QuestionAnswer = Callable[[Mapping[str, Any]], "Mapping[str, Any] | None"]
"""The same for a question; None declines it."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What to answer to the requests of a run; None for what its settings say."""

    permission: PermissionAnswer | None = None
    question: QuestionAnswer | None = None


NO_ANSWERS = Answers()
"""Of a run that has nobody to ask."""


@dataclass(frozen=True)
class Request:
    """A prompt with its directory and settings.

    Attributes:
        output: What the answer has to look like.
        answers: What to answer to requests in the meantime.
        is_repair: It sends back an answer that did not; the session has been told the schema.
        secrets: What no error of it may tell; None for those of its settings alone.
        warnings: Sentences on its settings, for the result.

    Raises:
        OpenCodeConfigError: When made, of a prompt or a file that cannot be passed on.
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
    """Refuse a workspace with plugins of its own for a run that is to leave them out.

    OpenCode 1.18.33 executes their files whatever it is told, from the workspace up to the root of
    its repository.
    """
    for place in (workspace, *workspace.parents):
        directory = place / ".opencode"
        plugins = [*directory.glob("plugin/*.[jt]s"), *directory.glob("plugins/*.[jt]s")]
        if plugins and str(place) != os.path.expanduser("~"):  # those there are the user's own
            raise OpenCodeConfigError(
                f"{setting}: OpenCode would execute {str(plugins[0])!r} all the same: remove the "
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
        raise OpenCodeConfigError(f"no file {name!r} (counted from {workspace})")
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
    """*workspace* as what a worker elsewhere, or later, takes for the same directory."""
    if not isinstance(workspace, (str, os.PathLike)) or not os.fspath(workspace):
        return cast(str, workspace)  # refused where the run is begun
    try:
        return os.path.abspath(os.path.expanduser(os.fspath(workspace)))
    except FileNotFoundError:
        raise OpenCodeConfigError(
            f"workspace {os.fspath(workspace)!r}: {NO_CURRENT_DIRECTORY}"
        ) from None


def directory(workspace: StrPath) -> Path:
    """The directory itself, links and all resolved.

    Raises:
        OpenCodeConfigError: Where there is none.
    """
    if not isinstance(workspace, (str, os.PathLike)) or not os.fspath(workspace):
        raise OpenCodeConfigError(f"workspace is {workspace!r}: use the path of a directory")
    text, whole = os.fspath(workspace), absolute(workspace)
    try:
        path = Path(whole).resolve()
        is_there, is_directory = path.exists(), path.is_dir()
    except UnicodeEncodeError as error:
        raise OpenCodeConfigError(f"workspace {text!r}: {unencodable(error)}") from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OpenCodeConfigError(f"workspace {text[:200]!r}: {reason}") from None
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
