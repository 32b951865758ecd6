"""What OpenCode says about a failure, without the secrets that it quotes.

    settings, environment --> values --+
    stderr, errors, events ------------+--> cleaned(): "***" for each value, quoted files cut out

OpenCode 1.18.33 quotes a broken configuration, keys included; a provider may repeat the key that it
refuses. Only diagnostics are cleaned: what the model says and what tools print is kept as it is.
Knows names and shapes of settings, and how OpenCode reports a broken file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from .config import RunConfig
from .errors import OpenCodeError
from .events import Event, dump_event, parse_event_line
from .reading import mapping

_MASK = "***"
# Types of events that neither the model nor a tool made.
_DIAGNOSTICS = ("error", "retry", "fallback", "warning", "diagnostic")
_LONG = 8  # characters; a shorter value is masked only where its name says that it is a secret
_SHORTEST = 4  # and one that is shorter still would be found in words that say something else

_NAMED = re.compile(r"key|token|secret|passw|credential|auth|cookie", re.IGNORECASE)
_NAMED_IN_ENVIRONMENT = re.compile(
    r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE
)
VALUES_ARE_SECRET = ("headers", "env", "environment")
# The user chooses the names in these: an agent "keyword-finder" is not a secret.
_NAMES_ARE_FREE = ("agent", "mode", "mcp", "provider", "models", "command", "tools", "permission")
_WORDS = (None, True, False, "allow", "ask", "deny")  # values of switches and permissions
_NOT_SECRETS = {"allow", "deny", "true", "false", "none", "null"}
# Not secret where only the neighbours are: a path, a URL without login and query, a number.
_PLAIN = re.compile(r"[/~.].*|\w+://[^@?#]*|[\d.,]+", re.DOTALL)
_LOGIN = re.compile(r"://([^/@\s]*)@")
_JSON_VARIABLES = ("OPENCODE_CONFIG_CONTENT", "OPENCODE_AUTH_CONTENT")


class Secrets:
    """The secret values of settings and of this process's environment."""

    def __init__(self, *configs: RunConfig) -> None:
        self._configs = configs

    @cached_property
    def _values(self) -> list[str]:
        # Collected when there is something to clean: most runs have nothing to complain about.
        values = {value for name, each in os.environ.items() for value in _of_parent(name, each)}
        for cfg in self._configs:
            values.update(_of_config(cfg))
        # A configuration is quoted as JSON, by OpenCode without escapes for other alphabets.
        for is_ascii in (True, False):
            values |= {json.dumps(value, ensure_ascii=is_ascii)[1:-1] for value in values}
        # The longest first: one may be a part of another.
        return sorted(values, key=len, reverse=True)

    def __repr__(self) -> str:
        return "<Secrets>"

    def cleaned(self, text: str) -> str:
        """*text* without what it quotes of a configuration, and with secrets masked."""
        text = without_quotes(text)
        for value in self._values if text else ():
            if value not in text:
                continue
            if len(value) >= _LONG:
                text = text.replace(value, _MASK)
            else:  # a short one may be a part of a word
                text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", _MASK, text)
        return text

    def clean_events(self, events: Sequence[Event]) -> Sequence[Event]:
        """*events* with their diagnostics cleaned; *events* itself if that changes nothing."""
        if not any(event.get("type") in _DIAGNOSTICS for event in events):
            return events
        cleaned = [
            self._in(event) if event.get("type") in _DIAGNOSTICS else event for event in events
        ]
        return events if cleaned == list(events) else cleaned

    def clean_lines(self, lines: Iterable[str]) -> list[str]:
        """Return *lines* of output, with the diagnostics among them cleaned."""
        return [self._clean_line(line) for line in lines]

    def clean_error(self, error: OpenCodeError) -> None:
        """Clean the text and the attributes of *error*, except the result and its parts."""
        error.args = tuple(self._in(each) for each in error.args)
        for name, value in vars(error).items():
            if name not in ("result", "events", "raw_stdout_lines", "prompt", "key"):
                setattr(error, name, self._in(value))

    def _clean_line(self, line: str) -> str:
        event = parse_event_line(line)
        if event.get("type") not in _DIAGNOSTICS:
            return line
        if "raw" in event:
            return self.cleaned(line)
        cleaned = self._in(event)
        return line if cleaned == event else dump_event(cleaned).decode().rstrip("\n")

    def _in(self, value: Any) -> Any:
        """*value* with all strings in it cleaned."""
        if isinstance(value, str):
            return self.cleaned(value)
        if isinstance(value, dict):  # its type says how it is read, and is not a secret
            return {key: each if key == "type" else self._in(each) for key, each in value.items()}
        return [self._in(each) for each in value] if isinstance(value, list) else value


# --- secret values -------------------------------------------------------------------------------


def is_secret(name: str, value: Any) -> bool:
    """Whether a setting of this name holds a secret."""
    if value in _WORDS or (name.lower().endswith("tokens") and isinstance(value, (int, float))):
        return False  # "*token*": "deny", and maxTokens
    return _NAMED.search(name) is not None


