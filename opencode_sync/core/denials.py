"""What a caller denies: names that have an effect, the rules, and the check that they hold.

    OpenCode's configuration --> check_names() --> a name without effect is refused
    RunConfig --+--> rules_of() ----> a session's own rules, on a server
                +--> denials_of() --> what preload.js enforces, in a process
                +--> Tripwire ------> broken(events): a denied tool has run

OpenCode puts the rules of an agent after those of the configuration, the last one that matches
counts, and the workspace can define agents. The rules of a session come after all of
these, so on a server they are set there; in a process per run, preload.js enforces them.
OpenCode takes any name, and a rule for a name that nothing has denies nothing. Measured with
OpenCode 1.18.33 (names: also 1.17). Starts nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from .errors import OpenCodeConfigError, OpenCodePermissionError
from .reading import OUTPUT_TOOL, mapping, part_of

if TYPE_CHECKING:
    from .config import RunConfig
    from .events import Event

Rule = Mapping[str, str]


# Permissions of OpenCode's configuration, most of which are tools too; permissions that only its
# code asks for; tools of 1.17.
_NAMES = frozenset({
    "bash", "doom_loop", "edit", "external_directory", "glob", "grep", "list", "lsp", "question",
    "read", "skill", "task", "todowrite", "webfetch", "websearch",
    OUTPUT_TOOL, "invalid", "plan_enter", "plan_exit", "workflow_tool_approval",
    "batch", "codesearch", "todoread",
})  # fmt: skip
_EDITING = ("write", "apply_patch", "multiedit", "patch")
_READING = ("list_mcp_resources", "list_mcp_resource_templates", "read_mcp_resource")
# Tools that ask for the permission of another one: a rule of their own name has no effect.
_PERMISSION_OF = {**dict.fromkeys(_EDITING, "edit"), **dict.fromkeys(_READING, "read")}
_OTHER_NAMES = {"shell": "bash", "subagent": "task", "fetch": "webfetch"}  # OpenCode 2's, others'
_AGENT_KEYS = ("agent", "mode")  # of OpenCode's configuration; the second is the older name

_SLIP = 0.75  # similarity by difflib of a misspelled name: "edti" for "edit"
_SLIP_CHARACTERS = 2  # that one may be longer than the other: "search" does not mean "websearch"


def places(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parts of *config* that hold permissions: itself, and each agent with a dotted prefix."""
    yield "", config
    for key in _AGENT_KEYS:
        for agent, settings in mapping(config.get(key)).items():
            yield f"{key}.{agent}.", mapping(settings)


# --- names ---------------------------------------------------------------------------------------


def check_names(config: Mapping[str, Any], others: Iterable[str] = ()) -> list[str]:
    """Check the names in ``permission`` and ``tools`` of *config*, its agents' included.

    Args:
        config: OpenCode's configuration.
        others: Names of further MCP servers that the run has.

    Returns:
        A sentence for each unknown name: a plugin or the user's own configuration may bring a tool
        of that name.

    Raises:
        OpenCodeConfigError: A name is nearly a known one, or OpenCode never asks for it.
    """
    named = [*mapping(config.get("mcp")), *others]
    servers = [re.sub(r"[^\w-]", "_", str(name), flags=re.ASCII) for name in named]
    warnings = []
    for prefix, place in places(config):
        for key in ("permission", "tools"):
            for name in map(str, mapping(place.get(key))):
                # A tool that is switched off becomes a rule for the permission it asks for.
                instead = _PERMISSION_OF.get(name) if key == "permission" else None
                if fault := _fault(name, servers, instead):
                    raise OpenCodeConfigError(f"{prefix}{key} {name!r} has no effect: {fault}")
                if not _is_known(name, servers):
                    warnings.append(
                        f"{prefix}{key} {name!r} is not a known permission or tool: it has no "
                        "effect unless a plugin or another configuration brings a tool of that "
                        "name."
                    )
    return warnings


