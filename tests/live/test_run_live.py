"""One run of the real opencode: what goes in, what comes out, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeProcessError,
    OpenCodeTimeoutError,
    RunResult,
    TokenUsage,
    _command,
)
from opencode_sync.testing import ChatRequest, Reply, ScriptedModel, tool_call

Scripted = Callable[..., ScriptedModel]


# --- the prompt ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        "-- first \"line\"\n\n'second'\twith a tab\u2028and a separator, ünï 🙂\r\n  ",
        "x" * 2_000_000 + "\nend",
    ],
    ids=["every kind of character", "2 MB"],
)
def test_a_prompt_reaches_the_model_byte_for_byte(
    client: OpenCodeClient, scripted: Scripted, workspace: Path, prompt: str
) -> None:
    model = scripted("ok")

    client.run(prompt, workspace, run_cfg=model.run_config())

    assert [request.prompt for request in model.requests] == [prompt]


# --- the answer ----------------------------------------------------------------------------------


def numbered(size: int) -> str:
    """Text of *size* characters in which a missing piece would show."""
    return "".join(f"{number:09d}\n" for number in range(size // 10))


@pytest.mark.parametrize("size", [700_000, 2_000_000, 8_000_000], ids=["0.7 MB", "2 MB", "8 MB"])
def test_a_large_answer_arrives_whole_by_run(
    client: OpenCodeClient, scripted: Scripted, workspace: Path, size: int
) -> None:
    model = scripted(numbered(size))

    result = client.run("Count", workspace, run_cfg=model.run_config())

    # Compared first: pytest would take minutes to show the difference of such texts.
    is_whole = result.final_text == numbered(size).rstrip("\n") or result.final_text == numbered(
        size
    )
    assert is_whole, len(result.final_text)
    assert result.status == "ok"


@pytest.mark.parametrize("size", [700_000, 2_000_000, 8_000_000], ids=["0.7 MB", "2 MB", "8 MB"])
def test_a_large_answer_arrives_whole_by_stream(
    client: OpenCodeClient, scripted: Scripted, workspace: Path, size: int
) -> None:
    model = scripted(numbered(size))

    with client.stream("Count", workspace, run_cfg=model.run_config()) as stream:
        events = list(stream)

    texts = [event["part"]["text"] for event in events if event["type"] == "text"]
    is_whole = [text.rstrip("\n") for text in texts] == [numbered(size).rstrip("\n")]
    assert is_whole, [len(text) for text in texts]
    assert [event["type"] for event in events] == ["step_start", "text", "step_finish"]
    assert stream.result.events == events


# --- how it ends ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool_run(
    opencode_binary: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunResult, list[ChatRequest], Path]:
    """A run with a text, a tool call, an attached file, and an answer."""
    workspace = tmp_path_factory.mktemp("tools")
    (workspace / "notes.txt").write_text("The code word is Kiebitz.\n")
    call = tool_call("bash", command="echo made > made.txt; exit 3", description="Make a file")
    usage = TokenUsage(input=1_000, output=100, cache_read=50)
    script = [
        Reply("Let me look.", tool_calls=[call], usage=usage),
        Reply("Done.", usage=usage),
    ]
    with ScriptedModel(script) as model, OpenCodeClient(opencode_binary) as client:
        cfg = model.run_config(files=("notes.txt",), title="A title")
        result = client.run("Make it", workspace, run_cfg=cfg)
        return result, model.requests, workspace


def test_a_tool_call_works_in_the_workspace_and_stands_in_the_result(
    tool_run: tuple[RunResult, list[ChatRequest], Path],
) -> None:
    result, _, workspace = tool_run

    [call] = result.tool_calls
    assert (workspace / "made.txt").read_text() == "made\n"
    assert call["part"]["tool"] == "bash"
    assert call["part"]["state"]["metadata"]["exit"] == 3


def test_texts_answer_usage_and_cost_are_summed_over_the_steps(
    tool_run: tuple[RunResult, list[ChatRequest], Path],
) -> None:
    result, _, workspace = tool_run

    assert (result.status, result.finish_reason, result.turns) == ("ok", "stop", 2)
    assert (result.final_text, result.answer) == ("Let me look.\n\nDone.", "Done.")
    assert (result.token_usage.input, result.token_usage.output) == (2_000, 200)
    assert result.token_usage.cache_read == 100
    # 1, 10 and 0.1 dollars per million, as the model's default price list has it.
    assert result.total_cost == pytest.approx((2_000 * 1 + 200 * 10 + 100 * 0.1) / 1e6)
    assert (result.exit_code, result.attempts, result.workspace) == (0, 1, str(workspace))
    assert result.duration_s > 0


def test_an_attached_file_reaches_the_model(
    tool_run: tuple[RunResult, list[ChatRequest], Path],
) -> None:
    _, requests, _ = tool_run

    assert "The code word is Kiebitz." in json.dumps(requests[0].body)


@pytest.mark.parametrize(
    "permission, ends",
    [
        ({"bash": "deny"}, "stop"),
        ({"bash": {"*": "allow", "ls*": "deny"}}, "stop"),
    ],
    ids=["the tool", "a command of it"],
)
def test_a_denied_tool_stands_in_the_status_and_is_no_error(
    client: OpenCodeClient,
    scripted: Scripted,
    workspace: Path,
    permission: dict[str, Any],
    ends: str,
) -> None:
    model = scripted([tool_call("bash", command="ls", description="List"), "I may not."])

    result = client.run("List", workspace, run_cfg=model.run_config(permission=permission))

    assert (result.status, result.denied_tools) == ("denied", ["bash"])
    assert (result.finish_reason, result.answer) == (ends, "I may not.")


def test_a_401_is_an_error_whose_first_line_has_the_status_and_the_providers_words(
    client: OpenCodeClient, scripted: Scripted, workspace: Path
) -> None:
    model = scripted(Reply.failure(401, "this key is no good"))

    with pytest.raises(OpenCodeProcessError) as caught:
        client.run("Hi", workspace, run_cfg=model.run_config())

    first_line = str(caught.value).splitlines()[0]
    assert "401" in first_line
    assert "this key is no good" in first_line
    result = caught.value.result
    assert result is not None
    assert result.error is not None
    assert (result.status, result.error.status_code) == ("error", 401)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "scripted/unheard-of"}, "unheard-of"),
        ({"agent": "nobody"}, "'nobody' not found"),
        ({"command": "no-such-command"}, "no-such-command"),
    ],
    ids=["model", "agent", "command"],
)
def test_an_unknown_name_is_an_error_that_names_it(
    client: OpenCodeClient,
    scripted: Scripted,
    workspace: Path,
    changes: dict[str, str],
    words: str,
) -> None:
    model = scripted("I should not be asked.")

    with pytest.raises(OpenCodeProcessError, match=words) as caught:
        client.run("Hi", workspace, run_cfg=model.run_config(**changes))

    assert caught.value.result is not None
    assert caught.value.result.status == "error"
    assert caught.value.result.final_text == ""


def test_a_flag_that_the_binary_does_not_know_is_named_with_its_version(
    client: OpenCodeClient,
    opencode_binary: str,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def argv(*args: Any) -> list[str]:
        return [*_command.build_argv(*args), "--from-the-future"]

    monkeypatch.setattr("opencode_sync.client.build_argv", argv)
    version = subprocess.check_output([opencode_binary, "--version"], text=True).strip()

    with pytest.raises(OpenCodeProcessError) as caught:
        client.run("Hi", workspace)

    assert f"opencode {version} does not know --from-the-future" in str(caught.value)


def test_an_exhausted_timeout_is_an_error_with_what_was_got(
    client: OpenCodeClient, scripted: Scripted, workspace: Path
) -> None:
    call = tool_call("bash", command="echo here", description="Say so")
    asked_again = threading.Event()

    def answer(request: ChatRequest) -> Any:
        if not request.tool_results:
            return call
        asked_again.set()
        return Reply.hang()

    model = scripted(answer)

    with pytest.raises(OpenCodeTimeoutError, match=r"timeout_s") as caught:
        client.run("Hi", workspace, run_cfg=model.run_config(), timeout_s=15)

    assert asked_again.is_set()
    result = caught.value.result
    assert result is not None
    assert (result.status, len(result.tool_calls)) == ("timed_out", 1)
    assert (caught.value.limit, caught.value.limit_s) == ("timeout_s", 15)


# --- sessions ------------------------------------------------------------------------------------

CONTINUE_ELSEWHERE = """
import sys
from opencode_sync import OpenCodeClient, RunConfig
import pickle

