"""The command line on a terminal: what the screen shows, and what Ctrl-C does.

In the place of opencode stands a program that does what the prompt says, see standin.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.screen import CTRL_C, CTRL_D, UP, Screen
from tests.standin import write_serving, write_standin

Terminal = Callable[..., Screen]

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def standin(tmp_path: Path) -> Path:
    """The program in the place of opencode."""
    return write_standin(tmp_path / "bin" / "opencode")


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """The same for ``opencode serve``; see serving.py for what its prompts do."""
    return write_serving(tmp_path / "bin" / "serving")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """Starts ``opencode-sync`` on a terminal, in an empty directory, with *binary* as opencode."""
    (tmp_path / "here").mkdir()
    with ExitStack() as screens:

        def start(binary: Path, *words: str) -> Screen:
            return screens.enter_context(
                Screen(
                    [sys.executable, "-m", "opencode_sync", *words],
                    cwd=tmp_path / "here",
                    env={"PYTHONPATH": str(ROOT), "OPENCODE_BINARY": str(binary)},
                )
            )

        yield start


@pytest.fixture
def here(terminal: Terminal, tmp_path: Path) -> Path:
    """The directory that the program is started in."""
    return tmp_path / "here"


def saved(here: Path) -> list[str]:
    """The answers in out.jsonl, in order."""
    lines = (here / "out.jsonl").read_text().splitlines()
    return sorted(json.loads(line)["answer"] for line in lines)


# --- run -----------------------------------------------------------------------------------------

HOLD = "[time.sleep(0.01) for _ in iter(lambda: os.path.exists('go-on'), True)]"
HANG = "open('begun', 'w').close(); time.sleep(600)"


def test_a_stream_shows_text_while_the_run_goes_on(
    terminal: Terminal, standin: Path, here: Path
) -> None:
    prompt = f"step(text='first', reason='tool-calls')\n{HOLD}\nstep(text='last')"

    screen = terminal(standin, "run", "--stream", prompt)
    screen.wait_for("first")
    (here / "go-on").touch()

    assert screen.end() == 0
    assert screen.text.startswith("first\n\nlast\nok, 2 steps, 240 tokens, $0.0200, ")


def test_what_a_model_says_cannot_move_the_cursor(terminal: Terminal, standin: Path) -> None:
    prompt = r"step(text='seen\rhidden\x1b[2Jstill')"

    screen = terminal(standin, "run", "--stream", prompt)

    assert screen.end() == 0
    assert screen.text.startswith("seenhiddenstill\n")


@pytest.mark.parametrize("options", [("--stream",), ()], ids=["stream", "plain"])
def test_ctrl_c_ends_a_run_and_its_text_so_far_stays(
    terminal: Terminal, standin: Path, here: Path, options: tuple[str, ...]
) -> None:
    screen = terminal(
        standin, "run", *options, f"step(text='So far.', reason='tool-calls'); {HANG}"
    )
    screen.wait_until((here / "begun").exists)
    if options:
        screen.wait_for("So far.")
    screen.type(CTRL_C)

    assert screen.end() == 130
    assert "So far." in screen.text
    assert "cancelled, 1 step" in screen.text
    assert screen.text.endswith("opencode-sync: interrupted\n")
    assert "Traceback" not in screen.text


# --- map -----------------------------------------------------------------------------------------


def test_a_map_shows_a_bar_with_what_it_cost_and_then_the_report(
    terminal: Terminal, standin: Path, here: Path
) -> None:
    # A bar is drawn ten times a second at most: a job that ends sooner after its first drawing
    # would show with the next one only.
    (here / "in.txt").write_text(f"time.sleep(0.5); step(text='one')\n{HOLD}; fail('bad key')\n")

    screen = terminal(standin, "map", "in.txt", "--output", "out.jsonl", "--workers", "2")
    screen.wait_for("| 1/2 [")
    screen.wait_for("0 failed, $0.0100, 120 tokens]")
    (here / "go-on").touch()

    assert screen.end() == 1
    bar, report, *_ = screen.text.splitlines()
    assert bar.startswith("100%|")
    assert "2/2" in bar
    assert "1 failed, $0.0100, 120 tokens]" in bar
    assert report == "1 done, 1 failed"


def test_ctrl_c_ends_a_map_and_the_same_command_goes_on(
    terminal: Terminal, standin: Path, here: Path
) -> None:
    hang = f"step(text='three') if os.path.exists('begun') else ({HANG.replace(';', ',')})"
    lines = ["step(text='one')", "step(text='two')", hang, "step(text='four')"]
    (here / "in.txt").write_text("\n".join(lines))
    command = ("map", "in.txt", "--output", "out.jsonl", "--workers", "1")

    first = terminal(standin, *command)
    first.wait_until((here / "begun").exists)
    first.type(CTRL_C)
    statuses = [first.end()]
    so_far = saved(here)
    second = terminal(standin, *command)
    statuses.append(second.end())

    assert statuses == [130, 0]
    assert so_far == ["one", "two"]
    assert first.text.endswith(
        "opencode-sync: interrupted: 2 of 4 jobs are in out.jsonl; the same command runs the rest\n"
    )
    assert "Traceback" not in first.text
    assert "2 done, 0 failed, 2 from the checkpoint\n" in second.text
    assert saved(here) == ["four", "one", "three", "two"]


def test_ctrl_c_ends_a_map_on_the_warm_server(terminal: Terminal, server: Path, here: Path) -> None:
    (here / "in.txt").write_text("say one\ntool\n")
    command = ("map", "in.txt", "--output", "out.jsonl", "--workers", "1", "--server")

    screen = terminal(server, *command)
    screen.wait_until(lambda: _has_a_line(here / "out.jsonl"))
    screen.type(CTRL_C)

    assert screen.end() == 130
    assert "1 of 2 jobs are in out.jsonl" in screen.text
    assert saved(here) == ["one"]


# --- chat ----------------------------------------------------------------------------------------


def await_prompt(screen: Screen) -> None:
    """Wait until keys go to the prompt; a Ctrl-D before it has the terminal would be lost."""
    screen.wait_until(lambda: screen.text.rpartition("\n")[2] == "> ")


def test_a_chat_answers_prompt_by_prompt_and_ends_with_ctrl_d(
    terminal: Terminal, server: Path
) -> None:
    screen = terminal(server, "chat")
    await_prompt(screen)
    screen.type("say say one\n")
    screen.wait_for("say one\nok, 1 step, 120 tokens, $0.5000")
    screen.type("say say two\n")
    screen.wait_for("say two\nok")
    await_prompt(screen)
    screen.type(CTRL_D)

    assert screen.end() == 0
    assert "opencode-sync: $1.00; to go on: opencode-sync chat --session ses_" in screen.text


def test_a_chat_asks_for_permission_on_the_screen(terminal: Terminal, server: Path) -> None:
    screen = terminal(server, "chat", "--permission", "ask")
    await_prompt(screen)
    screen.type("ask\n")
    screen.wait_for("OpenCode asks for permission: bash ls\n")
    screen.type("not now\n")
    screen.wait_for('{"reply": "reject", "message": "not now"}\nok')
    await_prompt(screen)
    screen.type(CTRL_D)

    assert screen.end() == 0


def test_what_was_typed_before_a_question_is_no_answer_to_it(
    terminal: Terminal, server: Path
) -> None:
    screen = terminal(server, "chat", "--permission", "ask")
    await_prompt(screen)
    screen.type("ask\ny\n")
    screen.wait_for("with words to the model: ")
    screen.type("not now\n")
    screen.wait_for('{"reply": "reject", "message": "not now"}\nok')
    await_prompt(screen)
    screen.type(CTRL_D)

    assert screen.end() == 0


def test_ctrl_c_ends_a_turn_of_a_chat_and_at_the_prompt_the_chat(
    terminal: Terminal, server: Path
) -> None:
    screen = terminal(server, "chat")
    await_prompt(screen)
    screen.type("tool\n")
    screen.wait_for("\ntool")
    screen.type(CTRL_C)
    screen.wait_for("opencode-sync: interrupted; Ctrl-D ends the conversation\n> ")
    screen.type("say say on\n")
    screen.wait_for("say on\nok")
    await_prompt(screen)
    screen.type(CTRL_C)

    assert screen.end() == 130
    assert screen.text.endswith("opencode-sync: interrupted\n")
    assert "Traceback" not in screen.text


def test_a_later_chat_goes_on_and_has_the_prompts_at_the_arrow_keys(
    terminal: Terminal, server: Path
) -> None:
    first = terminal(server, "chat")
    await_prompt(first)
    first.type("say say one\n")
    first.wait_for("say one\nok")
    await_prompt(first)
    first.type(CTRL_D)
    first.end()
    session = first.text.split()[-1]
    second = terminal(server, "chat", "--session", session)
    second.wait_for("2 messages so far\n> ")
    second.type(f"{UP}\n")
    second.wait_for("> say say one\nsay one\nok")
    await_prompt(second)
    second.type(CTRL_D)

    assert second.end() == 0
    assert second.text.split()[-1] == session


def _has_a_line(path: Path) -> bool:
    return path.exists() and path.read_bytes().endswith(b"\n")
