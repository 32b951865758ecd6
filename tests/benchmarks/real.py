"""The real binary before a scripted model: one run, and eight at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from opencode_sync.testing import ScriptedModel

from .measuring import Aim, Row, at_most, compare, interleave
from .setting import Answer, Contender, Setting

ANSWER = "The answer is 42."
PROMPT = "What is the answer?"


def settings_of(model: ScriptedModel) -> dict[str, Any]:
    """What every contender is told, so that it asks *model*."""
    cfg = model.run_config()
    return {"model": cfg.model, "config": cfg.config_overrides, "env": dict(cfg.extra_env or {})}


def one_run(setting: Setting) -> list[Row]:
    with ScriptedModel(ANSWER) as model:
        told = _told(setting, model)
        as_variable = {"OPENCODE_CONFIG_CONTENT": json.dumps(told["config"])}
        for_a_shell = told | {"env": told["env"] | as_variable}
        workers = setting.contenders("ours", "bare", *setting.rivals)
        ways: dict[str, Callable[[], Answer]] = {
            name: (lambda worker=worker: _checked(worker, 1, **told))
            for name, worker in workers.items()
        }
        ways["bare"] = lambda: _checked(workers["bare"], 1, **for_a_shell)
        ways["lean"] = lambda: _checked(workers["ours"], 1, **told, changes={"lean": True})
        ways["bare"]()  # the first run of a home makes its database
        found = interleave(ways, setting.size(7, 2))
    return [
        _row("one run", what, rival, found[way], found[rival], aim if rival == "bare" else None)
        for way, what, aim in (
            ("ours", "one run", at_most(1.0)),
            ("lean", "one run, lean=True", at_most(0.85)),
        )
        for rival in ("bare", *setting.rivals)
    ]


def at_once(setting: Setting) -> list[Row]:
    count = setting.size(8, 4)
    with ScriptedModel(ANSWER) as model:
        told = _told(setting, model)
        workers = setting.contenders("ours", *setting.rivals)
        ways = {
            name: (lambda worker=worker: _checked(worker, count, at_once=count, **told))
            for name, worker in workers.items()
        }
        found = interleave(ways, setting.size(5, 1))
    best = min(setting.rivals, key=lambda name: median(answer.wall_s for answer in found[name]))
    what = f"{count} runs at once, the default settings"
    return [
        _row("at once", what, name, found["ours"], found[name],
             at_most(0.9) if name == best else None, per=count)
        for name in setting.rivals
    ]  # fmt: skip


def _told(setting: Setting, model: ScriptedModel) -> dict[str, Any]:
    places = {"workspace": str(setting.workspace), "binary": setting.opencode()}
    return settings_of(model) | places


def _checked(worker: Contender, count: int, **arguments: Any) -> Answer:
    answer = worker.ask("runs", prompts=[PROMPT] * count, **arguments)
    assert answer.answer == [ANSWER] * count, (worker.name, answer)
    return answer


def _row(
    benchmark: str,
    what: str,
    rival: str,
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
    aim: Aim | None,
    per: int = 1,
) -> Row:
    against = "opencode run > file" if rival == "bare" else rival
    walls = [[answer.wall_s / per for answer in answers] for answers in (ours, theirs)]
    cpus = [median(answer.cpu_s for answer in answers) / per for answers in (ours, theirs)]
    note = f"CPU {cpus[0]:.2f} s each, theirs {cpus[1]:.2f} s"
    unit = "s" if per == 1 else "s each"
    return compare(benchmark, what, against, *walls, unit, "of theirs", aim, note)
