"""What one run is asked for: values.

Knows the names of settings and how they merge; _validation, which of them will do; neither knows of
flags, files or processes.

What an argument has to be: looked at before anything is started.

Each check raises OpenCodeConfigError, with the argument's name, its value, and what to use.

Settings of a run, looked at before anything is started.

validate_config_for_run(RunConfig): types --> permissions, tools, MCP servers --> JSON
                                    --> combinations --> words

Each check raises OpenCodeConfigError, with the field's name, its value unless it may be secret, and
what to use. Knows what OpenCode would ignore, misread or hang on; starts nothing.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .errors import OpenCodeConfigError
from .mcp import check_names, check_servers


def check_number(
    name: str, value: object, *, optional: bool = False, positive: bool = False
) -> None:
    """Check for a finite number: above 0, or of 0 or more; None where *optional*."""
    if value is None and optional:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Not math.isfinite: that raises for an int of hundreds of digits.
    is_in_range = is_number and 0 <= value <= sys.float_info.max  # type: ignore[operator]
    if not is_in_range or (positive and value == 0):
        bound = "above 0" if positive else "of 0 or more"
        none = ", or None for no limit" if optional else ""
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use a number {bound}{none}")


def check_count(name: str, value: object, least: int) -> None:
    """Check for a whole number of *least* or more, or None."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if value is not None and not is_count:
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use {least} or more, or None")


def check_flag(name: str, value: object) -> None:
    """Check for a bool: of other values ``"no"`` would be true."""
    if not isinstance(value, bool):
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use True or False")


def check_program(name: str, value: object) -> None:
    """Check for what may name a program."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use a path, or a name on PATH")


def checked_path(name: str, value: str | os.PathLike[str], kind: str = "a file") -> Path:
    """*value* as an absolute path, ``~`` expanded; there need be nothing there.

    Args:
        kind: What it is the path of, in words.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use the path of {kind}")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise OpenCodeConfigError(f"{name} {text!r}: there is no such home: use an absolute path")
    try:
        path = os.path.abspath(path)
        os.fsencode(path)
    except FileNotFoundError:
        raise OpenCodeConfigError(f"{name} {text!r}: {NO_CURRENT_DIRECTORY}") from None
    except UnicodeEncodeError as error:
        raise OpenCodeConfigError(f"{name} {text!r}: {unencodable(error)}") from None
    return Path(path)


NO_CURRENT_DIRECTORY = "the current directory has vanished: use an absolute path"


def unencodable(error: UnicodeEncodeError) -> str:
    """What is wrong with a text that the system cannot take, and what to do."""
    if sys.getfilesystemencoding() == "utf-8":
        return f"it cannot be encoded: {error}"
    return f"{error}: run Python with PYTHONUTF8=1, or in a UTF-8 locale"