binary, data_dir, workspace = sys.argv[1:]
cfg = pickle.loads(sys.stdin.buffer.read())
with OpenCodeClient(binary, data_dir=data_dir) as client:
    print(client.run("Fifth", workspace, run_cfg=cfg).session_id)
"""


def test_sessions_are_continued_forked_and_found_again_in_a_later_process(
    opencode_binary: str, scripted: Scripted, workspace: Path, tmp_path: Path
) -> None:
    import pickle

    model = scripted("ok")
    cfg = model.run_config()
    data_dir = tmp_path / "kept"

    with OpenCodeClient(opencode_binary, data_dir=data_dir) as client:

        def run(prompt: str, **changes: Any) -> str | None:
            return client.run(prompt, workspace, run_cfg=cfg.replace(**changes)).session_id

        first = run("First")
        second = run("Second", session_id=first)
        branch = run("Third", session_id=first, fork=True)
        last = run("Fourth", continue_session=True)
    script = [sys.executable, "-c", CONTINUE_ELSEWHERE]
    elsewhere = subprocess.run(
        [*script, opencode_binary, str(data_dir), str(workspace)],
        input=pickle.dumps(cfg.replace(session_id=first)),
        capture_output=True,
        check=True,
    )

    def turns(request: ChatRequest) -> list[str]:
        messages = request.messages
        return [str(message["content"]) for message in messages if message["role"] == "user"]

    assert [turns(request) for request in model.requests] == [
        ["First"],
        ["First", "Second"],
        ["First", "Second", "Third"],
        ["First", "Second", "Third", "Fourth"],  # the branch was the last
        ["First", "Second", "Fifth"],  # and left the original as it was
    ]
    assert second == first
    assert branch != first
    assert last == branch
    assert elsewhere.stdout.decode().strip() == first


def test_a_session_that_is_unknown_is_refused_by_name(
    client: OpenCodeClient, workspace: Path, scripted: Scripted
) -> None:
    cfg = scripted("ok").run_config(session_id="ses_of_nobody")

    with pytest.raises(OpenCodeConfigError, match="ses_of_nobody"):
        client.run("Hi", workspace, run_cfg=cfg)


# --- threads and configuration -------------------------------------------------------------------


def test_four_threads_share_a_client_and_each_gets_its_own_answer(
    client: OpenCodeClient, scripted: Scripted, workspace: Path
) -> None:
    model = scripted(lambda request: f"You said {request.prompt}.")
    cfg = model.run_config()

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: client.run(str(n), workspace, run_cfg=cfg), range(4)))

    assert [result.final_text for result in answers] == [f"You said {n}." for n in range(4)]
    assert len({result.session_id for result in answers}) == 4


@pytest.fixture
def configured(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[ChatRequest], set[str]]:
    """Puts a word into each source of configuration; tells which of them a request has."""
    sources = {"user": tmp_path / "config/opencode", "project": workspace}
    for name, directory in sources.items():
        directory.mkdir(parents=True, exist_ok=True)
        words = directory / f"{name}.md"
        words.write_text(f"word-of-{name}")
        config = {"instructions": [str(words)]}
        (directory / "opencode.json").write_text(json.dumps(config))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    ours = {"agent": {"build": {"prompt": "word-of-parent"}}}
    monkeypatch.setenv("OPENCODE_CONFIG_CONTENT", json.dumps(ours))

    def words_in(request: ChatRequest) -> set[str]:
        return {
            name for name in ("user", "project", "parent") if f"word-of-{name}" in request.system
        }

    return words_in


def test_configuration_is_inherited_and_merged_with_ours(
    client: OpenCodeClient,
    scripted: Scripted,
    workspace: Path,
    configured: Callable[[ChatRequest], set[str]],
) -> None:
    model = scripted("ok")

    client.run("Hi", workspace, run_cfg=model.run_config(inherit_user_config=True))

    assert [configured(request) for request in model.requests] == [{"user", "project", "parent"}]


@pytest.mark.parametrize(
    "changes, left",
    [
        ({"inherit_user_config": False}, {"project"}),
        ({"inherit_user_config": True, "inherit_project_config": False}, {"user", "parent"}),
    ],
    ids=["the user's", "the project's"],
)
def test_configuration_can_be_left_out(
    client: OpenCodeClient,
    scripted: Scripted,
    workspace: Path,
    configured: Callable[[ChatRequest], set[str]],
    changes: dict[str, bool],
    left: set[str],
) -> None:
    model = scripted("ok")

    client.run("Hi", workspace, run_cfg=model.run_config(**changes))

    assert [configured(request) for request in model.requests] == [left]
