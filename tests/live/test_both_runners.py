"""What run and stream do, with a process per run and with a warm server alike.

Each test runs with both, and one model answers both. What cannot hold for one of them:

| what | process | server | because |
|---|---|---|---|
| ``exit_code``, ``stderr``, raw lines | yes | empty | a turn is no process |
| ``print_logs``, ``log_level`` | yes | refused | the log is of all its runs together |
| ``extra_env``, ``mcp``, ``lean``, | yes | for the whole | they are read once, at the start |
| ``instructions``, ``inherit_...``, | | | of what serves the run: a server is |
| ``config_overrides`` | | | given them with its own ``run_cfg`` |
| ``pure`` | yes | refused | a plugin keeps its password from its tools |
| ``text_delta``, ``reasoning_delta`` | none | yes | ``opencode run`` prints whole parts |
| ``on_permission``, ``on_question`` | refused | yes | a process has nobody to ask |
| another attempt at a start | yes | never | all turns share a start that went well |
| a flag that is unknown, a cut line | yes | never | there is neither argv nor stdout |
| OpenCodeServerError | never | yes | there is no server to be lost |

Those of them that a caller can see have a test at the end; deaths of servers, broken connections
and what only a stand-in can do have files of their own.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from opencode_sync import (
    OpenCodeBudgetError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeProcessError,
    OpenCodeServer,
    OpenCodeTimeoutError,
    RunConfig,
    RunResult,
    RunStream,
    TokenUsage,
)
from opencode_sync.api.runner import Runner
from opencode_sync.process.data_dirs import DataDirectories
from opencode_sync.testing import ChatRequest, Reply
from tests.live.warm import WITHIN_S, MakeRunner, Script, Tools, conversation, shell

IDLE_S = 3.0

_ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def workspace(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for each runner: tools write their ids there."""
    return tmp_path_factory.mktemp("workspace")


# --- one run with everything ---------------------------------------------------------------------


@dataclass
class Whole:
    """A run with a text, a tool call, an attached file, a log file, and an answer."""

    result: RunResult
    requests: list[ChatRequest]
    workspace: Path
    log_file: Path
    left: Tools


@pytest.fixture(scope="module")
def whole(runner: Runner, cfg: RunConfig, script: Script, workspace: Path) -> Whole:
    (workspace / "notes.txt").write_text("The code word is Kiebitz.\n")
    left = Tools(workspace / "left.pids")
    leave = "({} sh sleeper.sh left.pids {} >/dev/null 2>&1 &)"
    left_two = f"{leave.format('setsid', 90901)}; {leave.format('env -i', 90904)}"
    make = "echo made > made.txt; env > env.txt; exit 3"
    both = "until [ $(cat left.pids | wc -l) = 2 ]; do sleep 0.02; done"
    command = f"{left_two}; {both}; {make}"
    usage = TokenUsage(input=1_000, output=100, cache_read=50)
    looking = Reply("Let me look.", tool_calls=[shell(command)], usage=usage)
    prompt = script.to("Make it", looking, Reply("Done.", usage=usage))
    log_file = workspace / "events.jsonl"

    result = runner.run(
        prompt,
        workspace,
        run_cfg=cfg.replace(files=("notes.txt",), title="A title"),
        log_file=log_file,
    )
    return Whole(result, script.asked(prompt, 2), workspace, log_file, left)


def test_a_tool_call_works_in_the_workspace_and_stands_in_the_result(whole: Whole) -> None:
    [call] = whole.result.tool_calls

    assert (whole.workspace / "made.txt").read_text() == "made\n"
    assert call["part"]["tool"] == "bash"
    assert call["part"]["state"]["metadata"]["exit"] == 3


def test_a_tool_is_given_nothing_that_is_for_opencode_alone(whole: Whole) -> None:
    lines = (whole.workspace / "env.txt").read_text().splitlines()
    names = [line.partition("=")[0] for line in lines]

    assert "HOME" in names
    assert [name for name in names if name.startswith("BUN_")] == []
    assert "OPENCODE_SERVER_PASSWORD" not in names


