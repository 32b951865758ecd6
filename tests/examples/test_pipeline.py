"""Test a pipeline of your own without a provider: the model is scripted, the OpenCode is real.

Run it next to your code: pytest test_pipeline.py
"""

from typing import Literal

import pytest
from pydantic import BaseModel

from opencode_sync import OpenCodeError, OpenCodeServer
from opencode_sync.testing import Reply, ScriptedModel


# The pipeline; in your project it stands in a module of its own.
class Label(BaseModel):
    kind: Literal["bug", "wish", "question"]


def sort_issues(server: OpenCodeServer, issues: list[str]) -> dict[str, list[str]]:
    """The issues by kind; those that no answer came for are under "unsorted"."""
    prompts = [f"What kind of issue is this?\n\n{issue}" for issue in issues]
    results = server.map(prompts, schema=Label, on_error="return")
    by_kind: dict[str, list[str]] = {}
    for issue, result in zip(issues, results, strict=True):
        kind = "unsorted" if isinstance(result, OpenCodeError) else result.parsed.kind
        by_kind.setdefault(kind, []).append(issue)
    return by_kind


# Its tests.
def answer(request):
    if "crash" in request.prompt:
        return '{"kind": "bug"}'
    if "teapot" in request.prompt:
        return Reply.failure(401, "no key for teapots")
    return '{"kind": "wish"}'


@pytest.fixture(scope="module")
def server():
    with ScriptedModel(answer) as model, OpenCodeServer(run_cfg=model.run_config()) as server:
        yield server


def test_issues_are_sorted_by_kind(server):
    issues = ["A crash at the start", "More colours", "Another crash"]

    assert sort_issues(server, issues) == {"bug": [issues[0], issues[2]], "wish": [issues[1]]}


def test_an_issue_without_an_answer_is_kept(server):
    assert sort_issues(server, ["a teapot"]) == {"unsorted": ["a teapot"]}
