"""From timeout_s to control, with the whole tree gone."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil

from tests.standin import VERSION

from .measuring import Row, at_most, interleave
from .setting import MARK, Contender, Setting

TIMEOUT_S = 1.0
PATIENCE_S = 3.0  # then the tools are ended from outside, for who waits for them

# In the place of opencode, since it is our own time that is measured. As OpenCode does: tools in
# sessions of their own, which no signal to it reaches.
PROGRAM = f"""{VERSION}
printf '%s\\n' '{{"type": "step_start", "sessionID": "ses_1", "part": {{}}}}'
setsid sleep 600 >/dev/null 2>&1 &
setsid sh -c "sleep 600 & sleep 600" >/dev/null 2>&1 &
exec sleep 600
"""


def measure(setting: Setting) -> list[Row]:
    binary = setting.root / "with-tools"
    binary.write_text(PROGRAM)
    binary.chmod(0o755)
    workers = setting.contenders("ours", "bare", *setting.rivals)
    watched = {name: _Watched(worker) for name, worker in workers.items()}
    ways = {name: (lambda one=one: one.time_out(binary)) for name, one in watched.items()}
    rows = []
    for name, times in interleave(ways, setting.size(5, 3)).items():
        what = "from timeout_s to control" + ("" if name == "ours" else f", {name}")
        aim = at_most(0.5, " s") if name == "ours" else None
        note = watched[name].told()
        rows.append(Row("timeout", what, unit="s", ours=times, aim=aim, note=note))
    return rows


class _Watched:
    """A contender, whose tools are ended for it after a while."""

    def __init__(self, worker: Contender) -> None:
        self._worker = worker
        self._left = 0
        self._is_held_up = False

    def time_out(self, binary: Path) -> float:
        """Seconds beyond the timeout."""
        timer = threading.Timer(TIMEOUT_S + PATIENCE_S, self._rescue)
        timer.start()
        try:
            answer = self._worker.ask("time_out", binary=str(binary), timeout_s=TIMEOUT_S)
            return float(answer.answer)
        finally:
            timer.cancel()
            self._end_tools()

    def told(self) -> str:
        left = f"{self._left} tools left running" if self._left else "no tool left"
        came = "; came back only when its tools were ended from outside"
        return left + came * self._is_held_up

    def _rescue(self) -> None:
        self._is_held_up = True
        self._end_tools()

    def _end_tools(self) -> None:
        count = 0
        for process in psutil.process_iter():
            try:
                if process.name() == "sleep" and process.environ().get(MARK) == self._worker.name:
                    process.kill()
                    count += 1
            except psutil.Error:  # ended, or another user's
                continue
        self._left = max(self._left, count)
