"""The scripted model, asked over HTTP, and by the real opencode at the end."""

from __future__ import annotations

import http.client
import itertools
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from opencode_sync import OpenCodeClient, build_env, testing
from opencode_sync.testing import (
    Answer,
    ChatRequest,
    Reply,
    ScriptedModel,
    TokenUsage,
    ToolCall,
    tool_call,
)

SOON_S = 10.0
PROMPT = "newline\nquotes \" and '\ttab, \u2028 and é \U0001f600"


# --- asking over HTTP ----------------------------------------------------------------------------


@dataclass
class Response:
    """What a client got: of a stream, put together again."""

    status: int
    headers: dict[str, str]
    chunks: list[Any]

    @property
    def _parts(self) -> list[Any]:
        choices = [choice for chunk in self.chunks for choice in chunk.get("choices", ())]
        return [choice.get("delta") or choice.get("message") or {} for choice in choices]

    @property
    def text(self) -> str:
        return "".join(part.get("content") or "" for part in self._parts)

    @property
    def reasoning(self) -> str:
        return "".join(part.get("reasoning_content", "") for part in self._parts)

    @property
    def calls(self) -> list[Any]:
        return [call for part in self._parts for call in part.get("tool_calls", ())]

    @property
    def finish_reason(self) -> Any:
        reasons = [c["finish_reason"] for chunk in self.chunks for c in chunk["choices"]]
        return next(reason for reason in reasons if reason)

    @property
    def usage(self) -> Any:
        return self.chunks[-1].get("usage")

    @property
    def error(self) -> str:
        return str(self.chunks[0]["error"]["message"])


class Client:
    """One connection to a model."""

    def __init__(self, model: ScriptedModel) -> None:
        address = urlsplit(model.base_url)
        self.connection = http.client.HTTPConnection(
            str(address.hostname), address.port, timeout=SOON_S
        )

    def send(self, content: object = "hi", **body: Any) -> http.client.HTTPResponse:
        messages = [{"role": "user", "content": content}]
        body = {"model": "scripted", "messages": messages, "stream": True, **body}
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body))
        return self.connection.getresponse()

    def ask(self, content: object = "hi", **body: Any) -> Response:
        response = self.send(content, **body)
        text = response.read().decode()
        headers = dict(response.getheaders())
        if headers["Content-Type"] == "application/json":
            return Response(response.status, headers, [json.loads(text)])
        *events, done, _ = text.split("\n\n")
        assert done == "data: [DONE]"
        return Response(response.status, headers, [json.loads(e[len("data: ") :]) for e in events])


@pytest.fixture
def connect() -> Iterator[Callable[[ScriptedModel], Client]]:
    clients = []

    def connect(model: ScriptedModel) -> Client:
        clients.append(Client(model))
        return clients[-1]

    yield connect
    for client in clients:
        client.connection.close()


Connect = Callable[[ScriptedModel], Client]
streaming = pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])


# --- scripts -------------------------------------------------------------------------------------


@streaming
def test_a_list_is_answered_in_order(connect: Connect, stream: bool) -> None:
    with ScriptedModel(["one", Reply("two")]) as model:
        client = connect(model)

        texts = [client.ask(stream=stream).text for _ in range(2)]

    assert texts == ["one", "two"]


def test_a_request_after_the_end_of_the_script_fails_and_says_so(connect: Connect) -> None:
    with ScriptedModel(["one"]) as model:
        client = connect(model)
        client.ask()

        answer = client.ask()

    assert answer.status == 400
    assert answer.error == "the script has no reply left"


@pytest.mark.parametrize(
    "replies", ["one", itertools.cycle(["one"])], ids=["a single reply", "a cycle"]
)
def test_a_script_without_end_answers_every_request(connect: Connect, replies: Any) -> None:
    with ScriptedModel(replies) as model:
        client = connect(model)

        texts = [client.ask().text for _ in range(3)]

    assert texts == ["one"] * 3


