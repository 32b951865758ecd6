"""Names of permissions and tools: which are known, which are a slip, which have no effect.

OpenCode takes any name, and a rule for a name that nothing bears forbids nothing. Names of 1.17 to
1.18.33; a plugin or the user's own configuration may bring further tools, which nobody knows here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
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
