"""What OpenCode's server takes and sends: the bodies of requests, and messages as events.

    Request --> session_body(), prompt_body(), command_body() --> POST
    arguments of a command --> check_command()

    message.updated ------> compaction; which messages belong to the turn, and are complete
    message.part.updated -> step_start, text, reasoning, tool_use, step_finish   (each part once)
    message.part.delta ---> text_delta, reasoning_delta
    session.created, a task's part --> sub_agent
    session.status -------> retry; busy or idle
    session.error --------> error
    permission.asked, question.asked --> permission, question

A turn is over when its session is idle and its answers are complete. Idle alone says nothing: it
comes twice after an abort or an error, the second time perhaps only after the next prompt.
Measured with OpenCode 1.18.33. Sends and asks nothing.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..core.config import RunConfig
from ..core.denials import Rule, make_rule, rules_of
from ..core.errors import OpenCodeConfigError
from ..core.events import Event
from ..core.reading import OUTPUT_TOOL, called_session, mapping, number_of
from ..core.request import Request
from . import feed
from .feed import Message

TITLE_CHARACTERS = 50
OWN_S = 60.0  # OpenCode's own pauses take 32 s at most: a longer one is what the provider asks for

# Settings of the server as a whole, the same for all that it runs.
SERVER_WIDE = (
    "extra_env",
    "mcp",
    "config_overrides",
    "instructions",
    "inherit_user_config",
    "inherit_project_config",
    "disable_autoupdate",
    "pure",
    "lean",
    "print_logs",
    "log_level",
)

# Tools that would wait for an answer for ever.
_NOBODY_TO_ASK = tuple(
    {"permission": name, "pattern": "*", "action": "deny"}
    for name in ("question", "plan_enter", "plan_exit")
)

# How files begin whose media type models know.
_SIGNATURES = {
    "image/png": rb"\x89PNG\r\n\x1a\n",
    "image/jpeg": rb"\xff\xd8\xff",
    "image/gif": rb"GIF8[79]a",
    "image/webp": rb"RIFF.{4}WEBP",
    "application/pdf": rb"%PDF-",
}


def check_server_wide(cfg: RunConfig, server: RunConfig) -> None:
    """Raise OpenCodeConfigError for a run's setting that only a server can have.

    One that is left out, or equal to the server's, is accepted.
    """
    for field in dataclasses.fields(RunConfig):
        value = getattr(cfg, field.name)
        if field.name in SERVER_WIDE and value not in (field.default, getattr(server, field.name)):
            raise OpenCodeConfigError(
                f"{field.name} is the same for all runs of a server: set it in the run_cfg that "
                "the server is started with"
            )


def session_body(request: Request) -> dict[str, Any]:
    """Return the body for a new session."""
    cfg = request.cfg
    command = "" if cfg.command is None else f"/{cfg.command} "
    # Without a title OpenCode asks the model for one, with each prompt.
    title = cfg.title or _head(command + request.prompt)
    return {"title": title, "permission": [*_NOBODY_TO_ASK, *permission_rules(request)]}


def _head(prompt: str) -> str:
    line = prompt.strip().partition("\n")[0].strip()
    return line if len(line) <= TITLE_CHARACTERS else line[: TITLE_CHARACTERS - 3] + "..."


def permission_rules(request: Request) -> list[Rule]:
    """Return what *request* allows and denies as a session's rules; the last match counts."""
    rules = [] if request.answers.question is None else [make_rule("question", "*", "allow")]
    # Not as "tools" in the prompt's body, which would replace all rules of the session.
    rules += rules_of(request.cfg)
    if request.output is not None:
        rules.append(make_rule(OUTPUT_TOOL, "*", "allow"))
    return rules