def shown(value: object) -> str:
    """*value* as it is written, if that is short; else its type."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a stranger's repr, or an int too long to be written
        text = ""
    return text if 0 < len(text) <= 200 else type(value).__name__


# Fields that may hold passwords, tokens or keys: they show in a repr as "...", and so does what
# stands before the "@" of a URL.
SECRET_FIELDS = frozenset({"password", "extra_env", "mcp", "config_overrides"})
URL_LOGIN = re.compile(r"(?<=://)[^/\s]*(?=@)")


@dataclass(frozen=True, repr=False)
class RunConfig:
    """Settings of a run. All are optional; what is None is left to OpenCode and its own config.

    Attributes:
        agent: Name of the agent. An unknown one is an error, and so is a sub-agent's name in a
            process per run: OpenCode would run its default agent. A server runs the sub-agent.
            A command that names an agent of its own is run by that one.
        model: ``"provider/model"``. With none configured anywhere, the prompt goes to the
            vendor's free models.
        files: Paths attached to the prompt; relative ones count from the workspace.
        title: Title of the session; None for the beginning of its prompt.
        command: Name of an OpenCode command; the prompt becomes its arguments, which reach the
            model as they are: nothing in them is expanded or run. A command that puts them into a
            shell command of its own is refused, and so are files that they name (``@file``) for a
            sub-agent, arguments with *pure*, and on a server that runs elsewhere arguments with
            ``$``, ``@`` or a backtick. In a process, arguments have OpenCode load a plugin, and so
            wait for its own installations by npm: some 12 seconds once in a workspace that has a
            ``.opencode`` directory, and a minute where an earlier run ended in the middle of one.
        continue_session: Continue this client's last session in the workspace.
        session_id: Continue this session.
        fork: Branch the continued session, leaving the original as it is.
        share: Share the session publicly.
        attach: URL of a running server that shall do the work.
        password, username: Credentials for *attach*.
        remote_dir: Directory on the server of *attach*.
        port: Accepted for compatibility; OpenCode's ``run`` does nothing with it.
        variant: The provider's name for a reasoning effort, such as ``"high"``. OpenCode ignores
            one that the model does not have, of which there is a warning in the result. For a
            process, where *model* is given here, OpenCode is asked for the model's variants first,
            which takes 2 s once.
        thinking: Give the model's reasoning as ``reasoning`` events.
        print_logs: Keep OpenCode's log lines in the result's ``stderr``.
        log_level: ``"DEBUG"``, ``"INFO"``, ``"WARN"`` or ``"ERROR"``. With *print_logs*, the last
            one leaves out what tells of MCP servers that do not work.
        disable_autoupdate: Keep OpenCode from replacing its own binary.
        extra_env: Variables for the child, over the environment it inherits. A tool sees them all.
        permission: OpenCode's permission rules, each leaf ``"allow"`` or ``"deny"``. What is
            denied here, in *tools* or in *config_overrides* holds against all configuration of
            the workspace and the user, its agents and commands, and for sub-agents: a tool that
            runs all the same ends the run with an OpenCodePermissionError. No rule holds for what
            OpenCode itself runs at the word of the workspace's configuration: its plugins, custom
            tools, MCP servers, formatters, language servers and shell, and the shell commands in
            the template of a *command*. ``inherit_project_config=False`` leaves that out;
            a workspace with plugins in ``.opencode/plugin`` or ``.opencode/plugins`` is refused
            then, and with *pure*, since OpenCode 1.18.33 executes these files all the same.
            A name that has no effect is refused where it is nearly a known one, or a tool that asks
            for another permission (``"edit"`` stands for ``write`` and ``apply_patch``); of other
            names that are not known there is a warning in the result.
        mcp: MCP servers by name: OpenCode's key, of which entries are checked. Of a server that
            does not work there is a warning in the result.
        tools: Tools by name, True or False; names are checked as those of *permission*.
        config_overrides: Any other OpenCode configuration; the fields above are merged over it.
        auto: Answer permission questions with yes; explicit denials hold.
        pure: Run without plugins; a workspace that has some of its own is refused.
        instructions: Paths, globs or URLs of instruction files, OpenCode's key of this name.
        inherit_user_config: Use the configuration, agents, skills and instructions of the user's
            home and environment. Without them, tools see an empty ``XDG_CONFIG_HOME``.
        inherit_project_config: Use those found in the workspace. Without them, skills in
            ``.claude`` and ``.agents`` directories are left out, the user's too: OpenCode has one
            switch for both.
        keep_background: Leave processes alone that tools left running at the run's normal end. On
            an ``OpenCodeServer`` they go on as long as its server.
        lean: Switch off what a single run rarely needs, for some 2 % less time and 10 % less CPU:
            snapshots (and so OpenCode's undo), sharing, language servers, plugins that come with
            OpenCode, newer lists of models, pruning, watching files; JavaScript that is hot for
            minutes is optimised later. *extra_env* and *config_overrides* can take each back.
    """

    agent: str | None = None
    model: str | None = None
    files: tuple[str | Path, ...] = ()
    title: str | None = None
    command: str | None = None
    continue_session: bool = False
    session_id: str | None = None
    fork: bool = False
    share: bool | None = None
    attach: str | None = None
    password: str | None = None
    remote_dir: str | None = None
    port: int | None = None
    variant: str | None = None
    thinking: bool | None = None
    print_logs: bool | None = None
    log_level: str | None = None
    disable_autoupdate: bool = True
    extra_env: Mapping[str, str] | None = None
    permission: str | Mapping[str, Any] | None = None
    mcp: Mapping[str, Any] | None = None
    tools: Mapping[str, Any] | None = None
    config_overrides: Mapping[str, Any] | None = None
    username: str | None = None
    auto: bool = False
    pure: bool = False
    instructions: tuple[str, ...] = ()
    inherit_user_config: bool = True
    inherit_project_config: bool = True
    keep_background: bool = False
    lean: bool = False

    def __post_init__(self) -> None:
        # Copies, so that a caller who changes his mapping later does not change a frozen value.
        for name in ("extra_env", "permission", "mcp", "tools", "config_overrides"):
            try:
                object.__setattr__(self, name, _plain_copy(getattr(self, name)))
            except RecursionError:
                raise OpenCodeConfigError(
                    f"{name} is nested too deeply: does it hold itself?"
                ) from None
        for name in ("files", "instructions"):
            value = () if (given := getattr(self, name)) is None else given
            # A lone path is one file; iterated, it would be one file per character.
            single = isinstance(value, (str, os.PathLike)) or not isinstance(value, Iterable)
            object.__setattr__(self, name, (value,) if single else tuple(value))

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                text = "..." if field.name in SECRET_FIELDS else repr(value)
                shown.append(f"{field.name}={URL_LOGIN.sub('...', text)}")
        return f"RunConfig({', '.join(shown)})"

    def replace(self, **changes: Any) -> RunConfig:
        """A copy with *changes*; raises TypeError for a field that does not exist."""
        return replace(self, **changes)

    def build_opencode_config_dict(self) -> dict[str, Any]:
        """OpenCode's configuration for this run: *config_overrides* with the fields over it.

        Mappings merge key by key, everything else replaces. Empty where nothing is set.
        """
        config: dict[str, Any] = _plain_copy(self.config_overrides or {})
        for key in ("permission", "mcp", "tools"):
            value = getattr(self, key)
            if value is not None:
                config = merged(config, {key: _plain_copy(value)})
        if self.instructions:
            config["instructions"] = list(self.instructions)
        return config

    def opencode_config_content_json(self) -> str | None:
        """The same as JSON for ``OPENCODE_CONFIG_CONTENT``, or None where it is empty."""
        config = self.build_opencode_config_dict()
        return json.dumps(config, ensure_ascii=False) if config else None


@dataclass(frozen=True)
class Job:
    """One entry of a batch; what is None is taken from the batch's own settings.

    Attributes:
        prompt: The prompt.
        workspace: Directory to work in.
        run_cfg: Settings, in place of the batch's as a whole.
        timeout_s: Seconds from the start of the run's process.
        key: Name of the job in a checkpoint and in its result.
        max_cost, max_steps, max_tokens: As for ``run``.
    """

    prompt: str
    workspace: str | Path | None = None
    run_cfg: RunConfig | None = None
    timeout_s: float | None = None
    key: str | None = None
    max_cost: float | None = None
    max_steps: int | None = None
    max_tokens: int | None = None


def _plain_copy(value: Any) -> Any:
    """A deep copy with a dict for every mapping: JSON takes no other kind."""
    if isinstance(value, Mapping):
        return {key: _plain_copy(below) for key, below in value.items()}
    return [_plain_copy(below) for below in value] if isinstance(value, (list, tuple)) else value


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """*over* laid on *under*: mappings merge key by key, everything else replaces."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merged(below, value)
        result[key] = value
    return result


LOG_LEVELS = ("DEBUG", "INFO", "WARN", "ERROR")
_ACTIONS = ("allow", "deny")


def validate_permission_actions(permission: Any, *, may_ask: bool = False, _path: str = "") -> None:
    """Check that every leaf of a permission setting is ``"allow"`` or ``"deny"``; None has none.

    Args:
        may_ask: There is somebody to ask, so that ``"ask"`` will do too.

    Raises:
        OpenCodeConfigError: Also a ValueError; names the leaf by its dotted path.
    """
    where = f"permission {_path!r}" if _path else "permission"
    if isinstance(permission, Mapping):
        for key, value in permission.items():
            path = f"{_path}.{key}" if _path else str(key)
            validate_permission_actions(value, may_ask=may_ask, _path=path)
    elif permission == "ask" and may_ask:
        return
    elif permission == "ask":
        raise OpenCodeConfigError(
            f"{where} is 'ask', but a run has nobody to ask: "
            "use 'allow' or 'deny', or a session with on_permission"
        )
    elif permission not in _ACTIONS and (_path or permission is not None):
        raise OpenCodeConfigError(f"{where} is {permission!r}: use 'allow' or 'deny'")


def validate_config_for_run(
    cfg: RunConfig, *, may_ask: bool = False, mcp_servers: Iterable[str] = ()
) -> None:
    """Check settings that OpenCode would ignore, misread or hang on.

    Args:
        may_ask: There is somebody to ask, as with a session.
        mcp_servers: Names of MCP servers that the run has beside those of *cfg*.

    Raises:
        OpenCodeConfigError: Names the field, its value unless it may be secret, and what to use.
    """
    _check_types(cfg)
    config = cfg.build_opencode_config_dict()
    _check_permissions(config, may_ask)
    _check_tools(config)
    check_names(config, mcp_servers)
    check_servers(config.get("mcp"))
    _check_serialisable(config)
    _check_combinations(cfg)
    _check_words(cfg)
    _check_environment(cfg.extra_env or {})


def _check_types(cfg: RunConfig) -> None:
    for field in fields(RunConfig):
        value = getattr(cfg, field.name)
        accepted, words = _ACCEPTED[str(field.type)]
        odd = [v for v in (value if isinstance(value, tuple) else (value,)) if not accepted(v)]
        if odd:
            kind = type(odd[0]).__name__
            raise OpenCodeConfigError(f"{field.name} is of type {kind}: use {words}")


def _optional(*types: type) -> Callable[[object], bool]:
    return lambda value: value is None or isinstance(value, types)


# By annotation; of a tuple, each entry is looked at.
_ACCEPTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "str | None": (_optional(str), "a str"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "bool | None": (_optional(bool), "True or False, or None"),
    "int | None": (lambda value: value is None or type(value) is int, "an int"),
    "tuple[str, ...]": (lambda value: isinstance(value, str), "strings"),
    "tuple[str | Path, ...]": (lambda value: isinstance(value, (str, os.PathLike)), "paths"),
    "Mapping[str, str] | None": (_optional(Mapping), "a mapping"),
    "Mapping[str, Any] | None": (_optional(Mapping), "a mapping"),
    "str | Mapping[str, Any] | None": (_optional(str, Mapping), "a str or a mapping"),
}


def _check_permissions(config: Mapping[str, Any], may_ask: bool) -> None:
    validate_permission_actions(config.get("permission"), may_ask=may_ask)
    for key in ("agent", "mode"):  # the second is the older name of the first
        agents = config.get(key)
        for name, agent in agents.items() if isinstance(agents, Mapping) else ():
            if isinstance(agent, Mapping) and agent.get("permission") is not None:
                path = f"{key}.{name}.permission"
                validate_permission_actions(agent["permission"], may_ask=may_ask, _path=path)


def _check_tools(config: Mapping[str, Any]) -> None:
    tools = config.get("tools")
    for name, is_on in tools.items() if isinstance(tools, Mapping) else ():
        if not isinstance(is_on, bool):  # of other values "no" would be true
            raise OpenCodeConfigError(f"tools {name!r} is {is_on!r}: use True or False")


def _check_serialisable(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        try:
            json.dumps({key: value}, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise OpenCodeConfigError(f"config key {key!r} is not valid JSON: {error}") from None


def _check_combinations(cfg: RunConfig) -> None:
    if cfg.fork and not (cfg.session_id or cfg.continue_session):
        raise OpenCodeConfigError("fork=True has no session: set session_id or continue_session")
    if cfg.session_id and cfg.continue_session:
        raise OpenCodeConfigError("session_id and continue_session exclude each other: set one")
    for name in ("password", "username", "remote_dir"):
        if getattr(cfg, name) is not None and cfg.attach is None:
            raise OpenCodeConfigError(f"{name} is set without attach: it belongs to a server's URL")


def _check_words(cfg: RunConfig) -> None:
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        for word in value if isinstance(value, tuple) else (value,):
            text = os.fspath(word) if isinstance(word, os.PathLike) else word
            if not isinstance(text, str):
                continue
            if "\0" in text or not (text.strip() or field.name == "title"):
                shown = "" if field.name in SECRET_FIELDS else f" {text!r}"
                what = URL_LOGIN.sub("...", f"{field.name}{shown}")
                raise OpenCodeConfigError(f"{what} is blank or holds a NUL character")
    if cfg.model is not None and not all(part.strip() for part in cfg.model.partition("/")):
        raise OpenCodeConfigError(f"model {cfg.model!r} names no provider: use 'provider/model'")
    if cfg.log_level is not None and cfg.log_level not in LOG_LEVELS:
        raise OpenCodeConfigError(
            f"log_level {cfg.log_level!r}: use one of {', '.join(LOG_LEVELS)}"
        )


def _check_environment(env: Mapping[str, str]) -> None:
    for name, value in env.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise OpenCodeConfigError(f"extra_env[{name!r}]: names and values must be str")
        if not name or "=" in name or "\0" in name + value:
            shown = name.partition("=")[0]  # what follows may be a secret
            raise OpenCodeConfigError(f"extra_env[{shown!r}]: a name without '=', and no NUL bytes")
