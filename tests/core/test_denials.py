"""What a caller denies: names that have an effect, the rules, and the check that they hold."""

from __future__ import annotations

from contextlib import closing
from typing import Any, cast

import pytest

from opencode_sync import (
    OpenCodeBinaryNotFoundError,
    OpenCodeConfigError,
    OpenCodePermissionError,
    OpenCodeServer,
    RunConfig,
    validate_config_for_run,
)
from opencode_sync.core.denials import Tripwire, check_names, denials_of, marked, rules_of
from opencode_sync.core.events import Event
from tests.scripted import ScriptedRunner


def rule(permission: str, action: str, pattern: str = "*") -> dict[str, str]:
    return {"permission": permission, "pattern": pattern, "action": action}


def used(tool: str, /, status: str = "completed", **given: Any) -> Event:
    part = {"tool": tool, "state": {"status": status, "input": given, "output": ""}}
    return cast(Event, {"type": "tool_use", "part": part})


# --- names ---------------------------------------------------------------------------------------

MCP = {"my docs": {"type": "local", "command": ["docs"]}}


def names(*given: str, setting: str = "permission", **config: Any) -> list[str]:
    return check_names({setting: dict.fromkeys(given, "deny"), **config})


@pytest.mark.parametrize("name", ["bash", "*", "ba*", "todo????", "plan_exit", "todoread"])
def test_a_known_name_passes_without_a_word(name: str) -> None:
    assert names(name) == []


@pytest.mark.parametrize("name", ["my_docs_search", "my_docs_*"])
def test_the_tools_of_an_mcp_server_are_known_by_its_name(name: str) -> None:
    assert names(name, mcp=MCP) == []
    assert check_names({"permission": {name: "deny"}}, ["my docs"]) == []


@pytest.mark.parametrize(
    "name, meant",
    [
        ("bsh", "bash"),
        ("Bash", "bash"),
        ("edti", "edit"),
        ("web_fetch", "webfetch"),
        ("reads", "read"),
        ("bsh*", "bash"),
        ("externaldirectory", "external_directory"),
        ("shell", "bash"),
    ],
)
def test_a_misspelled_name_is_refused(name: str, meant: str) -> None:
    with pytest.raises(OpenCodeConfigError) as caught:
        validate_config_for_run(RunConfig(permission={name: "deny"}))

    assert str(caught.value) == (
        f"permission {name!r} has no effect: there is no such permission or tool: use {meant!r}"
    )


@pytest.mark.parametrize("name", ["search", "deploy", "git_push", "jira_*", "todo", "reads_get"])
def test_for_any_other_name_there_is_a_warning(name: str) -> None:
    (warning,) = names(name)

    assert warning == (
        f"permission {name!r} is not a known permission or tool: it has no effect unless a plugin "
        "or another configuration brings a tool of that name."
    )


@pytest.mark.parametrize("name, instead", [("write", "edit"), ("read_mcp_resource", "read")])
def test_a_tool_that_asks_for_another_permission_is_one_among_tools_alone(
    name: str, instead: str
) -> None:
    assert names(name, setting="tools") == []
    with pytest.raises(OpenCodeConfigError, match=f"OpenCode asks for '{instead}' when"):
        names(name)


def test_the_name_of_an_mcp_server_alone_is_refused() -> None:
    with pytest.raises(OpenCodeConfigError, match=r"begin with its name: use 'my_docs_\*'"):
        names("my_docs", mcp=MCP)


@pytest.mark.parametrize("key", ["agent", "mode"])
def test_the_names_of_agents_are_checked_too(key: str) -> None:
    cfg = RunConfig(config_overrides={key: {"build": {"permission": {"bsh": "deny"}}}})

    with pytest.raises(OpenCodeConfigError, match=rf"{key}\.build\.permission 'bsh' has no effect"):
        validate_config_for_run(cfg)


def test_a_run_may_name_the_tools_of_its_server_s_mcp_servers() -> None:
    mcp = {"edits": {"type": "local", "command": ["edits"]}}
    server = OpenCodeServer("no-such-program", run_cfg=RunConfig(mcp=mcp))

    # The settings are taken, and so the program is looked for.
    with closing(server), pytest.raises(OpenCodeBinaryNotFoundError):
        server.run("Hi", run_cfg=RunConfig(permission={"edits_*": "deny"}))


# --- rules ---------------------------------------------------------------------------------------


def test_what_the_configuration_denies_comes_before_what_the_fields_say() -> None:
    overrides = {"permission": {"bash": "deny"}, "tools": {"write": False}}
    cfg = RunConfig(config_overrides=overrides, permission={"bash": {"ls *": "allow"}})

    assert rules_of(cfg) == [
        rule("edit", "deny"),
        rule("bash", "deny"),
        rule("bash", "allow", "ls *"),
    ]


def test_a_configuration_that_denies_nothing_makes_no_rules() -> None:
    assert rules_of(RunConfig(config_overrides={"permission": {"bash": "allow"}})) == []


