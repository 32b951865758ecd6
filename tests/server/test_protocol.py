"""Settings become bodies of requests, and messages of a session become events.

In the orders that OpenCode 1.18.33 was seen to use.
"""

from __future__ import annotations

import base64
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import OpenCodeConfigError, RunConfig
from opencode_sync.core.errors import OpenCodeServerError
from opencode_sync.core.events import Event
from opencode_sync.core.reading import OUTPUT_TOOL
from opencode_sync.core.request import Request
from opencode_sync.process.command import sealed
from opencode_sync.server.feed import ANSWER, REFUSED, Message
from opencode_sync.server.protocol import (
    Translator,
    check_command,
    check_server_wide,
    command_body,
    missing_rules,
    permission_rules,
    prompt_body,
    session_body,
)


def request_for(prompt: str = "Fix it", workspace: Path = Path("/"), **settings: Any) -> Request:
    return Request(prompt, workspace, RunConfig(**settings))


def rule(permission: str, action: str, pattern: str = "*") -> dict[str, str]:
    return {"permission": permission, "pattern": pattern, "action": action}


def test_permission_and_tools_become_rules_of_which_the_last_that_matches_counts() -> None:
    permission = {"bash": {"*": "deny", "git *": "allow"}, "external_directory": {"~/a/*": "deny"}}
    request = request_for(tools={"bash": True, "write": True}, permission=permission)

    assert permission_rules(request) == [
        rule("bash", "allow"),
        rule("edit", "allow"),
        rule("bash", "deny"),
        rule("bash", "allow", "git *"),
        rule("external_directory", "deny", f"{Path.home()}/a/*"),
    ]


@pytest.mark.parametrize(
    "prompt, command, title",
    [
        ("\n  First line \nsecond", None, "First line"),
        ("x" * 51, None, "x" * 47 + "..."),
        (" ", "review", "/review"),
        ("the tests", "review", "/review the tests"),
    ],
    ids=["lines", "too long", "a command", "with arguments"],
)
def test_a_session_is_called_by_the_head_of_its_prompt(
    prompt: str, command: str | None, title: str
) -> None:
    assert session_body(request_for(prompt, command=command))["title"] == title


def test_a_session_has_its_own_title_and_nobody_to_ask() -> None:
    body = session_body(request_for(title="T", permission={"bash": "allow"}))

    assert body["title"] == "T"
    assert body["permission"] == [
        rule("question", "deny"),
        rule("plan_enter", "deny"),
        rule("plan_exit", "deny"),
        rule("bash", "allow"),
    ]


def test_a_prompt_goes_out_with_who_is_to_answer_it() -> None:
    request = request_for(model="a/b/c", agent="plan", variant="high", tools={"bash": False})

    assert prompt_body(request) == {
        "parts": [{"type": "text", "text": "Fix it"}],
        "model": {"providerID": "a", "modelID": "b/c"},
        "agent": "plan",
        "variant": "high",
    }


def test_a_command_goes_out_with_the_prompt_as_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    request = request_for("", tmp_path, command="review", model="a/b", files=("a.txt",))

    body = command_body(request, "this and that")

    assert (body["command"], body["arguments"], body["model"]) == ("review", "this and that", "a/b")
    assert [part["filename"] for part in body["parts"]] == ["a.txt"]


PNG = b"\x89PNG\r\n\x1a\n\x00"


@pytest.mark.parametrize(
    "name, content, media_type",
    [
        ("a.txt", "hällo\u2028".encode(), "text/plain"),
        ("a.png", PNG, "image/png"),
        ("noname", PNG, "image/png"),
        ("a.png", b"\xff\xd8\xff\xe0", "image/jpeg"),
        ("a.txt", b"RIFF\x0c\x00\x00\x00WEBPVP8 ", "image/webp"),
        ("a.pdf", b"%PDF-\xe2\xe3", "application/pdf"),
        ("a.png", b"\x00\xff", "application/octet-stream"),
        ("a.png", b"not an image", "text/plain"),
        ("a.mp3", b"\xff\xfb", "audio/mpeg"),
        ("noname", b"\xff\x00", "application/octet-stream"),
        ("empty.txt", b"", "text/plain"),
    ],
)
def test_a_file_goes_out_whole_and_as_what_its_content_is(
    tmp_path: Path, name: str, content: bytes, media_type: str
) -> None:
    (tmp_path / name).write_bytes(content)

    file, _ = prompt_body(request_for("Look", tmp_path, files=(name,)))["parts"]

    head, _, data = file["url"].partition(",")
    assert (file["mime"], file["filename"], head) == (media_type, name, f"data:{media_type};base64")
    assert base64.b64decode(data) == content


