"""Read by the type checker alone, as a user's program is: see test_typing.py.

A line that ends in `type: ignore` is one that it must object to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import assert_type

from opencode_sync import (
    ErrorInfo,
    Event,
    Job,
    OpenCodeBudgetError,
    OpenCodeClient,
    OpenCodeError,
    OpenCodePermissionError,
    OpenCodeProcessError,
    OpenCodeServer,
    OpenCodeTimeoutError,
    Retry,
    RunConfig,
    RunResult,
    RunStream,
    Session,
    SubAgent,
    TokenUsage,
    parse_event_line,
)
from opencode_sync.testing import ScriptedModel


def one_run(workspace: Path) -> str:
    with OpenCodeClient(any_version=True) as client:
        assert_type(client, OpenCodeClient)
        result = client.run("Explain this", workspace, timeout_s=60, max_cost=0.5, max_steps=9)
    assert_type(result, RunResult)
    assert_type(result.total_cost, float)
    assert_type(result.token_usage, TokenUsage)
    assert_type(result.error, ErrorInfo | None)
    assert_type(result.events, list[Event])
    assert_type(result.warnings, list[str])
    assert_type(result.sub_agents, list[SubAgent])
    return result.final_text


def outcomes(result: RunResult) -> str:
    if result.status == "timed_out":
        return "too slow"
    if result.status == "time_out":  # type: ignore[comparison-overlap]
        return "no such status"
    return "as it is"


def a_stream(client: OpenCodeClient) -> RunResult:
    with client.stream("List the files", ".", log_file="events.jsonl") as stream:
        assert_type(stream, RunStream)
        for event in stream:
            assert_type(event, Event)
        assert_type(stream.session_id, str | None)
    return stream.result


def events_by_type(event: Event) -> None:
    if event["type"] == "text":
        text: str = event["part"]["text"]
        print(text)
        event["part"]["txt"]  # type: ignore[typeddict-item]
    elif event["type"] == "tool_use":
        tool: str = event["part"]["tool"]
        arguments: dict[str, Any] = event["part"]["state"]["input"]
        print(tool, arguments)
    elif event["type"] == "step_finish":
        cost: float = event["part"]["cost"]
        cached: int = event["part"]["tokens"]["cache"]["read"]
        print(cost, cached)
    elif event["type"] == "error":
        message: str = event["error"]["data"]["message"]
        print(message)
    elif event["type"] == "text_delta":
        delta: str = event["delta"]
        print(delta)
    elif event["type"] == "diagnostic":
        raw: str = event["raw"]
        print(raw)
    elif event["type"] == "warning":
        sentence: str = event["message"]
        print(sentence)
    elif event["type"] == "sub_agent":
        child: str = event["childID"]
        print(child)
    elif event["type"] == "compaction":
        summary: str = event["messageID"]
        print(summary)
    elif event["type"] == "retry":
        wait_s: float = event["retry_after_s"]
        print(wait_s)


def a_batch(server: OpenCodeServer) -> tuple[str, ...]:
    job = Job("Say one.", max_cost=0.5, max_steps=9, max_tokens=1_000)
    with server.map([job], ".", max_total_tokens=10_000, max_steps=20, max_tokens=2_000) as batch:
        for result in batch:
            assert_type(result, RunResult)
    assert_type(batch.report.empty, int)
    assert_type(batch.results, list[RunResult | OpenCodeError])
    again = Retry(2, delay_s=60, on=(OpenCodeTimeoutError,))
    for end in server.map(["Say one."], on_error="return", retries=again, progress="always"):
        assert_type(end, RunResult | OpenCodeError)
    return batch.report.warnings


def a_revert(session: Session) -> list[str]:
    session.send("Write a file", max_steps=9, max_tokens=1_000)
    return session.revert(all_files=False)


def wrong_options(client: OpenCodeClient, session: Session) -> None:
    client.run("Go", timeout=60)  # type: ignore[call-arg]
    client.run("Go", timeout_s="60")  # type: ignore[arg-type]
    client.run("Go", keep_events=False)  # type: ignore[call-arg]
    client.map(["Go"], log_file="events.jsonl")  # type: ignore[call-overload]
    session.stream("Go", max_step=3)  # type: ignore[call-arg]


def events_are_dicts(line: bytes) -> object:
    event = parse_event_line(line)
    return event.get("type"), dict(event), {**event}


def settings() -> RunConfig:
    cfg = RunConfig(
        model="provider/model", files=("a.txt", Path("b.txt")), permission={"*": "deny"}
    )
    assert_type(cfg.replace(thinking=True), RunConfig)
    cfg.model = "other/model"  # type: ignore[misc]
    RunConfig(modle="provider/model")  # type: ignore[call-arg]
    return cfg


def errors(client: OpenCodeClient) -> RunResult | None:
    try:
        return client.run("Go")
    except OpenCodeTimeoutError as error:
        assert_type(error.result, RunResult | None)
    except OpenCodeProcessError as error:
        assert_type(error.exit_code, int | None)
    except OpenCodeBudgetError as error:
        assert_type(error.limit_name, str)
    except OpenCodePermissionError as error:
        assert_type(error.tool, str | None)
    except OpenCodeError as error:
        return error.result
    return None


def a_pipeline_under_test() -> None:
    with ScriptedModel(["Hello!"]) as model, OpenCodeClient(run_cfg=model.run_config()) as client:
        client.run("Greet")
