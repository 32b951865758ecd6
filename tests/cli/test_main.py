"""The command line: what goes to stdout and to stderr, and every exit status.

In the place of opencode stands a program that does what the prompt says, see standin.py.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import __version__
from opencode_sync.batch.table import FORMATS, SETTINGS
from opencode_sync.cli import demo, main
from opencode_sync.core.limits import LIMITS_OF_A_JOB
from opencode_sync.process import install
from opencode_sync.process.command import TESTED_VERSION
from tests.standin import VERSION, write_serving, write_standin

Shell = Callable[..., tuple[int, str, str]]

ROOT = Path(__file__).parents[2]
WITHIN_S = 30
HELLO = "step(text='Hello.')"


@pytest.fixture(autouse=True)
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program in the place of opencode; the current directory is another one."""
    monkeypatch.chdir(tmp_path)
    path = write_standin(tmp_path / "bin" / "opencode")
    monkeypatch.setenv("OPENCODE_BINARY", str(path))
    return path


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str]) -> Shell:
    """Runs a command line; returns the exit status, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        try:
            status = main.main(words)
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capfd.readouterr()

    return run


# --- help and usage ------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], *([command.name] for command in main._COMMANDS)])
def test_help_fits_a_screen_and_shows_an_example(shell: Shell, words: list[str]) -> None:
    status, out, _ = shell(*words, "--help")

    lines = out.splitlines()
    assert status == 0
    assert len(lines) <= (60 if words == ["map"] else 30)  # it explains its input too
    assert max(map(len, lines)) <= 80
    assert f"opencode-sync {' '.join(words)}" in lines[-1]


def test_the_help_of_map_lists_what_it_reads(shell: Shell) -> None:
    _, out, _ = shell("map", "--help")

    for understood in (*FORMATS, *LIMITS_OF_A_JOB, *SETTINGS, "key", "workspace"):
        assert understood in out


def test_the_version_is_the_packages(shell: Shell) -> None:
    assert shell("--version") == (0, f"opencode-sync {__version__}\n", "")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="no command"),
        pytest.param(["run"], id="no prompt"),
        pytest.param(["run", "a", "--json", "--stream"], id="two shapes"),
        pytest.param(["run", "--mod", "p/m", "a"], id="abbreviated option"),
        pytest.param(["map", "a.txt"], id="no output"),
        pytest.param(["map", "a.txt", "-o", "b", "--on-error", "x"], id="no such choice"),
        pytest.param(["map", "a.txt", "-o", "b", "--retry-on", "x"], id="no such error"),
        pytest.param(["map", "a.txt", "-o", "b", "--max-total-cost", "x"], id="no such number"),
    ],
)
def test_wrong_usage_is_one_line_on_stderr(shell: Shell, words: list[str]) -> None:
    status, out, err = shell(*words)

    assert (status, out) == (2, "")
    assert err.startswith("opencode-sync")
    assert len(err.splitlines()) == 1


# --- run: what is printed ------------------------------------------------------------------------


def test_the_text_alone_goes_to_stdout(shell: Shell) -> None:
    status, out, err = shell("run", HELLO)

    assert (status, out) == (0, "Hello.\n")
    assert err.startswith("ok, 1 step, 120 tokens, $0.0100, ")
    assert err.endswith("s, session ses_1\n")


def test_the_session_s_id_is_printed_without_escape_sequences(shell: Shell) -> None:
    end = r'show(sessionID="ses\x1b[2J\u202e_2", type="step_finish", part={"reason": "stop"})'

    assert shell("run", end)[2].endswith("s, session ses_2\n")


def test_log_lines_are_shown_without_escape_sequences(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with main._log_lines(True):
        logging.getLogger("opencode_sync").info("turn in %s", "ses\x1b[2J_1")

    assert capsys.readouterr().err == "turn in ses_1\n"


def test_a_terminal_gets_no_escape_sequences(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    _, out, err = shell("run", r"step(text='a\x1b[2Jb\rc'); fail('bad\rkey')")

    assert out == "abc\n"
    assert "401: badkey\n" in err


def test_a_stream_prints_the_same_text_and_tells_tools_on_stderr(shell: Shell) -> None:
    tool = "('bash', {'status': 'completed', 'title': 'ls', 'metadata': {'exit': 0}})"
    prompt = f"step(text='I look.', tool={tool}, reason='tool-calls')\nstep(text='Nothing.')"

    streamed = shell("run", "--stream", prompt)
    plain = shell("run", prompt)

    assert streamed[1] == plain[1] == "I look.\n\nNothing.\n"
    assert streamed[2].splitlines()[0] == "[bash] ls"


def test_json_is_the_whole_result(shell: Shell) -> None:
    status, out, _ = shell("run", "--json", HELLO)
    failed, failed_out, _ = shell("run", "--json", "step(text='So far.'); fail('no')")

    result, failure = json.loads(out), json.loads(failed_out)
    assert status == 0
    assert (result["status"], result["answer"], result["total_cost"]) == ("ok", "Hello.", 0.01)
    assert [event["type"] for event in result["events"]] == ["step_start", "text", "step_finish"]
    assert failed == 1
    assert (failure["status"], failure["final_text"]) == ("error", "So far.")


SCHEMA = '{"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}'


REFUSAL = {"status": "error", "error": "The user rejected permission to use it"}


@pytest.mark.parametrize(
    "before",
    ["", f"step(tool=('bash', {REFUSAL}), reason='tool-calls')\n"],
    ids=["ok", "a tool was denied"],
)
def test_an_answer_with_a_schema_is_printed_as_json(
    shell: Shell, tmp_path: Path, before: str
) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA)
    prompt = f"""{before}step(text='Here it is: {{"n": 1}}')\n# end\n"""

    assert shell("run", "--schema", "schema.json", prompt)[:2] == (0, '{"n": 1}\n')