def test_texts_answer_usage_and_cost_are_summed_over_the_steps(whole: Whole) -> None:
    result = whole.result

    assert (result.status, result.finish_reason, result.turns) == ("ok", "stop", 2)
    assert (result.final_text, result.answer) == ("Let me look.\n\nDone.", "Done.")
    assert (result.token_usage.input, result.token_usage.output) == (2_000, 200)
    assert result.token_usage.cache_read == 100
    # 1, 10 and 0.1 dollars per million, as the model's default price list has it.
    assert result.total_cost == pytest.approx((2_000 * 1 + 200 * 10 + 100 * 0.1) / 1e6)
    assert (result.prompt, result.workspace) == ("Make it", str(whole.workspace))
    assert result.attempts == 1
    assert result.duration_s > 0


def test_an_attached_file_reaches_the_model_with_the_prompt(whole: Whole) -> None:
    said = json.dumps(whole.requests[0].messages[-1])

    assert "The code word is Kiebitz." in said
    assert "Make it" in said


def test_the_log_file_has_each_event_as_a_line(whole: Whole) -> None:
    first, *events = map(json.loads, whole.log_file.read_text().splitlines())

    assert first["type"] == "attempt"
    assert events == whole.result.events


def test_what_a_tool_leaves_running_ends_with_the_run(whole: Whole) -> None:
    assert len(whole.left._pids()) == 2
    assert whole.left.living() == []


# --- the prompt and the answer -------------------------------------------------------------------

SIZE = 8_000_000


def numbered(size: int) -> str:
    """Text of *size* characters in which a missing piece would show."""
    return "".join(f"{number:09d}\n" for number in range(size // 10)).rstrip("\n")


ODD = "-- \"first\" line\n\n'second'\twith a tab\u2028and a separator, ünï 🙂\r\n  "


def test_a_prompt_of_2_mb_and_an_answer_of_8_mb_arrive_byte_for_byte(
    runner: Runner, workspace: Path, script: Script
) -> None:
    prompt = script.to("\ufeff" + ODD + numbered(2_000_000) + ODD, numbered(SIZE))

    with runner.stream(prompt, workspace) as stream:
        events = [event for event in stream if event["type"] != "text_delta"]

    [request] = script.asked(prompt)
    is_whole = request.prompt == prompt  # compared first: to show the difference takes minutes
    assert is_whole, len(request.prompt)
    assert [event["type"] for event in events] == ["step_start", "text", "step_finish"]
    is_whole = events[1]["part"]["text"].rstrip("\n") == numbered(SIZE)
    assert is_whole, len(events[1]["part"]["text"])
    is_kept = stream.result.final_text == numbered(SIZE)
    assert is_kept
    assert stream.result.status == "ok"


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"model": "scripted/unheard-of"}, "unheard-of"),
        ({"agent": "nobody"}, "nobody"),
        ({"command": "no-such-command"}, "no-such-command"),
    ],
    ids=["model", "agent", "command"],
)
def test_an_unknown_name_is_an_error_that_names_it(
    runner: Runner, cfg: RunConfig, workspace: Path, changes: dict[str, str], name: str
) -> None:
    with pytest.raises(OpenCodeProcessError, match=name) as caught:
        runner.run("Hi", workspace, run_cfg=cfg.replace(**changes))

    assert name in str(caught.value).splitlines()[0]
    assert "\n    at " not in str(caught.value)  # OpenCode's own traceback
    assert caught.value.result is not None
    assert caught.value.result.final_text == ""


@pytest.mark.parametrize("session_id", ["ses_of_nobody", "of another form"])
def test_an_unknown_session_is_refused_by_name(
    runner: Runner, cfg: RunConfig, workspace: Path, session_id: str
) -> None:
    going_on = cfg.replace(session_id=session_id)

    with pytest.raises(OpenCodeConfigError, match=session_id):
        runner.run("Hi", workspace, run_cfg=going_on)


@pytest.mark.only("server")
def test_a_401_is_an_error_whose_first_line_has_the_status_and_the_providers_words(
    runner: Runner, workspace: Path, script: Script
) -> None:
    prompt = script.to("Refuse", Reply.failure(401, "this key is no good"))

    with pytest.raises(OpenCodeProcessError) as caught:
        runner.run(prompt, workspace)

    assert "401: this key is no good" in str(caught.value).splitlines()[0]
    result = caught.value.result
    assert result is not None
    assert result.error is not None
    assert (result.status, result.error.status_code) == ("error", 401)
    assert len(script.asked(prompt)) == 1


