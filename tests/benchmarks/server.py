"""A warm server: against a bare loop of HTTP calls, and with a model that takes its time."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from opencode_sync.testing import Reply, ScriptedModel

from .measuring import Row, at_least, compare, interleave
from .real import ANSWER, PROMPT, settings_of
from .setting import CannotRun, Contender, Setting

THREADS = 8
BUSY_S, BUSY_THREADS = 0.5, 16


def measure(setting: Setting) -> list[Row]:
    """Milliseconds per prompt, each way."""
    many = setting.size(96, 32)
    few = setting.size(8, 2)  # of those that take a process each
    rows: list[Row] = []
    with ScriptedModel(ANSWER) as model:
        told = settings_of(model)
        own = told | {"binary": setting.opencode(), "workspace": str(setting.workspace)}
        common = {"workspace": str(setting.workspace), "threads": THREADS}
        workers = setting.contenders("ours", "bare", *setting.rivals)
        client = setting.contender("ours")
        place = _start(workers["ours"], own, THREADS)
        http = common | place | {"model": told["model"]}
        ways: dict[str, Callable[[], float]] = {
            "server.map": lambda: _ms(workers["ours"], "turns", many, **common),
            "bare": lambda: _ms(workers["bare"], "turns", many, **http),
            "client.map": lambda: _ms(client, "runs", few, **own, at_once=2),
        }
        for name in setting.rivals:
            try:
                _session_ms(workers[name], many // 4, own)
            except CannotRun as error:
                reason = str(error).partition(" (")[0]
                rows.append(Row("server", "its session", name, note=f"does not run: {reason}"))
            else:
                ways[name] = lambda name=name: _session_ms(workers[name], many // 4, own)  # type: ignore[misc]
        ways["server.map"](), ways["bare"]()  # the first ones take longer
        found = interleave(ways, setting.size(5, 2))
        workers["ours"].ask("stop_server")
    ours = found.pop("server.map")
    what = f"{many} prompts, {THREADS} at a time"
    per_s = f"{1000 / median(ours):.1f} prompts per s"
    told_of = {
        "bare": ("a bare loop of HTTP calls, on the same server", at_least(0.85), per_s),
        "client.map": (f"client.map of {few} prompts, 2 at a time", at_least(20), ""),
    }
    for name, theirs in found.items():
        session = (f"{name}, one session, a prompt after the other", at_least(1), "")
        against, aim, note = told_of.get(name, session)
        row = compare("server", what, against, ours, theirs, "ms", "times as fast", aim, note)
        rows.append(row)
    return rows


def busy(setting: Setting) -> list[Row]:
    """Prompts per second with a model that takes its time."""
    count = setting.size(96, 48)
    with ScriptedModel(lambda request: Reply(ANSWER, delay_s=BUSY_S)) as model:
        worker = setting.contender("ours")
        _start(worker, settings_of(model) | {"binary": setting.opencode()}, BUSY_THREADS)
        common = {"workspace": str(setting.workspace), "threads": BUSY_THREADS}
        _ms(worker, "turns", BUSY_THREADS, **common)  # the first ones of a server take longer
        rounds = range(setting.size(5, 2))
        rates = [1000 / _ms(worker, "turns", count, **common) for _ in rounds]
        worker.ask("stop_server")
    what = f"{BUSY_THREADS} at a time, a model that takes {BUSY_S:g} s"
    limit = f"{BUSY_THREADS / BUSY_S:g} per s if nothing but the model took time"
    return [Row("server", what, unit="per s", ours=rates, aim=at_least(10, " per s"), note=limit)]


def _start(worker: Contender, told: dict[str, object], threads: int) -> dict[str, str]:
    arguments = {name: told[name] for name in ("binary", "model", "config", "env")}
    place: dict[str, str] = worker.ask("start_server", **arguments, threads=threads).answer
    return place


def _ms(worker: Contender, task: str, count: int, **arguments: object) -> float:
    """Milliseconds for each of *count* prompts."""
    answer = worker.ask(task, prompts=[PROMPT] * count, **arguments)
    assert answer.answer == [ANSWER] * count, (worker.name, answer)
    return 1000 * answer.wall_s / count


def _session_ms(rival: Contender, count: int, told: dict[str, object]) -> float:
    """The same in a session of *rival*, without its start."""
    answer = rival.ask("session", prompts=[PROMPT] * count, **told).answer
    assert answer["answers"] == [ANSWER] * count, (rival.name, answer)
    return 1000 * float(answer["seconds"]) / count