def test_a_dash_reads_the_prompt_from_stdin(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(HELLO.encode())))

    assert shell("run", "-")[:2] == (0, "Hello.\n")


def test_text_that_utf8_cannot_encode_is_printed_with_a_mark(shell: Shell) -> None:
    assert shell("run", r"step(text='a\ud800b')")[:2] == (0, "a?b\n")


def test_a_reader_that_closes_the_pipe_ends_the_program_quietly() -> None:
    command = [sys.executable, "-m", "opencode_sync", "run", "step(text='x' * 1_000_000)"]

    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout
        process.stdout.close()
        _, err_bytes = process.communicate(timeout=WITHIN_S)

    err = err_bytes.decode()
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "Exception ignored" not in err


@pytest.mark.parametrize("options", [[], ["--stream"], ["--json"]], ids=["text", "stream", "json"])
def test_a_warning_is_printed_once_on_stderr(shell: Shell, options: list[str]) -> None:
    prompt = "show(type='warning', message='The server f is down.'); step(text='Hello.')"

    status, out, err = shell("run", *options, prompt)

    assert (status, err.count("The server f is down.")) == (0, 1)
    assert ("The server f is down." in out) == (options == ["--json"])


# --- run: what it is asked for -------------------------------------------------------------------

SHOW_CONFIG = "step(text=os.environ['OPENCODE_CONFIG_CONTENT'])"


@pytest.mark.parametrize(
    "redirections, prompt, status",
    [("<&- >&- 2>&-", HELLO, 0), (">&-", HELLO, 0), ("<&-", "-", 2)],
    ids=["none is open", "nobody reads", "nobody writes"],
)
def test_standard_streams_may_be_closed(redirections: str, prompt: str, status: int) -> None:
    command = [sys.executable, "-m", "opencode_sync", "run", prompt]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    done = subprocess.run(["sh", "-c", f'exec "$0" "$@" {redirections}', *command], env=env)

    assert done.returncode == status


