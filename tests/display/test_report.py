"""A batch as a page: complete, safe to open, and written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import tracemalloc
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opencode_sync import Job, OpenCodeConfigError, OpenCodeError, OpenCodeTimeoutError, RunResult
from opencode_sync.core.records import record_of, records_in
from opencode_sync.display import report
from opencode_sync.display.jobs import detail_of, row_of
from opencode_sync.display.report import (
    Clock,
    checkpoint_to_html,
    curves_of,
    lanes_of,
    results_to_html,
    script_json,
    span,
    time_ticks,
    value_ticks,
    write_html,
)
from tests.scripted import ScriptedRunner

HOSTILE = (
    "</script><script>alert(1)</script><!--<script>"
    "<img src=x onerror=alert(2)>\u2028\u2029\ud800\x00\u202e&quot;\"'`${1}{{ 7 * 7 }}"
)
VOID = {"meta", "link", "input", "br", "line", "rect", "path"}


class Reading(HTMLParser):
    """What a browser's parser finds in a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.unclosed: list[str] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.data: dict[str, Any] = {}
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if not self.tags:
            return
        tag, attributes = self.tags[-1]
        if self.unclosed[-1:] == ["script"] and attributes.get("type") == "application/json":
            self.data[str(attributes["id"])] = json.loads(data)
        elif self.unclosed and self.unclosed[-1] in self.inside:
            self.inside[tag].append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def jobs(self) -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = self.data["jobs"]
        return jobs


def record(index: int = 0, **changes: Any) -> dict[str, Any]:
    """A job that took the second after *index*."""
    result = RunResult(
        prompt=f"prompt {index}",
        index=index,
        key=f"key {index}",
        attempts=1,
        duration_s=1.0,
        total_cost=0.01,
        turns=1,
    )
    for event in (
        {"type": "step_start", "timestamp": (1_000_000 + index) * 1000, "part": {}},
        {
            "type": "tool_use",
            "part": {
                "tool": "bash",
                "state": {"status": "completed", "input": {"command": "ls"}, "output": "a b"},
            },
        },
        {"type": "text", "part": {"text": f"answer {index}"}},
        {
            "type": "step_finish",
            "part": {"reason": "stop", "tokens": {"total": 12, "input": 7, "output": 5}},
        },
    ):
        result.append_event(event)  # type: ignore[arg-type]
    return {**result.to_dict(), "failure": None, **changes}


