"""Conversations: turns, requests and answers; with a stand-in for a server, or without."""

from __future__ import annotations

import gc
import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeCancelledError,
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeProcessError,
    OpenCodeServer,
    PermissionRequest,
    QuestionRequest,
    RunConfig,
    Session,
    allow_all,
    allow_reads,
    ask_in_terminal,
)
from opencode_sync.api.permissions import answers_of, permission_request, question_request
from tests.scripted import STEP_COST, ScriptedRunner
from tests.standin import write_serving

WITHIN_S = 30


@pytest.fixture
def runner() -> Iterator[ScriptedRunner]:
    with ScriptedRunner() as runner:
        yield runner


@pytest.fixture
def chat(runner: ScriptedRunner, tmp_path: Path) -> Session:
    return Session(runner, tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OpenCodeServer]:
    """A stand-in's; what its prompts mean stands at its head."""
    with OpenCodeServer(write_serving(tmp_path / "opencode")) as server:
        yield server


# --- turns ---------------------------------------------------------------------------------------


def test_a_conversation_goes_on_where_its_last_turn_ended(
    chat: Session, runner: ScriptedRunner
) -> None:
    before = chat.session_id

    chat.send("hello")
    chat.send("again")

    assert before is None
    assert chat.session_id == "ses_1"
    assert [request.cfg.session_id for request in runner.begun] == [None, "ses_1"]


def test_where_it_begins_holds_for_the_first_turn_alone(
    runner: ScriptedRunner, tmp_path: Path
) -> None:
    cfg = RunConfig(continue_session=True, fork=True, share=True, title="Birds", agent="plan")
    chat = Session(runner, tmp_path, run_cfg=cfg)

    chat.send("hello")
    chat.send("again")

    assert [request.cfg for request in runner.begun] == [
        cfg,
        RunConfig(session_id="ses_1", agent="plan"),
    ]


def test_a_turn_may_have_settings_of_its_own(chat: Session, runner: ScriptedRunner) -> None:
    chat.send("hello")
    chat.send("again", run_cfg=RunConfig(agent="plan", session_id="ses_other"))

    assert runner.begun[1].cfg == RunConfig(agent="plan", session_id="ses_1")


def test_a_turn_that_failed_is_paid_for_and_the_next_one_goes_on(
    chat: Session, runner: ScriptedRunner
) -> None:
    with pytest.raises(OpenCodeProcessError):
        chat.send("fail please")
    chat.send("hello")

    assert chat.total_cost == pytest.approx(2 * STEP_COST)
    assert chat.token_usage.input == 14
    assert runner.begun[1].cfg.session_id == "ses_1"


def test_the_turn_under_way_is_counted_as_it_goes(chat: Session) -> None:
    costs = []

    with chat.stream("hello") as stream:
        for _ in stream:
            costs.append(chat.total_cost)

    assert costs == [0, 0, STEP_COST]
    assert chat.total_cost == STEP_COST


def test_the_first_turn_under_way_tells_the_session_s_id(chat: Session) -> None:
    with chat.stream("hold on") as stream:
        next(stream)

        assert chat.session_id == stream.session_id == "ses_1"


def test_a_fork_is_made_with_its_first_prompt_and_counts_its_own(
    chat: Session, runner: ScriptedRunner
) -> None:
    chat.send("hello")

    fork = chat.fork()
    before = fork.session_id
    fork.send("again")

    assert before is None
    assert runner.begun[1].cfg == RunConfig(session_id="ses_1", fork=True)
    assert (chat.total_cost, fork.total_cost) == (STEP_COST, STEP_COST)


def test_a_prompt_waits_until_the_turn_before_has_ended(
    chat: Session, runner: ScriptedRunner
) -> None:
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(chat.send, "hold on")
        runner.wait_for(1)
        second = threads.submit(chat.send, "hello")
        runner.release()

        assert first.result(WITHIN_S).answer.endswith("HOLD ON")
        assert second.result(WITHIN_S).answer == "HELLO"
    assert runner.most == 1


def test_a_thread_does_not_wait_for_itself(chat: Session) -> None:
    uses: list[Callable[[], object]] = [lambda: chat.send("hello"), chat.fork, chat.revert]

    with chat.stream("hold on"):
        for use in uses:
            with pytest.raises(OpenCodeConfigError, match="this thread has a prompt"):
                use()

    assert chat.send("hello").answer == "HELLO"


def test_an_abandoned_stream_gives_its_turn_back(chat: Session) -> None:
    stream = chat.stream("hold on")
    next(stream)

    del stream
    gc.collect()

    assert chat.send("hello").answer == "HELLO"


def test_a_refused_prompt_gives_its_turn_back(chat: Session) -> None:
    with pytest.raises(OpenCodeConfigError):
        chat.send(" ")
    with pytest.raises(OpenCodeConfigError):
        chat.send("hello", schema="none")

    assert chat.send("hello").answer == "HELLO"


