"""Settings that the real OpenCode would pass over without a word, with both runners.

One run of each runner answers for almost all: it has MCP servers that do not work, a variant that
the model does not have, and a permission that nobody knows.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import OpenCodeProcessError, OpenCodeServer, RunConfig, RunResult
from opencode_sync.api.runner import Runner
from opencode_sync.testing import Answer, ChatRequest, Reply, ScriptedModel, tool_call

# An MCP server that has one tool, and ends where that is called.
WORKING = """
import json, sys
def answer(message, **result):
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
for line in sys.stdin:
    message = json.loads(line)
    if message.get("method") == "initialize":
        version = message["params"]["protocolVersion"]
        about = {"name": "works", "version": "1"}
        answer(message, protocolVersion=version, capabilities={"tools": {}}, serverInfo=about)
    elif message.get("method") == "tools/list":
        answer(message, tools=[{"name": "hello", "inputSchema": {"type": "object"}}])
    elif message.get("method") == "tools/call":
        sys.exit(3)
"""
MCP = {
    "missing": {"type": "local", "command": ["/nowhere/docs"]},
    "dying": {"type": "local", "command": ["sh", "-c", "exit 3"]},
    "hanging": {"type": "local", "command": ["sleep", "600"], "timeout": 1000},
    "ending": {"type": "local", "command": [sys.executable, "-c", WORKING]},
    "working": {"type": "local", "command": [sys.executable, "-c", WORKING]},
    "off": {"type": "local", "command": ["/nowhere/docs"], "enabled": False},
}
BROKEN = ("missing", "dying", "hanging", "ending")
PICTURES = ("photo.jpg", "noname")
UNUSUAL = "permission 'deploy' is not a known permission or tool"


def png(width: int = 1) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, 1, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + b"\xff\0\0" * width)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def answer(request: ChatRequest) -> Answer:
    if request.prompt.endswith("Say hello.") and not request.tool_results:
        return Reply.calls(tool_call("ending_hello"))
    return Reply("Done.")


@pytest.fixture(scope="module")
def script() -> Callable[[ChatRequest], Answer]:
    return answer


@pytest.fixture(scope="module")
def cfg(model: ScriptedModel) -> RunConfig:
    return model.run_config(mcp=MCP)


class Warned:
    """What a run came to, and what the model was asked first in it."""

    def __init__(self, result: RunResult, request: ChatRequest) -> None:
        self.result, self.request = result, request
        self.text = "\n".join(result.warnings)


@pytest.fixture(scope="module")
def warned(runner: Runner, cfg: RunConfig, model: ScriptedModel, workspace: Path) -> Warned:
    odd = cfg.replace(variant="highest", permission={"deploy": "deny"})
    if isinstance(runner, OpenCodeServer):
        odd = odd.replace(files=PICTURES)
    for name in PICTURES:
        (workspace / name).write_bytes(png())
    n_asked = len(model.requests)
    result = runner.run("Say hello.", workspace, run_cfg=odd)
    return Warned(result, model.requests[n_asked])


@pytest.mark.parametrize("name", BROKEN)
def test_an_mcp_server_that_does_not_start_dies_or_hangs_is_told(warned: Warned, name: str) -> None:
    told = [text for text in warned.result.warnings if f"the MCP server {name!r}" in text]

    assert len(told) == 1
    assert told[0].startswith(f"The model was without the tools of the MCP server {name!r} (failed")


def test_an_mcp_server_that_works_or_is_off_is_not_told(warned: Warned) -> None:
    assert "working_hello" in warned.request.tools
    assert "'working'" not in warned.text
    assert "'off'" not in warned.text


def test_a_permission_that_nobody_knows_is_told(warned: Warned) -> None:
    assert UNUSUAL in warned.text


def test_an_unknown_variant_is_told(warned: Warned) -> None:
    said = "The variant 'highest' is unknown to the model 'scripted/scripted' (it has low, medium, "

    assert said in warned.text


def test_warnings_are_events_too_and_change_no_status(warned: Warned) -> None:
    events = [event for event in warned.result.events if event["type"] == "warning"]

    assert [event["message"] for event in events] == warned.result.warnings
    assert warned.result.status == "ok"


# --- files ---------------------------------------------------------------------------------------


def sent_images(request: ChatRequest) -> list[str]:
    """The beginnings of the images that the model got."""
    contents: list[Any] = [message.get("content") for message in request.messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part["image_url"]["url"][:22] for part in parts if part.get("type") == "image_url"]


@pytest.mark.only("server")
def test_a_picture_is_seen_by_its_content(warned: Warned) -> None:
    assert sent_images(warned.request) == ["data:image/png;base64,"] * len(PICTURES)


@pytest.mark.only("server")
def test_a_picture_that_cannot_be_read_is_told_in_words(
    runner: Runner, cfg: RunConfig, workspace: Path
) -> None:
    (workspace / "broken.png").write_bytes(png()[:20])

    with pytest.raises(OpenCodeProcessError, match="ImageDecodeError: Image could not be decoded"):
        runner.run("Look.", workspace, run_cfg=cfg.replace(files=("broken.png",)))
