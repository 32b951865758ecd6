"""The real binary before a scripted model: one run, and eight at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from opencode_sync.testing import ScriptedModel

from .measuring import Row, at_most, compare, interleave
from .setting import Answer, Contender, Setting

ANSWER = "The answer is 42."
PROMPT = "What is the answer?"
AT_ONCE = 8


def settings_of(model: ScriptedModel) -> dict[str, Any]:
    """What every contender is told, so that it asks *model*."""
    cfg = model.run_config()
    return {"model": cfg.model, "config": cfg.config_overrides, "env": dict(cfg.extra_env or {})}


def one_run(setting: Setting) -> list[Row]:
    binary = setting.opencode()
    with ScriptedModel(ANSWER) as model:
        told = settings_of(model) | {"workspace": str(setting.workspace), "binary": binary}
        workers = setting.contenders("ours", "bare", *setting.rivals)

        def once(name: str, **more: Any) -> Answer:
            given = told | _for_a_shell(told) if name == "bare" else told | more
            return _checked(workers[name], 1, **given)

        ways: dict[str, Callable[[], Answer]] = {
            name: (lambda name=name: once(name)) for name in workers
        }
        ways["lean"] = lambda: once("ours", changes={"lean": True})
        ways["bare"]()  # the first run of a home makes its database
        found = interleave(ways, setting.rounds(7, 2))
    rows = []
    for way, aim in (("ours", at_most(1.0)), ("lean", at_most(0.85))):
        what = "one run" + (", lean=True" if way == "lean" else "")
        for rival in ("bare", *setting.rivals):
            against = "opencode run > file" if rival == "bare" else rival
            row = _row("one run", what, against, found[way], found[rival],
                       aim if rival == "bare" else None)  # fmt: skip
            rows.append(row)
    return rows


def at_once(setting: Setting) -> list[Row]:
    binary = setting.opencode()
    count = setting.rounds(AT_ONCE, 4)
    with ScriptedModel(ANSWER) as model:
        told = settings_of(model) | {"workspace": str(setting.workspace), "binary": binary}
        workers = setting.contenders("ours", *setting.rivals)

        def once(name: str) -> Answer:
            return _checked(workers[name], count, with_memory=True, at_once=count, **told)

        ways = {name: (lambda name=name: once(name)) for name in workers}
        found = interleave(ways, setting.rounds(5, 1))
    best = min(setting.rivals, key=lambda name: median(answer.wall_s for answer in found[name]))
    what = f"{count} runs at once, the default settings"
    rows = []
    for name in setting.rivals:
        aim = at_most(0.9) if name == best else None
        rows.append(_row("at once", what, name, found["ours"], found[name], aim, per=count))
    return rows


def _checked(worker: Contender, count: int, **arguments: Any) -> Answer:
    answer = worker.ask("runs", prompts=[PROMPT] * count, **arguments)
    assert answer.answer == [ANSWER] * count, (worker.name, answer)
    return answer


def _for_a_shell(told: dict[str, Any]) -> dict[str, Any]:
    import json

    config = json.dumps(told["config"])
    return {"env": {**told["env"], "OPENCODE_CONFIG_CONTENT": config}}


def _row(
    benchmark: str,
    what: str,
    against: str,
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
    aim: Any,
    per: int = 1,
) -> Row:
    notes = [
        f"CPU {_mid(ours, 'cpu_s') / per:.2f} s each, theirs {_mid(theirs, 'cpu_s') / per:.2f} s"
    ]
    if per > 1:
        peaks = [f"{_mid(answers, 'peak_mib') / 1024:.1f} GiB" for answers in (ours, theirs)]
        notes.append(f"peak {peaks[0]}, theirs {peaks[1]}")
    walls = [[answer.wall_s / per for answer in answers] for answers in (ours, theirs)]
    unit = "s" if per == 1 else "s each"
    return compare(benchmark, what, against, *walls, unit, "time", aim, "; ".join(notes))


def _mid(answers: Sequence[Answer], field: str) -> float:
    return median(getattr(answer, field) for answer in answers)
