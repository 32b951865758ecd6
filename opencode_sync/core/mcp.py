"""MCP servers: what their settings may hold, and what a result says of one that does not work.

    RunConfig.mcp ----> check_servers()   before anything is started
    GET /mcp ---------> warnings_of()  --+
    OpenCode's log ---> unavailable()  --+--> sentences for RunResult.warnings

OpenCode silently drops a key that it does not know, and goes on without a server that does not
work. Written for the schema of OpenCode 1.18.33. Starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .errors import OpenCodeConfigError
from .reading import mapping

# --- settings ------------------------------------------------------------------------------------


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
_OF_BOTH: dict[str, _Key] = {
    "type": (_is_text, "'local' or 'remote'"),
    "enabled": (_is_flag, "True or False"),
    "timeout": (_is_count, "a whole number of milliseconds above 0"),
}
_KEYS: dict[str, dict[str, _Key]] = {
    "local": _OF_BOTH
    | {
        "command": (_is_command, "a list of strings, the program and its arguments"),
        "environment": (_is_texts, "a mapping of names to strings"),
        "cwd": (_is_text, "the path of a directory"),
    },
    "remote": _OF_BOTH
    | {
        "url": (_is_text, "a URL"),
        "headers": (_is_texts, "a mapping of names to strings"),
        "oauth": (_is_oauth, "a mapping, or False"),
    },
}
_OAUTH: dict[str, _Key] = {
    **dict.fromkeys(("clientId", "clientSecret", "scope", "redirectUri"), (_is_text, "a string")),
    "callbackPort": (_is_count, "a port"),
}
_NEEDED = {"local": "command", "remote": "url"}
# What other programs call it.
_MEANT = {
    "env": "environment",
    "args": "command",
    "disabled": "enabled",
    "stdio": "local",
    "http": "remote",
    "sse": "remote",
}


def check_servers(servers: Any) -> None:
    """Check the setting ``mcp``; an entry of ``enabled`` alone switches a server on or off.

    Raises:
        OpenCodeConfigError: Names the server, the key, and what to use.
    """
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
            _check_keys(where, entry, _OF_BOTH)
            continue
        kind = entry.get("type")
        if kind not in _KEYS:
            raise OpenCodeConfigError(f"{where} {_wrong_type(entry)}")
        _check_keys(where, entry, _KEYS[kind])
        if _NEEDED[kind] not in entry:
            raise OpenCodeConfigError(f"{where} is {kind!r} and has no {_NEEDED[kind]!r}: add it")
        if isinstance(oauth := entry.get("oauth"), Mapping):
            _check_keys(f"{where}, oauth", oauth, _OAUTH)


def _wrong_type(entry: Mapping[str, Any]) -> str:
    kind = entry.get("type")
    likely = _MEANT.get(str(kind)) or ("remote" if "url" in entry else "local")
    if kind is None:
        return f"has no 'type': use {likely!r}"
    return f"has a type that OpenCode does not know: use {likely!r}"


def _check_keys(where: str, entry: Mapping[str, Any], keys: Mapping[str, _Key]) -> None:
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

    meant = _MEANT.get(str(key))
    near = [meant] if meant in keys else get_close_matches(str(key), keys, n=1)
    if near:
        return f"{near[0]!r}, {keys[str(near[0])][1]}"
    return ", ".join(map(repr, keys))


# --- servers that do not work --------------------------------------------------------------------


def unavailable(name: str, status: str, error: str = "") -> str:
    """A sentence on a server whose tools the model did not get, or lost."""
    why = ": ".join(filter(None, (status.replace("_", " "), error)))
    advice = f"; run 'opencode mcp auth {name}'" if status == "needs_auth" else ""
    return f"The model was without the tools of the MCP server {name!r} ({why}{advice})."


def warnings_of(statuses: Any) -> list[str]:
    """One sentence for each server of ``GET /mcp`` that is switched on and does not work."""
    return [
        unavailable(str(name), str(state.get("status")), str(state.get("error") or ""))
        for name, state in mapping(statuses).items()
        if isinstance(state, Mapping) and state.get("status") not in ("connected", "disabled")
    ]