def test_a_file_that_has_vanished_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").touch()
    request = request_for("Look", tmp_path, files=("gone.txt",))
    (tmp_path / "gone.txt").unlink()

    with pytest.raises(OpenCodeConfigError, match=r"gone\.txt'.*No such file"):
        prompt_body(request)


def test_a_setting_of_the_server_may_be_left_out_or_repeated_and_not_be_another() -> None:
    server = RunConfig(lean=True, extra_env={"A": "b"}, model="a/b")

    check_server_wide(RunConfig(), server)
    check_server_wide(server.replace(model="c/d", title="T", auto=True), server)
    with pytest.raises(OpenCodeConfigError, match="extra_env is the same for all runs"):
        check_server_wide(RunConfig(extra_env={"A": "c"}), server)


# --- arguments of a command ----------------------------------------------------------------------


def opened(text: str) -> str:
    """As our plugin does it."""

    def word(match: re.Match[str]) -> str:
        letters = match[1]
        return base64.urlsafe_b64decode(letters + "=" * (-len(letters) % 4)).decode()

    return re.sub(r"ocs\.([\w-]*)\.ocs", word, text)


ODD = (
    'a !`touch x` $& $1 @b.txt "two  words" \'in\none\' it\'s [Image 1] "" ocs.YQ.ocs \u00a0ü🙂\t\n'
)


def test_sealed_arguments_hold_nothing_that_is_expanded_and_open_to_what_they_were() -> None:
    found = sealed(ODD)

    assert re.fullmatch(r"""(ocs\.[\w-]*\.ocs|[\s"'])*""", found)
    assert opened(found) == ODD


@pytest.mark.parametrize(
    "template",
    ["See !`git show $1`.", "!`echo $ARGUMENTS`", "!`a`, then !`b\n$2`"],
    ids=["a word", "all", "the second"],
)
def test_a_template_that_puts_its_arguments_into_the_shell_is_refused(template: str) -> None:
    with pytest.raises(OpenCodeConfigError, match="command 'x' puts its arguments into a shell"):
        check_command("x", template, "plain", has_plugin=True)


@pytest.mark.parametrize("arguments", ["!`ls`", "$&", "@a.txt"])
def test_what_a_server_elsewhere_would_expand_is_refused(arguments: str) -> None:
    with pytest.raises(OpenCodeConfigError, match="which OpenCode expands"):
        check_command("x", "Do $1, !`ls`", arguments, has_plugin=False)


def test_arguments_that_nothing_expands_are_taken() -> None:
    check_command("x", "Do $1, !`ls`", "it's (plain); 'is it'?", has_plugin=False)
    check_command("x", "`$1` !`ls` $2", "$& !`ls` @a", has_plugin=True)


A, B, OUTPUT = rule("a", "allow"), rule("b", "allow"), rule(OUTPUT_TOOL, "allow")


@pytest.mark.parametrize(
    "has, wanted, missing",
    [
        ([], [A], [A]),
        ([B, A], [A], []),
        ([A, B], [A], [A]),
        ([A, B], [], []),
        ([A], [A, OUTPUT], [OUTPUT]),
        ([A, OUTPUT], [A], []),
        ([A, OUTPUT], [A, OUTPUT], []),
        ([A], [B, OUTPUT], [B, OUTPUT]),
    ],
)
def test_a_session_gets_the_rules_that_it_lacks(has: Any, wanted: Any, missing: Any) -> None:
    assert missing_rules(has, wanted) == missing


# --- messages as events --------------------------------------------------------------------------


