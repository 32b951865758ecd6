"""Settings of a run, looked at before anything is started.

validate_config_for_run(RunConfig): types --> permissions, tools, MCP servers --> JSON
                                    --> combinations --> words

Each check raises OpenCodeConfigError, with the field's name, its value unless it may be secret, and
what to use. Knows what OpenCode would ignore, misread or hang on; starts nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from ._mcp import check_servers
from ._tool_names import check_names
from .config import SECRET_FIELDS, URL_LOGIN, RunConfig
from .errors import OpenCodeConfigError

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