def test_a_callable_is_called_for_several_requests_at_once(connect: Connect) -> None:
    both_are_here = threading.Barrier(2)

    def reply(request: ChatRequest) -> str:
        both_are_here.wait(SOON_S)
        return request.prompt

    with ScriptedModel(reply) as model, ThreadPoolExecutor() as pool:
        answers = pool.map(lambda n: connect(model).ask(str(n)).text, range(2))

        assert list(answers) == ["0", "1"]


def test_a_generator_answers_requests_in_the_order_in_which_they_are_recorded(
    connect: Connect,
) -> None:
    def count() -> Iterator[str]:
        for n in range(40):
            time.sleep(0.001)  # lets another request come in between
            yield str(n)

    with ScriptedModel(count()) as model, ThreadPoolExecutor(8) as pool:
        answers = dict(pool.map(lambda n: (str(n), connect(model).ask(str(n)).text), range(40)))

        assert [answers[request.prompt] for request in model.requests] == [*map(str, range(40))]


# --- what a reply can be -------------------------------------------------------------------------


@streaming
def test_a_reply_has_reasoning_text_and_tool_calls(connect: Connect, stream: bool) -> None:
    calls = (tool_call("bash", name="ls"), ToolCall("read", {"path": "é"}, id="mine"))
    with ScriptedModel(Reply("Let me look.", tool_calls=calls, reasoning="Hm.")) as model:
        answer = connect(model).ask(stream=stream)

    assert (answer.reasoning, answer.text) == ("Hm.", "Let me look.")
    assert [call["function"]["name"] for call in answer.calls] == ["bash", "read"]
    assert [json.loads(call["function"]["arguments"]) for call in answer.calls] == [
        {"name": "ls"},
        {"path": "é"},
    ]
    assert answer.calls[1]["id"] == "mine"
    assert answer.finish_reason == "tool_calls"


def test_tool_calls_of_one_conversation_have_different_ids(connect: Connect) -> None:
    with ScriptedModel(Reply.calls(tool_call("a"), tool_call("b"))) as model:
        client = connect(model)

        ids = [call["id"] for _ in range(3) for call in client.ask().calls]

    assert len(set(ids)) == 6


def test_usage_counts_the_cache_to_the_input_and_reasoning_to_the_output(connect: Connect) -> None:
    usage = TokenUsage(input=10, output=5, reasoning=3, cache_read=100)
    with ScriptedModel(Reply("x", usage=usage)) as model:
        answer = connect(model).ask(stream_options={"include_usage": True})
        plain = connect(model).ask()

    assert plain.usage is None
    assert answer.usage == {
        "prompt_tokens": 110,
        "completion_tokens": 8,
        "total_tokens": 118,
        "prompt_tokens_details": {"cached_tokens": 100},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }


@streaming
def test_a_failure_has_its_status_message_and_headers(connect: Connect, stream: bool) -> None:
    with ScriptedModel(Reply.failure(429, "slow down", retry_after_s=0.2)) as model:
        answer = connect(model).ask(stream=stream)

    assert (answer.status, answer.error) == (429, "slow down")
    assert (answer.headers["Retry-After"], answer.headers["Retry-After-Ms"]) == ("1", "200")