ROOT, CHILD = "ses_root", "ses_child"
TRACE = "\n    at somewhere (/$bunfs/root/chunk.js:1:1)"


class Session:
    """Says what a server says about one turn, and keeps what comes of it."""

    def __init__(self, session_id: str = ROOT, **settings: Any) -> None:
        self.id = session_id
        self.translator = Translator(ROOT, **settings)
        self.events: list[Event] = []
        self._numbers: Iterator[int] = itertools.count(1000)
        self._answer = ""

    def say(self, kind: str, session_id: str = "", **properties: Any) -> list[Event]:
        events = self.translator.read(Message(session_id or self.id, kind, properties))
        self.events += events
        return events

    def user(self, created: int | None = None) -> None:
        created = created or next(self._numbers)
        info = {"id": f"msg_{created}", "role": "user", "time": {"created": created}}
        self.say("message.updated", info=info)

    def answer(self, *, completed: bool = False, created: int | None = None, **more: Any) -> None:
        """Begin an answer, or complete the last one."""
        if not completed:
            self._answer = str(created or next(self._numbers))
        time = {"created": int(self._answer)} | ({"completed": 1} if completed else {})
        info = {"id": f"msg_{self._answer}", "role": "assistant", "time": time} | more
        self.say("message.updated", info=info)

    def part(self, kind: str, part_id: str = "", session_id: str = "", **more: Any) -> list[Event]:
        part = {"id": part_id or f"prt_{next(self._numbers)}", "type": kind}
        part |= {"messageID": f"msg_{self._answer}"} | more
        return self.say("message.part.updated", session_id, part=part)

    def delta(self, part_id: str, delta: str) -> list[Event]:
        return self.say("message.part.delta", partID=part_id, field="text", delta=delta)

    def status(self, kind: str, **more: Any) -> list[Event]:
        return self.say("session.status", status={"type": kind} | more)

    def error(self, name: str, message: str) -> list[Event]:
        return self.say("session.error", error={"name": name, "data": {"message": message}})

    @property
    def is_over(self) -> bool:
        return self.translator.is_over

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.events]


@pytest.fixture
def begun() -> Session:
    """A turn whose first answer has begun."""
    session = Session()
    session.user()
    session.status("busy")
    session.answer()
    session.part("step-start")
    return session


def test_a_text_comes_as_deltas_and_then_whole(begun: Session) -> None:
    begun.part("text", "prt_t", text="", time={"start": 1})
    begun.delta("prt_t", "Hel")
    begun.delta("prt_t", "lo")
    begun.part("text", "prt_t", text="Hello", time={"start": 1, "end": 2})
    late = begun.delta("prt_t", "!")

    assert begun.types == ["step_start", "text_delta", "text_delta", "text"]
    assert begun.events[-1]["part"]["text"] == "Hello"
    assert begun.events[1]["delta"] == "Hel"
    assert late == []


def test_a_summary_is_told_before_its_text_and_once(begun: Session) -> None:
    begun.part("step-finish", reason="stop")
    begun.answer(summary=True)
    begun.part("text", "prt_s", text="", time={"start": 1})
    begun.delta("prt_s", "## Sum")
    begun.part("text", "prt_s", text="## Summary", time={"start": 1, "end": 2})
    begun.answer(completed=True, summary=True)

    assert begun.types == ["step_start", "step_finish", "compaction", "text"]
    assert begun.events[2]["messageID"] == begun.events[3]["part"]["messageID"]


@pytest.mark.parametrize("is_wanted", [True, False], ids=["wanted", "not wanted"])
def test_reasoning_comes_only_where_it_is_wanted(is_wanted: bool) -> None:
    session = Session(with_reasoning=is_wanted)
    session.user()
    session.answer()

    session.part("reasoning", "prt_r", text="", time={"start": 1})
    session.delta("prt_r", "Hm")
    session.part("reasoning", "prt_r", text="Hm", time={"start": 1, "end": 2})

    assert session.types == (["reasoning_delta", "reasoning"] if is_wanted else [])


