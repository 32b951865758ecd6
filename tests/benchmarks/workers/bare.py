"""What a script does without any package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, urlsplit

from .answering import serve


def runs(binary: str, prompts: list[str], model: str, env: dict[str, str], **_: Any) -> list[str]:
    """From a shell, the output into a file."""
    shell = 'exec "$0" run --format json -m "$1" "$2" > out.jsonl'
    answers = []
    for prompt in prompts:
        command = ["sh", "-c", shell, binary, model, prompt]
        subprocess.run(command, env={**os.environ, **env}, check=True, stdin=subprocess.DEVNULL)
        with open("out.jsonl") as lines:
            events = [json.loads(line) for line in lines]
        answers.append("".join(event["part"].get("text", "") for event in events))
    return answers


def time_out(binary: str, timeout_s: float) -> float:
    began = time.monotonic()
    try:
        subprocess.run([binary, "run"], stdout=subprocess.DEVNULL, timeout=timeout_s, check=True)
    except subprocess.TimeoutExpired:
        return time.monotonic() - began - timeout_s
    raise AssertionError("it was to time out")


def turns(
    url: str, password: str, prompts: list[str], workspace: str, model: str, threads: int
) -> list[str]:
    """The HTTP calls of a prompt: a new session, and a message that is answered at the end."""
    import base64
    import http.client
    import threading

    token = base64.b64encode(f"opencode:{password}".encode()).decode()
    headers = {"authorization": f"Basic {token}", "content-type": "application/json"}
    local = threading.local()

    def post(path: str, body: dict[str, Any]) -> Any:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(urlsplit(url).netloc)
        target = f"{path}?directory={quote(workspace, safe='')}"
        local.connection.request("POST", target, json.dumps(body), headers)
        response = local.connection.getresponse()
        content = response.read()
        assert response.status == 200, content
        return json.loads(content)

    provider, _, name = model.partition("/")

    def one(prompt: str) -> str:
        session = post("/session", {"title": prompt, "permission": []})
        body = {
            "parts": [{"type": "text", "text": prompt}],
            "model": {"providerID": provider, "modelID": name},
        }
        answer = post(f"/session/{session['id']}/message", body)
        return "".join(part.get("text", "") for part in answer["parts"])

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, prompts))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(serve(runs, time_out, turns))