def test_options_reach_opencode(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "a.txt").write_text("")
    options = ["--model", "p/m", "--agent", "plan", "--session", "ses_9", "--file", "a.txt"]
    show = "step(text=json.dumps([os.getcwd(), *sys.argv[1:]]))"

    _, out, _ = shell("run", "--workspace", "there", *options, show)

    where, *argv = json.loads(out)
    assert where == str(tmp_path / "there")
    for words in ("-m p/m", "--agent plan", "--session ses_9", f"-f {tmp_path / 'a.txt'}"):
        assert words in " ".join(argv)


@pytest.mark.parametrize("command", ["run", "map"])
def test_a_fallback_model_answers_where_the_first_one_is_out(
    shell: Shell, tmp_path: Path, command: str
) -> None:
    prompt = "'a/one' in sys.argv and fail('bad key'); step(text='fine')"
    (tmp_path / "in.txt").write_text(f"{prompt}\n")
    models = ["--model", "a/one", "--fallback-model", "b/two", "--fallback-model", "c/three"]
    wanted = [prompt, "--json"] if command == "run" else ["in.txt", "--output", "out.jsonl"]

    status, out, err = shell(command, *wanted, *models)

    result = json.loads(out if command == "run" else (tmp_path / "out.jsonl").read_text())
    assert status == 0
    assert (result["answer"], result["model"]) == ("fine", "b/two")
    assert [each["model"] for each in result["tried"]] == ["a/one"]
    assert command == "map" or "did not answer: a/one (APIError 401: bad key)" in err


def test_configuration_and_permission_are_merged(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"share": "disabled", "permission": {"bash": "deny"}}')

    _, out, _ = shell("run", "--config", "c.json", "--permission", '{"edit": "deny"}', SHOW_CONFIG)

    config = json.loads(out)
    assert config["share"] == "disabled"
    assert config["permission"] == {"bash": "deny", "edit": "deny"}


# --- map -----------------------------------------------------------------------------------------

MapFile = Callable[..., tuple[int, str, str]]


@pytest.fixture
def map_file(shell: Shell, tmp_path: Path) -> MapFile:
    """Maps *lines* into out.jsonl; returns the exit status, stdout and stderr."""

    def run(lines: str, *options: str, name: str = "in.txt") -> tuple[int, str, str]:
        (tmp_path / name).write_text(lines)
        return shell("map", name, "--output", "out.jsonl", *options)

    return run


