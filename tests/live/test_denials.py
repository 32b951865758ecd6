"""What the caller denies is denied, whatever the workspace's own configuration allows.

The workspace is hostile: its configuration, that of the directory above it, its agents and its
commands allow all. The commands of the scripts make files; a file that is there was made by a tool
that was denied.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodePermissionError,
    OpenCodeProcessError,
    OpenCodeServer,
    RunConfig,
    RunResult,
)
from opencode_sync.api.runner import Runner
from opencode_sync.process import command as _command
from opencode_sync.server import protocol
from opencode_sync.testing import Reply, ToolCall, tool_call
from tests.live.warm import MakeRunner, Script, make_configuration, shell

ALL = {"bash": "allow", "edit": "allow", "*": "allow"}
CONFIG = {
    "permission": ALL,
    "tools": {"bash": True, "write": True},
    "agent": {name: {"permission": ALL} for name in ("build", "plan", "general", "explore")},
}
AGENT = """---
description: {name}
mode: {mode}
permission:
  bash: allow
  "*": allow
  edit: {edit}
---
Help.
"""
COMMAND = """---
description: A command
{head}
---
Do as you like: $ARGUMENTS
"""


def make_hostile(workspace: Path) -> None:
    """Allow all, in each place that OpenCode reads."""
    workspace.mkdir()
    ours = make_configuration(workspace)
    agents, commands, nested = ours / "agent", ours / "command", ours / "agents/deep"
    for directory in (agents, commands, nested):
        directory.mkdir(parents=True)
    (workspace.parent / "opencode.json").write_text(json.dumps(CONFIG))
    (workspace / "opencode.jsonc").write_text(json.dumps(CONFIG))
    (ours / "opencode.json").write_text(json.dumps(CONFIG))
    (agents / "helper.md").write_text(AGENT.format(name="helper", mode="subagent", edit="allow"))
    (nested / "free.md").write_text(AGENT.format(name="free", mode="primary", edit="allow"))
    (agents / "reader.md").write_text(AGENT.format(name="reader", mode="subagent", edit="deny"))
    (commands / "free.md").write_text(COMMAND.format(head="agent: build"))
    (commands / "all.md").write_text("Handle: $ARGUMENTS")
    (commands / "words.md").write_text("First ($1), then ($2).")
    (commands / "bare.md").write_text("Do it.")
    (commands / "into.md").write_text("This: !`echo $1; touch made-into`")
    (commands / "sub.md").write_text(COMMAND.format(head="agent: helper\nsubtask: true"))
    subprocess.run(["git", "init", "-q", str(workspace.parent)], check=True)


@pytest.fixture(scope="module")
def workspace(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("repository") / "workspace"
    make_hostile(workspace)
    return workspace


@pytest.fixture(scope="module", autouse=True)
def free(runner: Runner, workspace: Path) -> RunResult:
    """A run to which nothing is denied."""
    return runner.run("Hello", workspace)


def touch(name: str) -> ToolCall:
    return shell(f"touch made-{name}")


def task(prompt: str, **more: Any) -> ToolCall:
    return tool_call("task", description="Help", prompt=prompt, subagent_type="helper", **more)


def trying(script: Script, name: str, **more: Any) -> str:
    """A prompt at which the model and a sub-agent try bash."""
    child = script.to(f"child of {name}", touch(f"{name}-child"), "I may not either.")
    calls = Reply.calls(touch(name), shell("echo allowed > allowed.txt"), task(child, **more))
    return script.to(name, calls, "I may not.")


def made(workspace: Path) -> list[str]:
    return sorted(path.name for path in workspace.glob("made-*"))


# --- denials -------------------------------------------------------------------------------------

# The last of the caller's own rules that matches counts.
PATTERNS = {"bash": {"*": "deny", "echo *": "allow"}, "edit": "deny"}


def on_server(**settings: Any) -> Any:
    """Settings that come to the same rules as others, for which a process is started."""
    return pytest.param(settings, marks=pytest.mark.only("server"))


@pytest.mark.parametrize(
    "settings",
    [
        on_server(permission="deny"),
        on_server(permission={"*": "deny"}),
        on_server(tools={"bash": False}),
        {"permission": PATTERNS, "auto": True, "agent": "deep/free"},
    ],
    ids=["all", "a wildcard", "tools", "by pattern, with auto, of the user's own agent"],
)
def test_a_denial_holds_against_the_workspace_and_its_agents(
    runner: Runner, cfg: RunConfig, workspace: Path, script: Script, settings: dict[str, Any]
) -> None:
    prompt = trying(script, "try")
    (workspace / "allowed.txt").unlink(missing_ok=True)

    result = runner.run(prompt, workspace, run_cfg=cfg.replace(**settings))

    assert made(workspace) == []
    assert (workspace / "allowed.txt").exists() == (settings.get("permission") is PATTERNS)
    assert (result.status, result.finish_reason) == ("denied", "stop")
    assert "bash" in result.denied_tools
    assert result.answer == "I may not."


@pytest.mark.parametrize(
    "command",
    [pytest.param("free", marks=pytest.mark.only("server")), "sub"],
    ids=["an agent of its own", "a sub-agent"],
)
def test_a_denial_holds_against_the_workspace_s_commands(
    runner: Runner, cfg: RunConfig, workspace: Path, script: Script, command: str
) -> None:
    script.to(f"Do as you like: {command}", touch(command), "I may not.")
    denying = cfg.replace(permission={"bash": "deny"}, command=command)

    runner.run(command, workspace, run_cfg=denying)

    assert made(workspace) == []


def test_a_denial_holds_in_a_session_that_was_begun_without_it_and_in_a_fork(
    runner: Runner, cfg: RunConfig, workspace: Path, script: Script, free: RunResult
) -> None:
    denying = cfg.replace(session_id=free.session_id, permission={"bash": "deny"})
    going_on = trying(script, "going-on")
    # Nor can a sub-agent go on in the session that was allowed more.
    branching = trying(script, "branching", task_id=free.session_id)

    branch = runner.run(branching, workspace, run_cfg=denying.replace(fork=True))
    result = runner.run(going_on, workspace, run_cfg=denying)

    assert made(workspace) == []
    assert (branch.status, result.status) == ("denied", "denied")
    assert branch.session_id != free.session_id == result.session_id


def test_what_config_overrides_deny_holds_too_also_to_one_agent(
    make: MakeRunner, cfg: RunConfig, workspace: Path, script: Script
) -> None:
    denied = {
        "permission": {"bash": "deny"},
        "agent": {"deep/free": {"permission": {"read": "deny"}}},
    }
    denying = cfg.replace(config_overrides={**(cfg.config_overrides or {}), **denied})
    (workspace / "notes.txt").write_text("The code word is Kiebitz.\n")
    reading = tool_call("read", filePath=str(workspace / "notes.txt"))
    child = script.to("By another", Reply.calls(touch("two"), reading), "Read.")
    prompt = script.to("By the one", Reply.calls(touch("one"), reading, task(child)), "Denied.")

    result = make(run_cfg=denying).run(
        prompt, workspace, run_cfg=denying.replace(agent="deep/free")
    )

    assert made(workspace) == []
    [read] = [
        call["sessionID"]
        for call in result.tool_calls
        if (call["part"]["tool"], call["part"]["state"]["status"]) == ("read", "completed")
    ]
    assert read != result.session_id  # but the sub-agent's
    assert set(result.denied_tools) == {"bash", "read"}


# --- arguments of a command ----------------------------------------------------------------------

ODD = (
    "text !`touch made-arguments` costs $& $$ $' $1 @notes.txt \"two  words\" it's;\n touch made-it"
)


WORDS = "text 'b !`touch made-words` $&'  $$ @notes.txt"


@pytest.mark.parametrize(
    "command, arguments, text",
    [
        pytest.param("all", ODD, f"Handle: {ODD}", marks=pytest.mark.only("server")),
        ("words", WORDS, "First (text), then (b !`touch made-words` $& $$ @notes.txt)."),
        pytest.param("bare", ODD, f"Do it.\n\n{ODD}", marks=pytest.mark.only("server")),
    ],
    ids=["as a whole", "as words", "behind the template"],
)
def test_the_arguments_of_a_command_reach_the_model_as_they_are_and_never_the_shell(
    runner: Runner,
    cfg: RunConfig,
    workspace: Path,
    script: Script,
    command: str,
    arguments: str,
    text: str,
) -> None:
    (workspace / "notes.txt").write_text("The code word is Kiebitz.\n")

    result = runner.run(arguments, workspace, run_cfg=cfg.replace(command=command))

    assert script.last.prompt == text
    assert result.status == "ok"
    assert made(workspace) == []


def test_a_command_that_puts_its_arguments_into_the_shell_is_refused_by_name(
    runner: Runner, cfg: RunConfig, workspace: Path, script: Script
) -> None:
    before = len(script.requests)

    with pytest.raises(OpenCodeConfigError, match="command 'into' puts its arguments into a shell"):
        runner.run("x; touch made-refused", workspace, run_cfg=cfg.replace(command="into"))

    assert len(script.requests) == before
    assert "made-refused" not in made(workspace)
    (workspace / "made-into").unlink(missing_ok=True)  # the template's own


@pytest.mark.only("server")
def test_a_file_that_arguments_name_is_not_given_to_a_sub_agent(
    runner: Runner, cfg: RunConfig, workspace: Path, script: Script
) -> None:
    (workspace / "notes.txt").write_text("The code word is Kiebitz.\n")
    as_sub_agent = cfg.replace(command="sub", permission={"read": "deny"})
    before = len(script.requests)

    with pytest.raises(OpenCodeError, match="command 'sub' gives its arguments to a sub-agent"):
        runner.run("look at @notes.txt", workspace, run_cfg=as_sub_agent)

    assert len(script.requests) == before


@pytest.mark.only("server")
def test_a_server_elsewhere_takes_only_arguments_that_nothing_expands(
    runner: Runner, cfg: RunConfig, workspace: Path, script: Script
) -> None:
    assert isinstance(runner, OpenCodeServer)
    as_command = cfg.replace(command="all", config_overrides=None, extra_env=None)
    plain = {"lean": False, "inherit_user_config": True, "instructions": ()}
    own = as_command.replace(**plain)

    with OpenCodeServer.connect(runner.url, runner.password) as elsewhere:
        elsewhere.run("it's plain; is it?", workspace, run_cfg=own)
        with pytest.raises(OpenCodeConfigError, match="hold '`', which OpenCode expands"):
            elsewhere.run(ODD, workspace, run_cfg=own)

    assert script.last.prompt == "Handle: it's plain; is it?"


@pytest.mark.only("process")
def test_arguments_are_refused_where_pure_leaves_out_what_seals_them(
    runner: Runner, cfg: RunConfig, workspace: Path
) -> None:
    with pytest.raises(OpenCodeConfigError, match="pure=True leaves out all plugins"):
        runner.run("Hi", workspace, run_cfg=cfg.replace(command="all", pure=True))


# --- the tripwire --------------------------------------------------------------------------------


@pytest.mark.only("process")
def test_a_process_that_does_not_enforce_denials_is_stopped_before_its_first_tool(
    runner: Runner,
    cfg: RunConfig,
    workspace: Path,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    idle = tmp_path / "idle.js"
    idle.write_text("")
    monkeypatch.setattr(_command, "PRELOAD_FILE", idle)
    prompt = script.to("Say it slowly", Reply("Let me see.", delay_s=1.0), "Done.")

    with pytest.raises(OpenCodePermissionError, match=r"does not load preload\.js") as caught:
        runner.run(prompt, workspace, run_cfg=cfg.replace(permission={"bash": "deny"}))

    assert caught.value.tool is None
    assert caught.value.result is not None
    assert caught.value.result.status == "error"


def test_a_denied_tool_that_runs_all_the_same_ends_the_run(
    runner: Runner,
    cfg: RunConfig,
    workspace: Path,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pretending = tmp_path / "pretending.js"
    words = _command.ENFORCED.decode()
    pretending.write_text(f"require('fs').writeSync(2, {json.dumps(words)} + '\\n')\n")
    if isinstance(runner, OpenCodeClient):
        monkeypatch.setattr(_command, "PRELOAD_FILE", pretending)
    else:
        monkeypatch.setattr(protocol, "permission_rules", lambda cfg, **allowed: [])
    prompt = script.to("Run it", shell("true"), Reply("Never said.", delay_s=60.0))

    with pytest.raises(OpenCodePermissionError, match="'bash' is denied, and has run") as caught:
        runner.run(prompt, workspace, run_cfg=cfg.replace(permission={"bash": "deny"}))

    assert caught.value.tool == "bash"
    assert caught.value.result is not None
    assert caught.value.result.status == "error"


# --- another agent -------------------------------------------------------------------------------


def test_a_sub_agent_s_name_is_refused_or_runs_by_its_own_rules(
    runner: Runner, cfg: RunConfig, workspace: Path, script: Script
) -> None:
    writing = tool_call("write", filePath=str(workspace / "made-written"), content="no")
    prompt = script.to("As a reader", writing, "I may not.")
    as_reader = cfg.replace(agent="reader")

    if isinstance(runner, OpenCodeServer):  # it runs the sub-agent that was asked for
        assert runner.run(prompt, workspace, run_cfg=as_reader).denied_tools == ["write"]
    else:
        with pytest.raises(OpenCodeProcessError, match='"reader" is a subagent'):
            runner.run(prompt, workspace, run_cfg=as_reader)
    assert made(workspace) == []


@pytest.mark.only("process")
def test_a_fallback_that_opencode_words_in_another_way_is_an_error_of_its_own(
    runner: Runner,
    cfg: RunConfig,
    workspace: Path,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("opencode_sync.process.stderr.FALLBACK", "never said")
    before = len(script.requests)

    with pytest.raises(OpenCodeProcessError, match="reader"):
        runner.run("As a reader", workspace, run_cfg=cfg.replace(agent="reader"))

    assert len(script.requests) == before


# --- what was not denied -------------------------------------------------------------------------


@pytest.mark.only("server")
def test_a_call_with_malformed_json_has_failed_and_was_not_denied(
    runner: Runner, workspace: Path, script: Script
) -> None:
    prompt = script.to("Write it", ToolCall("write", '{"filePath": "x", '), "It did not work.")

    result = runner.run(prompt, workspace)

    [call] = result.tool_calls
    assert "JSON parsing failed" in call["part"]["state"]["input"]["error"]
    assert (result.status, result.denied_tools) == ("ok", [])
