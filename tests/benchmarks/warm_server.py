"""96 prompts on the warm server, against a bare loop of the same HTTP calls on it."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from opencode_sync.testing import Reply, ScriptedModel

from .measuring import Row, Spread, at_least, compare, interleave
from .real import ANSWER, PROMPT, settings_of
from .setting import CannotRun, Setting

THREADS = 8


BUSY_S, BUSY_THREADS = 0.5, 16


def busy(setting: Setting) -> list[Row]:
    """Prompts per second with a model that takes its time."""
    binary = setting.opencode()
    count = setting.rounds(96, 48)
    with ScriptedModel(lambda request: Reply(ANSWER, delay_s=BUSY_S)) as model:
        told = settings_of(model) | {"binary": binary, "threads": BUSY_THREADS}
        ours = setting.contender("ours")
        ours.ask("start_server", **told)
        common = {"workspace": str(setting.workspace), "threads": BUSY_THREADS}

        def once(n: int) -> float:
            return n / ours.ask("turns", prompts=[PROMPT] * n, **common).wall_s

        once(BUSY_THREADS)  # the first ones of a server take longer
        value = Spread.of([once(count) for _ in range(setting.rounds(5, 2))])
        ours.ask("stop_server")
    what = f"{BUSY_THREADS} at a time, a model that takes {BUSY_S:g} s"
    aim = at_least(10, " per s")
    limit = f"{BUSY_THREADS / BUSY_S:g} per s if nothing but the model took time"
    return [Row("server", what, unit="per s", ours=value, value=value, aim=aim, note=limit)]


def measure(setting: Setting) -> list[Row]:
    """Seconds per prompt, each way."""
    binary = setting.opencode()
    many = setting.rounds(96, 32)
    few = setting.rounds(8, 2)  # of those that take a process each
    with ScriptedModel(ANSWER) as model:
        told = settings_of(model)
        workspace = str(setting.workspace)
        workers = setting.contenders("ours", "bare", *setting.rivals)
        client = setting.contender("ours")
        own = told | {"binary": binary, "threads": THREADS}
        place = workers["ours"].ask("start_server", **own).answer
        common = {"workspace": workspace, "threads": THREADS}
        http = common | place | {"model": told["model"]}

        def on_server() -> float:
            done = workers["ours"].ask("turns", prompts=[PROMPT] * many, **common)
            assert done.answer == [ANSWER] * many, done
            return done.wall_s / many

        def by_http() -> float:
            done = workers["bare"].ask("turns", prompts=[PROMPT] * many, **http)
            assert done.answer == [ANSWER] * many, done
            return done.wall_s / many

        def by_client() -> float:
            given = told | {"binary": binary, "workspace": workspace, "at_once": 2}
            return client.ask("runs", prompts=[PROMPT] * few, **given).wall_s / few

        def by_session(name: str) -> float:
            given = told | {"binary": binary, "workspace": workspace}
            turns = many // 4
            answer = workers[name].ask("session", prompts=[PROMPT] * turns, **given).answer
            assert answer["answers"] == [ANSWER] * turns, answer
            return float(answer["seconds"]) / turns

        ways: dict[str, Callable[[], float]] = {
            "server.map": on_server,
            "bare": by_http,
            "client.map": by_client,
        }
        rows, sessions = [], []
        for name in setting.rivals:
            try:
                by_session(name)
            except CannotRun as error:
                rows.append(
                    Row(
                        "server",
                        "its session",
                        name,
                        note=f"does not run: {str(error).partition(' (')[0]}",
                    )
                )
            else:
                sessions.append(name)
                ways[name] = lambda name=name: by_session(name)  # type: ignore[misc]
        on_server(), by_http()
        found = interleave(ways, setting.rounds(5, 2))
        workers["ours"].ask("stop_server")
    found = {way: [1000 * seconds for seconds in times] for way, times in found.items()}
    per_s = 1000 / median(found["server.map"])
    what = f"{many} prompts, {THREADS} at a time"
    ours = found["server.map"]
    rows += [
        compare("server", what, "a bare loop of HTTP calls, on the same server", ours,
                found["bare"], "ms", "speed", at_least(0.85), f"{per_s:.1f} prompts per s"),
        compare("server", what, f"client.map of {few} prompts, 2 at a time", ours,
                found["client.map"], "ms", "speed", at_least(20)),
    ]  # fmt: skip
    for name in sessions:
        against = f"{name}, one session, a prompt after the other"
        rows.append(compare("server", what, against, ours, found[name], "ms", "speed", at_least(1)))
    return rows
