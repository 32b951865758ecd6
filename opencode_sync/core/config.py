"""The settings of a run, and the checks of settings and arguments before anything is started.

    RunConfig, Job               values; what is None is left to OpenCode, or to the batch
    validate_config_for_run()    refuses what OpenCode would ignore, misread or hang on
    check_...(), checked_...()   arguments of clients, servers, batches and requests

Each check raises OpenCodeConfigError, which names the setting, its value unless it may be secret,
and what to use. Knows nothing of flags, variables and processes: see ``process.command``.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, fields, replace
from numbers import Number
from pathlib import Path
from types import NoneType
from typing import Any

from .denials import check_names, places
from .errors import OpenCodeConfigError
from .reading import mapping

# Fields that may hold passwords, tokens or keys: a repr shows "..." for them, and for the login in
# a URL.
SECRET_FIELDS = frozenset({"password", "extra_env", "mcp", "config_overrides"})
_URL_LOGIN = re.compile(r"(?<=://)[^/\s]*(?=@)")


@dataclass(frozen=True, repr=False)
class RunConfig:
    """Settings of a run. All are optional; what is None is left to OpenCode and its own config.

    Attributes:
        agent: Name of the agent. An unknown name is an error. So is a sub-agent in a process per
            run, where OpenCode would run its default agent instead; a server runs the sub-agent.
            A command that names an agent runs with that agent.
        model: ``"provider/model"``. With no model configured anywhere, the prompt goes to the
            vendor's free models.
        fallback_models: Models to ask, in this order, when *model* is out: the provider answers
            401, 402, 403 or 404, or does not know the model; it asks for a pause of more than 30 s;
            or it has refused a request twice, or broken the connection twice. The run then starts
            anew with the next one, unless a tool has run. All attempts count for the limits and the
            totals; the result's ``model`` says who answered, and ``tried`` who did not and why. A
            command whose template names a model has that one alone.
        files: Paths of files to attach to the prompt; relative to the workspace.
        title: Title of the session; None for the beginning of its prompt.
        command: Name of an OpenCode command; the prompt becomes its arguments. They reach the model
            unchanged: nothing in them is expanded or run. Refused are: a command that puts its
            arguments into a shell command; arguments that name files (``@file``) for a sub-agent;
            arguments with *pure*; and on a server that runs elsewhere, arguments with ``$``, ``@``
            or a backtick. In a process per run, arguments make OpenCode load a plugin, and so wait
            for its own npm installations: 12 seconds once in a workspace with a ``.opencode``
            directory, and a minute after a run that was stopped in the middle of one.
        continue_session: Continue this client's last session in the workspace.
        session_id: Continue this session.
        fork: Continue in a copy of the session, and leave the original unchanged.
        share: Share the session publicly.
        attach: URL of a running server that does the work.
        password, username: Credentials for *attach*.
        remote_dir: Directory on the server of *attach*.
        port: Accepted for compatibility; OpenCode's ``run`` ignores it.
        variant: The provider's name for a reasoning effort, such as ``"high"``. OpenCode ignores a
            variant that the model does not have; the result then has a warning. A process per run
            with *model* first asks OpenCode for the model's variants, which takes 2 s once.
        thinking: Give the model's reasoning as ``reasoning`` events.
        print_logs: Keep OpenCode's log lines in the result's ``stderr``.
        log_level: ``"DEBUG"``, ``"INFO"``, ``"WARN"`` or ``"ERROR"``. With *print_logs*, the last
            one hides the lines on MCP servers that do not work, and so their warnings.
        disable_autoupdate: Keep OpenCode from replacing its own binary.
        extra_env: Environment variables, over the inherited ones. Tools see all of them.
        permission: OpenCode's permission rules; each leaf is ``"allow"`` or ``"deny"``. What is
            denied here, in *tools* or in *config_overrides* stays denied whatever the configuration
            of the workspace and the user, their agents and commands allow, and for sub-agents too.
            If a denied tool runs nevertheless, the run ends with an OpenCodePermissionError. No
            rule covers what OpenCode itself runs for the workspace's configuration: its plugins,
            custom tools, MCP servers, formatters, language servers and shell, and the shell
            commands in the template of a *command*. ``inherit_project_config=False`` leaves that
            configuration out. Then, and with *pure*, a workspace with plugins in
            ``.opencode/plugin`` or ``.opencode/plugins`` is refused, since OpenCode 1.18.33 runs
            these files nevertheless. A name without effect is refused where it is nearly a known
            one, or a tool that asks for another permission (``"edit"`` stands for ``write`` and
            ``apply_patch``); for any other unknown name the result has a warning.
        mcp: MCP servers by name, in OpenCode's format; entries are checked. The result has a
            warning for each server that does not work.
        tools: Tools by name, True or False; names are checked like those of *permission*.
        config_overrides: Any other OpenCode configuration; the fields above are merged over it.
        auto: Answer permission questions with yes; explicit denials hold.
        pure: Run without plugins; a workspace with plugins of its own is refused.
        instructions: Paths, globs or URLs of instruction files, OpenCode's key of this name.
        inherit_user_config: Use the configuration, agents, skills and instructions of the user's
            home and environment. If False, tools see an empty ``XDG_CONFIG_HOME``.
        inherit_project_config: Use those found in the workspace. If False, skills in ``.claude``
            and ``.agents`` directories are left out, the user's too: OpenCode has one switch for
            both.
        keep_background: At the normal end of a run, leave processes alone that its tools left
            running. On an ``OpenCodeServer`` they run as long as its server.
        lean: Switch off what a single run rarely needs, to save about 2 % of the time and 10 % of
            the CPU: snapshots (and so OpenCode's undo), sharing, language servers, plugins that
            come with OpenCode, updates of the list of models, pruning, watching files, and late
            optimisation of JavaScript. *extra_env* and *config_overrides* can undo each.
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
    fallback_models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Copies, so that a caller who changes his mapping later does not change a frozen value.
        for name in ("extra_env", "permission", "mcp", "tools", "config_overrides"):
            try:
                object.__setattr__(self, name, _plain_copy(getattr(self, name)))
            except RecursionError:
                raise OpenCodeConfigError(
                    f"{name} is nested too deeply: does it contain itself?"
                ) from None
        for name in ("fallback_models", "files", "instructions"):
            value = () if (given := getattr(self, name)) is None else given
            # A lone path is one file, a lone name one model; iterated, it would be one a character.
            single = isinstance(value, (str, os.PathLike)) or not isinstance(value, Iterable)
            object.__setattr__(self, name, (value,) if single else tuple(value))

    def __repr__(self) -> str:
        settings = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                text = "..." if field.name in SECRET_FIELDS else _without_login(repr(value))
                settings.append(f"{field.name}={text}")
        return f"RunConfig({', '.join(settings)})"

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
        metadata: Anything that JSON can hold, such as a row's number: it comes back with the result
            or error, and stands in the checkpoint. numpy's and pandas' values become plain ones, a
            date its text, and what is missing None. The job is the same one whatever it says.
    """

    prompt: str
    workspace: str | Path | None = None
    run_cfg: RunConfig | None = None
    timeout_s: float | None = None
    key: str | None = None
    max_cost: float | None = None
    max_steps: int | None = None
    max_tokens: int | None = None
    metadata: Any = None


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """*over* laid on *under*: mappings merge key by key, everything else replaces."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merged(below, value)
        result[key] = value
    return result


def _plain_copy(value: Any) -> Any:
    """A deep copy with a dict for every mapping, since JSON takes no other kind."""
    if isinstance(value, Mapping):
        return {key: _plain_copy(below) for key, below in value.items()}
    return [_plain_copy(below) for below in value] if isinstance(value, (list, tuple)) else value


def _without_login(text: str) -> str:
    return _URL_LOGIN.sub("...", text)


# --- settings ------------------------------------------------------------------------------------

LOG_LEVELS = ("DEBUG", "INFO", "WARN", "ERROR")

# By a field's annotation: the types of its value, or of each entry of a tuple, and words for them.
_ACCEPTED: dict[str, tuple[tuple[type, ...], str]] = {
    "str | None": ((str, NoneType), "a str"),
    "bool": ((bool,), "True or False"),
    "bool | None": ((bool, NoneType), "True or False, or None"),
    "int | None": ((int, NoneType), "an int"),
    "tuple[str, ...]": ((str,), "strings"),
    "tuple[str | Path, ...]": ((str, os.PathLike), "paths"),
    "Mapping[str, str] | None": ((Mapping, NoneType), "a mapping"),
    "Mapping[str, Any] | None": ((Mapping, NoneType), "a mapping"),
    "str | Mapping[str, Any] | None": ((str, Mapping, NoneType), "a str or a mapping"),
}


def validate_config_for_run(
    cfg: RunConfig, *, may_ask: bool = False, mcp_servers: Iterable[str] = ()
) -> list[str]:
    """Check settings that OpenCode would ignore, misread or hang on.

    Args:
        may_ask: There is somebody to ask, as with a session.
        mcp_servers: Names of MCP servers that the run has beside those of *cfg*.

    Returns:
        A sentence for each name of a permission or tool that may have no effect.

    Raises:
        OpenCodeConfigError: Names the field, its value unless it may be secret, and what to use.
    """
    _check_types(cfg)
    config = cfg.build_opencode_config_dict()
    for prefix, place in places(config):
        if (permission := place.get("permission")) is not None:
            _check_actions(permission, may_ask, f"{prefix}permission" if prefix else "")
        for name, is_on in mapping(place.get("tools")).items():
            if not isinstance(is_on, bool):  # "no" would be true
                raise OpenCodeConfigError(
                    f"{prefix}tools {name!r} is {shown(is_on)}: use True or False"
                )
    warnings = check_names(config, mcp_servers)
    _check_servers(config.get("mcp"))
    for key, value in config.items():
        try:
            json.dumps({key: value}, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise OpenCodeConfigError(f"config key {key!r} is not valid JSON: {error}") from None
    _check_combinations(cfg)
    _check_words(cfg)
    _check_environment(cfg.extra_env or {})
    return warnings


def validate_permission_actions(permission: Any, *, may_ask: bool = False) -> None:
    """Check that every leaf of a permission setting is ``"allow"`` or ``"deny"``; None has no leaf.

    Args:
        may_ask: There is somebody to ask, so that ``"ask"`` is fine too.

    Raises:
        OpenCodeConfigError: Also a ValueError; names the leaf by its dotted path.
    """
    if permission is not None:
        _check_actions(permission, may_ask, "")


def _check_actions(value: Any, may_ask: bool, path: str) -> None:
    if isinstance(value, Mapping):
        for key, below in value.items():
            _check_actions(below, may_ask, f"{path}.{key}" if path else str(key))
        return
    if value in ("allow", "deny") or (value == "ask" and may_ask):
        return
    where = f"permission {path!r}" if path else "permission"
    if value == "ask":
        raise OpenCodeConfigError(
            f"{where} is 'ask', but a run has nobody to ask: "
            "use 'allow' or 'deny', or a session with on_permission"
        )
    raise OpenCodeConfigError(f"{where} is {value!r}: use 'allow' or 'deny'")


def _check_types(cfg: RunConfig) -> None:
    for field, value in _entries(cfg):
        accepted, words = _ACCEPTED[str(field.type)]
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            kind = type(value).__name__
            raise OpenCodeConfigError(f"{field.name} is of type {kind}: use {words}")


def _entries(cfg: RunConfig) -> Iterator[tuple[Field[Any], Any]]:
    """Each field with its value, or with each entry of a tuple."""
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        for entry in value if isinstance(value, tuple) else (value,):
            yield field, entry


def _check_combinations(cfg: RunConfig) -> None:
    if cfg.fork and not (cfg.session_id or cfg.continue_session):
        raise OpenCodeConfigError("fork=True has no session: set session_id or continue_session")
    if cfg.session_id and cfg.continue_session:
        raise OpenCodeConfigError("session_id and continue_session exclude each other: set one")
    if cfg.fallback_models and cfg.model is None:
        raise OpenCodeConfigError("fallback_models is set without model: name the first one there")
    for name in ("password", "username", "remote_dir"):
        if getattr(cfg, name) is not None and cfg.attach is None:
            raise OpenCodeConfigError(f"{name} is set without attach: it belongs to a server's URL")


def _check_words(cfg: RunConfig) -> None:
    for field, value in _entries(cfg):
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(text, str):
            continue
        is_blank = not text.strip() and field.name != "title"
        if is_blank or "\0" in text:
            what = "" if field.name in SECRET_FIELDS else f" {_without_login(repr(text))}"
            raise OpenCodeConfigError(f"{field.name}{what} is blank or holds a NUL character")
    models = [("model", cfg.model)] if cfg.model is not None else []
    models += [("fallback_models", model) for model in cfg.fallback_models]
    for name, model in models:
        if not all(part.strip() for part in model.partition("/")):
            raise OpenCodeConfigError(f"{name} {model!r} names no provider: use 'provider/model'")
    names = [model for _, model in models]
    if (twice := next((each for each in names if names.count(each) > 1), None)) is not None:
        raise OpenCodeConfigError(f"fallback_models: {twice!r} is there twice: name it once")
    if cfg.log_level is not None and cfg.log_level not in LOG_LEVELS:
        raise OpenCodeConfigError(
            f"log_level {cfg.log_level!r}: use one of {', '.join(LOG_LEVELS)}"
        )


def _check_environment(env: Mapping[str, str]) -> None:
    for name, value in env.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise OpenCodeConfigError(f"extra_env[{name!r}]: names and values must be str")
        if not name or "=" in name or "\0" in name + value:
            safe = name.partition("=")[0]  # what follows may be a secret
            raise OpenCodeConfigError(
                f"extra_env[{safe!r}]: use a name without '=', and no NUL bytes"
            )


# --- MCP servers: OpenCode 1.18.33 drops keys that it does not know -----------------------------


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_texts(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(text, str) for pair in value.items() for text in pair
    )


def _is_command(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_text, value))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_oauth(value: object) -> bool:
    return value is False or isinstance(value, Mapping)


# Key -> a check of its value, and words for a right one. A wrong one may be secret: never shown.
_Key = tuple[Callable[[object], bool], str]
_MCP_KEYS_OF_BOTH: dict[str, _Key] = {
    "type": (_is_text, "'local' or 'remote'"),
    "enabled": (_is_flag, "True or False"),
    "timeout": (_is_count, "a whole number of milliseconds above 0"),
}
_MCP_KEYS: dict[str, dict[str, _Key]] = {
    "local": _MCP_KEYS_OF_BOTH
    | {
        "command": (_is_command, "a list of strings, the program and its arguments"),
        "environment": (_is_texts, "a mapping of names to strings"),
        "cwd": (_is_text, "the path of a directory"),
    },
    "remote": _MCP_KEYS_OF_BOTH
    | {
        "url": (_is_text, "a URL"),
        "headers": (_is_texts, "a mapping of names to strings"),
        "oauth": (_is_oauth, "a mapping, or False"),
    },
}
_MCP_OAUTH: dict[str, _Key] = {
    **dict.fromkeys(("clientId", "clientSecret", "scope", "redirectUri"), (_is_text, "a string")),
    "callbackPort": (_is_count, "a port"),
}
_MCP_NEEDED = {"local": "command", "remote": "url"}
# What other programs call it.
_MCP_MEANT = {
    "env": "environment",
    "args": "command",
    "disabled": "enabled",
    "stdio": "local",
    "http": "remote",
    "sse": "remote",
}


def _check_servers(servers: Any) -> None:
    # An entry of "enabled" alone switches a server on or off.
    if servers is None:
        return
    if not isinstance(servers, Mapping):
        raise OpenCodeConfigError(f"mcp is of type {type(servers).__name__}: use a mapping")
    for name, entry in servers.items():
        where = f"mcp {name!r}"
        if not isinstance(entry, Mapping):
            raise OpenCodeConfigError(
                f"{where} is of type {type(entry).__name__}: use a mapping with 'type' and "
                "'command' or 'url'"
            )
        if list(entry) == ["enabled"]:
            _check_server_keys(where, entry, _MCP_KEYS_OF_BOTH)
            continue
        kind = entry.get("type")
        if kind not in _MCP_KEYS:
            raise OpenCodeConfigError(f"{where} {_wrong_server_type(entry)}")
        _check_server_keys(where, entry, _MCP_KEYS[kind])
        if _MCP_NEEDED[kind] not in entry:
            raise OpenCodeConfigError(
                f"{where} is {kind!r} and has no {_MCP_NEEDED[kind]!r}: add it"
            )
        if isinstance(oauth := entry.get("oauth"), Mapping):
            _check_server_keys(f"{where}, oauth", oauth, _MCP_OAUTH)


def _wrong_server_type(entry: Mapping[str, Any]) -> str:
    kind = entry.get("type")
    likely = _MCP_MEANT.get(str(kind)) or ("remote" if "url" in entry else "local")
    if kind is None:
        return f"has no 'type': use {likely!r}"
    return f"has a type that OpenCode does not know: use {likely!r}"


def _check_server_keys(where: str, entry: Mapping[str, Any], keys: Mapping[str, _Key]) -> None:
    for key, value in entry.items():
        if key not in keys:
            raise OpenCodeConfigError(
                f"{where}: {key!r} is unknown to OpenCode: use {_instead_of(key, keys)}"
            )
        is_right, words = keys[key]
        if not is_right(value):
            kind = type(value).__name__
            raise OpenCodeConfigError(f"{where}: {key!r} is an unusable {kind}: use {words}")


def _instead_of(key: object, keys: Mapping[str, _Key]) -> str:
    from difflib import get_close_matches

    meant = _MCP_MEANT.get(str(key))
    near = [meant] if meant in keys else get_close_matches(str(key), keys, n=1)
    if near:
        return f"{near[0]!r}, {keys[str(near[0])][1]}"
    return ", ".join(map(repr, keys))


# --- arguments -----------------------------------------------------------------------------------

NO_CURRENT_DIRECTORY = "the current directory has vanished: use an absolute path"


def plain_number(value: Any) -> Any:
    """A number of numpy's as one of Python's; anything else as it is."""
    is_foreign = isinstance(value, Number) and callable(getattr(value, "item", None))
    return value.item() if is_foreign else value


def checked_number(name: str, value: Any, *, optional: bool = False, positive: bool = False) -> Any:
    """*value*, a finite number: above 0 if *positive*, else 0 or more; or None if *optional*."""
    value = plain_number(value)
    if value is None and optional:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Not math.isfinite, which raises for an int of hundreds of digits.
    is_in_range = is_number and 0 <= value <= sys.float_info.max
    if not is_in_range or (positive and value == 0):
        bound = "above 0" if positive else "of 0 or more"
        none = ", or None for no limit" if optional else ""
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use a number {bound}{none}")
    return value


def checked_count(name: str, value: Any, least: int) -> Any:
    """*value*, a whole number of *least* or more, or None."""
    value = plain_number(value)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use {least} or more, or None")
    if value > sys.maxsize:  # which the standard library cannot count with
        raise OpenCodeConfigError(f"{name} is larger than {sys.maxsize}: use a smaller number")
    return value


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):  # "no" would be true
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use True or False")


def check_program(name: str, value: object) -> None:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use a path, or a name on PATH")


def checked_path(name: str, value: str | os.PathLike[str], kind: str = "a file") -> Path:
    """*value* as an absolute path with ``~`` expanded; nothing need exist there.

    Args:
        kind: What should be there, in words for the error.
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


def unencodable(error: UnicodeEncodeError) -> str:
    """Why the system cannot take a text, and what to do about it."""
    if sys.getfilesystemencoding() == "utf-8":
        return f"it cannot be encoded: {error}"
    return f"{error}: run Python with PYTHONUTF8=1, or in a UTF-8 locale"


def shown(value: object) -> str:
    """The repr of *value* if it is short, else the name of its type."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a stranger's repr, or an int of too many digits
        text = ""
    return text if 0 < len(text) <= 200 else type(value).__name__