def saved(path: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_map_writes_a_line_for_each_job_and_reports_on_stderr(map_file: MapFile) -> None:
    status, out, err = map_file("step(text='one')\nstep(text='two')\n", "--workers", "2")

    assert (status, out) == (0, "")
    assert sorted(line["answer"] for line in saved()) == ["one", "two"]
    assert err.startswith("2 done, 0 failed\n$0.0200, 240 tokens (200 in, 40 out)\n")


def test_a_table_comes_back_with_the_answers_beside_its_own_columns(
    map_file: MapFile, tmp_path: Path
) -> None:
    rows = "id;status;prompt\r\n7;\"old; \nnew\";\"step(text='one')\"\r\n8;x;\r\n9;;fail('no')\r\n"

    status, _, err = map_file(f"\ufeff{rows}", "--csv", "answers.csv", name="in.csv")

    assert status == 1
    assert "in.csv: metadata, not settings: id, status\n" in err
    assert "job 1 (line 4): the job has no prompt" in err
    text = (tmp_path / "answers.csv").read_text()
    assert text.startswith("\ufeffid;status;prompt;result_status;answer;error;total_cost;")
    with open(tmp_path / "answers.csv", encoding="utf-8-sig", newline="") as file:
        one, empty, failed = csv.DictReader(file, delimiter=";")
    assert (one["id"], one["status"], one["answer"]) == ("7", "old; \nnew", "one")
    assert (one["result_status"], one["error"], one["total_cost"]) == ("ok", "", "0.01")
    assert (empty["id"], empty["answer"], empty["result_status"]) == ("8", "", "error")
    assert failed["error"].startswith("OpenCodeProcessError: ")
    assert len(saved()) == 2  # the job without a prompt has not begun


def test_answers_of_before_stay_where_a_setting_is_refused(
    map_file: MapFile, tmp_path: Path
) -> None:
    (tmp_path / "answers.csv").write_text("of before")
    (tmp_path / "answers.csv").chmod(0o600)

    status, _, err = map_file("x\n", "--csv", "answers.csv", "--max-total-cost", "-1")

    assert (status, "max_total_cost is -1" in err) == (2, True)
    assert (tmp_path / "answers.csv").read_text() == "of before"

    map_file("step(text='one')\n", "--csv", "answers.csv")

    assert ",ok,one," in (tmp_path / "answers.csv").read_text()
    assert (tmp_path / "answers.csv").stat().st_mode & 0o777 == 0o600  # as it was


def test_answers_are_written_where_nobody_reads_stderr(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("step(text='one')\n")
    words = ["map", "in.txt", "--output", "out.jsonl", "--csv", "answers.csv"]
    reader, writer = os.pipe()
    os.close(reader)

    with open(writer, "wb") as stderr:
        command = [sys.executable, "-m", "opencode_sync", *words]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=env, stderr=stderr, timeout=WITHIN_S, check=False)

    assert ",ok,one," in (tmp_path / "answers.csv").read_text()


def test_a_carriage_return_stays_in_its_cell(map_file: MapFile, tmp_path: Path) -> None:
    rows = 'id,prompt\n"7\r8","step(text=\'a\\rb\')"\n'

    map_file(rows, "--csv", "answers.csv", name="in.csv")

    with open(tmp_path / "answers.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["id"], row["answer"]) == ("7\r8", "a\rb")


def test_a_template_makes_prompts_and_the_table_has_them(map_file: MapFile, tmp_path: Path) -> None:
    template = ("--prompt", "step(text='{word}')", "--key-column", "n")
    lines = '{"n": 1, "word": "a"}\n{"n": 2, "word": "b"}\n'

    for _ in range(2):
        status, _, err = map_file(lines, *template, "--csv", "answers.csv", name="in.jsonl")

    assert status == 0
    assert "2 from the checkpoint" in err
    assert sorted(line["key"] for line in saved()) == ["1", "2"]
    answers = list(csv.DictReader(io.StringIO((tmp_path / "answers.csv").read_text())))
    assert [each["prompt"] for each in answers] == ["step(text='a')", "step(text='b')"]
    assert [(each["word"], each["answer"]) for each in answers] == [("a", "a"), ("b", "b")]


def test_a_map_continues_after_a_failure_and_exits_with_1(map_file: MapFile) -> None:
    status, _, err = map_file("fail('bad key')\nstep(text='two')\n")

    assert status == 1
    assert err.startswith("1 done, 1 failed\n")
    assert "failed:\n  job 0 (line 1): opencode exited with status 1: APIError 401: bad key" in err
    assert err.endswith("1 job failed: the same command runs them again\n")


def test_what_failed_is_run_again_unless_told_otherwise(map_file: MapFile, tmp_path: Path) -> None:
    fails_once = (
        f"p = {str(tmp_path / 'was-here')!r}; "
        "step(text='now') if os.path.exists(p) else (open(p, 'w').close(), fail('not yet'))"
    )

    ends = [map_file(fails_once, *options) for options in ((), ("--no-retry-failed",), ())]

    assert [status for status, *_ in ends] == [1, 1, 0]
    assert "the same command without --no-retry-failed runs them again\n" in ends[1][2]
    assert [line["answer"] for line in saved()] == ["now"]


def test_an_edited_prompt_of_a_key_fails_unless_told_otherwise(map_file: MapFile) -> None:
    def run(word: str, *options: str) -> tuple[int, str]:
        job = {"key": "k", "prompt": f"step(text={word!r})"}
        status, _, err = map_file(json.dumps(job), *options, name="in.jsonl")
        return status, err

    first, refused = run("one"), run("two")
    kept = run("two", "--on-mismatch", "keep"), [line["answer"] for line in saved()]
    again = run("two", "--on-mismatch", "rerun"), [line["answer"] for line in saved()]

    assert (first[0], refused[0]) == (0, 1)
    assert "it has this job with another prompt: on_mismatch 'rerun' runs it again" in refused[1]
    assert refused[1].endswith("1 job did not begin: the reasons above say what to change\n")
    assert (kept[0][0], kept[1]) == (0, ["one"])
    assert (again[0][0], again[1]) == (0, ["two"])


def test_a_map_tries_failed_jobs_again_after_the_errors_that_are_named(
    map_file: MapFile, tmp_path: Path
) -> None:
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x'); fail('not yet')"

    status, _, err = map_file(
        count, "--retries", "2", "--retry-delay", "0", "--retry-on", "timeout,process"
    )

    assert status == 1
    assert (tmp_path / "runs").read_text() == "xxx"
    assert err.startswith("0 done, 1 failed, 2 retried\n")


def test_a_map_may_run_the_first_jobs_alone_and_the_rest_later(map_file: MapFile) -> None:
    lines = "step(text='one')\nstep(text='two')\nstep(text='three')\n"

    status, _, err = map_file(lines, "--limit", "2")
    again = map_file(lines)[0]

    assert (status, again) == (0, 0)
    assert "2 of 3 jobs are in out.jsonl; the same command without it runs the rest" in err
    assert len(saved()) == 3


def test_a_map_has_answers_of_a_schema(map_file: MapFile, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object", "required": ["n"]}')

    line = json.dumps({"prompt": "step(text='{\"n\": 7}')\n# end\n"})

    options = ("--schema", "schema.json", "--csv", "answers.csv")
    status, _, _ = map_file(line, *options, name="in.jsonl")

    assert status == 0
    assert [line["parsed"] for line in saved()] == [{"n": 7}]
    (row,) = csv.DictReader(io.StringIO((tmp_path / "answers.csv").read_text()))
    assert json.loads(row["parsed"]) == {"n": 7}


@pytest.mark.parametrize(
    "options, statuses, warned",
    [
        (("--max-cost", "4"), ["ok", "ok"], True),
        (("--max-cost", "4", "--max-total-cost", "none"), ["ok", "ok", "ok"], False),
        (("--max-cost", "1", "--max-total-cost", "none"), ["over_budget"] * 3, False),
    ],
    ids=["as before", "each job", "each job, less"],
)
def test_the_limit_of_a_job_alone_binds_all_jobs_with_a_warning(
    map_file: MapFile, options: tuple[str, ...], statuses: list[str], warned: bool
) -> None:
    goes_on = "step(cost=2.0, reason='tool-calls'); time.sleep(60)\n"
    line = goes_on if "1" in options else "step(cost=2.0)\n"

    _, _, err = map_file(line * 3, *options, "--workers", "1")

    assert [line["status"] for line in saved()] == statuses
    assert ("warning: --max-cost is a limit of each job now" in err) == warned


def test_a_bar_is_shown_where_it_is_asked_for(map_file: MapFile) -> None:
    shown = [map_file(HELLO, "--progress", when)[2] for when in ("always", "never", "auto")]

    assert ["1/1" in err for err in shown] == [True, False, False]


def test_a_map_may_stop_at_the_first_failure(map_file: MapFile) -> None:
    lines = "fail('bad key')\nstep(text='two')\n"

    status, _, err = map_file(lines, "--on-error", "raise", "--workers", "1")

    assert status == 1
    assert err.endswith("opencode-sync: opencode exited with status 1: APIError 401: bad key\n")
    assert len(saved()) == 1


def test_a_map_stops_jobs_that_take_more_steps_than_allowed(map_file: MapFile) -> None:
    lines = "step(text='one')\nstep(reason='tool-calls'); time.sleep(60)\n"

    status, _, _ = map_file(lines, "--max-steps", "1")

    assert status == 1
    assert sorted(line["status"] for line in saved()) == ["ok", "over_budget"]


def test_a_job_that_ended_at_a_refused_tool_counts_as_not_done(map_file: MapFile) -> None:
    status, _, err = map_file(f"step(tool=('bash', {REFUSAL}), reason='tool-calls')")

    assert status == 1
    assert "1 job ended when a tool was refused: see --permission" in err


def test_a_map_over_its_budget_starts_nothing_more_and_says_how_to_go_on(
    map_file: MapFile,
) -> None:
    lines = "".join(f"step(text='{n}', cost=3)\n" for n in range(5))

    status, _, err = map_file(lines, "--max-total-cost", "4", "--workers", "1")

    assert status == 1
    assert len(saved()) == 2
    assert (
        "--max-total-cost is spent: 2 of 5 jobs are in out.jsonl; the same command with more" in err
    )
    assert map_file(lines, "--max-total-cost", "4", "--workers", "1")[0] == 1
    assert len(saved()) == 2
    assert map_file(lines, "--max-total-cost", "40", "--workers", "1")[0] == 0
    assert len(saved()) == 5


@pytest.fixture
def with_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of opencode, a program that serves; see serving.py."""
    monkeypatch.setenv("OPENCODE_BINARY", str(write_serving(tmp_path / "bin" / "serving")))


@pytest.mark.usefixtures("with_server")
def test_a_map_starts_no_server_if_all_jobs_are_in_the_output(
    map_file: MapFile, tmp_path: Path
) -> None:
    map_file("say one\nsay two\n", "--server")
    program, started = tmp_path / "bin" / "serving", tmp_path / "started"
    program.write_text(f"{VERSION}touch '{started}'; exit 1\n")

    status, _, err = map_file("say one\nsay two\n", "--server")

    assert (status, started.exists()) == (0, False)
    assert "2 from the checkpoint" in err


@pytest.mark.usefixtures("with_server")
def test_a_map_on_a_server_that_does_not_start_ends_at_once_and_keeps_no_failures(
    map_file: MapFile, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "serving"
    program.write_text(f"{VERSION}echo no way; exit 1\n")

    status, _, err = map_file("say one\nsay two\n", "--server")

    assert status == 1
    assert "no way" in err
    assert not any("say one" in str(line) for line in saved())


def test_a_map_writes_a_page_of_all_that_is_in_the_output(map_file: MapFile) -> None:
    map_file("step(text='the first answer')\n")

    status, _, _ = map_file("step(text='the second answer')\n", "--report", "page.html")

    page = Path("page.html").read_text()
    assert status == 0
    assert "the first answer" in page
    assert "the second answer" in page


def test_a_page_that_cannot_be_written_is_an_error_before_anything_is_run(
    map_file: MapFile,
) -> None:
    status, _, err = map_file(HELLO, "--report", "nowhere/page.html")

    assert status == 2
    assert "nowhere/page.html" in err
    assert not Path("out.jsonl").exists()


# --- chat, where stdin is no terminal ------------------------------------------------------------


@pytest.fixture
def chat(with_server: None, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Chats with *text* on stdin; returns the exit status, stdout and stderr."""

    def run(text: str, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return shell("chat", *options)

    return run


def test_a_chat_without_a_terminal_refuses_permissions(chat: Shell) -> None:
    status, out, _ = chat("ask\n", "--permission", "ask")

    assert status == 0
    assert '{"reply": "reject"' in out


@pytest.mark.parametrize(
    "options, words",
    [
        (("--max-tokens", "0"), "max_tokens is 0"),
        (("--session", "ses_none"), "session 'ses_none' is unknown to the server"),
    ],
    ids=["budget", "session"],
)
def test_a_chat_refuses_what_makes_no_sense(
    chat: Shell, options: tuple[str, ...], words: str
) -> None:
    status, out, err = chat("say say one\n", *options)

    assert (status, out) == (2, "")
    assert words in err


def test_a_chat_refuses_prompts_that_are_not_text(
    with_server: None, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))

    status, out, err = shell("chat")

    assert (status, out) == (2, "")
    assert "the prompts on stdin are not utf-8: invalid start byte" in err


def test_a_failed_turn_ends_a_chat_without_a_terminal(chat: Shell) -> None:
    status, out, err = chat("break\nsay say one\n")

    assert status == 1
    assert "say one" not in out
    assert "ProviderError: broken" in err


# --- every exit status ---------------------------------------------------------------------------


def test_a_run_that_ended_at_a_refused_tool_exits_with_1(shell: Shell) -> None:
    status, _, err = shell("run", f"step(tool=('bash', {REFUSAL}), reason='tool-calls')")

    assert status == 1
    assert "refused" in err
    assert "--permission" in err


@pytest.mark.parametrize(
    "words, named",
    [
        (["run", "x", "--file", "none.txt"], "none.txt"),
        (["run", "x", "--config", "none.json"], "none.json"),
        (["run", "x", "--config", "bad.json"], "line 3 column 3"),
        (["run", "x", "--config", "list.json"], "object"),
        (["run", "x", "--schema", "none.json"], "--schema none.json: No such file"),
        (["run", "x", "--permission", "{"], "--permission"),
        (["run", "x", "--timeout", "-1"], "timeout_s"),
        (["map", "none.txt", "--output", "out.jsonl"], "none.txt: No such file"),
        (
            ["map", "bad.jsonl", "--output", "out.jsonl"],
            "bad.jsonl, line 2, column 10: not",
        ),
        (["map", "good.txt", "--output", "no/out.jsonl"], "no/out.jsonl"),
        (["map", "good.txt", "--output", "bad.json"], "not a checkpoint"),
        (["map", "good.txt", "-o", "bad.json", "--report", "./bad.json"], "is OUT too"),
        (["map", "good.txt", "-o", "out.jsonl", "--report", "good.txt"], "is FILE too"),
        (["map", "good.txt", "-o", "good.txt"], "good.txt is FILE too"),
        (["map", "good.txt", "-o", "out.jsonl", "--csv", "out.jsonl"], "is OUT too"),
        (["map", "good.txt", "-o", "out.jsonl", "--csv", "no/a.csv"], "--csv no/a.csv: No such"),
        (["map", "good.txt", "-o", "o", "--csv", "a.json", "--schema", "./a.json"], "is --schema"),
        (["map", "empty.txt", "-o", "out.jsonl"], "empty.txt holds no prompts"),
        (["install", "--version", "latest"], "latest"),
    ],
)
def test_refused_input_exits_with_2_and_one_line(
    shell: Shell, tmp_path: Path, words: list[str], named: str
) -> None:
    (tmp_path / "bad.json").write_text('{\n  "a": 1,\n  b}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt"}\n')
    (tmp_path / "good.txt").write_text("x\n")
    (tmp_path / "empty.txt").write_text("\n")

    status, out, err = shell(*words)

    assert (status, out) == (2, "")
    assert err.startswith("opencode-sync: ")
    assert named in err
    assert len(err.splitlines()) == 1


def test_a_run_over_its_time_exits_with_124(shell: Shell) -> None:
    status, out, err = shell("run", "--timeout", "0.5", "step(text='So far.'); time.sleep(60)")

    assert (status, out) == (124, "So far.\n")
    assert "0.5 s (timeout_s)" in err


@pytest.mark.parametrize(
    "option, limit", [("max-cost", "2"), ("max-steps", "1"), ("max-tokens", "1")]
)
def test_a_run_over_its_budget_exits_with_1(shell: Shell, option: str, limit: str) -> None:
    prompt = "step(reason='tool-calls', cost=3); time.sleep(60)"

    status, _, err = shell("run", f"--{option}", limit, prompt)

    assert status == 1
    assert f"{option.replace('-', '_')} of " in err


# --- errors of all kinds -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["run", "x"], ["map", "in.txt", "-o", "out.jsonl"]], ids=["run", "map"]
)
def test_no_opencode_exits_with_1_and_says_how_to_get_one(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    Path("in.txt").write_text("x\n")
    monkeypatch.delenv("OPENCODE_BINARY")
    monkeypatch.setenv("PATH", "/nowhere")

    status, _, err = shell(*words)

    assert status == 1
    assert "opencode-sync install" in err
    assert not Path("out.jsonl").exists()


def test_an_unexpected_exception_is_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "install", _raise(ZeroDivisionError("by nought")))

    assert shell("install") == (
        1,
        "",
        "opencode-sync: ZeroDivisionError: by nought (--debug shows where)\n",
    )


def test_debug_shows_tracebacks_and_log_lines_and_they_end_with_it(shell: Shell) -> None:
    status, _, err = shell("run", "--debug", "fail('bad key')")

    assert status == 1
    assert "Traceback" in err
    assert "attempt 1" in err
    assert "attempt 1" not in shell("run", HELLO)[2]


def _raise(error: Exception) -> Callable[..., Any]:
    def raises(*args: object, **settings: object) -> None:
        raise error

    return raises


# --- install and demo ----------------------------------------------------------------------------


def test_install_installs_the_version_asked_for(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(install, "install", asked.append)

    statuses = [shell("install")[0], shell("install", "--version", "1.18.30")[0]]

    assert (statuses, asked) == ([0, 0], [None, "1.18.30"])


def test_a_demo_in_which_something_does_not_work_exits_with_1(shell: Shell) -> None:
    status, out, err = shell("demo")  # its prompts are not Python

    assert status == 1
    assert "Everything worked" not in out
    for part in ("run", "stream", "four_at_once"):
        assert f"opencode-sync: the demo failed: {part}: " in err


@pytest.mark.parametrize(
    "version, reason",
    [
        (None, "no 'opencode' on PATH"),
        ("1.1.0", "version 1.1.0 is older than"),
        ("opencode v2.0.10", "OpenCode 2.0.10 is newer than the known versions"),
    ],
    ids=["none", "older", "unknown"],
)
def test_the_demo_installs_opencode_beside_one_that_it_cannot_use(
    monkeypatch: pytest.MonkeyPatch, standin: Path, tmp_path: Path, version: str | None, reason: str
) -> None:
    if version is not None:
        other = write_standin(tmp_path / "other" / "opencode")
        other.write_text(other.read_text().replace(TESTED_VERSION, version))
    monkeypatch.delenv("OPENCODE_BINARY")
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    monkeypatch.setattr(demo, "install", lambda report: standin)
    said: list[str] = []

    program = demo.find_program(said.append)

    assert program == str(standin)
    assert reason in said[0]


@pytest.mark.parametrize(
    "words",
    [["run", HELLO], ["map", "jobs.txt", "-o", "out.jsonl"], ["demo"]],
    ids=lambda words: words[0],
)
def test_an_opencode_that_is_not_known_is_refused(
    shell: Shell, standin: Path, tmp_path: Path, words: list[str]
) -> None:
    standin.write_text(standin.read_text().replace(TESTED_VERSION, "opencode v2.0.10"))
    (tmp_path / "jobs.txt").write_text(HELLO)

    status, out, err = shell(*words)

    assert (status, out) == (2, "")
    assert "OpenCode 2.0.10 is newer than the known versions (1.17 up to, not including, 2)" in err
    assert not (tmp_path / "out.jsonl").exists()
