"""From timeout_s to control, with the whole tree gone."""

from __future__ import annotations

import threading

import psutil

from . import standins
from .measuring import Row, Spread, at_most, interleave
from .setting import MARK, Contender, Setting

TIMEOUT_S = 1.0
PATIENCE_S = 3.0  # then the tools are ended from outside, for who waits for them


def measure(setting: Setting) -> list[Row]:
    binary = str(standins.with_tools(setting.root))
    workers = setting.contenders("ours", "bare", *setting.rivals)
    left = dict.fromkeys(workers, 0)
    is_held_up = dict.fromkeys(workers, False)

    def once(name: str) -> float:
        def rescue() -> None:
            is_held_up[name] = True
            left[name] = max(left[name], _end_tools(workers[name]))

        timer = threading.Timer(TIMEOUT_S + PATIENCE_S, rescue)
        timer.start()
        try:
            answer = workers[name].ask("time_out", binary=binary, timeout_s=TIMEOUT_S)
            return float(answer.answer)
        finally:
            timer.cancel()
            left[name] = max(left[name], _end_tools(workers[name]))

    rounds = setting.rounds(5, 3)
    found = interleave({name: (lambda name=name: once(name)) for name in workers}, rounds)
    rows = []
    for name, times in found.items():
        value = Spread.of(times)
        what = "from timeout_s to control" + ("" if name == "ours" else f", {name}")
        notes = [f"{left[name]} tools left running" if left[name] else "no tool left"]
        if is_held_up[name]:
            notes.append("came back only when its tools were ended from outside")
        aim = at_most(0.5, " s") if name == "ours" else None
        rows.append(
            Row("timeout", what, unit="s", ours=value, value=value, aim=aim, note="; ".join(notes))
        )
    return rows


def _end_tools(worker: Contender) -> int:
    """End the tools of the worker's runs; how many there were."""
    count = 0
    for process in psutil.process_iter():
        try:
            if process.name() == "sleep" and process.environ().get(MARK) == worker.name:
                process.kill()
                count += 1
        except psutil.Error:  # ended, or another user's
            continue
    return count