def test_abort_ends_the_turn_under_way_and_no_other(chat: Session, runner: ScriptedRunner) -> None:
    chat.abort()
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(chat.send, "hold on")
        runner.wait_for(1)

        chat.abort()

        with pytest.raises(OpenCodeCancelledError, match="the session was aborted"):
            sending.result(WITHIN_S)
    assert chat.send("hello").answer == "HELLO"


def test_leaving_ends_the_turn_under_way_and_takes_no_more(
    chat: Session, runner: ScriptedRunner
) -> None:
    with ThreadPoolExecutor(1) as threads:
        with chat:
            sending = threads.submit(chat.send, "hold on")
            runner.wait_for(1)
        with pytest.raises(OpenCodeCancelledError, match="the session was closed"):
            sending.result(WITHIN_S)

    with pytest.raises(OpenCodeConfigError, match="resume it by its session_id"):
        chat.send("hello")


def test_a_conversation_has_a_time_limit_of_its_own(runner: ScriptedRunner, tmp_path: Path) -> None:
    chat = Session(runner, tmp_path, timeout_s=0.1)

    with pytest.raises(TimeoutError, match=r"over 0\.1 s"):
        chat.send("hold on")
    with pytest.raises(TimeoutError, match=r"over 0\.2 s"):
        chat.send("hold on", timeout_s=0.2)


def test_it_says_what_it_is(chat: Session) -> None:
    before = repr(chat)
    chat.send("hello")

    assert before.startswith("<Session not begun in ")
    assert repr(chat).startswith("<Session ses_1 in ")
    assert repr(chat).endswith("$0.0100 spent>")


# --- what needs a beginning, or a server ---------------------------------------------------------


def test_what_has_not_begun_has_no_messages_and_no_fork(server: OpenCodeServer) -> None:
    chat = server.session()

    assert chat.messages() == []
    uses: list[Callable[[], object]] = [chat.fork, chat.revert, chat.unrevert, chat.summarize]
    for use in uses:
        with pytest.raises(OpenCodeConfigError, match="send a prompt first"):
            use()


def test_a_summary_by_a_model_without_a_provider_is_refused(server: OpenCodeServer) -> None:
    with pytest.raises(OpenCodeConfigError, match="model 'm' names no provider"):
        server.session().summarize("m")