def hostile(value: Any) -> Any:
    """*value* with HOSTILE in the place of each text, keys of mappings aside."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, Mapping):
        return {key: hostile(each) for key, each in value.items()}
    return [hostile(each) for each in value] if isinstance(value, list) else value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


@pytest.fixture
def runner() -> Iterator[ScriptedRunner]:
    with ScriptedRunner(max_workers=2) as runner:
        yield runner


def page_of(path: Path, records: Iterable[Mapping[str, Any]], **settings: Any) -> Reading:
    write_html(records, path, **settings)
    return Reading(path.read_text(encoding="utf-8"))


# --- safe to open --------------------------------------------------------------------------------


def test_nothing_that_a_job_says_becomes_markup(path: Path) -> None:
    kept = {"status", "index", "failure"}
    evil = {k: v if k in kept else hostile(v) for k, v in record().items()}
    evil["error"] = {"name": HOSTILE, "message": HOSTILE, "status_code": 400}
    evil["failure"] = {"type": HOSTILE, "message": HOSTILE}

    plain = page_of(path, [record(failure={"type": "OpenCodeError", "message": "no"})])
    page = page_of(path, [evil], title=HOSTILE)

    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert page.data["job-0"]["prompt"].startswith("</script><script>alert(1)</script>")
    assert page.unclosed == []


def test_the_page_allows_itself_its_own_script_and_style_and_nothing_else(path: Path) -> None:
    page = page_of(path, [record()])

    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
    (script,), (style,) = page.inside["script"], page.inside["style"]
    assert policy == (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_the_page_requests_nothing_and_has_no_inline_style_or_handler(path: Path) -> None:
    page = page_of(path, [record()])

    for tag, attributes in page.tags:
        target = attributes.get("href") or attributes.get("src") or "#"
        assert target.startswith("#") or target == "data:,", tag
    urls = re.findall(r"\w+://[^\s\"')]+|url\(|@import", path.read_text())
    assert set(urls) == {"http://www.w3.org/2000/svg"}  # a name, which is not requested
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [name for name in names if name == "style" or name.startswith("on")]


def test_ids_are_unique_and_what_points_to_one_finds_it(path: Path) -> None:
    page = page_of(path, [record(n) for n in range(3)])

    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    pointers = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert len(ids) == len(set(ids))
    assert pointers
    assert set(pointers) <= set(ids)


# --- complete ------------------------------------------------------------------------------------


def test_a_row_shows_its_job_in_short(path: Path) -> None:
    page = page_of(path, [record()])

    assert page.jobs == [
        {
            "n": 0,
            "key": "key 0",
            "status": "ok",
            "kind": None,
            "prompt": "prompt 0",
            "gist": "answer 0",
            "tools": ["bash"],
            "cost": 0.01,
            "tokens": 12,
            "seconds": 1.0,
            "from": 0.0,
            "to": 1.0,
            "lane": 0,
        }
    ]


def test_a_row_unfolds_to_prompt_answer_tools_and_events(path: Path) -> None:
    page = page_of(path, [record()])

    detail = page.data["job-0"]
    assert (detail["prompt"], detail["answer"]) == ("prompt 0", "answer 0")
    assert [(tool["name"], tool["input"], tool["output"]) for tool in detail["tools"]] == [
        ("bash", "ls", "a b")
    ]
    assert [event["type"] for event in detail["events"]] == [
        "step_start",
        "tool_use",
        "text",
        "step_finish",
    ]


def test_a_checkpoint_makes_the_same_page_as_its_results(
    runner: ScriptedRunner, tmp_path: Path
) -> None:
    file, jobs = tmp_path / "batch.jsonl", ["a", "fail b", Job("c", key="see", metadata={"row": 3})]
    ends = list(runner.map(jobs, on_error="return", checkpoint=file))
    results_to_html(ends, tmp_path / "results.html", title="Letters")

    checkpoint_to_html(file, tmp_path / "file.html")

    ours, theirs = (
        {job["prompt"]: job for job in Reading((tmp_path / name).read_text()).jobs}
        for name in ("results.html", "file.html")
    )
    assert ours == theirs
    assert [job["key"] for job in ours.values()] == [None, None, "see"]
    assert '"row": 3' in Reading((tmp_path / "file.html").read_text()).data["job-2"]["metadata"]
    assert {job["prompt"]: job["status"] for job in ours.values()} == {
        "a": "ok",
        "fail b": "error",
        "c": "ok",
    }
    assert "Letters" in (tmp_path / "results.html").read_text()
    assert "batch.jsonl" in (tmp_path / "file.html").read_text()


def test_a_row_unfolds_to_warnings_and_sub_agents_too() -> None:
    used = {"input": 1_000, "output": 20, "total": 1_020}
    agent = {"agent": "general", "title": "look", "token_usage": used, "total_cost": 0.0012}

    detail = detail_of(record(sub_agents=[agent], warnings=["The MCP server 'f' did not start."]))

    assert ("Sub-agents", "general look (1,020 tokens, $0.0012)") in detail["facts"]
    assert detail["warnings"] == ["The MCP server 'f' did not start."]


def test_an_error_is_of_the_kind_that_the_batch_counts_it_under(runner: ScriptedRunner) -> None:
    late = OpenCodeTimeoutError("too late", result=RunResult(attempts=1))
    ends = [*runner.map(["fail a"], on_error="return"), late, OpenCodeError("no run")]

    rows = [row_of(each, n) for n, each in enumerate(map(record_of, ends))]

    kinds = ["OpenCodeProcessError (APIError 401)", "OpenCodeTimeoutError", "OpenCodeError"]
    assert [row.kind for row in rows] == kinds
    assert [row.status for row in rows] == ["error", "timed_out", "error"]


def test_errors_are_counted_by_kind_the_most_frequent_first(path: Path) -> None:
    kinds = ["OpenCodeTimeoutError", "OpenCodeServerError", "OpenCodeTimeoutError"]
    records = [record(n, failure={"type": k, "message": "no"}) for n, k in enumerate(kinds)]

    page = page_of(path, [*records, record(3)])

    shown = [(a["data-kind"]) for a in page.all("button") if "data-kind" in a]
    assert shown == ["OpenCodeTimeoutError", "OpenCodeServerError"]


def test_a_batch_without_times_has_a_table_and_no_timeline(path: Path) -> None:
    page = page_of(path, [record(events=[])])

    assert [job["n"] for job in page.jobs] == [0]
    assert "timeline" not in [attributes.get("id") for attributes in page.all("svg")]


def test_jobs_that_took_no_time_hours_apart_make_a_page(path: Path) -> None:
    page = page_of(path, [record(n, duration_s=0.0) for n in (0, 10_000)])

    assert [job["n"] for job in page.jobs] == [0, 10_000]


def test_the_page_counts_cut_and_empty_answers(runner: ScriptedRunner, path: Path) -> None:
    checkpoint = path.with_name("jobs.jsonl")
    list(runner.map(["a", "b", "mute"], checkpoint=checkpoint, max_workers=1))
    lines = [json.loads(line) for line in checkpoint.read_text().splitlines()]
    lines[0]["finish_reason"] = "length"  # as an earlier version wrote it: with the status "ok"
    checkpoint.write_text("".join(json.dumps(line) + "\n" for line in lines))

    page = page_of(path, records_in(checkpoint))

    assert [job["status"] for job in page.jobs] == ["incomplete", "ok", "ok"]
    assert "2 ok, 1 of them empty" in page.text


def test_the_page_counts_jobs_whose_tokens_had_no_price(runner: ScriptedRunner, path: Path) -> None:
    results_to_html(list(runner.map(["free a", "b", "free c"])), path)

    assert "2 used tokens at $0.00" in path.read_text()


def test_a_batch_of_nothing_is_a_page_too(path: Path) -> None:
    page = page_of(path, [])

    assert page.jobs == []


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys([*record(), "started_at"], values)))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_record_makes_a_page(odd: dict[str, Any]) -> None:
    pytest.importorskip("jinja2")
    path = Path("/dev/null")

    write_html([odd, record()], path)


# --- of a size that opens ------------------------------------------------------------------------


def test_a_long_text_is_cut_and_so_is_a_long_list_of_events() -> None:
    detail = detail_of(record(prompt="x" * 30_000, events=[{"type": "text"}] * 205))

    assert detail["prompt"] == "x" * 20_000 + "\n… 10,000 characters more"
    assert (len(detail["events"]), detail["more_events"]) == (200, 5)


def test_a_page_that_becomes_too_large_leaves_out_tools_and_events(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_PAGE_CHARS", 100)

    page = page_of(path, [record(0), record(1)])

    assert "events" in page.data["job-0"]
    assert page.data["job-1"]["left_out"] == "the page would become too large"
    assert not {"events", "tools"} & page.data["job-1"].keys()
    assert page.data["job-1"]["answer"] == "answer 1"


def test_records_are_not_kept_while_the_page_is_made(path: Path) -> None:
    write_html([record()], path)  # what is loaded and cached once
    large = (record(n, raw_stdout_lines=["x" * 1_000_000 + str(n)]) for n in range(40))

    tracemalloc.start()
    try:
        write_html(large, path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 10_000_000


# --- the page of a batch -------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [None, "batch.jsonl"], ids=["without", "with a checkpoint"])
def test_the_report_of_a_batch_becomes_a_page(
    runner: ScriptedRunner, tmp_path: Path, checkpoint: str | None
) -> None:
    file = None if checkpoint is None else tmp_path / checkpoint
    batch = runner.map(["a", "fail b", Job("c", key="see")], on_error="return", checkpoint=file)
    list(batch)

    batch.report.to_html(tmp_path / "report.html")

    page = Reading((tmp_path / "report.html").read_text())
    assert sorted((job["prompt"], job["status"]) for job in page.jobs) == [
        ("a", "ok"),
        ("c", "ok"),
        ("fail b", "error"),
    ]
    assert all("from" in job for job in page.jobs)
    assert ("events" in page.data["job-0"]) is (checkpoint is not None)


def test_a_job_that_is_not_in_the_checkpoint_is_on_the_page_too(
    runner: ScriptedRunner, tmp_path: Path
) -> None:
    jobs: list[Any] = ["a", 3]  # which is no job
    batch = runner.map(jobs, on_error="return", checkpoint=tmp_path / "c")
    list(batch)

    batch.report.to_html(tmp_path / "report.html")

    assert len(Reading((tmp_path / "report.html").read_text()).jobs) == 2


def test_a_number_that_is_not_finite_leaves_the_page_readable() -> None:
    assert script_json({"n": float("inf")}) == '{"n":null}'


# --- the file ------------------------------------------------------------------------------------


def test_a_page_that_cannot_be_completed_leaves_the_old_one(path: Path) -> None:
    path.write_text("old")

    def records() -> Iterator[dict[str, Any]]:
        yield record()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_html(records(), path)

    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_path_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OpenCodeConfigError, match=r"nowhere/x\.html.*No such file or directory"):
        write_html([record()], tmp_path / "nowhere" / "x.html")


def test_without_jinja_the_error_says_what_to_install(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)

    with pytest.raises(OpenCodeConfigError, match=r'pip install "opencode-sync-sdk\[report\]"'):
        write_html([record()], path)


# --- a checkpoint's file -------------------------------------------------------------------------


def lines(path: Path, *records: Mapping[str, Any]) -> Path:
    own = {"fingerprint": "f", "settings": "s"}
    ordered = ({"key": each["key"], **own, **each} for each in records)
    path.write_text("".join(json.dumps(each) + "\n" for each in ordered))
    return path


def test_the_last_line_of_a_key_counts(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", record(0, answer="old"), record(1), record(0, answer="new"))

    assert [each["answer"] for each in records_in(file)] == ["answer 1", "new"]


def test_a_line_that_is_cut_off_is_left_out(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", record(0), record(1))
    file.write_bytes(file.read_bytes()[:-20])

    assert [each["index"] for each in records_in(file)] == [0]


@pytest.mark.parametrize("line", ["{}", "not JSON", '{"key": "a", "status": "ok"}'])
def test_a_damaged_line_is_left_out_and_a_file_of_nothing_else_refused(
    tmp_path: Path, line: str
) -> None:
    file = lines(tmp_path / "a.jsonl", record(0))
    file.write_text(f"{line}\n{file.read_text()}")
    other = tmp_path / "b.jsonl"
    other.write_text(line + "\n")

    assert [each["index"] for each in records_in(file)] == [0]
    with pytest.raises(OpenCodeConfigError, match=r"b\.jsonl': not a checkpoint"):
        list(records_in(other))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OpenCodeConfigError, match=r"a\.jsonl.*No such file"):
        list(records_in(tmp_path / "a.jsonl"))


# --- where things stand in the charts ------------------------------------------------------------


def test_jobs_that_ran_side_by_side_have_lanes_of_their_own() -> None:
    assert lanes_of([(0, 5), (1, 2), (2, 4), (3, 6), (6, 7)]) == [0, 1, 1, 2, 0]


def test_hours_in_which_nothing_ran_are_left_out_and_a_short_pause_is_not() -> None:
    clock = Clock([(1000, 1010), (1005, 1020), (91_020, 91_030)])
    short = Clock([(0, 10), (100, 110)])

    assert clock.at(1005) == 5
    assert clock.at(91_025) == 25
    assert clock.total_s == 30
    assert [(each.at, each.skipped_s) for each in clock.breaks] == [(20, 90_000)]
    assert (short.total_s, short.breaks) == (110, [])


def test_curves_are_stacked_and_end_at_the_sum() -> None:
    curves, top = curves_of(["a", "b"], [(5, [1, 2]), (10, [1, 0])], 10)

    assert top == 4
    assert [curve.line for curve in curves] == [
        "M0 100H0V100.00H5000V75.00H10000V50.00H10000",
        "M0 100H0V100.00H5000V25.00H10000V0.00H10000",
    ]


@pytest.mark.parametrize(
    "total_s, labels",
    [
        (0.5, ["0 s"]),
        (9, ["0 s", "2 s", "4 s", "6 s", "8 s"]),
        (1172, ["0 s", "5 min", "10 min", "15 min"]),
        (9000, ["0 s", "30 min", "1 h", "1 h 30 min", "2 h", "2 h 30 min"]),
        (900_000, ["0 s", "2 d", "4 d", "6 d", "8 d", "10 d"]),
    ],
)
def test_times_on_the_axis_are_round(total_s: float, labels: list[str]) -> None:
    assert [tick.label for tick in time_ticks(total_s)] == labels


@pytest.mark.parametrize(
    "top, values", [(47, [20, 40]), (1, [0.5, 1]), (0.033, [0.01, 0.02, 0.03]), (0, [])]
)
def test_values_on_the_axis_are_round(top: float, values: list[float]) -> None:
    assert value_ticks(top) == pytest.approx(values)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (4.14, "4.1 s"),
        (59.96, "1 min"),
        (3599.9, "1 h"),
        (7500, "2 h 5 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_a_span_of_time_has_at_most_two_units(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_the_page_counts_what_earlier_tries_have_cost(tmp_path: Path) -> None:
    once_more = record(1, cost_before=0.5, tokens_before=1_000_000)

    page = page_of(tmp_path / "page.html", [record(0), once_more])

    words = " ".join(page.text.split())
    assert "Cost$0.5200$0.2600 a job; $0.5000 of it on earlier tries" in words
    assert "Tokens1 M" in words