def missing_rules(has: Sequence[Rule], wanted: Sequence[Rule]) -> list[Rule]:
    """Return the rules to add to a session that *has* some, so that those *wanted* are its last."""
    # The rule for structured output is added and removed with the prompts that need it.
    lasting = [rule for rule in wanted if rule["permission"] != OUTPUT_TOOL]
    standing = [rule for rule in has if rule["permission"] != OUTPUT_TOOL]
    if lasting and standing[-len(lasting) :] != lasting:
        return list(wanted)
    passing = list(wanted[len(lasting) :])
    return passing if passing and has[-1:] != passing else []


def prompt_body(request: Request) -> dict[str, Any]:
    """Return the body for ``prompt_async``; raise OpenCodeConfigError if a file is unreadable."""
    cfg = request.cfg
    body = {"parts": [*_files(request), {"type": "text", "text": request.prompt}], **_who(cfg)}
    if cfg.model is not None:
        provider, _, model = cfg.model.partition("/")
        body["model"] = {"providerID": provider, "modelID": model}
    if request.output is not None:
        body["format"] = {"type": "json_schema", "schema": request.output.tool_schema}
    return body


def command_body(request: Request, arguments: str) -> dict[str, Any]:
    """Return the body for ``command``; raise OpenCodeConfigError if a file is unreadable."""
    cfg = request.cfg
    body: dict[str, Any] = {"command": cfg.command, "arguments": arguments, **_who(cfg)}
    if cfg.files:
        body["parts"] = _files(request)
    if cfg.model is not None:
        body["model"] = cfg.model
    return body


def _who(cfg: RunConfig) -> dict[str, Any]:
    return {key: value for key in ("agent", "variant") if (value := getattr(cfg, key)) is not None}


def _files(request: Request) -> list[dict[str, str]]:
    return [_file(request.workspace / os.path.expanduser(file)) for file in request.cfg.files]


def _media_type(name: str, content: bytes) -> str:
    """Guess a file's media type by its *content*, else by its *name*."""
    import mimetypes

    for media_type, signature in _SIGNATURES.items():
        if re.match(signature, content, re.DOTALL):
            return media_type
    try:
        content.decode()
        return "text/plain"  # the model gets it as text; most providers refuse other types
    except UnicodeDecodeError:
        named = mimetypes.guess_type(name)[0]
        # A provider would refuse the prompt for a file that is only named like an image.
        return named if named and named not in _SIGNATURES else "application/octet-stream"


