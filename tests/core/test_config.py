"""RunConfig and Job: values, checked before anything is started."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from opencode_sync import (
    Job,
    OpenCodeConfigError,
    RunConfig,
    validate_config_for_run,
    validate_permission_actions,
)


def full_config() -> RunConfig:
    return RunConfig(
        agent="build",
        model="provider/model",
        files=("a.txt", Path("b.txt")),
        session_id="ses_1",
        fork=True,
        attach="http://user:secret-login@host:4096/x",
        password="secret-password",
        extra_env={"TOKEN": "secret-token"},
        permission={"*": "deny", "edit": {"*.md": "allow"}},
        mcp={
            "github": {
                "type": "remote",
                "url": "https://mcp.example",
                "headers": {"Authorization": "secret-header"},
            }
        },
        tools={"webfetch": False},
        config_overrides={"provider": {"p": {"options": {"apiKey": "secret-key"}}}},
        instructions=("docs/*.md",),
    )


# --- a value -------------------------------------------------------------------------------------


def test_configs_of_the_same_settings_are_equal() -> None:
    assert pickle.loads(pickle.dumps(full_config())) == full_config()
    assert full_config() != full_config().replace(fork=False)
    assert RunConfig() == RunConfig(files=(), extra_env=None)


def test_replace_gives_a_changed_copy() -> None:
    cfg = RunConfig(model="a/b", title="T")

    changed = cfg.replace(model="c/d")

    assert changed == RunConfig(model="c/d", title="T")
    assert cfg == RunConfig(model="a/b", title="T")
    with pytest.raises(TypeError, match="modle"):
        cfg.replace(modle="a/b")


def test_a_config_is_changed_neither_by_what_it_is_made_from_nor_by_what_it_gives() -> None:
    permission, overrides = {"edit": {"*.md": "allow"}}, {"a": {"b": [1]}}
    cfg = RunConfig(permission=permission, config_overrides=overrides)
    given = cfg.build_opencode_config_dict()

    permission["edit"]["*.md"] = given["permission"]["edit"]["*.md"] = "deny"
    overrides["a"]["b"].append(2)
    given["a"]["b"].append(2)

    assert cfg.permission == {"edit": {"*.md": "allow"}}
    assert cfg.config_overrides == {"a": {"b": [1]}}


def test_mappings_of_any_kind_become_json() -> None:
    inner: Mapping[str, Any] = MappingProxyType({"*.md": "allow"})
    cfg = RunConfig(permission=MappingProxyType({"edit": inner}), mcp={"a": [inner, (1, 2)]})

    validate_config_for_run(cfg.replace(mcp=None))
    content = cfg.opencode_config_content_json()

    assert json.loads(content or "") == {
        "permission": {"edit": {"*.md": "allow"}},
        "mcp": {"a": [{"*.md": "allow"}, [1, 2]]},
    }


def test_a_mapping_that_contains_itself_is_refused() -> None:
    overrides: dict[str, Any] = {}
    overrides["a"] = overrides

    with pytest.raises(OpenCodeConfigError, match="config_overrides is nested too deeply"):
        RunConfig(config_overrides=overrides)


def test_a_lone_path_is_one_file_and_any_iterable_will_do() -> None:
    assert RunConfig(files="notes.txt").files == ("notes.txt",)  # type: ignore[arg-type]
    assert RunConfig(files=Path("a")).files == (Path("a"),)  # type: ignore[arg-type]
    assert RunConfig(files=iter(["a", "b"])).files == ("a", "b")  # type: ignore[arg-type]
    assert RunConfig(instructions=["a.md"]).instructions == ("a.md",)  # type: ignore[arg-type]
    assert RunConfig(files=None).files == ()  # type: ignore[arg-type]


# --- its repr ------------------------------------------------------------------------------------


def test_the_repr_shows_what_differs_from_the_defaults() -> None:
    cfg = RunConfig(model="a/b", thinking=True, disable_autoupdate=False)

    assert repr(cfg) == "RunConfig(model='a/b', thinking=True, disable_autoupdate=False)"
    assert repr(RunConfig()) == "RunConfig()"


def test_the_repr_hides_secrets() -> None:
    text = repr(Job("Explain", run_cfg=full_config()))

    assert "secret" not in text
    assert "password=..." in text
    assert "attach='http://...@host:4096/x'" in text
    assert "model='provider/model'" in text


# --- what OpenCode gets --------------------------------------------------------------------------


def test_nothing_set_is_no_configuration() -> None:
    assert RunConfig().build_opencode_config_dict() == {}
    assert RunConfig().opencode_config_content_json() is None


def test_the_fields_are_merged_over_config_overrides() -> None:
    cfg = RunConfig(
        config_overrides={
            "theme": "dark",
            "permission": {"bash": "deny", "edit": "deny"},
            "mcp": {"a": {"command": ["x"], "enabled": True}},
            "tools": {"read": True},
            "instructions": ["a.md"],
        },
        permission={"edit": {"*.md": "allow"}},
        mcp={"a": {"enabled": False}, "b": {}},
        tools={"webfetch": False},
        instructions=("b.md",),
    )

    assert cfg.build_opencode_config_dict() == {
        "theme": "dark",
        "permission": {"bash": "deny", "edit": {"*.md": "allow"}},
        "mcp": {"a": {"command": ["x"], "enabled": False}, "b": {}},
        "tools": {"read": True, "webfetch": False},
        "instructions": ["b.md"],
    }


def test_an_empty_mapping_is_a_setting_and_the_json_keeps_characters_as_they_are() -> None:
    cfg = RunConfig(permission={}, config_overrides={"username": "Åsa 😀"})

    assert cfg.opencode_config_content_json() == '{"username": "Åsa 😀", "permission": {}}'


# --- permissions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "permission", [None, "deny", {}, {"edit": {"*": "deny", "a/*.py": "allow"}}], ids=repr
)
def test_allow_and_deny_are_permissions_at_any_depth(permission: Any) -> None:
    validate_permission_actions(permission)
    validate_config_for_run(RunConfig(permission=permission))


@pytest.mark.parametrize(
    "permission, message",
    [
        ({"edit": {"*.py": "ask"}}, "permission 'edit.*.py' is 'ask', but a run has nobody to ask"),
        ("ask", "permission is 'ask', but a run has nobody to ask"),
        ({"bash": "perhaps"}, "permission 'bash' is 'perhaps': use 'allow' or 'deny'"),
        ({"bash": None}, "permission 'bash' is None: use 'allow' or 'deny'"),
        ({"edit": {"*": ["allow"]}}, "permission 'edit.*' is ['allow']: use 'allow' or 'deny'"),
        ("yes", "permission is 'yes': use 'allow' or 'deny'"),
    ],
)
def test_any_other_permission_is_refused_with_its_path(permission: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        validate_permission_actions(permission)

    assert isinstance(raised.value, OpenCodeConfigError)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    "config, path",
    [
        ({"permission": {"edit": "ask"}}, "'edit'"),
        ({"agent": {"build": {"permission": {"bash": "ask"}}}}, "'agent.build.permission.bash'"),
        ({"mode": {"plan": {"permission": "ask"}}}, "'mode.plan.permission'"),
    ],
)
def test_ask_is_refused_in_config_overrides_too(config: dict[str, Any], path: str) -> None:
    cfg = RunConfig(config_overrides=config)

    with pytest.raises(OpenCodeConfigError, match=f"permission {path} is 'ask'"):
        validate_config_for_run(cfg)
    validate_config_for_run(cfg, may_ask=True)


@pytest.mark.parametrize("value", ["no", 0, None])
def test_a_tool_is_on_or_off(value: Any) -> None:
    agents = {"agent": {"build": {"tools": {"bash": value}}}}

    with pytest.raises(OpenCodeConfigError, match=r"^tools 'bash' is .*: use True or False"):
        validate_config_for_run(RunConfig(tools={"bash": value}))
    with pytest.raises(OpenCodeConfigError, match=r"^agent\.build\.tools 'bash' is"):
        validate_config_for_run(RunConfig(config_overrides=agents))


# --- everything else that is refused -------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg",
    [
        full_config(),
        RunConfig(title="", continue_session=True, fork=True, extra_env={"EMPTY": ""}),
        RunConfig(model="openrouter/vendor/model", log_level="DEBUG", print_logs=True),
        RunConfig(config_overrides={"agent": None, "mode": []}, port=4096, share=False),
    ],
    ids=repr,
)
def test_settings_that_go_together_pass(cfg: RunConfig) -> None:
    validate_config_for_run(cfg)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fork without a session": ({"fork": True}, "fork=True has no session"),
    "two sessions": (
        {"session_id": "s", "continue_session": True},
        "session_id and continue_session exclude each other",
    ),
    "password without attach": ({"password": "p"}, "password is set without attach"),
    "model without provider": ({"model": "gpt"}, "model 'gpt' names no provider"),
    "log_level": ({"log_level": "debug"}, "log_level 'debug': use one of DEBUG, INFO"),
    "blank agent": ({"agent": " "}, "agent ' ' is blank"),
    "blank file": ({"files": ("a", "")}, "files '' is blank"),
    "NUL in file": ({"files": (Path("a\0b"),)}, "files 'a\\x00b' is blank or holds a NUL"),
    "agent of a type": ({"agent": 3}, "agent is of type int: use a str"),
    "files as bytes": ({"files": b"ab"}, "files is of type int: use paths"),
    "instructions of a type": ({"instructions": (Path("a"),)}, "instructions is of type"),
    "switch as a word": ({"auto": "false"}, "auto is of type str: use True or False"),
    "optional switch": ({"thinking": 1}, "thinking is of type int: use True or False, or None"),
    "port as bool": ({"port": True}, "port is of type bool: use an int"),
    "permission of a type": ({"permission": ["bash"]}, "permission is of type list"),
    "extra_env of a type": ({"extra_env": [("A", "b")]}, "extra_env is of type list"),
    "variable of a type": ({"extra_env": {"A": 1}}, "extra_env['A']: names and values must be str"),
    "variable without a name": ({"extra_env": {"": "x"}}, "extra_env['']: use a name without '='"),
    "variable with =": ({"extra_env": {"A=B": "x"}}, "extra_env['A']: use a name without '='"),
    "variable with NUL": ({"extra_env": {"A": "\0"}}, "extra_env['A']: use a name without '='"),
    "no JSON": ({"config_overrides": {"x": {1, 2}}}, "config key 'x' is not valid JSON"),
    "no JSON key": ({"config_overrides": {(1, 2): "x"}}, "config key (1, 2) is not valid JSON"),
    "no JSON number": ({"config_overrides": {"x": math.nan}}, "config key 'x' is not valid JSON"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED.keys())
def test_a_setting_that_opencode_would_misread_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    cfg = RunConfig(**changes)

    with pytest.raises(OpenCodeConfigError) as raised:
        validate_config_for_run(cfg)

    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    "changes",
    [
        {"password": "secret\0", "attach": "http://host"},
        {"password": b"secret", "attach": "http://host"},
        {"extra_env": {"TOKEN": "secret\0"}},
        {"extra_env": {"TOKEN": b"secret"}},
        {"extra_env": {"TOKEN=secret": ""}},
        {"mcp": {"a": {"token": b"secret"}}},
        {"attach": "http://me:secret@host\0"},
    ],
    ids=str,
)
def test_a_refusal_shows_no_secret(changes: dict[str, Any]) -> None:
    with pytest.raises(OpenCodeConfigError) as raised:
        validate_config_for_run(RunConfig(**changes))

    assert "secret" not in str(raised.value)


# --- MCP servers ---------------------------------------------------------------------------------

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
    validate_config_for_run(RunConfig(mcp={"docs": entry}))


REFUSED_SERVERS: list[tuple[Any, str]] = [
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


@pytest.mark.parametrize("entry, words", REFUSED_SERVERS)
def test_what_opencode_would_drop_or_refuse_is_refused(entry: Any, words: str) -> None:
    with pytest.raises(OpenCodeConfigError) as caught:
        validate_config_for_run(RunConfig(mcp={"f": entry}))

    assert words in str(caught.value)


@pytest.mark.parametrize("settings", [{"mcp": {"f": {}}}, {"config_overrides": {"mcp": {"f": {}}}}])
def test_servers_are_checked_wherever_they_are_set(settings: dict[str, Any]) -> None:
    with pytest.raises(OpenCodeConfigError, match="mcp 'f' has no 'type'"):
        validate_config_for_run(RunConfig(**settings))


def test_no_value_is_told_since_it_may_be_secret() -> None:
    entry = REMOTE | {"headers": {"Authorization": 12345678}}

    with pytest.raises(OpenCodeConfigError) as caught:
        validate_config_for_run(RunConfig(mcp={"f": entry}))

    assert "'headers' is an unusable dict" in str(caught.value)
    assert "12345678" not in str(caught.value)