# --- limits --------------------------------------------------------------------------------------


@dataclass
class Limited:
    """The errors of runs that each passed a limit, by its name; and tools that ran until then."""

    errors: dict[str, OpenCodeError]
    tools: dict[str, Tools]


@pytest.fixture(scope="module")
def limited(runner: Runner, script: Script, workspace: Path, whole: Whole) -> Limited:
    """Runs that wait for their limits together, each from where the model has brought it.

    What events tell is told by a server alone: both runners read them in one place.
    """
    tools = {name: Tools(workspace / f"{name}.pids") for name in ("timeout_s", "idle_timeout_s")}
    echo = shell("echo here")
    timeout_s = 4 * whole.result.duration_s + 1  # for one of the same two steps
    script.to("Hang", echo, tools["timeout_s"].call)
    script.to("Sleep", Reply("Let me.", tool_calls=[tools["idle_timeout_s"].call]))
    script.to("Later", Reply.failure(429, "slow down", retry_after_s=3600))
    never = threading.Event()
    script.to("Spend", echo, Reply([never, "Spent."]))  # one that is done keeps its answer

    with ExitStack() as started, ThreadPoolExecutor() as threads:
        started.callback(never.set)

        def start(prompt: str, **limits: float) -> RunStream:
            return started.enter_context(runner.stream(prompt, workspace, **limits))

        streams = {"timeout_s": start("Hang", timeout_s=timeout_s)}
        tools["timeout_s"].wait_until_started()
        if is_server(runner):
            streams["idle_timeout_s"] = start("Sleep", idle_timeout_s=IDLE_S)
            tools["idle_timeout_s"].wait_until_started()
            streams["429"] = start("Later", idle_timeout_s=IDLE_S)
            streams["max_cost"] = start("Spend", max_cost=0.0001)
        errors = dict(zip(streams, threads.map(_error_of, streams.values()), strict=True))
    return Limited(errors, tools)


def _error_of(stream: RunStream) -> OpenCodeError:
    with pytest.raises(OpenCodeError) as caught:
        stream.wait()
    return caught.value


def test_after_timeout_s_the_error_has_what_was_got_and_no_tool_lives(limited: Limited) -> None:
    error = limited.errors["timeout_s"]

    assert isinstance(error, OpenCodeTimeoutError)
    assert error.limit == "timeout_s"
    assert "(timeout_s); stopped after" in str(error)
    assert error.result is not None
    assert (error.result.status, error.result.turns) == ("timed_out", 1)
    assert error.result.tool_calls[0]["part"]["state"]["output"] == "here\n"
    assert limited.tools["timeout_s"].living() == []


@pytest.mark.only("server")
def test_after_idle_timeout_s_the_error_has_what_was_got_and_no_tool_lives(
    limited: Limited,
) -> None:
    error = limited.errors["idle_timeout_s"]

    assert isinstance(error, OpenCodeTimeoutError)
    assert (error.limit, error.limit_s) == ("idle_timeout_s", IDLE_S)
    assert error.result is not None
    assert (error.result.status, error.result.final_text) == ("timed_out", "Let me.")
    assert limited.tools["idle_timeout_s"].living() == []


@pytest.mark.only("server")
def test_a_provider_that_is_being_retried_is_named_by_the_timeout(limited: Limited) -> None:
    error = limited.errors["429"]

    assert isinstance(error, OpenCodeTimeoutError)
    assert "the provider was being retried: 429 slow down" in str(error)
    assert error.result is not None
    assert [event["type"] for event in error.result.events][-1:] == ["retry"]


@pytest.mark.only("server")
def test_after_max_cost_the_error_has_what_was_got_and_spent(limited: Limited) -> None:
    error = limited.errors["max_cost"]

    assert isinstance(error, OpenCodeBudgetError)
    assert error.limit == 0.0001
    assert error.spent == pytest.approx((100 * 1 + 20 * 10) / 1e6)
    assert error.result is not None
    assert error.result.status == "over_budget"
    assert 1 <= error.result.turns <= 2  # it may have been asked once more until it was stopped