def _fault(name: str, servers: Iterable[str], instead: str | None) -> str:
    """What is wrong with *name*, and what to use; "" where nothing is."""
    if instead:
        return f"OpenCode asks for {instead!r} when this tool is used: use that"
    if name in servers:
        return f"the tools of this MCP server begin with its name: use '{name}_*'"
    if _is_known(name, servers):
        return ""
    literal = re.split(r"[*?]", name, maxsplit=1)[0].rstrip("_-")
    meant = _OTHER_NAMES.get(name.lower()) or _near(name, literal)
    if meant and meant != literal:
        return f"there is no such permission or tool: use {meant!r}"
    return ""


def _is_known(name: str, servers: Iterable[str]) -> bool:
    if any(fnmatchcase(known, name.replace("[", "[[]")) for known in (*_NAMES, *_PERMISSION_OF)):
        return True
    return any(name.startswith(f"{server}_") for server in servers)


def _near(name: str, literal: str) -> str | None:
    """The known name that *name*, which begins with *literal*, misspells, or None."""
    known = {_folded(each): each for each in _NAMES}
    folded = _folded(literal)
    if folded in known:
        return known[folded]
    from difflib import get_close_matches

    # The tools of an MCP server are called SERVER_TOOL: "tasks_*" may be those of a server "tasks"
    # that another configuration has.
    is_of_a_server = re.search(r"\w_", name) is not None
    near = [
        each
        for each in known
        if abs(len(each) - len(folded)) <= _SLIP_CHARACTERS
        and ("_" in known[each] or not is_of_a_server)
    ]
    found = get_close_matches(folded, near, n=1, cutoff=_SLIP)
    return known[found[0]] if found else None


