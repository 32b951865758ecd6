"""What a caller denies: the rules, where they are enforced, and what breaks them.

    RunConfig --+--> rules_of() ------> a session's rules, on a server
                +--> denials_of() ----> what preload.js enforces, in a process
                +--> Tripwire(cfg) ---> broken(events): a denied tool has run

OpenCode puts the rules of an agent after those of the configuration, the last one that matches
counts, and whoever wrote the workspace can write agents. The rules of a session come after all of
them, which is how a server is told; in a process of its own preload.js has the last word.
Measured with OpenCode 1.18.33. Starts nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .config import RunConfig
from .errors import OpenCodePermissionError
from .events import Event
from .mcp import AGENT_KEYS, PERMISSION_OF, mapping

Rule = Mapping[str, str]

OUTPUT_TOOL = "StructuredOutput"  # OpenCode gives it to the model where a prompt has a format

# Of these tools, a rule's pattern is held against this argument as it is.
_SUBJECT_OF = {"bash": "command", "webfetch": "url", "task": "subagent_type", "skill": "name"}
# One command of plain words, which OpenCode asks for as it stands. It does not ask for a change of
# directory, nor for what its parser takes for something else: an assignment, a declaration, a test.
_PLAIN_COMMAND = re.compile(r"(?P<name>[\w./+-]+)([ \t]+[\w./+=:,@%^~*?-]+)*")
_NOT_ASKED = frozenset({
    "cd", "chdir", "popd", "pushd", "push-location", "set-location",
    "declare", "export", "local", "readonly", "typeset", "unset", "unsetenv",
})  # fmt: skip


def rules_of(cfg: RunConfig) -> list[Rule]:
    """*tools* and *permission* as rules, of which the last one that matches counts.

    Those of *config_overrides* are among them where they deny something.
    """
    fields = _rules(cfg.tools or {}, cfg.permission)
    overrides = cfg.config_overrides or {}
    below = _rules(mapping(overrides.get("tools")), overrides.get("permission"))
    return [*(below if _deny(below) else ()), *fields]


def marked(config: Mapping[str, Any]) -> dict[str, Any]:
    """*config* with a mark in the permissions of each agent of which it denies something."""
    result = dict(config)
    for key, name, mark, _ in _denied_to_agents(config):
        agent = result[key][name]
        permission = agent.get("permission")
        own = {"*": permission} if isinstance(permission, str) else permission or {}
        agent = {**agent, "permission": {**own, mark: "deny"}}
        result[key] = {**result[key], name: agent}
    return result


def denials_of(cfg: RunConfig, *, is_server: bool = False) -> list[dict[str, Any]]:
    """What *cfg* denies: ``rules``, and the mark of the ``agent`` where they are one agent's.

    Args:
        is_server: Only what is denied to single agents: a session there has rules of its own.
    """
    found = _denied_to_agents(cfg.build_opencode_config_dict())
    denials: list[dict[str, Any]] = [{"agent": mark, "rules": rules} for _, _, mark, rules in found]
    rules = [] if is_server else rules_of(cfg)
    return [*denials, {"rules": rules}] if _deny(rules) else denials


def _denied_to_agents(config: Mapping[str, Any]) -> list[tuple[str, str, str, list[Rule]]]:
    """Key of the configuration, name, mark and rules of each agent that is denied something."""
    found = []
    for key in AGENT_KEYS:
        for number, (name, agent) in enumerate(mapping(config.get(key)).items()):
            agent = mapping(agent)
            rules = _rules(mapping(agent.get("tools")), agent.get("permission"))
            if _deny(rules):
                found.append((key, name, f"opencode-sync-{key}-{number}", rules))
    return found


def _rules(tools: Mapping[str, Any], permission: Any) -> list[Rule]:
    rules = []
    for tool, is_on in tools.items():
        rules.append(make_rule(PERMISSION_OF.get(tool, tool), "*", "allow" if is_on else "deny"))
    for name, actions in mapping(
        {"*": permission} if isinstance(permission, str) else permission
    ).items():
        if isinstance(actions, Mapping):
            rules += [make_rule(name, _at_home(pattern), word) for pattern, word in actions.items()]
        else:
            rules.append(make_rule(name, "*", actions))
    return rules


def make_rule(permission: str, pattern: str, action: str) -> Rule:
    """One rule, as OpenCode writes it."""
    return {"permission": permission, "pattern": pattern, "action": action}


def _deny(rules: Iterable[Rule]) -> bool:
    return any(rule["action"] == "deny" for rule in rules)


def _at_home(pattern: str) -> str:
    # OpenCode does so for patterns of its configuration only.
    for home in ("~", "$HOME"):
        if pattern == home or pattern.startswith(f"{home}/"):
            return os.path.expanduser("~") + pattern[len(home) :]
    return pattern


class Tripwire:
    """Tells when a tool has run that the caller denies, whatever let it run.

    It knows tools that are denied as a whole, and of some tools single commands and names; of
    others a pattern is held against something that an event does not tell.
    """

    def __init__(self, cfg: RunConfig) -> None:
        rules = rules_of(cfg)
        self._rules = rules if _deny(rules) else []
        self._command = cfg.command

    def broken(self, events: Iterable[Event]) -> OpenCodePermissionError | None:
        """The error for the first of *events* that tells of a denied tool's use."""
        for event in events if self._rules else ():
            part = mapping(event.get("part"))
            if event.get("type") != "tool_use" or not self._is_denied(part):
                continue
            tool = str(part["tool"])
            return OpenCodePermissionError(
                f"tool {tool!r} is denied, and has run all the same; the run was stopped: see "
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
        permission = PERMISSION_OF.get(tool, tool)
        about = [rule for rule in self._rules if matches(permission, rule["permission"])]
        if about and about[-1]["pattern"] == "*":
            return about[-1]["action"] == "deny"
        subject = given.get(_SUBJECT_OF.get(tool, ""))
        if not isinstance(subject, str) or (tool == "bash" and not _is_asked(subject)):
            return False
        about = [rule for rule in about if matches(subject.strip(), rule["pattern"])]
        return bool(about) and about[-1]["action"] == "deny"


def _is_asked(command: str) -> bool:
    """Whether OpenCode is sure to have held *command*, as a whole, against the rules."""
    plain = _PLAIN_COMMAND.fullmatch(command.strip())
    return plain is not None and plain["name"].lower() not in _NOT_ASKED


def matches(text: str, pattern: str) -> bool:
    """Whether OpenCode takes *text* for a case of *pattern*, in which only * and ? are special."""
    wild = re.escape(pattern.replace("\\", "/")).replace(r"\*", ".*").replace(r"\?", ".")
    if wild.endswith(r"\ .*"):
        wild = wild[: -len(r"\ .*")] + r"( .*)?"
    return re.fullmatch(wild, text.replace("\\", "/"), re.DOTALL) is not None
