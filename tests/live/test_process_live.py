"""What only a process per run does; tests/live/test_both_runners.py has what a server does too."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeProcessError,
    build_argv,
)
from opencode_sync.testing import ScriptedModel


def test_a_flag_that_the_binary_does_not_know_is_named_with_its_version(
    client: OpenCodeClient,
    opencode_binary: str,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def argv(*args: Any) -> list[str]:
        return [*build_argv(*args), "--from-the-future"]

    monkeypatch.setattr("opencode_sync.process.command.build_argv", argv)
    version = subprocess.check_output([opencode_binary, "--version"], text=True).strip()

    with pytest.raises(OpenCodeProcessError) as caught:
        client.run("Hi", workspace)

    assert f"opencode {version} does not know --from-the-future" in str(caught.value)


def test_a_session_is_refused_in_another_directory_and_nothing_is_left_unpacked(
    opencode_binary: str, workspace: Path, scripted: Any, tmp_path: Path
) -> None:
    model: ScriptedModel = scripted(lambda request: f"re {request.prompt}")
    cfg = model.run_config()
    (workspace / "sub").mkdir()
    data, shared = tmp_path / "data", Path(tempfile.gettempdir())
    before = set(shared.rglob("*.so"))
    refused = f"works in '{workspace}', not in '{workspace / 'sub'}': pass that workspace"

    # Sessions in a directory of ours, and those of a database that is OpenCode's alone to know.
    for isolate_db in (True, False):
        with OpenCodeClient(opencode_binary, isolate_db=isolate_db, data_dir=data) as client:
            first = client.run("one", workspace, run_cfg=cfg)
            for fork in (False, True):
                going_on = cfg.replace(session_id=first.session_id, fork=fork)
                with pytest.raises(OpenCodeConfigError, match=re.escape(refused)):
                    client.run("two", workspace / "sub", run_cfg=going_on)

    assert [request.prompt for request in model.requests] == ["one", "one"]
    assert {*data.rglob("*.so"), *shared.rglob("*.so")} == before
