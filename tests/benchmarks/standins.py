"""Programs in the place of opencode, for what is our own cost and not the binary's.

All are started as `opencode run` is, and look at no argument but --version, nor at the prompt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from opencode_sync import TESTED_VERSION
from tests.standin import VERSION

_IDS = {"sessionID": "ses_0123456789abcdefghijklmnop", "messageID": "msg_0123456789abcdefghijklmn"}


def line(kind: str, **part: object) -> str:
    """An event as OpenCode 1.18.33 writes it."""
    whole = {"id": "prt_0123456789abcdefghijklmnop", **_IDS, "type": kind, **part}
    event = {"type": kind.replace("-", "_"), "timestamp": 1_760_000_000_000}
    return json.dumps({**event, "sessionID": _IDS["sessionID"], "part": whole})


_START = line("step-start")
_TEXT = line("text", text="The answer is 42.", time={"start": 1, "end": 2})
_TOKENS = {
    "total": 120,
    "input": 100,
    "output": 20,
    "reasoning": 0,
    "cache": {"read": 0, "write": 0},
}
_FINISH = line("step-finish", reason="stop", cost=0.01, tokens=_TOKENS)

_KIND = '"type": "text"'
_FLOOD = """\
import os, sys
def part(number):
    line = TEXT.replace("prt_0123456789", f"prt_{number:010d}")
    return line.replace("The answer is 42.", f"Word {number} of the answer, as long as they are.")
def write(data):
    data = memoryview(data)
    while data:
        data = data[os.write(1, data):]
write(START.encode() + b"\\n")
for first in range(0, COUNT, 1000):
    numbers = range(first, min(COUNT, first + 1000))
    write("".join(part(number) + "\\n" for number in numbers).encode())
write(FINISH.encode() + b"\\n")
"""

_STAMPED = """\
import os, time
def write(line):
    stamp = '{"written_ns": %d, ' % time.monotonic_ns()
    os.write(1, (stamp + line[1:] + "\\n").encode())
time.sleep(0.05)
write(START)
time.sleep(0.05)
write(FINISH)
"""

_PYTHON_VERSION = f"""\
import sys
if sys.argv[1:] == ["--version"]:
    sys.exit(print("{TESTED_VERSION}"))
"""

# As OpenCode does: tools in sessions of their own, which no signal to it reaches.
_TOOLS = """\
printf '%s\\n' '{start}'
setsid sleep 600 >/dev/null 2>&1 &
setsid sh -c "sleep 600 & sleep 600" >/dev/null 2>&1 &
exec sleep 600
"""


def ends_at_once(directory: Path) -> Path:
    """Prints three events, and ends."""
    return _write(directory / "ends-at-once", f"{VERSION}printf '%s\\n' {_quoted()}\n")


def flood(directory: Path, count: int, kind: str = "text") -> Path:
    """Prints *count* events as fast as it can; *kind* is ``"text"``, or what leaves no text."""
    program = f"COUNT = {count}\nTEXT = TEXT.replace({_KIND!r}, {_KIND.replace('text', kind)!r})\n"
    return _python(directory / f"flood-{kind}-{count}", program + _FLOOD)


def stamped(directory: Path) -> Path:
    """Prints a first and a last event 50 ms apart, each with the moment of its writing."""
    return _python(directory / "stamped", _STAMPED)


def with_tools(directory: Path) -> Path:
    """Runs three tools that obey SIGTERM, for ever."""
    return _write(directory / "with-tools", VERSION + _TOOLS.format(start=_START))


def _quoted() -> str:
    return " ".join(f"'{text}'" for text in (_START, _TEXT, _FINISH))


def _python(path: Path, program: str) -> Path:
    lines = f"START, TEXT, FINISH = {_START!r}, {_TEXT!r}, {_FINISH!r}\n"
    return _write(path, f"#!{sys.executable} -IS\n{_PYTHON_VERSION}{lines}{program}")


def _write(path: Path, program: str) -> Path:
    path.write_text(program)
    path.chmod(0o755)
    return path