def test_a_tool_call_comes_when_it_has_ended_and_once(begun: Session) -> None:
    for status in ("pending", "running", "running", "completed", "completed"):
        begun.part("tool", "prt_t", tool="bash", state={"status": status})

    assert begun.types == ["step_start", "tool_use"]
    assert begun.events[-1]["part"]["state"]["status"] == "completed"
    assert begun.translator.has_used_tools


def test_messages_of_an_earlier_turn_are_passed_over() -> None:
    session = Session(since=500)
    session.user(created=400)
    session.part("text", text="the prompt", messageID="msg_400")
    session.answer(created=450)
    session.part("text", text="old", time={"start": 1, "end": 2})
    session.status("idle")

    assert session.events == []
    assert not session.translator.has_begun


# --- the end -------------------------------------------------------------------------------------


def test_a_turn_is_over_when_it_is_idle_and_its_answers_are_complete(begun: Session) -> None:
    begun.part("step-finish", reason="stop")
    begun.answer(completed=True)
    before_idle = begun.is_over
    begun.status("busy")
    begun.status("idle")

    assert not before_idle
    assert begun.is_over
    assert begun.types == ["step_start", "step_finish"]
    assert list(begun.events[0]) == ["type", "timestamp", "sessionID", "part"]


def test_a_turn_is_not_over_between_its_steps(begun: Session) -> None:
    begun.status("idle")  # that of the turn before, come late
    begun.status("busy")
    begun.answer(completed=True, finish="tool-calls")

    assert not begun.is_over


def test_after_an_error_the_answer_is_waited_for(begun: Session) -> None:
    begun.error("APIError", "bad key")
    begun.status("idle")
    at_first_idle = begun.is_over
    begun.answer(completed=True, error={"name": "APIError", "data": {"message": "bad key"}})

    assert not at_first_idle
    assert begun.is_over
    assert begun.types == ["step_start", "error"]


def test_an_error_that_only_the_answer_tells_is_told(begun: Session) -> None:
    begun.answer(completed=True, error={"name": "ContextOverflowError", "data": {}})

    assert begun.types == ["step_start", "error"]


def test_the_step_that_gives_structured_output_is_the_last(begun: Session) -> None:
    begun.part("tool", tool="StructuredOutput", state={"status": "completed"})
    begun.part("step-finish", reason="tool-calls")
    begun.answer(completed=True, structured={"name": "Kiebitz"})
    begun.answer()
    # Words in its place, which may fit the schema.
    begun.answer(completed=True, error={"name": "StructuredOutputError", "data": {}})

    assert begun.events[-1]["part"]["reason"] == "stop"
    assert begun.translator.structured == {"name": "Kiebitz"}
    assert begun.types == ["step_start", "tool_use", "step_finish"]


def test_an_abort_is_an_error_unless_it_is_ours(begun: Session) -> None:
    others = Session()
    others.error("MessageAbortedError", "Aborted")
    assert others.types == ["error"]

    begun.translator.stopped()
    begun.error("MessageAbortedError", "Aborted")
    begun.status("idle")
    begun.answer(completed=True, error={"name": "MessageAbortedError", "data": {}})

    assert begun.types == ["step_start"]
    assert begun.is_over


def test_an_unknown_model_ends_the_turn_and_is_told_once() -> None:
    session = Session()
    session.user()
    session.status("busy")
    session.error("UnknownError", "Model not found: a/b.")
    session.status("idle")
    session.error("UnknownError", f"ProviderModelNotFoundError: Model not found: a/b.{TRACE}")

    assert session.is_over
    assert [event["error"]["data"]["message"] for event in session.events] == [
        "Model not found: a/b."
    ]


def test_an_unknown_agent_ends_the_turn_before_it_begins() -> None:
    session = Session()
    session.error("UnknownError", 'Agent not found: "x". Available agents: build')
    at_first = session.is_over
    session.error("UnknownError", f"UnknownError: UnknownError{TRACE}")

    assert not at_first
    assert session.is_over
    assert session.types == ["error"]


def test_a_failure_that_is_told_with_its_trace_alone_is_told_without_it(begun: Session) -> None:
    begun.status("idle")
    begun.error("UnknownError", f"PlatformError: NotFound{TRACE}")

    assert begun.is_over
    assert begun.events[-1]["error"]["data"]["message"] == "PlatformError: NotFound"