# --- sessions ------------------------------------------------------------------------------------


_GO_ON = """
import pickle, sys

runner, session_id, workspace, cfg = pickle.load(sys.stdin.buffer)
with runner:
    with runner.session(workspace, session_id=session_id) as chat:
        fork = chat.fork()
        print(fork.send("Second").session_id == session_id)
        print(chat.send("Third").session_id == session_id)
    last = runner.run("Fourth", workspace, run_cfg=cfg.replace(continue_session=True))
    print(last.session_id == session_id)
"""


def test_a_pickled_runner_forks_and_continues_a_session_in_another_process(
    make: MakeRunner, cfg: RunConfig, script: Script, tmp_path: Path
) -> None:
    runner = make(data_dir=tmp_path / "kept")
    first = runner.run("First", tmp_path)
    runner.close()

    done = subprocess.run(
        [sys.executable, "-c", _GO_ON],
        cwd=_ROOT,
        input=pickle.dumps((runner, first.session_id, tmp_path, cfg)),
        stdout=subprocess.PIPE,
        check=True,
        timeout=WITHIN_S,
    )

    said = [conversation(request) for request in script.requests[-3:]]
    assert done.stdout.split() == [b"False", b"True", b"True"]
    assert said[0] == ["First", "re First", "Second"]
    assert said[1] == ["First", "re First", "Third"]
    assert said[2] == ["First", "re First", "Third", "re Third", "Fourth"]


# --- configuration -------------------------------------------------------------------------------


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace; words stand in each source of configuration."""
    workspace = tmp_path / "project"
    home = DataDirectories(tmp_path).empty_config()  # but for what OpenCode installs
    for name, directory in (("user", home / "opencode"), ("project", workspace)):
        directory.mkdir(exist_ok=True)
        words = directory / f"{name}.md"
        words.write_text(f"word-of-{name}")
        settings = {"instructions": [str(words)]}
        (directory / "opencode.json").write_text(json.dumps(settings))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    ours = {"agent": {"build": {"prompt": "word-of-parent"}}}
    monkeypatch.setenv("OPENCODE_CONFIG_CONTENT", json.dumps(ours))
    return workspace


@pytest.mark.parametrize(
    "changes, left",
    [
        pytest.param(
            *({"inherit_user_config": False}, {"project"}), marks=pytest.mark.only("process")
        ),
        pytest.param(
            {"inherit_user_config": True, "inherit_project_config": False},
            {"user", "parent"},
            marks=pytest.mark.only("server"),
        ),
    ],
    ids=["without the user's", "without the project's"],
)
def test_configuration_is_merged_with_ours_or_left_out(
    make: MakeRunner,
    cfg: RunConfig,
    configured: Path,
    script: Script,
    changes: dict[str, bool],
    left: set[str],
) -> None:
    """With one runner each: what both set is looked at by OpenCode's own words, in test_command."""
    prompt = script.to("What do you know?", "Words.")
    runner = make(run_cfg=cfg.replace(**changes))

    runner.run(prompt, configured)

    [request] = script.asked(prompt)
    words = {name for name in ("user", "project", "parent") if f"word-of-{name}" in request.system}
    assert words == left


# --- what cannot hold for one of them ------------------------------------------------------------


def is_server(runner: Runner) -> bool:
    return isinstance(runner, OpenCodeServer)


def test_only_a_process_has_an_exit_status_and_output(runner: Runner, whole: Whole) -> None:
    result = whole.result

    if is_server(runner):
        assert (result.exit_code, result.stderr, result.raw_stdout_lines) == (None, "", [])
    else:
        assert result.exit_code == 0
        assert [json.loads(line) for line in result.raw_stdout_lines] == result.events


def test_only_a_server_tells_of_text_before_it_is_complete(runner: Runner, whole: Whole) -> None:
    deltas = [event["delta"] for event in whole.result.events if event["type"] == "text_delta"]

    assert deltas == (["Let me look.", "Done."] if is_server(runner) else [])
