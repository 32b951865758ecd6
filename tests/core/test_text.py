"""Text that is only looked at: in a terminal, in Markdown, in HTML."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest

from opencode_sync.core.config import validate_permission_actions
from opencode_sync.core.errors import OpenCodeConfigError, OpenCodeTimeoutError
from opencode_sync.core.result import ErrorInfo, RunResult, TokenUsage
from opencode_sync.core.text import (
    error_html,
    error_lines,
    markdown,
    money,
    one_line,
    outcome,
    printable,
    result_markdown,
    spelled_out,
    strip_ansi,
    table,
    verbatim,
)


def test_a_terminal_gets_nothing_to_obey() -> None:
    text = "a\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b2J\rb\u202ec\td\n"

    assert printable(text) == "ared2Jbc\td\n"


ESCAPES = {
    "\x1b[91m\x1b[1mError: \x1b[0mno": "Error: no",
    "\x1b[38:2::255:0:0mred\x1b[0K": "red",
    "\x1b[?25lhidden\x1b[?25h": "hidden",
    "\x1b]0;title\x07text": "text",
    "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\": "link",
    "\x1bPq#0\x1b\\text": "text",
    "\x1b(Btext\x1b7\x1b8\x1bc": "text",
    "a\x1b]0;no end\nb": "a0;no end\nb",
    "[1] <b> 10%\ttab\n": "[1] <b> 10%\ttab\n",
}


@pytest.mark.parametrize("coloured, plain", ESCAPES.items())
def test_escape_sequences_are_taken_out_and_nothing_else(coloured: str, plain: str) -> None:
    assert strip_ansi(coloured) == plain


_SHOWN_FORMATS = {  # signs that stand above or below numbers: they are seen
    *(0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD),
    *range(0x600, 0x606),
    *range(0x13430, 0x13440),
}


def test_a_terminal_gets_nothing_that_it_does_not_show() -> None:
    codes = [code for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cf", "Zl")]
    hidden = "".join(chr(code) for code in codes if code not in _SHOWN_FORMATS)

    assert {"\u200e", "\u200f", "\u061c", "\U000e0041"} <= set(hidden)
    assert [each for each in hidden if printable(f"a{each}b") != "ab"] == []


@pytest.mark.parametrize(
    "text", ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u2764\ufe0f\u200d\U0001f525"]
)
def test_joiners_stay_where_a_script_needs_them(text: str) -> None:
    assert printable(text) == text


def test_everything_is_spelled_out_for_those_who_judge_it() -> None:
    text = "\x1b[1m\u200e\u200d\U000e0041\u3164\ud800 \t\n"

    assert spelled_out(text) == r"\x1b[1m\u200e\u200d\U000e0041\u3164" + "\ud800 \t\n"


def test_one_line_is_one_line_of_the_width() -> None:
    assert one_line("first\n\n  second third", 15) == "first second..."


def test_small_sums_show_their_digits() -> None:
    assert [money(dollars) for dollars in (0, 0.00123, 3.4)] == ["$0.0000", "$0.0012", "$3.40"]


def test_a_table_aligns_its_columns() -> None:
    assert table([("", "n"), ("one", "1"), ("a", "1,000")]) == [
        "         n",
        "one      1",
        "a    1,000",
    ]


# --- results -------------------------------------------------------------------------------------


def used(*tools: str) -> RunResult:
    result = RunResult(
        turns=2, total_cost=0.5, token_usage=TokenUsage(total=1_200), duration_s=4.06
    )
    for tool in tools:
        result.append_event({"type": "tool_use", "part": {"tool": tool}})
    return result


def test_the_outcome_says_in_one_line_what_happened() -> None:
    odd: Any = {"type": "tool_use", "part": "odd"}
    result = used("edit", "bash", "edit")
    result.append_event(odd)
    result.append_event({"type": "step_finish", "part": {"reason": "stop"}})

    assert outcome(result) == "ok, 3 steps, edit x2, bash, 1,200 tokens, $0.5000, 4.1 s"


# --- Markdown ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "before <img src=x onerror=alert(1)> after",
        "`not code\n<script>` neither",
        r"\`<script>`",
        "- ```\n<script>\n  ```\n<script>",
        "    indented <script>",
        "``` a `b\n<script>",
        "> ```\n<script>",
    ],
)
def test_no_tag_of_the_text_stays_a_tag(text: str) -> None:
    outside = True
    for line in markdown(text).split("\n"):
        if line.startswith("```"):
            outside = not outside
        elif outside:
            assert "<" not in line.replace("<code>", "").replace("</code>", "")


def test_a_picture_is_not_fetched() -> None:
    assert markdown("see ![x](https://example.com/?q=secret)").startswith("see !&#91;x]")


def test_code_stays_as_it_is() -> None:
    text = "Do:\n```python\nif a < b & c:\n    print('<b>')\n```\ndone"

    assert markdown(text) == ("Do:\n\n```python\nif a < b & c:\n    print('<b>')\n```\n\ndone")


def test_code_in_a_line_shows_its_angle_brackets() -> None:
    assert markdown("the `<b>` tag and `x`") == ("the <code>&#60;b&#62;</code> tag and `x`")


def test_a_fence_inside_of_code_does_not_end_it() -> None:
    text = "~~~\n```\n<script>\n```\n~~~\n<script>"

    lines = markdown(text).split("\n")

    assert lines == ["", "````", "```", "<script>", "```", "````", "", "&lt;script>"]


def test_code_that_is_never_closed_is_closed() -> None:
    assert markdown("```\n<script>") == "\n```\n<script>\n```\n"


def test_verbatim_text_has_no_meaning_in_markdown_or_html() -> None:
    assert verbatim("*a* <b> [c](d)") == ("&#42;a&#42; &#60;b&#62; &#91;c&#93;&#40;d&#41;")


# --- results and errors in a notebook ------------------------------------------------------------


def test_a_result_shows_its_answer_and_how_it_came_about() -> None:
    result = used("bash")
    result.append_event({"type": "text", "part": {"text": "**Done** <b>"}})

    assert result_markdown(result) == (
        "**Done** &lt;b>\n\n"
        f"*{verbatim('incomplete, 2 steps, bash, 1,200 tokens, $0.5000, 4.1 s')}*"
    )


def test_a_failed_result_shows_its_reason_and_its_warnings() -> None:
    result = RunResult(
        error=ErrorInfo("APIError", "<script>", 401),
        denied_tools=["edit"],
        warnings=["The MCP server <f> did not start."],
    )

    page = result_markdown(result)

    for note in ("APIError 401: <script>", "denied: edit", f"warning: {result.warnings[0]}"):
        assert verbatim(note) in page
    assert "<" not in page


def test_of_a_huge_answer_only_the_beginning_is_shown() -> None:
    result = RunResult()
    result.append_event({"type": "text", "part": {"text": "x" * 1_000_000}})

    page = result_markdown(result)

    assert len(page) < 110_000
    assert "900,000 characters more" in page


def test_an_error_shows_what_job_it_was_and_what_had_been_got() -> None:
    error = OpenCodeTimeoutError("<too long>", result=used())
    error.index, error.prompt = 3, "Do\nthis"

    page = error_html(error)

    for text in ("OpenCodeTimeoutError", "&lt;too long&gt;", "3", "Do this", "1,200 tokens"):
        assert f">{text}<" in page or f", {text}, " in page

    error.key = "issue-9"
    assert ">issue-9<" in error_html(error)


def test_a_raised_error_is_told_with_the_users_own_lines_alone() -> None:
    try:
        validate_permission_actions("ask")
    except OpenCodeConfigError as error:
        error.result = used()
        lines = error_lines(error)

    assert len(lines) == 3
    assert lines[0].startswith("test_text.py, line ")
    assert lines[0].endswith(': validate_permission_actions("ask")')
    assert lines[1] == "until then: incomplete, 2 steps, 1,200 tokens, $0.5000, 4.1 s"
    assert lines[2].startswith("OpenCodeConfigError: permission")