def test_a_trace_in_mid_turn_ends_nothing(begun: Session) -> None:
    begun.error("UnknownError", f"a plugin failed{TRACE}")

    assert not begun.is_over


def test_a_refused_command_is_told_by_the_message_or_else_by_the_refusal() -> None:
    told, untold = Session(), Session()
    refusal = OpenCodeServerError("the server refused it: 500", status_code=500)
    told.say(ANSWER, error=refusal)
    at_first = told.is_over
    told.error("UnknownError", 'Command not found: "x"')
    untold.say(ANSWER, error=refusal)

    last = untold.translator.end()

    assert not at_first
    assert told.is_over
    assert told.types == ["error"]
    assert told.translator.end() == []
    assert [event["error"]["data"]["message"] for event in last] == ["the server refused it: 500"]


# --- what else is told ---------------------------------------------------------------------------


def test_a_retry_bears_the_status_that_was_seen(begun: Session) -> None:
    begun.say(REFUSED, status=429, retry_after_s=7.0)
    (first,) = begun.status("retry", attempt=1, message="slow down")
    (second,) = begun.status("retry", attempt=2, message="slow down")

    assert (first["message"], first["statusCode"], first["attempt"]) == ("429 slow down", 429, 1)
    assert first["retry_after_s"] == 7.0
    assert (second["message"], second.get("statusCode")) == ("slow down", None)
    assert "retry_after_s" not in second


def test_a_retry_waits_for_the_status_that_takes_another_way() -> None:
    session = Session(tells_refusals=True)
    session.user()

    held = session.status("retry", attempt=1, message="slow down")
    was_held = session.translator.has_unexplained
    (event,) = session.say(REFUSED, status=429, retry_after_s=7.0)

    assert (held, was_held, session.translator.has_unexplained) == ([], True, False)
    assert (event["message"], event["statusCode"], event["attempt"]) == ("429 slow down", 429, 1)
    assert event["retry_after_s"] == 7.0


def test_a_retry_whose_status_nobody_tells_is_told_before_what_follows_it() -> None:
    session = Session(tells_refusals=True)
    session.user()

    first = [session.status("retry", attempt=n, message="no route") for n in (1, 2)]
    (second,) = session.status("busy")

    assert first[0] == []
    assert [first[1][0]["attempt"], second["attempt"]] == [1, 2]
    assert "statusCode" not in second
    assert session.translator.take_unexplained() == []


def test_where_nobody_tells_the_status_a_long_pause_is_what_the_provider_asks_for() -> None:
    session = Session()
    session.user()
    own, long = ((time.time() + wait_s) * 1000 for wait_s in (32, 3600))

    (first,) = session.status("retry", attempt=1, message="slow down", next=own)
    (second,) = session.status("retry", attempt=2, message="slow down", next=long)

    assert "retry_after_s" not in first
    assert second["retry_after_s"] == pytest.approx(3600, abs=60)


@pytest.mark.parametrize("kind", ["permission", "question"])
def test_a_request_is_told_with_all_it_says(begun: Session, kind: str) -> None:
    (event,) = begun.say(f"{kind}.asked", CHILD, id="x_1", patterns=["ls"])

    assert (event["type"], event["sessionID"]) == (kind, CHILD)
    assert event["request"] == {"id": "x_1", "patterns": ["ls"]}


def test_a_sub_agent_s_parts_are_told_and_its_errors_and_end_are_not(begun: Session) -> None:
    begun.part("text", session_id=CHILD, text="hi", time={"start": 1, "end": 2}, messageID="msg_c")
    begun.say("session.error", CHILD, error={"name": "APIError", "data": {"message": "no"}})
    begun.say("session.status", CHILD, status={"type": "idle"})

    begun.say("session.created", "ses_x", info={"id": "ses_x"})  # no sub-agent

    assert [(event["type"], event["sessionID"]) for event in begun.events[1:]] == [("text", CHILD)]
    assert not begun.translator.is_doubtful


