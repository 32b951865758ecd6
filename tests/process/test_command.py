"""Which program is run, with which arguments, in which environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeBinaryNotFoundError,
    OpenCodeConfigError,
    RunConfig,
    build_argv,
    build_env,
    resolve_binary,
)
from opencode_sync.core.request import Request
from opencode_sync.process import command as _command
from opencode_sync.process.command import (
    DENIALS,
    ENFORCED,
    OPENED,
    PLUGIN,
    PRELOAD,
    Command,
    add_denials,
    add_plugin,
    add_preload,
    managed_path,
    run_command,
    server_env,
    with_title,
    without_user_config,
)
from tests.process import executable

SOON_S = 100.0

# --- the program ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without any opencode, and a working directory of its own."""
    home = tmp_path / "home"
    for name in ("cwd", "bin"):
        (home / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", str(home / "bin"))
    monkeypatch.delenv("OPENCODE_BINARY", raising=False)
    monkeypatch.chdir(home / "cwd")
    return home


def test_a_program_on_path_wins_over_a_file_of_its_name_here(machine: Path) -> None:
    executable(Path("opencode"))
    found = executable(machine / "bin" / "opencode")

    assert resolve_binary() == str(found)


@pytest.mark.parametrize("name", ["~/cwd/tools/oc", Path("tools/oc")], ids=["home", "relative"])
def test_the_path_of_a_file_is_made_absolute(machine: Path, name: str | Path) -> None:
    found = executable(machine / "cwd" / "tools" / "oc")

    assert resolve_binary(name) == str(found)


def test_the_managed_copy_is_found_last(machine: Path) -> None:
    managed = executable(managed_path("1.18.33"))

    without_path = resolve_binary()
    on_path = executable(machine / "bin" / "opencode")

    assert without_path == str(managed)
    assert resolve_binary() == str(on_path)


def test_opencode_binary_comes_first_unless_a_program_is_asked_for(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(machine / "bin" / "opencode")
    chosen, wanted = executable(machine / "other" / "oc"), executable(machine / "cwd" / "mine")

    monkeypatch.setenv("OPENCODE_BINARY", "~/other/oc")

    assert resolve_binary() == str(chosen)
    assert resolve_binary("./mine") == str(wanted)


@pytest.mark.parametrize(
    "name, what",
    [
        ("opencode", "no 'opencode' on PATH"),
        ("./oc", "no file './oc'"),
        ("~nobody-of-this-name/oc", "no file '~nobody-of-this-name/oc'"),
        ("../bin", "'../bin' is a directory, not a program"),
        ("text", "'text' is not executable"),
        ("a\0b", "no 'a\\x00b' on PATH"),
    ],
    ids=["default", "file", "no user", "directory", "text", "NUL"],
)
def test_what_cannot_be_run_is_named_with_the_way_to_get_one(name: str, what: str) -> None:
    Path("text").write_text("no program")

    with pytest.raises(FileNotFoundError) as raised:
        resolve_binary(name)

    assert isinstance(raised.value, OpenCodeBinaryNotFoundError)
    assert str(raised.value) == (
        f"{what}: run 'opencode-sync install', or pass binary=\"path/to/opencode\""
    )


def test_a_wrong_opencode_binary_is_named_though_there_is_another_one(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(machine / "bin" / "opencode")
    monkeypatch.setenv("OPENCODE_BINARY", "/none/oc")

    with pytest.raises(OpenCodeBinaryNotFoundError, match="no file '/none/oc', which OPENCODE_BIN"):
        resolve_binary()


# --- its arguments -------------------------------------------------------------------------------

RUN = ["oc", "run", "--format", "json"]


def test_each_setting_has_its_flag_in_a_fixed_order() -> None:
    cfg = RunConfig(
        agent="build",
        model="p/m",
        files=("a.txt", Path("b.txt")),
        title="T",
        command="review",
        continue_session=True,
        session_id="ses_1",
        fork=True,
        share=True,
        attach="http://host",
        password="secret",
        username="me",
        remote_dir="/d",
        port=4096,
        variant="high",
        thinking=True,
        print_logs=True,
        log_level="INFO",
        auto=True,
        pure=True,
    )

    argv = build_argv("oc", "Explain", cfg)

    assert argv == [
        *RUN,
        "--print-logs",
        *("--log-level", "INFO"),
        *("--command", "review"),
        "--continue",
        *("--session", "ses_1"),
        "--fork",
        "--share",
        *("-m", "p/m"),
        *("--agent", "build"),
        *("-f", "a.txt"),
        *("-f", "b.txt"),
        *("--title", "T"),
        *("--attach", "http://host"),
        *("--username", "me"),
        *("--dir", "/d"),
        *("--port", "4096"),
        *("--variant", "high"),
        "--thinking",
        "--auto",
        "--pure",
        "--",
        "Explain",
    ]


@pytest.mark.parametrize(
    "changes, argument",
    [
        ({"title": "--help"}, "--title=--help"),
        ({"model": "-p/m"}, "--model=-p/m"),
        ({"files": ("-notes.txt",)}, "--file=-notes.txt"),
    ],
    ids=["title", "model", "file"],
)
def test_a_value_with_a_leading_dash_is_no_flag(changes: dict[str, Any], argument: str) -> None:
    assert build_argv("oc", None, RunConfig(**changes)) == [*RUN, argument]


def test_the_home_of_a_file_is_expanded(machine: Path) -> None:
    argv = build_argv("oc", None, RunConfig(files=("~/a.txt", Path("~/b.txt"))))

    assert argv == [*RUN, "-f", f"{machine}/a.txt", "-f", f"{machine}/b.txt"]


def test_no_secret_stands_among_the_arguments() -> None:
    cfg = RunConfig(
        attach="http://host",
        password="secret",
        extra_env={"TOKEN": "secret"},
        mcp={"a": {"token": "secret"}},
        config_overrides={"key": "secret"},
    )

    assert "secret" not in " ".join(build_argv("oc", "Explain", cfg))


# --- its environment -----------------------------------------------------------------------------


def content_of(env: dict[str, str]) -> Any:
    return json.loads(env["OPENCODE_CONFIG_CONTENT"])


def test_the_environment_is_that_of_the_parent_unless_there_is_another_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MINE", "1")
    base = {"A": "1", "B": "2"}

    env = build_env(RunConfig(extra_env={"B": "3"}), base)

    assert build_env(RunConfig()) == {**os.environ, "OPENCODE_DISABLE_AUTOUPDATE": "1"}
    assert env == {"A": "1", "B": "3", "OPENCODE_DISABLE_AUTOUPDATE": "1"}
    assert base == {"A": "1", "B": "2"}


def test_without_configuration_that_of_the_parent_stays_to_the_letter() -> None:
    base = {"OPENCODE_CONFIG_CONTENT": "{ // as it is\n}"}

    assert build_env(RunConfig(), base)["OPENCODE_CONFIG_CONTENT"] == "{ // as it is\n}"


def test_our_configuration_is_merged_over_that_of_the_parent() -> None:
    parent = {"permission": {"bash": "deny", "edit": "deny"}, "username": "U", "x": [1]}

    env = build_env(
        RunConfig(permission={"edit": "allow"}, config_overrides={"x": [2]}),
        {"OPENCODE_CONFIG_CONTENT": json.dumps(parent)},
    )

    assert content_of(env) == {
        "permission": {"bash": "deny", "edit": "allow"},
        "username": "U",
        "x": [2],
    }


def test_a_configuration_in_extra_env_stands_in_for_that_of_the_parent() -> None:
    cfg = RunConfig(extra_env={"OPENCODE_CONFIG_CONTENT": '{"a": 1}'}, tools={"bash": False})

    env = build_env(cfg, {"OPENCODE_CONFIG_CONTENT": '{"b": 2}'})

    assert content_of(env) == {"a": 1, "tools": {"bash": False}}


@pytest.mark.parametrize(
    "content, config",
    [
        ('/* all\n of it */ {"a": /* x */ 1}', {"a": 1}),
        ('{"url": "http://x/*y*/", "b": "a,}"}', {"url": "http://x/*y*/", "b": "a,}"}),
        (r'{"a": "\" // no comment", "b": "\\"}', {"a": '" // no comment', "b": "\\"}),
        ('{"a": 1, // last\n /* and */ }', {"a": 1}),
        ("", {}),
    ],
    ids=["block", "in strings", "escapes", "comma, then comments", "empty"],
)
def test_comments_and_trailing_commas_are_taken_as_opencode_takes_them(
    content: str, config: dict[str, Any]
) -> None:
    env = build_env(RunConfig(tools={"bash": False}), {"OPENCODE_CONFIG_CONTENT": content})

    assert content_of(env) == {**config, "tools": {"bash": False}}


@pytest.mark.parametrize(
    "content",
    ["no json", "[1]", "[" * 100_000],
    ids=["not JSON", "not an object", "too deep"],
)
def test_a_configuration_of_the_parent_that_cannot_be_merged_is_refused(content: str) -> None:
    with pytest.raises(OpenCodeConfigError, match="OPENCODE_CONFIG_CONTENT of the environment"):
        build_env(RunConfig(permission="deny"), {"OPENCODE_CONFIG_CONTENT": content})


def test_a_password_travels_in_its_variable() -> None:
    cfg = RunConfig(attach="http://host", password="secret")

    assert build_env(cfg, {})["OPENCODE_SERVER_PASSWORD"] == "secret"


def test_lean_switches_can_be_taken_back_one_by_one() -> None:
    cfg = RunConfig(
        lean=True,
        extra_env={"OPENCODE_DISABLE_SHARE": "0"},
        config_overrides={"snapshot": True},
    )

    env = build_env(cfg, {})

    assert env["OPENCODE_DISABLE_LSP_DOWNLOAD"] == "1"
    assert env["OPENCODE_DISABLE_SHARE"] == "0"
    assert content_of(env) == {"snapshot": True, "share": "disabled", "lsp": False}


def test_our_plugin_is_added_to_those_that_are_there() -> None:
    env = build_env(RunConfig(config_overrides={"plugin": ["theirs"], "a": 1}), {})

    assert content_of(add_plugin(env)) == {"plugin": ["theirs", PLUGIN.as_uri()], "a": 1}
    assert content_of(add_plugin({})) == {"plugin": [PLUGIN.as_uri()]}


@pytest.mark.parametrize(
    "given, command, title",
    [
        (None, None, ""),  # OpenCode takes the prompt's beginning
        ("", None, ""),
        ("T", "review", "T"),
        (None, "review", "/review"),
    ],
    ids=["none", "empty", "own", "a command's"],
)
def test_a_run_has_a_title_and_no_prompt_on_its_command_line(
    given: str | None, command: str | None, title: str
) -> None:
    argv = build_argv("oc", None, with_title(RunConfig(title=given, command=command)))

    assert argv[-2:] == ["--title", title]


@pytest.mark.parametrize(
    "env, expected",
    [({PRELOAD: "/theirs.js"}, {PRELOAD: "/theirs.js"}), ({PRELOAD: "", "A": "1"}, {"A": "1"})],
    ids=["a file", "none"],
)
def test_what_the_user_has_preloaded_stays(env: dict[str, str], expected: dict[str, str]) -> None:
    assert add_preload(env) == expected


def test_what_is_denied_is_told_to_what_is_preloaded() -> None:
    env = add_denials({}, RunConfig(permission={"bash": "deny"}))

    (denial,) = json.loads(env["OPENCODE_SYNC_DENIALS"])
    assert denial == {"rules": [{"permission": "bash", "pattern": "*", "action": "deny"}]}


def test_where_nothing_is_denied_the_user_may_preload_what_he_likes() -> None:
    env = {PRELOAD: "mine.js"}

    assert add_denials(env, RunConfig(permission="allow")) is env


@pytest.mark.parametrize("value", ["", "mine.js"], ids=["set to nothing", "set"])
def test_a_denial_is_refused_where_the_variable_that_enforces_it_is_set(value: str) -> None:
    with pytest.raises(OpenCodeConfigError, match="BUN_INSPECT_PRELOAD is set: unset it"):
        add_denials({PRELOAD: value}, RunConfig(permission={"bash": "deny"}))


def test_a_denial_is_refused_where_the_file_that_enforces_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_command, "PRELOAD_FILE", tmp_path / "missing.js")

    with pytest.raises(OpenCodeConfigError, match="in an archive"):
        add_denials({}, RunConfig(tools={"bash": False}))


# --- a run as a whole ----------------------------------------------------------------------------


def command_of(prompt: str = "Fix it", workspace: Path | None = None, **options: Any) -> Command:
    places = {name: options.pop(name) for name in ("data_home", "empty_config") if name in options}
    keeps_database = options.pop("keeps_database", True)
    request = Request(prompt, workspace or Path.cwd(), RunConfig(**options))
    unpacked = Path("/unpacked")
    return run_command("oc", request, unpacked=unpacked, keeps_database=keeps_database, **places)


def test_a_run_is_told_its_directories_and_what_to_preload() -> None:
    command = command_of(data_home=Path("/data"))

    assert command.env["XDG_DATA_HOME"] == "/data"
    assert command.env["BUN_TMPDIR"] == "/unpacked"
    assert Path(command.env[PRELOAD]).is_file()
    assert (command.prompt, command.must_say) == ("Fix it", {})


def test_errors_and_warnings_are_logged_whatever_was_asked_for() -> None:
    asked = [command_of(log_level=level).argv for level in (None, "ERROR", "DEBUG")]

    levels = [argv[argv.index("--log-level") + 1] for argv in asked]
    assert levels == ["WARN", "WARN", "DEBUG"]
    assert all("--print-logs" in argv for argv in asked)


def test_a_database_of_the_environment_s_own_does_not_take_sessions_out_of_the_data_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENCODE_DB", "/db")

    assert "OPENCODE_DB" not in command_of(keeps_database=False).env
    assert command_of().env["OPENCODE_DB"] == "/db"
    own = command_of(keeps_database=False, extra_env={"OPENCODE_DB": "/mine"})
    assert own.env["OPENCODE_DB"] == "/mine"
    server = server_env(RunConfig(), unpacked=Path("/unpacked"), data_home=Path("/data"))
    assert "OPENCODE_DB" not in server


def test_arguments_of_a_command_are_sealed_and_the_run_must_say_that_they_were_opened() -> None:
    command = command_of("$(touch x)", command="review")

    assert "touch" not in command.prompt
    assert list(command.must_say) == [OPENED]
    assert content_of(command.env)["plugin"] == [PLUGIN.as_uri()]


def test_a_run_that_is_denied_something_must_say_that_it_looks_for_it() -> None:
    command = command_of(permission={"bash": "deny"})

    assert list(command.must_say) == [ENFORCED]
    assert DENIALS in command.env


# --- leaving configuration out -------------------------------------------------------------------


def test_the_users_variables_are_left_out_with_the_users_configuration() -> None:
    base = {
        "OPENCODE_CONFIG": "/f.json",
        "OPENCODE_CONFIG_DIR": "/d",
        "OPENCODE_CONFIG_CONTENT": "no json, and nobody minds",
        "OPENCODE_PERMISSION": "{}",
        "OTHER": "1",
    }

    env = build_env(RunConfig(inherit_user_config=False, tools={"bash": False}), base)

    assert content_of(env) == {"tools": {"bash": False}}
    assert env.keys() == {"OPENCODE_CONFIG_CONTENT", "OTHER", "OPENCODE_DISABLE_AUTOUPDATE"}


def test_what_extra_env_sets_itself_is_not_left_out() -> None:
    own = {"OPENCODE_CONFIG_DIR": "/mine", "XDG_CONFIG_HOME": "/mine/config"}
    cfg = RunConfig(inherit_user_config=False, extra_env=own)

    env = without_user_config(build_env(cfg, {}), cfg, Path("/empty"))

    assert env["OPENCODE_CONFIG_DIR"] == "/mine"
    assert env["XDG_CONFIG_HOME"] == "/mine/config"
    assert env["OPENCODE_TEST_HOME"] == "/empty"


def test_instructions_in_the_home_are_found_without_the_users_configuration(machine: Path) -> None:
    cfg = RunConfig(inherit_user_config=False, instructions=("~/a.md", "b.md", "https://x/c.md"))

    assert content_of(build_env(cfg, {})) == {
        "instructions": [f"{machine}/a.md", "b.md", "https://x/c.md"]
    }


# --- what the real opencode makes of it ----------------------------------------------------------


@pytest.fixture
def resolved(machine: Path, tmp_path: Path, opencode_binary: str) -> Callable[[RunConfig], Any]:
    """The configuration that opencode comes to, each source of which defines one command."""
    workspace = tmp_path / "repo" / "inner"
    for source, path in {
        "user": machine / ".config/opencode/opencode.json",
        "home": machine / ".opencode/opencode.json",
        "repo": workspace.parent / "opencode.json",
        "workspace": workspace / "opencode.json",
        "dotted": workspace / ".opencode/opencode.json",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(defining(source)))
    (tmp_path / "repo" / ".git").mkdir()
    empty = tmp_path / "empty"
    empty.mkdir()

    def resolved(cfg: RunConfig) -> Any:
        env = add_preload(build_env(cfg))
        if not cfg.inherit_user_config:
            env = without_user_config(env, cfg, empty)
        done = subprocess.run(
            [opencode_binary, "debug", "config"],
            env={**env, "PWD": str(workspace)},
            cwd=workspace,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=SOON_S,
            check=True,
        )
        return json.loads(done.stdout)

    return resolved


def defining(command: str) -> dict[str, Any]:
    return {"command": {command: {"template": "x"}}, "instructions": [f"{command}.md"]}


Resolved = Callable[[RunConfig], Any]


def test_opencode_reads_every_source_and_ours_last(
    resolved: Resolved, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = json.dumps({**defining("parent"), "username": "parent"})
    monkeypatch.setenv("OPENCODE_CONFIG_CONTENT", f"{parent} // with a comment")

    config = resolved(RunConfig(config_overrides={"username": "ours"}))

    assert set(config["command"]) == {"user", "home", "repo", "workspace", "dotted", "parent"}
    assert config["username"] == "ours"


@pytest.mark.parametrize(
    "switches, sources",
    [
        ({"inherit_user_config": False}, {"repo", "workspace", "dotted"}),
        ({"inherit_project_config": False}, {"user", "home"}),
    ],
    ids=["user", "project"],
)
def test_opencode_reads_nothing_of_what_is_left_out(
    resolved: Resolved, switches: dict[str, Any], sources: set[str]
) -> None:
    config = resolved(RunConfig(**switches))

    assert set(config.get("command", {})) == sources
    assert set(config.get("instructions", ())) == {f"{source}.md" for source in sources}
