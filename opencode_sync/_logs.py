"""Lines of stderr that mean something: OpenCode's log, our plugin's, and its warnings.

    timestamp=... level=ERROR message="stream error" ... error.error="AI_APICallError: slow down"
    opencode-sync: {"status":429,"retry_after":"3600"}
    ! agent "nope" not found. Falling back to default agent

OpenCode retries a provider's refusals silently and for long; its log has the message, and our
plugin saw the HTTP status. Formats of 1.18.33; what is not recognised is left alone.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field

from .errors import strip_ansi
from .events import Event, RetryEvent

PLUGIN_PREFIX = "opencode-sync: "

_LOG_LINE = re.compile(r"timestamp=\S+ level=[A-Z]+ ")
_LOG_FIELD = re.compile(r'([\w.]+)=("(?:[^"\\]|\\.)*"|\S*)')
_NO_AGENT = re.compile(r'agent "(.*)" not found\. Falling back to default agent')


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
        cause: The last failure that the log explains: more than OpenCode's ``error`` event tells
            of an unknown model.
        missing_agent: The agent that OpenCode did not find, or None.
    """

    cause: str = ""
    missing_agent: str | None = None
    _status: dict[str, object] = field(default_factory=dict)

    def read(self, line: str) -> tuple[bool, Event | None]:
        """Whether *line* is a log line (or our plugin's), and the event that it amounts to."""
        if line.startswith(PLUGIN_PREFIX):
            self._note_status(line[len(PLUGIN_PREFIX) :])
            return True, None
        fields = log_fields(line)
        if fields is None:
            if (match := _NO_AGENT.search(strip_ansi(line))) is not None:
                self.missing_agent = match[1]
            return False, None
        if fields.get("message") == "failed" and "error" in fields:
            self.cause = fields["error"]
        if fields.get("message") == "stream error" and fields.get("small") != "true":
            return True, self._retry(fields)
        return True, None

    def _note_status(self, text: str) -> None:
        try:
            value = json.loads(text)
        except ValueError:
            return
        self._status = value if isinstance(value, dict) else {}

    def _retry(self, fields: dict[str, str]) -> Event | None:
        status, self._status = self._status.get("status"), {}
        message = fields.get("error.error") or fields.get("error") or "unknown error"
        message = message.partition("AI_APICallError: ")[2] or message
        event: RetryEvent = {"type": "retry", "timestamp": time.time_ns() // 1_000_000}
        event["sessionID"] = fields.get("session.id", "")
        if isinstance(status, int):
            if not is_retried(status):
                return None
            event["statusCode"] = status
            message = f"{status} {message}"
        event["message"] = message
        return event


def is_retried(status: int) -> bool:
    """Whether OpenCode asks again after this HTTP status of a provider, rather than give up."""
    return status in (408, 409, 429) or status >= 500
