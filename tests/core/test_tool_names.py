"""Names of permissions and tools: a deny that nothing bears the name of is not taken for one."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeBinaryNotFoundError,
    OpenCodeConfigError,
    OpenCodeServer,
    RunConfig,
    validate_config_for_run,
)
from opencode_sync.core.mcp import check_names

MCP = {"my docs": {"type": "local", "command": ["docs"]}}


def names(*given: str, setting: str = "permission", **config: Any) -> list[str]:
    return check_names({setting: dict.fromkeys(given, "deny"), **config})


@pytest.mark.parametrize(
    "name",
    ["bash", "edit", "*", "ba*", "web*", "todo????", "external_directory", "plan_exit", "todoread"],
)
def test_a_known_name_passes_without_a_word(name: str) -> None:
    assert names(name) == []


@pytest.mark.parametrize("name", ["my_docs_search", "my_docs_*", "my_docs_"])
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
        ("subagent", "task"),
    ],
)
def test_a_slip_of_a_known_name_is_refused(name: str, meant: str) -> None:
    with pytest.raises(OpenCodeConfigError) as caught:
        validate_config_for_run(RunConfig(permission={name: "deny"}))

    assert str(caught.value) == (
        f"permission {name!r} has no effect: there is no such permission or tool: use {meant!r}"
    )


@pytest.mark.parametrize(
    "name", ["search", "deploy", "git_push", "jira_*", "todo", "tasks_*", "reads_get"]
)
def test_another_name_is_told(name: str) -> None:
    (warning,) = names(name)

    assert warning == (
        f"permission {name!r} is not a known permission or tool: it has no effect unless a plugin "
        "or another configuration brings a tool of that name."
    )


@pytest.mark.parametrize(
    "name, instead",
    [("write", "edit"), ("apply_patch", "edit"), ("read_mcp_resource", "read")],
)
def test_a_tool_that_asks_for_another_permission_is_refused(name: str, instead: str) -> None:
    with pytest.raises(OpenCodeConfigError, match=f"OpenCode asks for '{instead}' when"):
        names(name)


@pytest.mark.parametrize("name", ["write", "apply_patch", "read_mcp_resource", "bash"])
def test_a_tool_may_be_named_among_the_tools(name: str) -> None:
    assert names(name, setting="tools") == []


def test_the_name_of_an_mcp_server_alone_is_refused() -> None:
    with pytest.raises(OpenCodeConfigError, match=r"begin with its name: use 'my_docs_\*'"):
        names("my_docs", mcp=MCP)


@pytest.mark.parametrize("key", ["agent", "mode"])
def test_the_names_of_agents_are_looked_at_too(key: str) -> None:
    cfg = RunConfig(config_overrides={key: {"build": {"permission": {"bsh": "deny"}}}})

    with pytest.raises(OpenCodeConfigError, match=rf"{key}\.build\.permission 'bsh' has no effect"):
        validate_config_for_run(cfg)


@pytest.mark.parametrize("value", ["no", 0, None])
def test_a_tool_is_on_or_off(value: Any) -> None:
    with pytest.raises(OpenCodeConfigError, match=r"tools 'bash' is .*: use True or False"):
        validate_config_for_run(RunConfig(tools={"bash": value}))


def test_a_run_may_name_the_tools_of_its_server_s_mcp_servers() -> None:
    mcp = {"edits": {"type": "local", "command": ["edits"]}}
    server = OpenCodeServer("no-such-program", run_cfg=RunConfig(mcp=mcp))

    # The settings are taken, and so the program is looked for.
    with closing(server), pytest.raises(OpenCodeBinaryNotFoundError):
        server.run("Hi", run_cfg=RunConfig(permission={"edits_*": "deny"}))