def task(status: str, child: str | None) -> dict[str, Any]:
    asked = {"subagent_type": "general", "description": "look"}
    metadata = {"sessionId": child} if child else {}
    return {"tool": "task", "state": {"status": status, "input": asked, "metadata": metadata}}


def test_a_sub_agent_is_announced_when_its_session_is_created(begun: Session) -> None:
    info = {"id": CHILD, "parentID": ROOT, "agent": "general", "title": "look (@general subagent)"}

    (event,) = begun.say("session.created", CHILD, info=info)
    again = begun.part("tool", **task("running", CHILD))

    assert event.pop("timestamp")  # type: ignore[misc]
    assert event == {
        "type": "sub_agent",
        "sessionID": ROOT,
        "childID": CHILD,
        "parentID": ROOT,
        "agent": "general",
        "title": "look (@general subagent)",
    }
    assert again == []


def test_a_sub_agent_that_is_taken_up_again_is_announced_by_the_call_of_it(begun: Session) -> None:
    begun.answer()

    pending = begun.part("tool", "prt_1", **task("running", None))
    running = begun.part("tool", "prt_1", **task("running", CHILD))
    completed = begun.part("tool", "prt_1", **task("completed", CHILD))

    assert pending == []
    assert [(e["type"], e["childID"], e["title"]) for e in running] == [  # type: ignore[typeddict-item]
        ("sub_agent", CHILD, "look")
    ]
    assert [event["type"] for event in completed] == ["tool_use"]


def test_a_sub_agent_of_an_earlier_turn_is_not_announced(begun: Session) -> None:
    assert begun.part("tool", **task("completed", CHILD) | {"messageID": "msg_earlier"}) == []


# --- after a gap ---------------------------------------------------------------------------------


def stored(created: int, role: str, *parts: dict[str, Any], **info: Any) -> dict[str, Any]:
    time = {"created": created} | ({"completed": 1} if role == "assistant" else {})
    message = {"id": f"msg_{created}", "role": role, "time": time} | info
    return {"info": message, "parts": [{"messageID": message["id"], **part} for part in parts]}


WHOLE = {"start": 1, "end": 2}


def test_what_is_stored_fills_a_gap_without_telling_anything_twice(begun: Session) -> None:
    begun.part("text", "prt_1", text="one", time=WHOLE)
    answer_id = int(begun._answer)
    messages = [
        stored(10, "assistant", {"id": "prt_0", "type": "text", "text": "old", "time": WHOLE}),
        stored(1000, "user", {"id": "prt_p", "type": "text", "text": "prompt"}),
        stored(
            answer_id,
            "assistant",
            {"id": "prt_1", "type": "text", "text": "one", "time": WHOLE},
            {"id": "prt_2", "type": "tool", "state": {"status": "completed"}},
        ),
        stored(2000, "assistant", {"id": "prt_3", "type": "text", "text": "two", "time": WHOLE}),
    ]

    events = begun.translator.read_stored(ROOT, messages)
    again = begun.translator.read_stored(ROOT, messages)
    begun.status("idle")

    assert [event["part"]["id"] for event in events] == ["prt_2", "prt_3"]
    assert again == []
    assert begun.is_over


def test_a_part_that_is_half_stored_is_told_when_it_is_whole(begun: Session) -> None:
    half = {"id": "prt_1", "type": "text", "text": "", "time": {"start": 1}}

    events = begun.translator.read_stored(ROOT, [stored(2000, "assistant", half)])
    begun._answer = "2000"
    delta = begun.delta("prt_1", "lo")
    begun.part("text", "prt_1", text="Hello", time=WHOLE)

    assert events == []
    assert [event["type"] for event in delta] == ["text_delta"]
    assert begun.events[-1]["part"]["text"] == "Hello"


def test_a_sub_agent_s_earlier_work_is_not_told_again(begun: Session) -> None:
    old = {"id": "prt_old", "type": "text", "text": "old", "time": WHOLE}
    new = {"id": "prt_new", "type": "text", "text": "new", "time": WHOLE}

    events = begun.translator.read_stored(
        CHILD, [stored(10, "assistant", old), stored(3000, "assistant", new)]
    )

    assert [event["part"]["id"] for event in events] == ["prt_new"]