def _folded(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


# --- rules ---------------------------------------------------------------------------------------


def rules_of(cfg: RunConfig) -> list[Rule]:
    """*tools* and *permission* as rules; the last one that matches counts.

    If *config_overrides* denies something, its rules come first.
    """
    fields = _rules(cfg.tools, cfg.permission)
    overrides = cfg.config_overrides or {}
    below = _rules(overrides.get("tools"), overrides.get("permission"))
    return [*below, *fields] if _deny(below) else fields


def denials_of(cfg: RunConfig, *, is_server: bool = False) -> list[dict[str, Any]]:
    """What *cfg* denies: ``rules``, and the mark of the ``agent`` where they are one agent's.

    Args:
        is_server: Only what is denied to single agents: a session there has rules of its own.
    """
    found = _denied_to_agents(cfg.build_opencode_config_dict())
    denials: list[dict[str, Any]] = [{"agent": mark, "rules": rules} for _, _, mark, rules in found]
    rules = [] if is_server else rules_of(cfg)
    return [*denials, {"rules": rules}] if _deny(rules) else denials


def marked(config: Mapping[str, Any]) -> dict[str, Any]:
    """*config* with a mark among the permissions of each agent that is denied something.

    preload.js sees permissions without the agent's name, and knows the agent by its mark.
    """
    result = dict(config)
    for key, name, mark, _ in _denied_to_agents(config):
        agent = result[key][name]
        permission = agent.get("permission")
        own = {"*": permission} if isinstance(permission, str) else permission or {}
        agent = {**agent, "permission": {**own, mark: "deny"}}
        result[key] = {**result[key], name: agent}
    return result


def _denied_to_agents(config: Mapping[str, Any]) -> list[tuple[str, str, str, list[Rule]]]:
    """Key of the configuration, name, mark and rules of each agent that is denied something."""
    found = []
    for key in _AGENT_KEYS:
        for number, (name, agent) in enumerate(mapping(config.get(key)).items()):
            agent = mapping(agent)
            rules = _rules(agent.get("tools"), agent.get("permission"))
            if _deny(rules):
                found.append((key, name, f"opencode-sync-{key}-{number}", rules))
    return found


def _rules(tools: Any, permission: Any) -> list[Rule]:
    rules = []
    for tool, is_on in mapping(tools).items():
        rules.append(make_rule(_PERMISSION_OF.get(tool, tool), "*", "allow" if is_on else "deny"))
    permission = {"*": permission} if isinstance(permission, str) else permission
    for name, actions in mapping(permission).items():
        if isinstance(actions, Mapping):
            rules += [make_rule(name, _at_home(pattern), word) for pattern, word in actions.items()]
        else:
            rules.append(make_rule(name, "*", actions))
    return rules


def make_rule(permission: str, pattern: str, action: str) -> Rule:
    """One rule, in OpenCode's form."""
    return {"permission": permission, "pattern": pattern, "action": action}


def _deny(rules: Iterable[Rule]) -> bool:
    return any(rule["action"] == "deny" for rule in rules)


def _at_home(pattern: str) -> str:
    # OpenCode does so only for patterns of its configuration.
    for home in ("~", "$HOME"):
        if pattern == home or pattern.startswith(f"{home}/"):
            return os.path.expanduser("~") + pattern[len(home) :]
    return pattern


def matches(text: str, pattern: str) -> bool:
    """Whether *pattern* matches *text* for OpenCode; only ``*`` and ``?`` are special in it."""
    wild = re.escape(pattern.replace("\\", "/")).replace(r"\*", ".*").replace(r"\?", ".")
    if wild.endswith(r"\ .*"):
        wild = wild[: -len(r"\ .*")] + r"( .*)?"
    return re.fullmatch(wild, text.replace("\\", "/"), re.DOTALL) is not None


# --- whether they hold ---------------------------------------------------------------------------

# The argument of a tool that OpenCode matches a rule's pattern with, as it is.
_SUBJECT_OF = {"bash": "command", "webfetch": "url", "task": "subagent_type", "skill": "name"}
# One command of plain words, which OpenCode asks for unchanged. It does not ask for a change of
# directory, or for what its parser does not see as a command: an assignment, a declaration, a test.
_PLAIN_COMMAND = re.compile(r"(?P<name>[\w./+-]+)([ \t]+[\w./+=:,@%^~*?-]+)*")
_NOT_ASKED = frozenset({
    "cd", "chdir", "popd", "pushd", "push-location", "set-location",
    "declare", "export", "local", "readonly", "typeset", "unset", "unsetenv",
})  # fmt: skip


class Tripwire:
    """Notices a tool that has run though the caller denies it, whatever allowed it.

    It knows tools that are denied as a whole, and of some tools single commands and names. Other
    patterns are matched with something that is not in the events.
    """

    def __init__(self, cfg: RunConfig) -> None:
        rules = rules_of(cfg)
        self._rules = rules if _deny(rules) else []
        self._command = cfg.command

    def broken(self, events: Iterable[Event]) -> OpenCodePermissionError | None:
        """The error for the first of *events* in which a denied tool has run, or None."""
        for event in events if self._rules else ():
            part = part_of(event)
            if event.get("type") == "tool_use" and self._is_denied(part):
                tool = str(part["tool"])
                return OpenCodePermissionError(
                    f"tool {tool!r} is denied, and has run nevertheless; the run was stopped: see "
                    "result.tool_calls for what it has done",
                    tool=tool,
                )
        return None

    def _is_denied(self, part: Mapping[str, Any]) -> bool:
        tool, state = part.get("tool"), mapping(part.get("state"))
        if state.get("status") != "completed" or not isinstance(tool, str):
            return False
        given = mapping(state.get("input"))
        # Not tools: a call that came to nothing, an answer, and the sub-agent that the caller
        # started by the name of its command.
        if tool in ("invalid", OUTPUT_TOOL) or (
            tool == "task" and self._command and given.get("command") == self._command
        ):
            return False
        permission = _PERMISSION_OF.get(tool, tool)
        about = [rule for rule in self._rules if matches(permission, rule["permission"])]
        if about and about[-1]["pattern"] == "*":
            return about[-1]["action"] == "deny"
        subject = given.get(_SUBJECT_OF.get(tool, ""))
        if not isinstance(subject, str) or (tool == "bash" and not _is_asked(subject)):
            return False
        about = [rule for rule in about if matches(subject.strip(), rule["pattern"])]
        return bool(about) and about[-1]["action"] == "deny"


def _is_asked(command: str) -> bool:
    """Whether OpenCode is sure to have checked *command*, as a whole, against the rules."""
    plain = _PLAIN_COMMAND.fullmatch(command.strip())
    return plain is not None and plain["name"].lower() not in _NOT_ASKED