def _file(path: Path) -> dict[str, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OpenCodeConfigError(f"file {str(path)!r}: {error.strerror}") from None
    media_type = _media_type(path.name, content)
    url = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
    return {"type": "file", "mime": media_type, "filename": path.name, "url": url}


# -- arguments of a command ----------------------------------------------------------------------

_INTO_SHELL = re.compile(r"!`[^`]*\$(ARGUMENTS|\d)[^`]*`")
_EXPANDED = re.compile(r"[`$@]")


def check_command(command: str, template: str, arguments: str, *, has_plugin: bool) -> None:
    """Refuse arguments that OpenCode would expand.

    Args:
        has_plugin: They are sealed, and opened by our plugin.

    Raises:
        OpenCodeConfigError: If the template passes them to the shell, or they hold characters that
            OpenCode expands and are not sealed.
    """
    if _INTO_SHELL.search(template):
        raise OpenCodeConfigError(
            f"command {command!r} puts its arguments into a shell command, where they could do "
            "anything: run it without arguments, or give its text as the prompt"
        )
    if not has_plugin and (found := _EXPANDED.search(arguments)) is not None:
        raise OpenCodeConfigError(
            f"the arguments of command {command!r} hold {found[0]!r}, which OpenCode expands, by "
            "the shell too: a server that runs elsewhere takes arguments without '`', '$' and '@'"
        )


# -- messages as events --------------------------------------------------------------------------

_STEPS = {"step-start": "step_start", "step-finish": "step_finish"}
_TRACE = "\n    at "  # in errors that end a turn outside of the model's loop


class Translator:
    """Reads the messages of one turn, in order.

    Attributes:
        has_begun: The server has taken the prompt.
        has_used_tools: A tool has run, which may have left processes.
        structured: The last structured output, unchecked; None if there was none.
        prompt_id: The prompt's message; None until the server has taken it.
        model: Provider and name of the model that answers; None until one does.
    """

    def __init__(
        self,
        session_id: str,
        *,
        since: int = 0,
        with_reasoning: bool = False,
        tells_refusals: bool = False,
    ) -> None:
        """
        Args:
            since: When the session's last message was made, in the server's milliseconds; only
                later ones belong to the turn.
            tells_refusals: A provider's refusals come as REFUSED too: not in the server's messages,
                and so before or after the retry that each explains.
        """
        self.has_begun = self.has_used_tools = False
        self.structured: Any = None
        self.prompt_id: str | None = None
        self.model: tuple[str, str] | None = None
        self._has_output = False
        self._session_id = session_id
        self._since = since
        self._began_at = since
        self._with_reasoning = with_reasoning
        self._ours: dict[str, None] = {}  # messages of the turn, in order
        self._summaries: set[str] = set()  # those that sum it up for OpenCode itself
        self._open: set[str] = set()  # answers that are not complete
        self._has_answer = self._is_idle = self._is_answered = False
        self._is_stopped = self._has_ended = False
        self._refusal: str | None = None
        self._told: set[str] = set()  # parts
        self._sub_agents: set[str] = set()  # sessions
        self._writing: dict[str, str] = {}  # parts under way: text or reasoning
        self._errors: set[tuple[str, str]] = set()
        self._tells_refusals = tells_refusals
        self._refusals: dict[str, Mapping[str, Any]] = {}
        self._unexplained: dict[str, Event] = {}  # retries, by session

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        is_done = self.has_begun and self._is_idle and not self._open
        is_refused = self._refusal is not None and bool(self._errors)
        return self._has_ended or is_refused or (is_done and (self._has_answer or self._is_stopped))

    @property
    def messages(self) -> list[str]:
        """Ids of the turn's messages, the prompt's too, in order."""
        return list(self._ours)

    @property
    def is_doubtful(self) -> bool:
        """Whether it may be over although no message says so."""
        return not self.is_over and (self._is_idle or self._is_answered or bool(self._errors))

    def stopped(self) -> None:
        """Note that we abort the turn: what the server says about that is not an error."""
        self._is_stopped = True

    @property
    def has_unexplained(self) -> bool:
        """Whether a retry is held back until its reason is known."""
        return bool(self._unexplained)

    def take_unexplained(self) -> list[Event]:
        """Return the retries that were held back; their reasons stay unknown."""
        events, self._unexplained = list(self._unexplained.values()), {}
        return events

    def end(self) -> list[Event]:
        """Note that the turn is over, as the server says when asked; return the last events."""
        self._has_ended = True
        if self._refusal is None or self._errors:
            return []
        return self._tell_error({"name": "UnknownError", "data": {"message": self._refusal}})

    def read(self, message: Message) -> list[Event]:
        """Return the events of *message*; mostly none or one."""
        session_id, kind, properties = message
        match kind:
            case "message.updated":
                return self._message(session_id, properties)
            case "message.part.updated":
                return self._part(session_id, properties)
            case "message.part.delta":
                return self._delta(session_id, properties)
            case "session.created":
                return self._new_session(session_id, properties)
            case "session.status":
                return self._status(session_id, properties)
            case "session.error":
                return self._error(session_id, properties)
            case "permission.asked" | "question.asked":
                asked = kind.removesuffix(".asked")
                return [_event(asked, session_id, request=dict(properties))]
            case feed.REFUSED:
                return self._refused(session_id, properties)
            case feed.ANSWER:
                return self._answer(properties)
        return []

    def covers(self, stored: Mapping[str, Any]) -> bool:
        """Whether a stored message is of this turn or a later one."""
        return created_at(stored) > self._since

    def read_stored(self, session_id: str, stored: Iterable[Mapping[str, Any]]) -> list[Event]:
        """Return the events of a session's stored messages that have not come before."""
        events: list[Event] = []
        for entry in stored:
            info = mapping(entry.get("info"))
            if not self.covers(entry) or created_at(entry) < self._began_at:
                continue
            events += self._message(session_id, {"info": info})
            for part in parts_of(entry):
                events += self._part(session_id, {"part": part})
        return events

    # -- by type of message --------------------------------------------------------------------

    def _message(self, session_id: str, properties: Mapping[str, Any]) -> list[Event]:
        info = mapping(properties.get("info"))
        created = created_at(properties)
        if session_id != self._session_id or created <= self._since:
            return []
        message_id = str(info.get("id"))
        self._ours[message_id] = None
        if info.get("role") == "user":
            if not self.has_begun:
                self.has_begun, self._began_at = True, created
                self.prompt_id = message_id
            return []
        events: list[Event] = []
        if info.get("summary") is True and message_id not in self._summaries:
            self._summaries.add(message_id)
            events = [_event("compaction", session_id, messageID=message_id)]
        self._has_answer = True
        if isinstance(info.get("providerID"), str) and isinstance(info.get("modelID"), str):
            self.model = info["providerID"], info["modelID"]
        if mapping(info.get("time")).get("completed"):
            self._open.discard(message_id)
        else:
            self._open.add(message_id)
        self.structured = info.get("structured", self.structured)
        return events + self._tell_error(info.get("error"))

    def _part(self, session_id: str, properties: Mapping[str, Any]) -> list[Event]:
        part = mapping(properties.get("part"))
        part_id, kind = str(part.get("id")), str(part.get("type"))
        is_root = session_id == self._session_id
        if part_id in self._told or (is_root and str(part.get("messageID")) not in self._ours):
            return []
        if part.get("tool") == "task" and (begun := self._task(session_id, part)):
            return [*begun, *self._part(session_id, properties)]
        if kind in ("text", "reasoning"):
            if not mapping(part.get("time")).get("end"):
                if part.get("messageID") not in self._summaries:
                    self._writing[part_id] = kind
                return []
            self._writing.pop(part_id, None)
            if kind == "reasoning" and not self._with_reasoning:
                return []
        elif kind == "tool":
            self.has_used_tools = True
            status = mapping(part.get("state")).get("status")
            if status not in ("completed", "error"):
                return []
            kind = "tool_use"
            self._has_output |= (
                is_root and part.get("tool") == OUTPUT_TOOL and status == "completed"
            )
        elif kind in _STEPS:
            kind = _STEPS[kind]
            if is_root and self._has_output and part.get("reason") == "tool-calls":
                part = {**part, "reason": "stop"}  # whatever else it says, this step is the last
        else:
            return []
        self._told.add(part_id)
        return [_event(kind, session_id, part=dict(part))]

    def _new_session(self, session_id: str, properties: Mapping[str, Any]) -> list[Event]:
        info = mapping(properties.get("info"))
        parent_id = info.get("parentID")
        if not parent_id:
            return []
        return self._sub_agent(session_id, parent_id, info.get("agent"), info.get("title"))

    def _task(self, session_id: str, part: Mapping[str, Any]) -> list[Event]:
        # A session that is resumed is not created.
        asked = mapping(mapping(part.get("state")).get("input"))
        agent, title = asked.get("subagent_type"), asked.get("description")
        return self._sub_agent(called_session({"part": part}), session_id, agent, title)

    def _sub_agent(
        self, child_id: str | None, parent_id: str, agent: Any, title: Any
    ) -> list[Event]:
        if child_id is None or child_id in self._sub_agents:
            return []
        self._sub_agents.add(child_id)
        more = {"childID": child_id, "parentID": parent_id, "agent": agent, "title": title}
        return [_event("sub_agent", self._session_id, **more)]

    def _delta(self, session_id: str, properties: Mapping[str, Any]) -> list[Event]:
        part_id = str(properties.get("partID"))
        kind = self._writing.get(part_id)
        if kind is None or properties.get("field") != "text":
            return []
        if kind == "reasoning" and not self._with_reasoning:
            return []
        delta = str(properties.get("delta"))
        return [_event(f"{kind}_delta", session_id, partID=part_id, delta=delta)]

    def _status(self, session_id: str, properties: Mapping[str, Any]) -> list[Event]:
        status = mapping(properties.get("status"))
        if session_id == self._session_id:
            self._is_idle = status.get("type") == "idle"
        if status.get("type") != "retry":
            unexplained = self._unexplained.pop(session_id, None)
            return [] if unexplained is None else [unexplained]
        event = _event(
            "retry",
            session_id,
            message=str(status.get("message")),
            attempt=status.get("attempt"),
        )
        seen = self._refusals.pop(session_id, None)
        if seen is not None:
            return [_explained(event, seen)]
        if not self._tells_refusals:
            wait_s = number_of(status.get("next")) / 1000 - time.time()
            return [cast(Event, {**event, "retry_after_s": wait_s} if wait_s > OWN_S else event)]
        before = self._unexplained.get(session_id)
        self._unexplained[session_id] = event
        return [] if before is None else [before]

    def _refused(self, session_id: str, properties: Mapping[str, Any]) -> list[Event]:
        if (event := self._unexplained.pop(session_id, None)) is not None:
            return [_explained(event, properties)]
        self._refusals[session_id] = properties
        return []

    def _error(self, session_id: str, properties: Mapping[str, Any]) -> list[Event]:
        if session_id != self._session_id:
            return []  # its parent's tool call fails with it
        error = mapping(properties.get("error"))
        message = str(mapping(error.get("data")).get("message"))
        if _TRACE in message and (self._is_idle or not self.has_begun):
            # The end of a turn that failed outside of the model's loop; mostly a repetition.
            self._has_ended = True
            message = message.partition("\n")[0]
            error = {"name": error.get("name"), "data": {"message": message}}
            return [] if self._errors else self._tell_error(error)
        return self._tell_error(error)

    def _tell_error(self, error: Any) -> list[Event]:
        error = mapping(error)
        key = str(error.get("name")), str(mapping(error.get("data")).get("message"))
        if not error or key in self._errors:
            return []
        if self._is_stopped and key[0] == "MessageAbortedError":
            return []
        if key[0] == "StructuredOutputError":
            return []  # an answer in words, which may still fit the schema
        self._errors.add(key)
        return [_event("error", self._session_id, error=dict(error))]

    def _answer(self, properties: Mapping[str, Any]) -> list[Event]:
        self._is_answered = True
        error = properties.get("error")
        # The reason comes as a message, before or after; the refusal itself has none.
        if error is not None and error.status_code is not None:
            self._refusal = str(error)
        return []


def parts_of(stored: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parts of a stored message."""
    parts = stored.get("parts")
    return [mapping(part) for part in parts] if isinstance(parts, list) else []


def created_at(stored: Mapping[str, Any]) -> int:
    """Return when a message was made, in the server's milliseconds; 0 if it does not say."""
    created = mapping(mapping(stored.get("info")).get("time")).get("created")
    return created if isinstance(created, int) else 0


def _event(kind: str, session_id: str, **more: Any) -> Event:
    stamp = {"type": kind, "timestamp": time.time_ns() // 1_000_000, "sessionID": session_id}
    return cast(Event, stamp | more)


def _explained(retry: Event, seen: Mapping[str, Any]) -> Event:
    """Return *retry* with what was *seen* of the provider's refusal."""
    more: dict[str, Any] = {
        "statusCode": seen["status"],
        "message": f"{seen['status']} {retry.get('message')}",
    }
    if seen.get("retry_after_s") is not None:
        more["retry_after_s"] = seen["retry_after_s"]
    return cast(Event, {**retry, **more})