def test_a_process_per_turn_says_what_it_cannot_do(tmp_path: Path) -> None:
    with OpenCodeClient() as client:
        for needs in ({"on_permission": allow_all}, {"on_question": print}, {"delete": True}):
            with pytest.raises(OpenCodeConfigError, match="needs a server: a process per turn"):
                client.session(tmp_path, **needs)
        with pytest.raises(OpenCodeConfigError, match="needs a server"):
            client.session(tmp_path, session_id="ses_1").messages()
        with pytest.raises(OpenCodeConfigError, match="'bash' is 'ask'"):
            client.session(tmp_path, run_cfg=RunConfig(permission={"bash": "ask"}))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"workspace": "missing"}, "does not exist"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"on_permission": "once"}, "on_permission is str"),
        ({"run_cfg": RunConfig(permission="perhaps")}, "'perhaps'"),
    ],
    ids=["workspace", "timeout", "callback", "permission"],
)
def test_settings_are_checked_at_once(
    server: OpenCodeServer, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(OpenCodeConfigError, match=words):
        server.session(**settings)


# --- permissions ---------------------------------------------------------------------------------

ASKING = RunConfig(permission={"bash": "ask"})


def test_ask_is_a_setting_of_a_session_and_not_of_a_run(server: OpenCodeServer) -> None:
    with pytest.raises(OpenCodeConfigError, match="nobody to ask"):
        server.run("say no", run_cfg=ASKING)

    assert server.session(run_cfg=ASKING).send("say yes").answer == "yes"


@pytest.mark.parametrize(
    "reply, sent",
    [
        ("once", {"reply": "once"}),
        ("always", {"reply": "once"}),
        ("reject", {"reply": "reject"}),
        (("reject", "use ls"), {"reply": "reject", "message": "use ls"}),
    ],
    ids=["once", "always", "reject", "with words"],
)
def test_the_reply_of_the_callback_is_sent(
    server: OpenCodeServer, reply: Any, sent: dict[str, str]
) -> None:
    chat = server.session(on_permission=lambda request: reply)

    assert json.loads(chat.send("ask me").answer) == sent


def test_a_callback_runs_in_the_thread_that_waits(server: OpenCodeServer) -> None:
    threads: list[threading.Thread] = []

    def allow(request: PermissionRequest) -> Any:
        threads.append(threading.current_thread())
        return "once"

    server.session(on_permission=allow).send("ask me")

    assert threads == [threading.current_thread()]


def test_a_reply_that_is_none_rejects_and_is_an_error(server: OpenCodeServer) -> None:
    replies: Iterator[Any] = iter([True, "once"])
    chat = server.session(on_permission=lambda request: next(replies))

    with pytest.raises(OpenCodeConfigError, match="on_permission returned True"):
        chat.send("ask me")

    assert json.loads(chat.send("ask me").answer) == {"reply": "once"}


# --- requests ------------------------------------------------------------------------------------

BASH = {
    "id": "per_1",
    "sessionID": "ses_1",
    "permission": "bash",
    "patterns": ["git status", "ls"],
    "metadata": {"command": "git status && ls"},
    "always": ["git status *", "ls *"],
}
ASKED = {
    "id": "que_1",
    "sessionID": "ses_1",
    "questions": [
        {"question": "Which?", "options": [{"label": "A"}, {"label": "B"}], "custom": False},
        {"question": "More?", "options": [{"label": "X"}, {"label": "Y"}], "multiple": True},
    ],
}


def test_a_permission_request_says_what_is_asked() -> None:
    request = permission_request(BASH)

    assert repr(request) == "PermissionRequest(permission='bash', patterns=('git status', 'ls'))"
    assert request.always == ("git status *", "ls *")
    assert request.metadata["command"] == "git status && ls"
    assert (request.id, request.session_id) == ("per_1", "ses_1")


def test_a_question_says_what_is_asked() -> None:
    request = question_request(ASKED)

    assert repr(request) == (
        "QuestionRequest(questions=("
        "Question(question='Which?', options=(Option(label='A'), Option(label='B')), "
        "multiple=False, custom=False), "
        "Question(question='More?', options=(Option(label='X'), Option(label='Y')), "
        "multiple=True, custom=True)))"
    )


@pytest.mark.parametrize("body", [{}, {"patterns": None, "metadata": None, "questions": None}])
def test_what_a_request_lacks_is_left_out(body: dict[str, Any]) -> None:
    assert permission_request(body).patterns == ()
    assert question_request(body).questions == ()


def asked(reply: Any) -> Any:
    answer = answers_of(None, lambda request: reply).question
    assert answer is not None
    return answer(ASKED)


def test_a_label_or_several_answer_each_question() -> None:
    assert asked(["A", ["X", "Y"]]) == {"answers": [["A"], ["X", "Y"]]}
    assert asked(["A", "something else"]) == {"answers": [["A"], ["something else"]]}
    assert asked(None) is None


@pytest.mark.parametrize(
    "reply",
    ["A", ["A"], 1, ["C", "X"], ["A", 1]],
    ids=["str", "one", "no list", "new", "no label"],
)
def test_an_answer_to_something_else_is_refused(reply: Any) -> None:
    with pytest.raises(OpenCodeConfigError, match="on_question"):
        asked(reply)


# --- policies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["read", "glob", "grep", "list"])
def test_allow_reads_allows_what_reads(name: str) -> None:
    assert allow_reads(PermissionRequest(name)) == "once"


@pytest.mark.parametrize("name", ["bash", "edit", "webfetch", "external_directory", "task"])
def test_allow_reads_tells_the_model_of_all_else(name: str) -> None:
    reply = allow_reads(PermissionRequest(name))

    assert reply == ("reject", "Only reading in the workspace is allowed here.")
    assert allow_all(PermissionRequest(name)) == "once"


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Types lines, and then the end of stdin."""

    def lines(*texts: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{text}\n" for text in texts)))

    return lines


@pytest.mark.parametrize(
    "typed, reply",
    [
        (["y"], "once"),
        (["", "Always"], "always"),
        (["n"], "reject"),
        (["use ls"], ("reject", "use ls")),
        ([], "reject"),
    ],
    ids=["yes", "nothing at first", "no", "words", "end of stdin"],
)
def test_who_sits_at_the_terminal_is_asked_for_permission(
    typing: Any, capsys: pytest.CaptureFixture[str], typed: list[str], reply: Any
) -> None:
    typing(*typed)

    assert ask_in_terminal(permission_request(BASH)) == reply

    shown = capsys.readouterr()
    assert "bash git status, ls\ngit status && ls\n" in shown.err
    assert shown.out == ""


def test_a_request_is_spelled_out_where_a_terminal_would_obey_or_hide_it(
    typing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    typing("y")

    ask_in_terminal(PermissionRequest("bash", ("ls \x1b]; rm -rf / \x07\rls",)))

    assert r"bash ls \x1b]; rm -rf / \x07\rls" in capsys.readouterr().err


def test_a_command_that_is_not_shown_whole_says_so(
    typing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    typing("n")
    command = "ls".ljust(2_000) + "; rm -rf /"

    ask_in_terminal(PermissionRequest("bash", ("ls",), metadata={"command": command}))

    assert "... and 10 characters more, not shown\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed, reply",
    [
        (["1", "1, 2"], [["A"], ["X", "Y"]]),
        (["3", "1,2", "2", "neither"], [["B"], ["neither"]]),
        (["1"], None),
    ],
    ids=["numbers", "until one fits", "end of stdin"],
)
def test_who_sits_at_the_terminal_answers_questions(
    typing: Any, typed: list[str], reply: Any
) -> None:
    typing(*typed)
    request: QuestionRequest = question_request(ASKED)

    assert ask_in_terminal(request) == reply