def setting_name(name: str, key: object) -> str:
    """What the setting *key* in the setting *name* is called; "" if the user chose its name."""
    return "" if name in _NAMES_ARE_FREE else str(key)


def _of_parent(name: str, value: str) -> Iterator[str]:
    """The secrets in one variable that a child inherits."""
    if name in _JSON_VARIABLES:
        yield from _of_json(name, value)
    if _NAMED_IN_ENVIRONMENT.search(name):
        yield from _wanted(value, is_named=True)


def _of_config(cfg: RunConfig) -> Iterator[str]:
    if cfg.password is not None:
        yield from _wanted(cfg.password, is_named=True)
    for name, value in (cfg.extra_env or {}).items():
        if name in _JSON_VARIABLES:
            yield from _of_json(name, value)
        yield from _wanted(value, is_named=is_secret(name, value))
    for setting in (cfg.attach, {"mcp": cfg.mcp, "tools": cfg.tools}, cfg.config_overrides):
        yield from _of_setting(setting)


def _of_json(name: str, text: str) -> Iterator[str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # comments, say, which OpenCode accepts
        return
    yield from _of_setting(value, is_listed=name == "OPENCODE_AUTH_CONTENT")


def _of_setting(
    value: Any, *, name: str = "", is_named: bool = False, is_listed: bool = False
) -> Iterator[str]:
    """The secrets in one setting of OpenCode's configuration.

    Args:
        name: What it is called.
        is_named: Its name, or that of a setting around it, says that it is a secret.
        is_listed: It is in a place where values are usually secret, such as headers.
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            below = setting_name(name, key)
            yield from _of_setting(
                each,
                name=below,
                is_named=is_named or is_secret(below, each),
                is_listed=is_listed or below in VALUES_ARE_SECRET,
            )
    elif isinstance(value, (list, tuple)):
        flag = ""  # of a command line
        for each in value:
            name, equals, rest = each.partition("=") if isinstance(each, str) else ("", "", "")
            is_option = flag.startswith("-") and is_secret(flag, each)
            yield from _of_setting(each, is_named=is_named or is_option, is_listed=is_listed)
            if equals and is_secret(name, rest):
                yield from _wanted(rest, is_named=True)
            flag = "" if equals else name
    elif isinstance(value, str):
        for login in _LOGIN.findall(value):
            yield from _wanted(login.partition(":")[2] or login, is_named=True)
        if is_named or is_listed:
            yield from _wanted(value, is_named=is_named)


def _wanted(value: Any, *, is_named: bool) -> Iterator[str]:
    """*value*, and what follows a word like "Bearer" in it, if they are to be masked."""
    text = str(value).strip()
    if not is_named and _PLAIN.fullmatch(text):
        return
    for each in {text, text.rpartition(" ")[2]}:
        if len(each) >= (_SHORTEST if is_named else _LONG) and each.lower() not in _NOT_SECRETS:
            yield each


# --- a broken configuration ----------------------------------------------------------------------

_FILE, _FAULTS, _END = "--- JSONC Input ---", "--- Errors ---", "--- End ---"
_POSITION = re.compile(r"^\w+ at line \d+, column \d+$", re.MULTILINE)
_GOT = re.compile(r"(\bExpected [^\n]*?), got ([^\n]*)")


def without_quotes(text: str) -> str:
    """*text* without what it quotes of a configuration; what is wrong, and where, stays."""
    if any(mark in text for mark in (_FILE, _FAULTS, _END)):
        text = _without_file(text)
    return _GOT.sub(_without_value, text) if ", got " in text else text


def _without_file(text: str) -> str:
    # The beginning or the end may be cut off. Text in the file may look like a mark, so the last
    # mark counts.
    before, begins, rest = text.partition(_FILE)
    if not begins:
        before, rest = "", text
    faults = rest.rpartition(_FAULTS)[2] if _FAULTS in rest or not begins else ""
    positions, _, after = faults.rpartition(_END) if _END in faults else (faults, "", "")
    return before + ", ".join(_POSITION.findall(positions)) + after


def _without_value(match: re.Match[str]) -> str:
    """What was expected, and the name of the setting if it follows the value."""
    expected, rest = match[1], match[2]
    try:
        end = json.JSONDecoder().raw_decode(rest)[1]
    except (ValueError, RecursionError):
        return expected
    return expected + rest[end:]


def config_refusal(body: Any) -> str | None:
    """What a server's answer says about a broken configuration, or None for any other answer."""
    name = str(mapping(body).get("name"))
    if not name.startswith("Config"):
        return None
    data = mapping(body.get("data"))
    where = f" at {data['path']}" if data.get("path") else ""
    words = [without_quotes(str(data["message"])).strip()] if data.get("message") else []
    for issue in data.get("issues") or ():
        if isinstance(issue, Mapping):
            setting = ".".join(map(str, issue.get("path") or ()))
            words.append(f"{setting}: {without_quotes(str(issue.get('message')))}")
    return f"{name}{where}" + (f": {'; '.join(words)}" if words else "")
