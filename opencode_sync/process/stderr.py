"""Lines of stderr: OpenCode's log, what preload.js reports, and warnings.

    timestamp=... level=ERROR message="stream error" ... error.error="AI_APICallError: slow down"
    timestamp=... level=WARN message="server unavailable" key=NAME type=local status=failed
    opencode-sync: {"status":429,"retry_after":"3600"}
    opencode-sync: {"model":"provider/model"}
    opencode-sync: {"type":"step_finish","timestamp":...,"sessionID":"ses_...","part":...}
    ! agent "nope" not found. Falling back to default agent

OpenCode retries a provider's refusals silently and for long; its log has the message, and
preload.js reports the HTTP status. Formats of 1.18.33; other lines are left alone.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

from ..core.events import Event, RetryEvent, warning_events
from ..core.reading import asked_to_wait_s, unavailable
from ..core.text import strip_ansi

PRELOAD_PREFIX = "opencode-sync: "
FALLBACK = "Falling back to"

NEEDED_BYTES = 8_000_000  # where a start writes: Bun unpacks 5.6 MB, and a database takes 0.9
_LONGEST = 65_536  # characters of a line that are searched
_LOG_LINE = re.compile(r"timestamp=\S+ level=[A-Z]+ ")
_LOG_FIELD = re.compile(r'(?<=\s)([\w.]+)=("(?:[^"\\]|\\.)*"|\S*)')
_NOT_MADE = re.compile(r"^E[A-Z]+: [^\n]*, mkdir '([^'\n]+)'", re.MULTILINE)
_NOT_SEEN = re.compile(r'^error: preload not found "', re.MULTILINE)
_NOT_TAKEN = re.compile(r"^error: invalid JSC environment variable\s+(BUN_JSC_\w+)", re.MULTILINE)


def log_fields(line: str) -> dict[str, str] | None:
    """The fields of a line of OpenCode's log, or None for any other line."""
    if not _LOG_LINE.match(line):
        return None
    return {key: _unquoted(value) for key, value in _LOG_FIELD.findall(line)}


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


@dataclass
class LogReader:
    """Reads stderr's lines in order.

    Attributes:
        cause: The last failure that the log explains; of an unknown model it tells more than
            OpenCode's ``error`` event does.
        other_agent: Why OpenCode runs another agent than was asked for, or None.
        pending: A refusal, or None; the next line shows whether it is the last one. Without
            its HTTP status it is taken for one that is retried, if nothing follows.
        model: Provider and name of the model that answers; None until one does.
    """

    cause: str = ""
    other_agent: str | None = None
    pending: Event | None = None
    model: str | None = None
    _status: dict[str, object] = field(default_factory=dict)
    _complaint: str = ""

    @property
    def explanation(self) -> str:
        """The log's explanation of a failure that has no message; "" where there is none."""
        return self.cause or self._complaint

    def read(self, line: str) -> tuple[bool, list[Event]]:
        """Whether *line* is a log line, and the events that follow from it."""
        line = line[:_LONGEST]
        fields = log_fields(line)
        if fields is None:
            why, falls_back, to = strip_ansi(line).partition(FALLBACK)
            if falls_back and "agent" in to:
                self.other_agent = why.strip(" !.,;:")
            return False, []
        message = fields.get("message")
        if message == "failed" and "error" in fields and fields.get("level") == "ERROR":
            self.cause = fields["error"]
        elif str(message).startswith("failed to ") and "error" in fields:
            self._complaint = f"{message}: {fields['error']}"
        events = self.take_pending()
        if message == "process" and "error" in fields:
            events = []  # OpenCode has given up: an error event follows
        if message == "stream error":
            events += self._refusal(fields)
        if message == "server unavailable" and "key" in fields:
            events += warning_events([unavailable(fields["key"], fields.get("status", "failed"))])
        if message == "MCP connection closed" and "server" in fields:
            events += warning_events([unavailable(fields["server"], "failed", "it ended")])
        return True, events

    def take_pending(self) -> list[Event]:
        """Take out the refusal that was held back, since nothing says that it was the last."""
        event, self.pending = self.pending, None
        return [] if event is None else [event]

    def read_told(self, line: str) -> list[Event]:
        """Read *line*, which begins with PRELOAD_PREFIX: an event, a status or the model's name."""
        try:
            value = json.loads(line[len(PRELOAD_PREFIX) :])
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict):
            return []
        if "type" in value:
            return [cast(Event, value)]
        if "status" in value:
            self._status = value
        if isinstance(value.get("model"), str):
            self.model = value["model"]
        return []

    def _refusal(self, fields: dict[str, str]) -> list[Event]:
        seen, self._status = self._status, {}
        if fields.get("small") == "true":  # a title that OpenCode asks for by itself
            return []
        message = fields.get("error.error") or fields.get("error") or "unknown error"
        message = message.partition("AI_APICallError: ")[2] or message
        event: RetryEvent = {
            "type": "retry",
            "timestamp": time.time_ns() // 1_000_000,
            "message": message,
        }
        if session := fields.get("session.id"):
            event["sessionID"] = session
        status = seen.get("status")
        if not isinstance(status, int):
            self.pending = event
            return []
        event["statusCode"] = status
        event["message"] = f"{status} {message}"
        if seen.get("retry_after"):
            event["message"] += f" (retry-after: {seen['retry_after']})"
        wait_s = asked_to_wait_s(seen.get("retry_after"), seen.get("retry_after_ms"))
        if wait_s is not None:
            event["retry_after_s"] = wait_s
        return [event] if is_retried(status) else []


