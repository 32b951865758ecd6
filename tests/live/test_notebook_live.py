"""A notebook's kernel, the real opencode and a scripted model: what the cells show."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil
import pytest

from tests.kernel import Kernel

# The prompts name what the model does: "say X", "tool X", "fail".
SETUP = """
import os
from opencode_sync import OpenCodeServer
from opencode_sync.display import stream
from opencode_sync.testing import Reply, ScriptedModel, tool_call

def answer(request):
    verb, _, words = request.prompt.strip().partition(" ")
    if verb == "fail":
        return Reply.failure(401, "bad <key>")
    if verb == "tool" and not request.tool_results:
        return tool_call("bash", command=words, description="A tool")
    return words

model = ScriptedModel(answer).start()
cfg = model.run_config()
os.environ.update(cfg.extra_env)
os.environ["OPENCODE_CONFIG_CONTENT"] = cfg.opencode_config_content_json()
server = OpenCodeServer(run_cfg=cfg).__enter__()
%load_ext opencode_sync
"""


@pytest.fixture(scope="module")
def kernel(opencode_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    # What the kernel keeps from cell to cell is no leak of a test's.
    temporary = tmp_path_factory.mktemp("temporary")
    environ = {**os.environ, "OPENCODE_BINARY": opencode_binary, "TMPDIR": str(temporary)}
    with Kernel.started(tmp_path_factory.mktemp("notebook"), environ) as kernel:
        outputs = kernel.run(SETUP)
        assert not outputs, outputs
        yield kernel
        kernel.run("server.close()\nmodel.close()\n%unload_ext opencode_sync")
        assert not list(temporary.glob("opencode-sync*"))


@pytest.fixture
def warm(kernel: Kernel) -> Iterator[Kernel]:
    """The kernel, whose cells may start a server: it is stopped after the test."""
    yield kernel
    kernel.run("%reload_ext opencode_sync")


def test_a_result_shows_as_markdown(kernel: Kernel) -> None:
    (output,) = kernel.run("server.run('say **Hello** <script>')")

    assert output["data"]["text/markdown"].startswith("**Hello** &lt;script>\n\n*ok")


def test_a_live_stream_is_one_cell_that_updates(kernel: Kernel) -> None:
    (output,) = kernel.run("result = stream.live(server.stream('tool ls'))")

    page = output["data"]["text/markdown"]
    assert output["output_type"] == "display_data"
    assert page.startswith("<code>&#91;bash&#93; ls</code>\n\nls\n\n*ok")


def test_the_magic_runs_the_cell_and_keeps_the_result(kernel: Kernel) -> None:
    kernel.run("word = 'Hello'")

    (output,) = kernel.run("%%opencode -m scripted/scripted --fill --into greeting\nsay {word}")

    assert output["data"]["text/markdown"].startswith("Hello\n\n*ok")
    assert kernel.value("greeting.answer") == "'Hello'"


def test_the_magic_runs_cells_on_a_server_on_which_the_stop_button_ends_a_turn_alone(
    warm: Kernel,
) -> None:
    magic = "%%opencode -m scripted/scripted --server --into n\n"

    (output,) = warm.run(f"{magic}say one")
    warm.run_until(
        warm.workspace / "begun too",
        f"{magic}tool touch 'begun too'; exec sleep 98764",
    )
    status = warm.value("n.status")
    left = [each for each in psutil.process_iter() if "98764" in " ".join(_command(each))]
    warm.run(f"{magic}say on")

    assert output["data"]["text/markdown"].startswith("one\n\n")
    assert (status, left) == ("'cancelled'", [])
    assert warm.value("n.answer") == "'on'"


def test_an_error_is_shown_in_brief(kernel: Kernel) -> None:
    (output,) = kernel.run("server.run('fail')")

    lines = [line for part in output["traceback"] for line in part.splitlines()]
    assert output["ename"] == "OpenCodeProcessError"
    assert lines[0] == "cell, line 1: server.run('fail')"
    assert "401: bad <key>" in lines[2]
    assert len(lines) < 8


def test_a_map_shows_a_bar(kernel: Kernel) -> None:
    outputs = kernel.run(
        "[r.answer for r in server.map(['say 1', 'say 2'], max_workers=2, progress=True)]"
    )

    assert outputs[-1]["data"]["text/plain"] == "['1', '2']"
    shown = "".join(str(output.get("text", output.get("data"))) for output in outputs)
    assert "2/2" in shown
    assert "Warning" not in shown  # of tqdm, where the notebook has no widgets


def test_the_stop_button_ends_a_map_and_leaves_what_was_finished(kernel: Kernel) -> None:
    outputs = kernel.run_until(
        kernel.workspace / "begun",
        """
results = []
for result in server.map(["say 1", "tool touch begun; exec sleep 98765"], max_workers=1):
    results.append(result)
""",
    )

    assert outputs[-1]["ename"] == "KeyboardInterrupt"
    assert kernel.value("[result.answer for result in results]") == "['1']"
    assert not [each for each in psutil.process_iter() if "98765" in " ".join(_command(each))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
