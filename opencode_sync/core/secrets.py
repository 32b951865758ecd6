"""What OpenCode says about a failure, without the secrets that it quotes.

    settings, environment --> values --+
    stderr, errors, events ------------+--> cleaned(): "***" for each value, quoted files cut out

OpenCode 1.18.33 quotes a broken configuration, keys included; a provider may repeat the key that it
refuses. Diagnostics alone are cleaned: what the model says and what tools print is kept as it is.
Knows names and shapes of settings, and OpenCode's words for a broken file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from .config import RunConfig
from .errors import OpenCodeError
from .events import Event, dump_event, parse_event_line

MASK = "***"
# Types of events that neither the model nor a tool made.
DIAGNOSTICS = ("error", "retry", "warning", "diagnostic")
LONG = 8  # characters; a shorter value is masked where its name says that it is a secret
SHORTEST = 4  # and one that is shorter still would be found in words that say something else

_NAMED = re.compile(r"key|token|secret|passw|credential|auth|cookie", re.IGNORECASE)
_NAMED_IN_ENVIRONMENT = re.compile(
    r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE
)
VALUES_ARE_SECRET = ("headers", "env", "environment")
# What stands in these is called as somebody likes: an agent "keyword-finder" is no secret.
NAMES_ARE_FREE = ("agent", "mode", "mcp", "provider", "models", "command", "tools", "permission")
_WORDS = (None, True, False, "allow", "ask", "deny")  # of switches and permissions
_NO_SECRETS = {"allow", "deny", "true", "false", "none", "null"}
# Of what is only listed beside secrets: a path, a URL that has no login and no query, a number.
_PLAIN = re.compile(r"[/~.].*|\w+://[^@?#]*|[\d.,]+", re.DOTALL)
_LOGIN = re.compile(r"://([^/@\s]*)@")
_JSON_VARIABLES = ("OPENCODE_CONFIG_CONTENT", "OPENCODE_AUTH_CONTENT")

_FILE, _FAULTS, _END = "--- JSONC Input ---", "--- Errors ---", "--- End ---"
_POSITION = re.compile(r"^\w+ at line \d+, column \d+$", re.MULTILINE)
_GOT = re.compile(r"(\bExpected [^\n]*?), got ([^\n]*)")
_CONFIG_ERRORS = "Config"  # what their names begin with


def is_secret(name: str, value: Any) -> bool:
    """Whether a setting of this name holds a secret."""
    if value in _WORDS or (name.lower().endswith("tokens") and isinstance(value, (int, float))):
        return False  # "*token*": "deny", and maxTokens
    return _NAMED.search(name) is not None


def setting_name(name: str, key: object) -> str:
    """What the setting *key* in the setting *name* is called; "" where its user has named it."""
    return "" if name in NAMES_ARE_FREE else str(key)


class Secrets:
    """The secret values of settings and of this process's environment."""

    def __init__(self, *configs: RunConfig) -> None:
        self._configs = configs

    @cached_property
    def _values(self) -> list[str]:
        # Looked for when there is something to clean: most runs have nothing to complain of.
        values = {value for name, each in os.environ.items() for value in _of_parent(name, each)}
        for cfg in self._configs:
            values.update(_of_config(cfg))
        # A configuration is quoted as JSON, by OpenCode with letters of all languages as they are.
        for is_ascii in (True, False):
            values |= {json.dumps(value, ensure_ascii=is_ascii)[1:-1] for value in values}
        # The longest first: one may be a part of another.
        return sorted(values, key=len, reverse=True)

    def __repr__(self) -> str:
        return "<Secrets>"

    def cleaned(self, text: str) -> str:
        """*text* without what it quotes of a configuration, and with secrets masked."""
        if not text:
            return text
        text = without_quotes(text)
        for value in self._values:
            if value in text:
                text = _masked(text, value)
        return text

    def clean_events(self, events: Sequence[Event]) -> Sequence[Event]:
        """*events* with their diagnostics cleaned; *events* itself where that changes nothing."""
        for event in events:
            if event.get("type") in DIAGNOSTICS:
                break
        else:
            return events
        cleaned = [
            self._in(event) if event.get("type") in DIAGNOSTICS else event for event in events
        ]
        return events if cleaned == list(events) else cleaned

    def clean_lines(self, lines: Iterable[str]) -> list[str]:
        """Return *lines* of output, with the diagnostics among them cleaned."""
        return [self._clean_line(line) for line in lines]

    def clean_error(self, error: OpenCodeError) -> None:
        """Clean the text of *error* and its attributes, but for the result and the events."""
        error.args = tuple(self._in(each) for each in error.args)
        for name, value in vars(error).items():
            if name not in ("result", "events", "raw_stdout_lines", "prompt", "key"):
                setattr(error, name, self._in(value))

    def _clean_line(self, line: str) -> str:
        event = parse_event_line(line)
        if event.get("type") not in DIAGNOSTICS:
            return line
        if "raw" in event:
            return self.cleaned(line)
        cleaned = self._in(event)
        return line if cleaned == event else dump_event(cleaned).decode().rstrip("\n")

    def _in(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.cleaned(value)
        if isinstance(value, dict):  # its type says how it is read, and is no secret
            return {key: each if key == "type" else self._in(each) for key, each in value.items()}
        return [self._in(each) for each in value] if isinstance(value, list) else value


# --- values --------------------------------------------------------------------------------------


def _of_parent(name: str, value: str) -> Iterator[str]:
    """The secrets of one variable that a child inherits."""
    if name in _JSON_VARIABLES:
        yield from _of_json(name, value)
    if _NAMED_IN_ENVIRONMENT.search(name):
        yield from _wanted(value, is_named=True)


def _of_config(cfg: RunConfig) -> Iterator[str]:
    if cfg.password is not None:
        yield from _wanted(cfg.password, is_named=True)
    for url in filter(None, (cfg.attach,)):
        yield from _logins(url)
    for name, value in (cfg.extra_env or {}).items():
        if name in _JSON_VARIABLES:
            yield from _of_json(name, value)
        yield from _wanted(value, is_named=is_secret(name, value))
    yield from _of_setting({"mcp": cfg.mcp, "tools": cfg.tools})
    yield from _of_setting(cfg.config_overrides)


def _of_json(name: str, text: str) -> Iterator[str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # comments, say; OpenCode itself may take it
        return
    yield from _of_setting(value, is_listed=name == "OPENCODE_AUTH_CONTENT")


def _of_setting(
    value: Any, *, name: str = "", is_named: bool = False, is_listed: bool = False
) -> Iterator[str]:
    """The secrets in one setting of OpenCode's configuration.

    Args:
        name: What it is called.
        is_named: That, or what it stands in is called, says that it is a secret.
        is_listed: It stands where values are secrets as a rule: among headers, say.
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
            name, equals, rest = str(each).partition("=")
            is_option = flag.startswith("-") and is_secret(flag, each)
            yield from _of_setting(each, is_named=is_named or is_option, is_listed=is_listed)
            if equals and is_secret(name, rest):
                yield from _wanted(rest, is_named=True)
            flag = "" if equals else name
    elif isinstance(value, str):
        yield from _logins(value)
        if is_named or is_listed:
            yield from _wanted(value, is_named=is_named)


def _logins(text: str) -> Iterator[str]:
    for login in _LOGIN.findall(text):
        yield from _wanted(login.partition(":")[2] or login, is_named=True)


def _wanted(value: Any, *, is_named: bool) -> Iterator[str]:
    """*value*, and what follows a word like "Bearer" in it, where that is to be masked."""
    text = str(value).strip()
    if not is_named and _PLAIN.fullmatch(text):
        return
    for each in {text, text.rpartition(" ")[2]}:
        if len(each) >= (SHORTEST if is_named else LONG) and each.lower() not in _NO_SECRETS:
            yield each


def _masked(text: str, value: str) -> str:
    if len(value) >= LONG:
        return text.replace(value, MASK)
    # A short one may be a part of a word.
    return re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", MASK, text)


# --- a broken configuration ----------------------------------------------------------------------


def without_quotes(text: str) -> str:
    """*text* without what it quotes of a configuration; what is wrong, and where, stays."""
    if any(mark in text for mark in (_FILE, _FAULTS, _END)):
        text = _without_file(text)
    return _GOT.sub(_without_value, text) if ", got " in text else text


def _without_file(text: str) -> str:
    # The beginning or the end may be cut off. What stands in the file may look like a mark, so the
    # last one counts.
    before, begins, rest = text.partition(_FILE)
    if not begins:
        before, rest = "", text
    faults = rest.rpartition(_FAULTS)[2] if _FAULTS in rest or not begins else ""
    positions, _, after = faults.rpartition(_END) if _END in faults else (faults, "", "")
    return before + ", ".join(_POSITION.findall(positions)) + after


def _without_value(match: re.Match[str]) -> str:
    """What was expected, and the name of the setting, where it follows what was found."""
    expected, rest = match[1], match[2]
    try:
        end = json.JSONDecoder().raw_decode(rest)[1]
    except (ValueError, RecursionError):
        return expected
    return expected + rest[end:]


def config_refusal(body: Any) -> str | None:
    """What a server's answer says of a broken configuration, or None for any other answer."""
    if not isinstance(body, Mapping) or not str(body.get("name")).startswith(_CONFIG_ERRORS):
        return None
    data = cast(Any, body.get("data"))
    data = data if isinstance(data, Mapping) else {}
    where = f" at {data['path']}" if data.get("path") else ""
    words = [without_quotes(str(data["message"])).strip()] if data.get("message") else []
    for issue in data.get("issues") or ():
        if isinstance(issue, Mapping):
            name = ".".join(map(str, issue.get("path") or ()))
            words.append(f"{name}: {without_quotes(str(issue.get('message')))}")
    return f"{body['name']}{where}" + (f": {'; '.join(words)}" if words else "")
