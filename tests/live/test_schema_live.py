"""Answers with a shape from the real opencode: by its own tool, or by words from a process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from opencode_sync import (
    OpenCodeOutputError,
    OpenCodeServer,
    RunConfig,
)
from opencode_sync.api.runner import Runner
from opencode_sync.testing import Answer, ChatRequest, Reply, ToolCall, tool_call
from tests.live.warm import Script, conversation


class Bird(BaseModel):
    name: str
    legs: int


@dataclass
class Fish:
    name: str
    legs: int


LEGGED = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "legs": {"type": "integer"}},
    "required": ["name", "legs"],
}
GOOD = {"name": "Kiebitz", "legs": 2}
BAD = {"name": "Kiebitz", "legs": "two"}
COST = (100 * 1 + 20 * 10) / 1e6  # of a request, at the scripted model's prices
REPAIR = "That answer does not fit the JSON Schema:"


def saying(value: Mapping[str, Any]) -> Callable[[ChatRequest], Answer]:
    """*value* by the tool where there is one, else in words."""

    def answer(request: ChatRequest) -> Answer:
        if "StructuredOutput" in request.tools:
            return tool_call("StructuredOutput", **value)
        return f"Here it is:\n```json\n{json.dumps(value)}\n```"

    return answer


# --- both runners --------------------------------------------------------------------------------


def test_an_answer_that_does_not_fit_is_repaired_in_the_same_session(
    runner: Runner, workspace: Path, script: Script
) -> None:
    script.answers["Describe it"] = saying(BAD)
    script.answers[REPAIR] = saying(GOOD)

    result = runner.run("Describe it", workspace, schema=Bird)

    assert result.parsed == Bird(name="Kiebitz", legs=2)
    assert (result.status, result.turns, result.attempts) == ("ok", 2, 1)
    assert result.total_cost == pytest.approx(2 * COST)
    assert conversation(script.last)[0].startswith("Describe it")
    assert "- $.legs: " in script.last.prompt


class Node(BaseModel):
    name: str
    kids: list[Node] = []


CUT = '{"name": "root", "kids": [{"name": "leaf"}, {"na'
WHOLE = {"name": "root", "kids": [{"name": "leaf", "kids": []}]}


@pytest.mark.only("server")
def test_a_cut_answer_is_sent_back_and_no_part_of_it_or_of_a_thought_is_taken(
    runner: Runner, workspace: Path, script: Script
) -> None:
    script.to("Draw it", Reply(CUT, finish_reason="length"))
    script.to(REPAIR, f'<think>{{"name": "no"}}</think>\n```json\n{json.dumps(WHOLE)}\n```')

    result = runner.run("Draw it", workspace, schema=Node)

    assert result.parsed == Node(name="root", kids=[Node(name="leaf")])
    assert (result.status, result.turns) == ("ok", 2)
    assert "cut off" in script.last.prompt


# --- on a server ---------------------------------------------------------------------------------


def test_an_object_is_asked_for_by_the_server_s_own_means(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    script.answers["Describe it"] = saying(GOOD)

    result = server.run("Describe it", workspace, schema=Fish)

    assert result.parsed == Fish("Kiebitz", 2)
    assert script.last.body["tool_choice"] == "required"
    assert script.last.prompt == "Describe it"


def test_a_value_that_is_no_object_is_asked_for_as_one(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    script.to("List them", tool_call("StructuredOutput", value=[GOOD, GOOD]))

    result = server.run("List them", workspace, schema=list[Bird])

    assert result.parsed == [Bird(name="Kiebitz", legs=2)] * 2


def test_a_model_that_answers_in_words_is_sent_back_to_the_tool(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    script.to("Describe it", "I would rather not.")
    script.answers[REPAIR] = saying(GOOD)

    result = server.run("Describe it", workspace, schema=Bird)

    assert result.parsed == Bird(name="Kiebitz", legs=2)


@pytest.mark.parametrize(
    "arguments, parsed, turns",
    [(GOOD, GOOD, 1), ('{"name": "Kiebitz", "legs": 2, "al', {**GOOD, "legs": 3}, 2)],
    ids=["whole", "cut"],
)
def test_of_a_cut_answer_the_tool_s_arguments_count_if_they_are_whole(
    server: OpenCodeServer, workspace: Path, script: Script, arguments: Any, parsed: Any, turns: int
) -> None:
    call = ToolCall("StructuredOutput", arguments)
    script.to("Describe it", Reply(tool_calls=[call], finish_reason="length"))
    script.answers[REPAIR] = saying({**GOOD, "legs": 3})

    result = server.run("Describe it", workspace, schema=LEGGED)

    assert (result.parsed, result.status, result.turns) == (parsed, "ok", turns)


def test_several_values_at_once_are_no_answer_and_neither_is_a_rounded_one(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    others = [tool_call("StructuredOutput", name=name, legs=2) for name in ("Kiebitz", "Star")]
    script.to("Describe it", Reply.calls(*others))
    script.to(REPAIR, tool_call("StructuredOutput", name="Kiebitz", legs=2**53 + 1))

    with pytest.raises(OpenCodeOutputError, match="the tool rounds whole numbers") as caught:
        server.run("Describe it", workspace, schema=Bird)

    assert "with 2 different values at once" in script.last.prompt
    assert caught.value.result is not None
    assert caught.value.result.total_cost == pytest.approx(2 * COST)


def test_the_tool_is_there_where_all_others_are_denied(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    script.answers["Describe it"] = saying(GOOD)

    server.run("Describe it", workspace, schema=Bird, run_cfg=RunConfig(permission="deny"))

    assert script.last.tools == ["StructuredOutput"]


def test_a_conversation_with_such_an_answer_is_read_forked_and_continued(
    server: OpenCodeServer, workspace: Path, script: Script
) -> None:
    # With a prompt's format in it, OpenCode 1.18.33 can do neither of the first two.
    script.answers["Describe it"] = saying(GOOD)

    with server.session(workspace) as chat:
        described = chat.send("Describe it", schema=Bird)
        roles = [message["info"]["role"] for message in chat.messages()]
        chat.fork().send("Fork")
        forked = [message["role"] for message in script.last.messages[1:]]
        chat.send("On")

    assert described.parsed == Bird(name="Kiebitz", legs=2)
    assert roles == ["user", "assistant"]
    assert forked == ["user", "assistant", "tool", "user"]
    assert [message["role"] for message in script.last.messages[1:]] == forked
