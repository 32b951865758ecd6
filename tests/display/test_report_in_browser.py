"""The report page of a batch of 2,000 in a real headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from opencode_sync import RunResult
from opencode_sync.display.report import write_html
from tests.browser import Chromium, Page, find_chromium

JOBS = 2_000
OPENS_WITHIN_S = 2.0
ATTACK = (
    '</script><script>window.owned = 1</script><img src="https://example.invalid/x" '
    'onerror="window.owned = 2"><svg onload="window.owned = 3">\u2028<style>*{color:red}</style>'
)


def record(n: int) -> dict[str, Any]:
    """Of every 100 jobs one timed out, five were refused by the provider, one holds an attack."""
    began = 1_790_000_000 + n // 8 * 5 + n % 8 / 10
    said = ATTACK if n % 100 == 7 else f"answer {n}\n\n" + "words of an answer " * 40
    result = RunResult(prompt=f"prompt {n} {ATTACK if n % 100 == 7 else ''}", index=n)
    result.key, result.attempts, result.duration_s = f"key-{n}", 1, 1 + n % 4
    state = {"status": "completed", "input": {"command": f"ls {said}"}, "output": said * 2}
    tokens = {"total": n, "input": n - n // 5, "output": n // 5, "cache": {}}
    failure = None
    for event in (
        {"type": "step_start", "timestamp": began * 1000, "part": {}},
        {"type": "tool_use", "timestamp": began * 1000, "part": {"tool": "bash", "state": state}},
        {"type": "text", "timestamp": began * 1000, "part": {"text": said}},
        {"type": "step_finish", "part": {"reason": "stop", "cost": n / 1000, "tokens": tokens}},
    ):
        result.append_event(event)  # type: ignore[arg-type]
    if n % 100 == 3:
        failure = {"type": "OpenCodeTimeoutError", "message": "the run took longer than 9 s"}
    elif n % 20 == 11:
        failure = {"type": "OpenCodeProcessError", "message": f"exited with status 1: {ATTACK}"}
    return {**result.to_dict(), "failure": failure}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    binary = find_chromium()
    if binary is None:
        pytest.skip("no Chromium on PATH, nor named by CHROMIUM_BINARY")
    with Chromium(binary, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(map(record, range(JOBS)), path, title=f"Batch {ATTACK}")
    return path.as_uri()


@pytest.fixture
def page(chromium: Chromium, url: str) -> Iterator[Page]:
    """The page. Whatever a test does with it, it asks for nothing and complains of nothing."""
    page = chromium.open(url)
    yield page
    assert page.requests == [url]
    assert page.complaints == []
    assert page.evaluate("window.owned") is None
    page.close()


def numbers(page: Page) -> list[str]:
    found: list[str] = page.evaluate(
        "[...document.querySelectorAll('.toggle')].map(b => b.innerText)"
    )
    return found


def text(page: Page, selector: str) -> str:
    found: str = page.evaluate(f"document.querySelector({selector!r}).innerText")
    return found


def search(page: Page, words: str) -> None:
    page.click("#search")
    page.type(words)


def test_a_batch_of_2000_opens_within_two_seconds(chromium: Chromium, url: str) -> None:
    tries = []
    for _ in range(3):  # somebody else may have had the machine
        page = chromium.open(url)
        page.close()
        tries.append(page.load_s)
        if page.load_s <= OPENS_WITHIN_S:
            break

    assert min(tries) <= OPENS_WITHIN_S


def test_scrolling_draws_the_rows_that_come_into_sight(page: Page) -> None:
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")

    page.wait_until("[...document.querySelectorAll('.toggle')].at(-1).innerText === '1,999'")
    assert len(numbers(page)) < 100


def test_a_click_on_a_heading_sorts_and_another_turns_it_round(page: Page) -> None:
    page.click("[data-by=cost]")
    assert numbers(page)[0] == "1,999"
    assert page.evaluate("document.querySelector('th.cost').ariaSort") == "descending"

    page.click("[data-by=cost]")
    assert numbers(page)[0] == "0"
    assert page.evaluate("document.querySelectorAll('[aria-sort]').length") == 1


def test_a_status_filters_and_the_sums_follow(page: Page) -> None:
    page.click("[data-status=timed_out]")

    assert numbers(page)[:3] == ["3", "103", "203"]
    assert text(page, "#count").startswith("20 of 2,000 jobs, $")


def test_an_error_by_kind_filters_and_is_taken_back(page: Page) -> None:
    page.click("[data-kind=OpenCodeProcessError]")
    assert text(page, "#count").startswith("100 of 2,000 jobs")

    page.click(".pick")
    assert text(page, "#count").startswith("2,000 jobs")


def test_a_search_looks_into_the_whole_answer(page: Page) -> None:
    search(page, "ANSWER 1234")

    page.wait_until("document.querySelector('#count').innerText.startsWith('1 of')")
    assert numbers(page) == ["1,234"]


def test_a_time_that_is_drawn_in_the_timeline_filters(page: Page) -> None:
    box = page.evaluate("document.querySelector('#bars').getBoundingClientRect().toJSON()")
    page.click_at(box["x"] + 2, box["y"] + 5, to_x=box["x"] + box["width"] / 2)

    count = int(text(page, "#count").split()[0].replace(",", ""))
    assert 900 < count < 1100


def test_a_click_in_the_timeline_opens_the_job(page: Page) -> None:
    box = page.evaluate("document.querySelector('#bars').getBoundingClientRect().toJSON()")
    page.click_at(box["x"] + box["width"] - 2, box["y"] + 5)

    page.wait_until("document.querySelector('.detail') !== null")
    assert text(page, "[aria-expanded=true]") in ("1,992", "1,984")


def test_a_row_unfolds_to_prompt_answer_tools_and_events(page: Page) -> None:
    page.click(".job .toggle")

    shown = text(page, ".detail")
    for words in ("prompt 0", "answer 0", "bash", "Tools (1)", "Events (4)"):
        assert words in shown
    page.click(".detail .list summary")
    page.wait_until("document.querySelector('.inside') !== null")
    page.click(".detail > section:last-child summary")
    page.wait_until("document.querySelectorAll('.detail .list').length === 2")
    assert "step_finish" in text(page, ".detail")


def test_rows_below_an_unfolded_one_stay_where_they_belong(page: Page) -> None:
    page.click(".job .toggle")
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait_until("[...document.querySelectorAll('.toggle')].at(-1).innerText === '1,999'")

    page.evaluate("scrollTo(0, 0)")
    page.wait_until("document.querySelector('.detail') !== null")
    gap = (
        "document.querySelector('.fold').nextSibling.getBoundingClientRect().top"
        " - document.querySelector('.fold').getBoundingClientRect().bottom"
    )
    assert page.evaluate(gap) == 0


def test_what_a_prompt_says_is_shown_and_not_done(page: Page) -> None:
    search(page, "key-1907")
    page.wait_until("document.querySelector('#count').innerText.startsWith('1 of')")

    page.click(".toggle")
    page.click(".detail .list summary")

    assert "<script>window.owned = 1</script>" in text(page, ".detail")
    assert page.evaluate("document.querySelectorAll('#rows img, #rows script').length") == 0


def test_the_keyboard_walks_unfolds_and_folds(page: Page) -> None:
    page.evaluate("document.querySelector('.toggle').focus()")
    focused = "document.activeElement.innerText"

    page.press("ArrowDown", 40)
    assert page.evaluate(focused) == "1"
    page.press("End", 35)
    assert page.evaluate(focused) == "1,999"
    page.press("Enter", 13)
    assert page.evaluate("document.activeElement.ariaExpanded") == "true"
    page.press("Enter", 13)
    assert page.evaluate("document.activeElement.ariaExpanded") == "false"


def test_a_narrow_screen_needs_no_scrolling_sideways(page: Page) -> None:
    page.resize(360, 740)
    page.settle()
    page.click(".job .toggle")

    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(chromium: Chromium, url: str, scheme: str) -> None:
    page = chromium.open(url, scheme=scheme)
    page.click(".job .toggle")

    faint = page.evaluate(CONTRAST)
    page.close()

    assert faint == []


# Texts whose contrast is below 4.5, the least that WCAG 2 asks for at level AA.
CONTRAST = """(() => {
  const channels = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
  const light = (color) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = channels(color).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if ((channels(color)[3] ?? 1) > 0) return color;
    }
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim().slice(0, 20);
    if (!text || !element.checkVisibility() || element.closest('script')) continue;
    const style = getComputedStyle(element);
    const color = element.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(color), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${text} (${ratio.toFixed(1)})`);
  }
  return found;
})()"""