def test_rules_that_deny_something_are_enforced_as_a_whole() -> None:
    cfg = RunConfig(permission={"bash": {"*": "deny", "ls *": "allow"}})

    assert denials_of(cfg) == [{"rules": [rule("bash", "deny"), rule("bash", "allow", "ls *")]}]


def test_settings_that_allow_have_no_denials() -> None:
    assert denials_of(RunConfig(permission="allow", tools={"bash": True})) == []


def test_what_an_agent_is_denied_is_denied_to_it_alone() -> None:
    agents = {
        "free": {"permission": {"bash": "allow"}},
        "reader": {"permission": {"bash": "deny"}, "tools": {"write": False}},
        "mute": {"permission": "deny"},
    }
    cfg = RunConfig(config_overrides={"agent": agents})

    reader, mute = denials_of(cfg)

    assert reader["rules"] == [rule("edit", "deny"), rule("bash", "deny")]
    assert mute["rules"] == [rule("*", "deny")]
    told = marked(cfg.build_opencode_config_dict())["agent"]
    permissions = {name: agent["permission"] for name, agent in told.items()}
    assert permissions == {
        "free": {"bash": "allow"},
        "reader": {"bash": "deny", reader["agent"]: "deny"},
        "mute": {"*": "deny", mute["agent"]: "deny"},
    }


def test_a_server_is_told_only_what_agents_are_denied() -> None:
    agents = {"reader": {"permission": {"bash": "deny"}}}
    cfg = RunConfig(permission="deny", config_overrides={"agent": agents})

    [told] = denials_of(cfg, is_server=True)

    assert told["rules"] == [rule("bash", "deny")]


# --- whether they hold ---------------------------------------------------------------------------

ONLY_GIT = {"bash": {"*": "deny", "git status": "allow"}}
NO_RM = {"bash": {"*": "allow", "rm *": "deny"}}


DENIED: dict[str, tuple[Any, Event]] = {
    "all": ("deny", used("read")),
    "a tool": ({"bash": "deny"}, used("bash", command="ls")),
    "all but one": ({"*": "deny", "read": "allow"}, used("server_tool")),
    "edit": ({"edit": "deny"}, used("apply_patch")),
    "wildcard": ({"server_*": "deny"}, used("server_tool")),
    "command": (NO_RM, used("bash", command="rm -r x")),
    "bare command": (NO_RM, used("bash", command="rm")),
    "name": ({"task": {"general": "deny"}}, used("task", subagent_type="general")),
}


@pytest.mark.parametrize("permission, event", DENIED.values(), ids=DENIED)
def test_a_denied_tool_that_has_run_is_noticed(permission: Any, event: Event) -> None:
    found = Tripwire(RunConfig(permission=permission)).broken([event])

    assert found is not None
    assert found.tool == event["part"]["tool"]


NOT_DENIED: dict[str, tuple[Any, Event]] = {
    "nothing denied": ("allow", used("bash", command="ls")),
    "a tool that has failed": ("deny", used("bash", status="error", command="ls")),
    "a call of a tool that is not offered": ("deny", used("invalid", tool="bash")),
    "an answer": ("deny", used("StructuredOutput")),
    "another tool": ({"bash": "deny"}, used("read")),
    "an exception": ({"*": "deny", "read": "allow"}, used("read")),
    "a command that is an exception": (ONLY_GIT, used("bash", command="git status")),
    "a command that only looks like it": (NO_RM, used("bash", command="echo 'rm x'")),
    "a change of directory": (ONLY_GIT, used("bash", command="cd src")),
    "a negated command": (ONLY_GIT, used("bash", command="! git status")),
    "a command with a comment": (ONLY_GIT, used("bash", command="git status # short")),
    "an assignment": (ONLY_GIT, used("bash", command="PAGER=cat")),
    "a declaration": (ONLY_GIT, used("bash", command="export PAGER=cat")),
    "a test": (ONLY_GIT, used("bash", command="[[ -d src ]]")),
    "a file": ({"read": {"*.env": "deny"}}, used("read", filePath="/a/b.py")),
}


@pytest.mark.parametrize("permission, event", NOT_DENIED.values(), ids=NOT_DENIED)
def test_what_is_not_denied_breaks_nothing(permission: Any, event: Event) -> None:
    assert Tripwire(RunConfig(permission=permission)).broken([event]) is None


def test_the_sub_agent_of_the_command_that_the_caller_named_is_not_denied() -> None:
    tripwire = Tripwire(RunConfig(permission="deny", command="review"))

    assert tripwire.broken([used("task", command="review")]) is None
    assert tripwire.broken([used("task", command="another")]) is not None


def test_a_denied_tool_that_runs_ends_the_run_with_an_error_that_has_its_result() -> None:
    runner = ScriptedRunner(run_cfg=RunConfig(permission={"bash": "deny"}))

    with pytest.raises(OpenCodePermissionError, match="'bash' is denied, and has run") as caught:
        runner.run("work")

    assert caught.value.tool == "bash"
    assert caught.value.result is not None
    assert caught.value.result.status == "error"
    assert len(caught.value.result.tool_calls) == 1
