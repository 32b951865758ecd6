"""Settings become the bodies of requests."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import OpenCodeConfigError, RunConfig
from opencode_sync.process.command import sealed
from opencode_sync.server.protocol import (
    check_command,
    check_server_wide,
    command_body,
    permission_rules,
    prompt_body,
    session_body,
)


def rule(permission: str, action: str, pattern: str = "*") -> dict[str, str]:
    return {"permission": permission, "pattern": pattern, "action": action}


@pytest.mark.parametrize(
    "cfg, rules",
    [
        (RunConfig(), []),
        (RunConfig(permission="deny"), [rule("*", "deny")]),
        (
            RunConfig(permission={"edit": "deny", "bash": {"*": "deny", "git *": "allow"}}),
            [rule("edit", "deny"), rule("bash", "deny"), rule("bash", "allow", "git *")],
        ),
        (
            RunConfig(tools={"bash": False, "write": True, "my_*": False}),
            [rule("bash", "deny"), rule("edit", "allow"), rule("my_*", "deny")],
        ),
        (
            RunConfig(tools={"bash": True}, permission={"bash": "deny"}),
            [rule("bash", "allow"), rule("bash", "deny")],
        ),
    ],
    ids=["none", "all", "patterns", "tools", "permission over tools"],
)
def test_permission_and_tools_become_rules(cfg: RunConfig, rules: list[Any]) -> None:
    assert permission_rules(cfg) == rules


def test_a_pattern_at_home_is_one_of_the_home_directory() -> None:
    cfg = RunConfig(permission={"external_directory": {"~/a/*": "allow", "$HOME": "deny"}})

    patterns = [rule["pattern"] for rule in permission_rules(cfg)]

    assert patterns == [f"{Path.home()}/a/*", str(Path.home())]


@pytest.mark.parametrize(
    "prompt, title",
    [
        ("Fix it", "Fix it"),
        ("\n  First line \nsecond", "First line"),
        ("x" * 50, "x" * 50),
        ("x" * 51, "x" * 47 + "..."),
        (" ", "opencode-sync"),
    ],
    ids=["short", "lines", "just fits", "too long", "blank"],
)
def test_a_session_is_called_by_the_head_of_its_prompt(prompt: str, title: str) -> None:
    assert session_body(prompt, RunConfig())["title"] == title


def test_a_session_has_its_own_title_and_nobody_to_ask() -> None:
    body = session_body("Fix it", RunConfig(title="T", permission={"bash": "allow"}))

    assert body["title"] == "T"
    assert body["permission"] == [
        rule("question", "deny"),
        rule("plan_enter", "deny"),
        rule("plan_exit", "deny"),
        rule("bash", "allow"),
    ]


def test_a_prompt_goes_out_with_who_is_to_answer_it(tmp_path: Path) -> None:
    cfg = RunConfig(model="a/b/c", agent="plan", variant="high")

    assert prompt_body("Fix it", cfg, tmp_path) == {
        "parts": [{"type": "text", "text": "Fix it"}],
        "model": {"providerID": "a", "modelID": "b/c"},
        "agent": "plan",
        "variant": "high",
    }


def test_a_prompt_never_carries_tools_which_would_replace_all_rules(tmp_path: Path) -> None:
    assert "tools" not in prompt_body("Fix it", RunConfig(tools={"bash": False}), tmp_path)


def test_a_command_goes_out_with_the_prompt_as_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    cfg = RunConfig(command="review", model="a/b", files=("a.txt",))

    body = command_body("this and that", cfg, tmp_path)

    assert (body["command"], body["arguments"], body["model"]) == ("review", "this and that", "a/b")
    assert [part["filename"] for part in body["parts"]] == ["a.txt"]


PNG = b"\x89PNG\r\n\x1a\n\x00"


@pytest.mark.parametrize(
    "name, content, media_type",
    [
        ("a.txt", "hällo\u2028".encode(), "text/plain"),
        ("a.json", b"{}", "text/plain"),
        ("a.png", PNG, "image/png"),
        ("a.jpg", PNG, "image/png"),
        ("noname", PNG, "image/png"),
        ("a.png", b"\xff\xd8\xff\xe0", "image/jpeg"),
        ("noname", b"GIF89a\x01", "image/gif"),
        ("a.txt", b"RIFF\x0c\x00\x00\x00WEBPVP8 ", "image/webp"),
        ("a.pdf", b"%PDF-\xe2\xe3", "application/pdf"),
        ("noname", b"%PDF-1.7\n1 0 obj", "application/pdf"),
        ("a.png", b"\x00\xff", "application/octet-stream"),
        ("a.png", b"not an image", "text/plain"),
        ("a.mp3", b"\xff\xfb", "audio/mpeg"),
        ("noname", b"\xff\x00", "application/octet-stream"),
        ("empty.txt", b"", "text/plain"),
    ],
)
def test_a_file_goes_out_whole_and_as_what_its_content_is(
    tmp_path: Path, name: str, content: bytes, media_type: str
) -> None:
    (tmp_path / name).write_bytes(content)

    file, _ = prompt_body("Look", RunConfig(files=(name,)), tmp_path)["parts"]

    head, _, data = file["url"].partition(",")
    assert (file["mime"], file["filename"], head) == (media_type, name, f"data:{media_type};base64")
    assert base64.b64decode(data) == content


def test_a_file_that_has_vanished_is_named(tmp_path: Path) -> None:
    with pytest.raises(OpenCodeConfigError, match=r"gone\.txt'.*No such file"):
        prompt_body("Look", RunConfig(files=("gone.txt",)), tmp_path)


def test_settings_of_the_server_may_be_left_out_or_repeated() -> None:
    server = RunConfig(lean=True, extra_env={"A": "b"}, model="a/b")

    check_server_wide(RunConfig(), server)
    check_server_wide(server.replace(model="c/d", title="T", auto=True), server)


def test_other_settings_of_the_server_are_refused() -> None:
    with pytest.raises(OpenCodeConfigError, match="extra_env is the same for all runs"):
        check_server_wide(RunConfig(extra_env={"A": "c"}), RunConfig(extra_env={"A": "b"}))


# --- arguments of a command ----------------------------------------------------------------------


def opened(text: str) -> str:
    """As our plugin does it."""

    def word(match: re.Match[str]) -> str:
        letters = match[1]
        return base64.urlsafe_b64decode(letters + "=" * (-len(letters) % 4)).decode()

    return re.sub(r"ocs\.([\w-]*)\.ocs", word, text)


ODD = (
    'a !`touch x` $& $1 @b.txt "two  words" \'in\none\' it\'s [Image 1] "" ocs.YQ.ocs \u00a0ü🙂\t\n'
)


def test_sealed_arguments_hold_nothing_that_is_expanded_and_open_to_what_they_were() -> None:
    found = sealed(ODD)

    assert re.fullmatch(r"""(ocs\.[\w-]*\.ocs|[\s"'])*""", found)
    assert opened(found) == ODD


def test_sealed_arguments_are_as_many_words_as_before() -> None:
    # As OpenCode 1.18.33 splits them.
    words = re.compile(r"""\[Image\s+\d+\]|"[^"]*"|'[^']*'|[^\s"']+""")

    before, after = words.findall(ODD), words.findall(sealed(ODD))

    assert [opened(word) for word in after] == before


@pytest.mark.parametrize(
    "template",
    ["See !`git show $1`.", "!`echo $ARGUMENTS`", "!`a`, then !`b\n$2`"],
    ids=["a word", "all", "the second"],
)
def test_a_template_that_puts_its_arguments_into_the_shell_is_refused(template: str) -> None:
    with pytest.raises(OpenCodeConfigError, match="command 'x' puts its arguments into a shell"):
        check_command("x", template, "plain", has_plugin=True)


@pytest.mark.parametrize("arguments", ["!`ls`", "$&", "@a.txt"])
def test_what_a_server_elsewhere_would_expand_is_refused(arguments: str) -> None:
    with pytest.raises(OpenCodeConfigError, match="which OpenCode expands"):
        check_command("x", "Do $1, !`ls`", arguments, has_plugin=False)


def test_arguments_that_nothing_expands_are_taken() -> None:
    check_command("x", "Do $1, !`ls`", "it's (plain); 'is it'?", has_plugin=False)
    check_command("x", "`$1` !`ls` $2", "$& !`ls` @a", has_plugin=True)