def test_an_answer_of_8_mb_is_streamed_whole_in_many_chunks(connect: Connect) -> None:
    text = "\U0001f600é-" * (8 * 2**20 // 7)
    with ScriptedModel(text) as model:
        answer = connect(model).ask()

    assert answer.text == text
    assert len(answer.chunks) > 40


# --- in the middle of an answer ------------------------------------------------------------------


def test_an_event_holds_the_model_in_the_middle_of_its_answer(connect: Connect) -> None:
    gate = threading.Event()
    with ScriptedModel(Reply(["first ", gate, "second"])) as model:
        response = connect(model).send()
        before = [response.readline() for _ in range(4)]
        held = model.in_flight
        gate.set()
        after = response.read()

    assert b'"first "' in before[2]
    assert b"second" not in b"".join(before)
    assert b'"second"' in after
    assert held == 1


@streaming
def test_chunks_come_after_pauses_and_callables(connect: Connect, stream: bool) -> None:
    reached = threading.Event()
    with ScriptedModel(Reply(["a", 0.01, "b", reached.set, "c"])) as model:
        answer = connect(model).ask(stream=stream)

    assert answer.text == "abc"
    assert reached.is_set()


def test_a_delay_passes_before_the_first_byte(connect: Connect) -> None:
    with ScriptedModel(Reply("late", delay_s=0.2)) as model:
        began = time.monotonic()
        answer = connect(model).ask()

    assert answer.text == "late"
    assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("text", ["", "half"], ids=["before the first byte", "after some text"])
def test_a_cut_answer_ends_without_its_end(connect: Connect, text: str) -> None:
    with ScriptedModel(Reply.cut(text)) as model:
        client = connect(model)

        with pytest.raises((http.client.IncompleteRead, http.client.RemoteDisconnected)) as caught:
            client.send().read()

    partial = getattr(caught.value, "partial", b"")
    assert text.encode() in partial
    assert b"DONE" not in partial


@pytest.mark.parametrize(
    "reply",
    [
        Reply.hang(),
        Reply.hang("half"),
        Reply("late", delay_s=60),
        Reply(["half", 60.0]),
        Reply(["half", threading.Event()]),
    ],
    ids=["a hang", "a hang after text", "a delay", "a pause", "a gate"],
)
def test_an_answer_under_way_ends_with_the_model(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, reply: Reply
) -> None:
    monkeypatch.setattr(testing, "CLOSE_S", 60.0)  # no thread is to need it
    model = ScriptedModel(reply).start()
    address = urlsplit(model.base_url)
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(lambda: connect(model).send().read())
        model.wait_for_requests(1)
        began = time.monotonic()

        model.close()

        assert time.monotonic() - began < SOON_S
        assert isinstance(asking.exception(SOON_S), (http.client.HTTPException, OSError))
    assert model.in_flight == 0
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(str(address.hostname), address.port).connect()


@pytest.mark.parametrize(
    "reply",
    [Reply.hang("half"), Reply(["half", 60.0]), Reply(["half", threading.Event()])],
    ids=["a hang", "a pause", "a gate"],
)
def test_a_client_that_goes_away_ends_its_answer(connect: Connect, reply: Reply) -> None:
    with ScriptedModel(reply) as model:
        client = connect(model)
        response = client.send()
        model.wait_for_requests(1)

        response.close()
        client.connection.close()

        model.wait_until_idle(SOON_S)


# --- what went wrong -----------------------------------------------------------------------------


def test_what_the_callable_raises_fails_the_request_and_the_test(connect: Connect) -> None:
    def reply(request: ChatRequest) -> str:
        raise LookupError("no such case")

    with pytest.raises(LookupError, match="no such case"), ScriptedModel(reply) as model:
        answer = connect(model).ask()

    assert answer.status == 400
    assert answer.error == "the script raised LookupError('no such case')"


def test_what_the_callable_raises_does_not_hide_what_the_test_raises(connect: Connect) -> None:
    def reply(request: ChatRequest) -> str:
        raise LookupError("no such case")

    with pytest.raises(ZeroDivisionError), ScriptedModel(reply) as model:
        connect(model).ask()
        raise ZeroDivisionError

    assert [type(error) for error in model.errors] == [LookupError]


def test_a_callable_in_an_answer_that_raises_cuts_it_and_fails_the_test(connect: Connect) -> None:
    def gate() -> None:
        raise TimeoutError("the test did not open the gate")

    with pytest.raises(TimeoutError, match="gate"), ScriptedModel(Reply(["half", gate])) as model:
        client = connect(model)
        with pytest.raises(http.client.IncompleteRead):
            client.send().read()


def test_what_is_not_a_reply_is_refused_by_name(connect: Connect) -> None:
    script: Any = [None]

    with pytest.raises(TypeError, match="None is not a reply"), ScriptedModel(script) as model:
        answer = connect(model).ask()

    assert "None is not a reply" in answer.error


@pytest.mark.parametrize(
    "method, path, content, status",
    [
        ("GET", "/v1/nothing", None, 404),
        ("POST", "/v1/embeddings", b"{}", 404),
        ("POST", "/v1/chat/completions", b"{cut", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
    ],
    ids=["an unknown page", "an unknown service", "not JSON", "not an object"],
)
def test_an_invalid_request_is_refused_and_not_recorded(
    connect: Connect, method: str, path: str, content: bytes | None, status: int
) -> None:
    with ScriptedModel("x") as model:
        connection = connect(model).connection
        connection.request(method, path, content)
        response = connection.getresponse()

        assert response.status == status
        assert json.loads(response.read())["error"]["message"]
        assert model.requests == []


def test_the_models_are_listed(connect: Connect) -> None:
    with ScriptedModel("x", model="small-talk") as model:
        connection = connect(model).connection
        connection.request("GET", "/v1/models")
        models = json.loads(connection.getresponse().read())["data"]

    assert models[0]["id"] == "small-talk"


# --- what is recorded ----------------------------------------------------------------------------


def test_a_request_is_recorded_with_what_it_holds(connect: Connect) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
        {"role": "user", "content": PROMPT},
    ]
    tools = [{"type": "function", "function": {"name": "bash"}}]
    with ScriptedModel("x") as model:
        connect(model).ask(messages=messages, tools=tools)
        request = model.requests[0]

    assert (request.system, request.prompt) == ("Be brief.", PROMPT)
    assert (request.tools, request.tool_results) == (["bash"], ["42"])
    assert (request.model, request.messages) == ("scripted", messages)
    assert request.headers["content-length"] == str(len(json.dumps(request.body)))
    assert abs(request.received_at - time.time()) < 60


def test_a_prompt_in_parts_is_joined_by_newlines(connect: Connect) -> None:
    parts: Any = [{"type": "text", "text": "a file"}, {"type": "image_url"}]
    with ScriptedModel("x") as model:
        connect(model).ask([*parts, {"type": "text", "text": "a prompt"}])

        assert model.requests[0].prompt == "a file\na prompt"


def test_waiting_for_requests_that_do_not_come_says_how_many_did(connect: Connect) -> None:
    with ScriptedModel("x") as model:
        connect(model).ask()

        with pytest.raises(TimeoutError, match="1 of 2 requests after 0"):
            model.wait_for_requests(2, timeout_s=0.01)


def test_the_most_requests_in_flight_are_counted(connect: Connect) -> None:
    gate = threading.Event()
    with ScriptedModel(Reply([gate, "x"])) as model, ThreadPoolExecutor() as pool:
        asking = [pool.submit(connect(model).ask) for _ in range(3)]
        model.wait_for_requests(3)
        during = model.in_flight
        gate.set()
        [each.result(SOON_S) for each in asking]

        assert (during, model.max_in_flight) == (3, 3)
        assert model.in_flight == 0


def test_more_requests_than_the_limit_are_refused_and_recorded_apart(connect: Connect) -> None:
    gate = threading.Event()
    script: list[Answer] = [Reply([gate, "first"]), "second"]
    with (
        ScriptedModel(script, max_concurrent=1, retry_after_s=3) as model,
        ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(connect(model).ask)
        model.wait_for_requests(1)
        client = connect(model)

        refused = client.ask("too much")
        gate.set()
        first.result(SOON_S)
        second = client.ask("again")

    assert (refused.status, refused.headers["Retry-After"]) == (429, "3")
    assert second.text == "second"
    assert [request.prompt for request in model.refused_requests] == ["too much"]
    assert [request.prompt for request in model.requests] == ["hi", "again"]


@streaming
def test_an_answered_request_is_no_longer_in_flight(connect: Connect, stream: bool) -> None:
    with ScriptedModel("x", max_concurrent=1) as model:
        for _ in range(100):
            client = connect(model)
            client.ask(stream=stream)
            client.connection.close()

        assert model.refused_requests == []


@pytest.mark.parametrize(
    "body",
    [
        {"model": "scripted-side"},
        {"messages": [{"role": "system", "content": "You are a title generator. You ..."}]},
    ],
    ids=["the side model", "a title"],
)
def test_what_opencode_asks_for_by_itself_uses_up_no_reply(connect: Connect, body: Any) -> None:
    with ScriptedModel(["one"], max_concurrent=0) as model:
        answer = connect(model).ask(**body)

    assert answer.text == "Scripted conversation"
    assert (len(model.side_requests), model.requests) == (1, [])


# --- its life ------------------------------------------------------------------------------------


def test_a_closed_model_keeps_its_records_and_has_no_address(connect: Connect) -> None:
    model = ScriptedModel("x")
    model.start()
    connect(model).ask()

    model.close()
    model.close()

    assert len(model.requests) == 1
    assert repr(model) == "<ScriptedModel 'scripted', closed, 1 requests>"
    with pytest.raises(RuntimeError, match="start"):
        _ = model.base_url


def test_the_run_config_points_opencode_here() -> None:
    with ScriptedModel("x", model="m", cost={"input": 2}) as model:
        cfg = model.run_config()
        base_url = model.base_url

    config = cfg.build_opencode_config_dict()
    provider = config["provider"]["scripted"]
    assert cfg.model == config["model"] == "scripted/m"
    assert provider["options"]["baseURL"] == base_url
    assert provider["models"]["m"]["cost"] == {"input": 2, "output": 0}


def test_changes_of_the_run_config_are_merged() -> None:
    changes: dict[str, Any] = {
        "agent": "plan",
        "lean": False,
        "config_overrides": {"agent": {"title": {"disable": False}}},
        "extra_env": {"FOO": "bar"},
    }
    with ScriptedModel("x") as model:
        cfg = model.run_config(**changes)

    config = cfg.build_opencode_config_dict()
    assert (cfg.agent, cfg.lean) == ("plan", False)
    assert config["agent"]["title"] == {"disable": False}
    assert "scripted" in config["provider"]
    assert cfg.extra_env is not None
    assert cfg.extra_env["FOO"] == "bar"


def test_a_proxy_of_the_environment_is_not_asked_for_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_PROXY", "example.com")

    with ScriptedModel("x") as model:
        env = model.run_config().extra_env

    assert env is not None
    assert env["NO_PROXY"] == "example.com,127.0.0.1"


# --- the real opencode ---------------------------------------------------------------------------


@pytest.fixture
def client(opencode_binary: str) -> Iterator[OpenCodeClient]:
    with OpenCodeClient(opencode_binary) as client:
        yield client


def test_opencode_makes_the_requests_of_the_conversation_and_no_others(
    client: OpenCodeClient, tmp_path: Path
) -> None:
    usage = TokenUsage(input=1000, output=50, reasoning=10, cache_read=300)
    look = tool_call("bash", command="echo $((6 * 7))", description="Multiply")
    cost = {"input": 2, "output": 20, "cache_read": 1}
    with ScriptedModel([look, Reply("42.", usage=usage)], cost=cost) as model:
        result = client.run(PROMPT, tmp_path, run_cfg=model.run_config())

    assert result.answer == "42."
    assert [request.prompt for request in model.requests] == [PROMPT, PROMPT]
    assert model.requests[1].tool_results == ["42\n"]
    assert model.requests[0].session_id == result.session_id
    assert model.side_requests == []
    # The first step has the default usage. A million tokens cost 2, 20 and 1 dollars; reasoning
    # counts as output.
    first, second = 100 * 2 + 20 * 20, 1000 * 2 + 60 * 20 + 300 * 1
    assert result.total_cost == pytest.approx((first + second) / 1e6)
    assert result.token_usage.total == 120 + 1360


def test_a_title_that_opencode_asks_for_uses_up_no_reply(
    opencode_binary: str, tmp_path: Path
) -> None:
    with_titles = {"agent": {"title": {"disable": False}}}
    with ScriptedModel(["done"]) as model:
        cfg = model.run_config(config_overrides=with_titles)
        # Without --title, which our runners give.
        subprocess.run(
            [opencode_binary, "run", "-m", str(cfg.model), "hi"],
            cwd=tmp_path,
            env={**build_env(cfg), "PWD": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )

    assert (len(model.requests), len(model.side_requests)) == (1, 1)
