"""Conversations with the real opencode: memory, permissions, questions, one turn at a time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeCancelledError,
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeServer,
    PermissionRequest,
    QuestionRequest,
    RunConfig,
    allow_reads,
)
from opencode_sync.testing import tool_call
from tests.endings import sleeping
from tests.live.warm import Script, conversation, shell

WITHIN_S = 60
ASKING = RunConfig(permission={"bash": "ask", "edit": "ask"})


# --- memory --------------------------------------------------------------------------------------


def test_each_turn_knows_those_before_it(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    with server.session(workspace) as chat:
        first = chat.send("My name is Bob.")
        second = chat.send("What is my name?")

    assert chat.total_cost == pytest.approx(first.total_cost + second.total_cost)
    assert chat.token_usage.total == 2 * first.token_usage.total
    assert second.answer == "re What is my name?"
    assert second.session_id == chat.session_id
    assert conversation(script.last) == ["My name is Bob.", "re My name is Bob.", second.prompt]


def test_a_fork_can_begin_before_a_message(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    with server.session(workspace) as chat:
        chat.send("One")
        chat.send("Two")
        two = chat.messages()[2]["info"]["id"]
        chat.fork(two).send("Instead")

        with pytest.raises(OpenCodeConfigError, match="unknown"):
            chat.fork("msg_0")

    assert conversation(script.last) == ["One", "re One", "Instead"]


def test_what_is_reverted_is_forgotten_and_can_come_back(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    with server.session(workspace) as chat:
        chat.send("One")
        chat.send("Two")
        chat.revert()
        chat.unrevert()
        chat.send("Three")
        restored = conversation(script.last)
        chat.revert(chat.messages()[2]["info"]["id"])
        chat.send("Four")

    assert restored == ["One", "re One", "Two", "re Two", "Three"]
    assert conversation(script.last) == ["One", "re One", "Four"]


def test_reverts_go_back_prompt_by_prompt_and_a_fork_has_none_of_it(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    with server.session(workspace) as chat:
        for prompt in ("One", "Two", "Three"):
            chat.send(prompt)
        chat.revert()
        chat.revert()
        with chat.fork() as fork:
            fork.send("Four")
        chat.revert()
        with pytest.raises(OpenCodeConfigError, match="no prompt to take back"):
            chat.revert()

    assert conversation(script.last) == ["One", "re One", "Four"]


def test_a_summary_takes_the_place_of_the_past_and_is_paid_for(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    with server.session(workspace) as chat:
        chat.send("A long story")
        before = chat.total_cost
        chat.summarize()
        chat.send("Go on")

    assert "re A long story" not in conversation(script.last)
    assert chat.total_cost == pytest.approx(before * 3)


def test_sessions_are_listed_and_one_is_removed_if_asked_for(
    server: OpenCodeServer, tmp_path: Path
) -> None:
    with server.session(tmp_path, title="Kept") as kept:
        kept.send("Hello")
    with server.session(tmp_path, delete=True) as removed:
        removed.send("Hello")
        both = server.sessions(tmp_path)

    (left,) = server.sessions(tmp_path)
    assert [each.session_id for each in both] == [removed.session_id, kept.session_id]
    assert (left.session_id, left.title, left.workspace) == (kept.session_id, "Kept", str(tmp_path))
    assert left in server.sessions()


# --- turns ---------------------------------------------------------------------------------------


def test_abort_ends_a_turn_with_its_tool_and_the_next_prompt_is_taken(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    script.to("Sleep", shell("sleep 904"), "Slept.")
    with server.session(workspace) as chat, ThreadPoolExecutor(1) as threads:
        sending = threads.submit(chat.send, "Sleep")
        end = time.monotonic() + WITHIN_S
        while not sleeping(904) and time.monotonic() < end:
            time.sleep(0.02)

        began = time.monotonic()
        chat.abort()
        with pytest.raises(OpenCodeCancelledError, match="aborted"):
            sending.result(WITHIN_S)
        took_s, left = time.monotonic() - began, sleeping(904)
        after = chat.send("Hello")

    assert took_s < 10  # and not for as long as a limit
    assert left == []
    assert after.answer == "re Hello"


def test_prompts_sent_at_once_take_turns_and_get_their_own_answers(
    server: OpenCodeServer, workspace: Path
) -> None:
    prompts = ["One", "Two", "Three"]
    with server.session(workspace) as chat, ThreadPoolExecutor(3) as threads:
        answers = [result.answer for result in threads.map(chat.send, prompts)]
        said = [each["info"]["role"] for each in chat.messages()]

    assert answers == ["re One", "re Two", "re Three"]
    assert said == ["user", "assistant"] * 3


# --- permissions ---------------------------------------------------------------------------------


class Answering:
    """A callback that answers with *reply*, and keeps what it was asked."""

    def __init__(self, reply: Any) -> None:
        self.reply = reply
        self.asked: list[Any] = []

    def __call__(self, request: PermissionRequest | QuestionRequest) -> Any:
        assert threading.current_thread() is threading.main_thread()  # the caller's
        self.asked.append(request)
        return self.reply


@pytest.fixture
def made(workspace: Path) -> Path:
    """A file that the model makes, and that is not there yet."""
    path = workspace / "made"
    path.unlink(missing_ok=True)
    return path


def test_a_tool_that_is_allowed_runs(
    server: OpenCodeServer, script: Script, workspace: Path, made: Path
) -> None:
    script.to("Touch it", shell("touch made"), "Done.")
    allow = Answering("once")

    with server.session(workspace, run_cfg=ASKING, on_permission=allow) as chat:
        result = chat.send("Touch it")

    assert (result.status, result.answer) == ("ok", "Done.")
    assert made.exists()
    assert repr(allow.asked) == "[PermissionRequest(permission='bash', patterns=('touch made',))]"


def test_the_model_sees_the_words_of_a_rejection_and_goes_on(
    server: OpenCodeServer, script: Script, workspace: Path, made: Path
) -> None:
    script.to("Touch it", shell("touch made"), "Then not.")

    with server.session(
        workspace, run_cfg=ASKING, on_permission=lambda _: ("reject", "use mkdir")
    ) as chat:
        result = chat.send("Touch it")
        told = script.last.tool_results[-1]
        after = chat.send("Hello")

    assert "use mkdir" in told
    assert (result.status, result.denied_tools) == ("denied", ["bash"])
    assert (result.answer, after.answer) == ("Then not.", "re Hello")
    assert not made.exists()


def test_always_is_asked_once_for_two_calls(
    server: OpenCodeServer, script: Script, tmp_path: Path
) -> None:
    script.to("Twice", shell("touch one"), shell("touch two"), "Done.")
    always = Answering("always")

    with server.session(tmp_path, run_cfg=ASKING, on_permission=always) as chat:
        chat.send("Twice")

    assert [request.patterns for request in always.asked] == [("touch one",)]
    assert (tmp_path / "two").exists()


def test_always_allows_nothing_that_a_rule_denies(
    server: OpenCodeServer, script: Script, tmp_path: Path
) -> None:
    paths = [str(tmp_path / name) for name in ("one.txt", "two.txt", "secret.txt")]
    writes = [tool_call("write", filePath=path, content="x\n") for path in paths]
    script.to("Write them", *writes, "Done.")
    always = Answering("always")
    cfg = RunConfig(permission={"edit": {"*": "ask", "*secret*": "deny"}})

    with server.session(tmp_path, run_cfg=cfg, on_permission=always) as chat:
        result = chat.send("Write them")

    assert len(always.asked) == 1
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == ["one.txt", "two.txt"]
    assert result.denied_tools == ["write"]


class Refusal(Exception):
    pass


def test_what_a_callback_raises_rejects_ends_the_turn_and_reaches_the_caller(
    server: OpenCodeServer, script: Script, workspace: Path, made: Path
) -> None:
    script.to("Touch it", shell("touch made"), "Done.")
    refusal = Refusal()

    def refuse(request: PermissionRequest) -> Any:
        raise refusal

    with server.session(workspace, run_cfg=ASKING, on_permission=refuse) as chat:
        with pytest.raises(Refusal) as caught:
            chat.send("Touch it")
        after = chat.send("Hello")

    assert caught.value is refusal
    assert not made.exists()
    assert after.answer == "re Hello"


def test_a_sub_agent_s_request_is_asked_too(
    server: OpenCodeServer, script: Script, workspace: Path, made: Path
) -> None:
    task = tool_call("task", description="touch", prompt="Touch below", subagent_type="general")
    script.to("Have it touched", task, "Done.")
    script.to("Touch below", shell("touch made"), "Touched.")
    allow = Answering("once")

    with server.session(workspace, run_cfg=ASKING, on_permission=allow) as chat:
        chat.send("Have it touched")

    assert [request.patterns for request in allow.asked] == [("touch made",)]
    assert allow.asked[0].session_id != chat.session_id
    assert made.exists()


def test_without_a_callback_what_is_asked_is_rejected_at_once(
    server: OpenCodeServer, script: Script, workspace: Path, made: Path
) -> None:
    script.to("Touch it", shell("touch made"), "Done.")

    with server.session(workspace, run_cfg=ASKING) as chat:
        result = chat.send("Touch it")

    assert result.denied_tools == ["bash"]
    assert not made.exists()


def test_a_policy_that_allows_reads_lets_the_model_read_and_not_write(
    server: OpenCodeServer, script: Script, workspace: Path, made: Path
) -> None:
    (workspace / "notes.txt").write_text("Kiebitz")
    read = tool_call("read", filePath=str(workspace / "notes.txt"))
    script.to("Read and touch", read, shell("touch made"), "Done.")

    with server.session(
        workspace, run_cfg=RunConfig(permission="ask"), on_permission=allow_reads
    ) as chat:
        result = chat.send("Read and touch")

    assert "Kiebitz" in script.last.tool_results[0]
    assert not made.exists()
    assert result.answer == "Done."


# --- questions -----------------------------------------------------------------------------------

WHICH = tool_call(
    "question",
    questions=[
        {
            "question": "Which one?",
            "header": "One",
            "options": [{"label": "A", "description": "a"}, {"label": "B", "description": "b"}],
        }
    ],
)


def test_a_question_is_answered(server: OpenCodeServer, workspace: Path, script: Script) -> None:
    script.to("Ask me", WHICH, "Thanks.")
    answer = Answering(["B"])

    with server.session(workspace, on_question=answer) as chat:
        result = chat.send("Ask me")

    (question,) = answer.asked[0].questions
    assert (question.question, [o.label for o in question.options]) == ("Which one?", ["A", "B"])
    assert '"Which one?"="B"' in script.last.tool_results[-1]
    assert result.answer == "Thanks."


def test_a_question_that_is_declined_ends_the_turn(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    script.to("Ask me", WHICH, "Thanks.")

    with server.session(workspace, on_question=lambda _: None) as chat:
        result = chat.send("Ask me")
        after = chat.send("Hello")

    assert (result.status, result.denied_tools) == ("denied", ["question"])
    assert after.answer == "re Hello"


def test_without_a_callback_the_model_cannot_ask(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    with server.session(workspace) as chat:
        chat.send("Hello")

    assert "question" not in script.last.tools


# --- a server elsewhere --------------------------------------------------------------------------


def test_a_session_goes_on_in_a_directory_that_the_server_calls_by_another_name(
    server: OpenCodeServer, script: Script, workspace: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(workspace)
    named = f"{link}/"
    cfg = RunConfig(attach=server.url, password=server.password, remote_dir=named)

    with (
        OpenCodeClient(run_cfg=cfg.replace(model=server._run_cfg.model)) as client,
        client.session() as talk,
    ):
        answers = [talk.send(prompt).answer for prompt in ("by name 1", "by name 2")]

    assert answers == ["re by name 1", "re by name 2"]
    assert "by name 1" in conversation(script.last)