def split_told(line: str) -> tuple[str, str | None]:
    """Split *line* into the text before what preload.js reports, and the report or None.

    The report begins with PRELOAD_PREFIX. A plugin may have printed without a newline before it.
    """
    if line.startswith(PRELOAD_PREFIX):
        return "", line
    before, is_told, told = line.partition(f"{PRELOAD_PREFIX}{{")
    if not is_told or _LOG_LINE.match(line):
        return line, None
    return before, f"{PRELOAD_PREFIX}{{{told}"


def no_agent(why: str) -> Event:
    """The error of a run in which another agent would take over; *why* in OpenCode's words."""
    message = f"{why}; the run was stopped before the default agent took over"
    return {"type": "error", "error": {"name": "AgentNotFoundError", "data": {"message": message}}}


def not_counted(n_sub_agents: int) -> str:
    """The warning for a run with sub-agents that OpenCode did not report."""
    return (
        f"What {n_sub_agents} sub-agent(s) used and did is not counted, and max_cost did not hold "
        "for them, since this opencode did not report their sessions: leave BUN_INSPECT_PRELOAD "
        "unset, install opencode_sync as plain files, or use the version that it is tested with."
    )


def unwritable_home(stderr: str) -> str | None:
    """If OpenCode ended because it may not write below its home: that, and what to set."""
    found = _NOT_MADE.search(strip_ansi(stderr[:_LONGEST]))
    if found is None:
        return None
    return (
        f"it cannot make {found[1]!r}: set HOME, or XDG_CONFIG_HOME, XDG_STATE_HOME and "
        "XDG_CACHE_HOME, to where it may write"
    )


def refused_by_bun(stderr: str) -> str | None:
    """If Bun ended before OpenCode began: why, and what to set."""
    said = strip_ansi(stderr[:_LONGEST])
    if _NOT_SEEN.search(said) is not None:
        return (
            "opencode does not see the file that BUN_INSPECT_PRELOAD names (a wrapper with a file "
            'system of its own?): let it, or set extra_env={"BUN_INSPECT_PRELOAD": ""}'
        )
    if (found := _NOT_TAKEN.search(said)) is not None:
        return f"opencode's Bun does not know {found[1]}: set lean=False"
    return None


def no_space(env: Mapping[str, str]) -> str | None:
    """If a disk that OpenCode writes to is full: how much is left, and what to do.

    OpenCode itself does not tell: its message would go into a file that is full too.

    Args:
        env: The environment that it was started with; says where it writes.
    """
    home = env.get("XDG_DATA_HOME") or env.get("HOME")
    places = [env.get("TMPDIR"), env.get("BUN_TMPDIR"), home]
    with suppress(OSError):  # no temporary directory takes a file
        places.insert(0, tempfile.gettempdir())
    for place in filter(None, places):
        with suppress(OSError):
            free = shutil.disk_usage(place).free
            if free < NEEDED_BYTES:
                return (
                    f"only {free / 1e6:.1f} MB are left in {place!r}, and it needs about "
                    f"{NEEDED_BYTES / 1e6:.0f}: make some space, or set TMPDIR (and data_dir) to "
                    "where there is more"
                )
    return None


def is_retried(status: int) -> bool:
    """Whether OpenCode asks again after this HTTP status of a provider, instead of giving up."""
    return status in (408, 409, 429) or status >= 500
