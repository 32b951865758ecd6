"""MCP servers: what a setting of them may hold, and what became of one.

    RunConfig.mcp ----> check_servers()  before anything is started
    GET /mcp ---------> unavailable()    --+
    OpenCode's log ---> unavailable()    --+--> sentences for RunResult.warnings

OpenCode drops a key that it does not know without a word, and goes on without a server that does
not work. Its schema of 1.18.33; starts nothing.

Names of permissions and tools: which are known, which are a slip, which have no effect.

OpenCode takes any name, and a rule for a name that nothing bears forbids nothing. Names of 1.17 to
1.18.33; a plugin or the user's own configuration may bring further tools, which nobody knows here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from .errors import OpenCodeConfigError

# Permissions of OpenCode's configuration, most of which are tools too; what only its code asks for;
# tools of 1.17.
_NAMES = frozenset({
    "bash", "doom_loop", "edit", "external_directory", "glob", "grep", "list", "lsp", "question",
    "read", "skill", "task", "todowrite", "webfetch", "websearch",
    "StructuredOutput", "invalid", "plan_enter", "plan_exit", "workflow_tool_approval",
    "batch", "codesearch", "todoread",
})  # fmt: skip
_EDITING = ("write", "apply_patch", "multiedit", "patch")
_READING = ("list_mcp_resources", "list_mcp_resource_templates", "read_mcp_resource")
PERMISSION_OF = {**dict.fromkeys(_EDITING, "edit"), **dict.fromkeys(_READING, "read")}
"""Tools that ask for the permission of another one: a rule of their own name is never looked at."""

AGENT_KEYS = ("agent", "mode")
"""Keys of OpenCode's configuration that hold agents; the second is the older name of the first."""

_OTHER_NAMES = {"shell": "bash", "subagent": "task", "fetch": "webfetch"}  # OpenCode 2's, others'

_OF_A_SERVER = re.compile(r"\w_")  # the tools of an MCP server are called SERVER_TOOL
_SLIP = 0.75  # of difflib: "edti" for "edit"
_SLIP_CHARACTERS = 2  # that one may be longer than the other: "search" is not "websearch"


def check_names(config: Mapping[str, Any], others: Iterable[str] = ()) -> list[str]:
    """Check the names in ``permission`` and ``tools`` of *config*, its agents' included.

    Args:
        config: OpenCode's configuration.
        others: Names of further MCP servers that the run has.

    Returns:
        A sentence for each name that is not known here.

    Raises:
        OpenCodeConfigError: A name is nearly a known one, or OpenCode never asks for it.
    """
    servers = [*mapping(config.get("mcp")), *others]
    tools = [re.sub(r"[^\w-]", "_", str(name), flags=re.ASCII) for name in servers]
    warnings = []
    for setting, name in _names_in(config):
        if fault := _fault(setting, name, tools):
            raise OpenCodeConfigError(f"{setting} {name!r} has no effect: {fault}")
        if not _is_known(name, tools):
            warnings.append(
                f"{setting} {name!r} is not a known permission or tool: it has no effect "
                "unless a plugin or another configuration brings a tool of that name."
            )
    return warnings


def _names_in(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each name, and the setting that it stands in."""
    places = {"": config}
    for key in AGENT_KEYS:
        for agent, settings in mapping(config.get(key)).items():
            places[f"{key}.{agent}."] = mapping(settings)
    for prefix, place in places.items():
        for setting in ("permission", "tools"):
            yield from ((prefix + setting, str(name)) for name in mapping(place.get(setting)))


def _fault(setting: str, name: str, servers: Iterable[str]) -> str:
    """What is wrong with *name*, and what to use; "" where nothing is."""
    instead = PERMISSION_OF.get(name)
    if instead and setting.endswith("permission"):  # "tools" become rules of that permission
        return f"OpenCode asks for {instead!r} when this tool is used: use that"
    if name in servers:
        return f"the tools of this MCP server begin with its name: use '{name}_*'"
    if _is_known(name, servers):
        return ""
    literal = re.split(r"[*?]", name, maxsplit=1)[0].rstrip("_-")
    if (meant := _OTHER_NAMES.get(name.lower()) or _near(name, literal)) and meant != literal:
        return f"there is no such permission or tool: use {meant!r}"
    return ""


def _is_known(name: str, servers: Iterable[str]) -> bool:
    if any(fnmatchcase(known, name.replace("[", "[[]")) for known in (*_NAMES, *PERMISSION_OF)):
        return True
    return any(name.startswith(f"{server}_") for server in servers)


def _near(name: str, literal: str) -> str | None:
    """The known name that *name*, which begins with *literal*, is a slip of, or None."""
    known = {_folded(each): each for each in _NAMES}
    folded = _folded(literal)
    if folded in known:
        return known[folded]
    from difflib import get_close_matches

    near = [
        each
        for each in known
        if abs(len(each) - len(folded)) <= _SLIP_CHARACTERS
        # "tasks_*" is of an MCP server "tasks", which another configuration may have.
        and ("_" in known[each] or not _OF_A_SERVER.search(name))
    ]
    found = get_close_matches(folded, near, n=1, cutoff=_SLIP)
    return known[found[0]] if found else None


def _folded(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def mapping(value: Any) -> Mapping[str, Any]:
    """*value*, or an empty mapping where it is something else."""
    return value if isinstance(value, Mapping) else {}


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


# Key -> whether its value will do, and what will. Values may be secret, and are not shown.
_Key = tuple[Callable[[object], bool], str]
_EITHER: dict[str, _Key] = {
    "type": (_is_text, "'local' or 'remote'"),
    "enabled": (_is_flag, "True or False"),
    "timeout": (_is_count, "a whole number of milliseconds above 0"),
}
_KEYS: dict[str, dict[str, _Key]] = {
    "local": _EITHER
    | {
        "command": (_is_command, "a list of strings, the program and its arguments"),
        "environment": (_is_texts, "a mapping of names to strings"),
        "cwd": (_is_text, "the path of a directory"),
    },
    "remote": _EITHER
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
            _check_keys(where, entry, _EITHER)
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
            raise OpenCodeConfigError(f"{where}: {key!r} is unknown to OpenCode: {_use(key, keys)}")
        will_do, words = keys[key]
        if not will_do(value):
            kind = type(value).__name__
            raise OpenCodeConfigError(f"{where}: {key!r} is an unusable {kind}: use {words}")


def _use(key: object, keys: Mapping[str, _Key]) -> str:
    from difflib import get_close_matches

    meant = _MEANT.get(str(key))
    near = [meant] if meant in keys else get_close_matches(str(key), keys, n=1)
    if near:
        return f"use {near[0]!r}, {keys[str(near[0])][1]}"
    return f"use {', '.join(map(repr, keys))}"


# --- what became of them -------------------------------------------------------------------------


def unavailable(name: str, status: str, error: str = "") -> str:
    """The sentence for a server whose tools the model was not offered, or not any more."""
    why = ": ".join(filter(None, (status.replace("_", " "), error)))
    advice = f"; run 'opencode mcp auth {name}'" if status == "needs_auth" else ""
    return f"The model was without the tools of the MCP server {name!r} ({why}{advice})."


def warnings_of(statuses: Any) -> list[str]:
    """One sentence for each server of ``GET /mcp`` that is wanted and does not work."""
    found = statuses.items() if isinstance(statuses, Mapping) else ()
    return [
        unavailable(str(name), str(state.get("status")), str(state.get("error") or ""))
        for name, state in found
        if isinstance(state, Mapping) and state.get("status") not in ("connected", "disabled")
    ]
