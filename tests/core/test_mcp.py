"""MCP servers: what a setting of them may hold, and what is said of one that does not work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from opencode_sync import OpenCodeConfigError, RunConfig, validate_config_for_run
from opencode_sync.core.mcp import check_servers, warnings_of

LOCAL = {"type": "local", "command": ["docs", "--stdio"]}
REMOTE = {"type": "remote", "url": "https://mcp.example"}


@pytest.mark.parametrize(
    "entry",
    [
        LOCAL,
        LOCAL | {"environment": {"A": "b"}, "cwd": "/", "enabled": True, "timeout": 5000},
        LOCAL | {"command": ("docs",)},
        REMOTE,
        REMOTE | {"headers": {"A": "b"}, "oauth": False, "enabled": False, "timeout": 1},
        REMOTE | {"oauth": {"clientId": "a", "scope": "b", "callbackPort": 1}},
        {"enabled": False},
    ],
    ids=["local", "all of local", "a tuple", "remote", "all of remote", "oauth", "a switch"],
)
def test_what_opencode_takes_passes(entry: Mapping[str, Any]) -> None:
    check_servers({"docs": entry})


REFUSED: list[tuple[Any, str]] = [
    ("docs", "mcp 'f' is of type str: use a mapping with 'type' and 'command' or 'url'"),
    ({}, "mcp 'f' has no 'type': use 'local'"),
    ({"url": "https://mcp.example"}, "mcp 'f' has no 'type': use 'remote'"),
    ({"type": "stdio", "command": ["x"]}, "a type that OpenCode does not know: use 'local'"),
    ({"type": "sse", "url": "https://x"}, "a type that OpenCode does not know: use 'remote'"),
    ({"type": "local"}, "mcp 'f' is 'local' and has no 'command': add it"),
    ({"type": "remote"}, "mcp 'f' is 'remote' and has no 'url': add it"),
    (LOCAL | {"env": {"A": "b"}}, "'env' is unknown to OpenCode: use 'environment', a mapping"),
    (LOCAL | {"args": ["a"]}, "'args' is unknown to OpenCode: use 'command', a list of strings"),
    (LOCAL | {"enviroment": {}}, "'enviroment' is unknown to OpenCode: use 'environment'"),
    (LOCAL | {"headers": {}}, "use 'type', 'enabled', 'timeout', 'command', 'environment'"),
    (LOCAL | {"command": "docs --stdio"}, "'command' is an unusable str: use a list of strings"),
    (LOCAL | {"command": []}, "'command' is an unusable list"),
    (LOCAL | {"command": ["docs", 1]}, "'command' is an unusable list"),
    (LOCAL | {"environment": {"A": 1}}, "'environment' is an unusable dict: use a mapping of"),
    (LOCAL | {"enabled": "no"}, "'enabled' is an unusable str: use True or False"),
    (LOCAL | {"timeout": 0}, "'timeout' is an unusable int: use a whole number of milliseconds"),
    (LOCAL | {"timeout": True}, "'timeout' is an unusable bool"),
    (REMOTE | {"oauth": True}, "'oauth' is an unusable bool: use a mapping, or False"),
    (REMOTE | {"oauth": {"client_id": "a"}}, "'client_id' is unknown to OpenCode: use 'clientId"),
    ({"enabled": "no"}, "'enabled' is an unusable str"),
]


@pytest.mark.parametrize("entry, words", REFUSED)
def test_what_opencode_would_drop_or_refuse_is_refused(entry: Any, words: str) -> None:
    with pytest.raises(OpenCodeConfigError) as caught:
        check_servers({"f": entry})

    assert words in str(caught.value)


@pytest.mark.parametrize("settings", [{"mcp": {"f": {}}}, {"config_overrides": {"mcp": {"f": {}}}}])
def test_servers_are_checked_wherever_they_are_set(settings: dict[str, Any]) -> None:
    with pytest.raises(OpenCodeConfigError, match="mcp 'f' has no 'type'"):
        validate_config_for_run(RunConfig(**settings))


def test_no_value_is_told_since_it_may_be_secret() -> None:
    entry = REMOTE | {"headers": {"Authorization": 12345678}}

    with pytest.raises(OpenCodeConfigError) as caught:
        check_servers({"f": entry})

    assert "'headers' is an unusable dict" in str(caught.value)
    assert "12345678" not in str(caught.value)


def test_each_server_that_is_wanted_and_does_not_work_is_told() -> None:
    states = {
        "works": {"status": "connected"},
        "off": {"status": "disabled"},
        "broken": {"status": "failed", "error": "Connection closed"},
        "locked": {"status": "needs_auth"},
        "odd": None,
    }

    broken, locked = warnings_of(states)

    assert broken == (
        "The model was without the tools of the MCP server 'broken' (failed: Connection closed)."
    )
    assert locked.endswith("'locked' (needs auth; run 'opencode mcp auth locked').")


@pytest.mark.parametrize("answer", [None, "no", {}])
def test_an_answer_of_another_shape_tells_nothing(answer: Any) -> None:
    assert warnings_of(answer) == []
