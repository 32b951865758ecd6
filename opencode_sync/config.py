"""What one run is asked for: values.

Knows the names of settings and how they merge; _validation, which of them will do; neither knows of
flags, files or processes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .errors import OpenCodeConfigError

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
