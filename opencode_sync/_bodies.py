"""Settings -> what a server is asked: the only place that knows the bodies of its requests.

What ``opencode run`` does on its own is done here too: the same rules for a session, the same
treatment of files. Measured with OpenCode 1.18.33. Sends nothing.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .core.config import RunConfig
from .core.denials import OUTPUT_TOOL, Rule, make_rule, rules_of
from .core.errors import OpenCodeConfigError, OpenCodeError
from .core.schema import OutputSchema
from .process.command import UNTITLED

TITLE_CHARACTERS = 50

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

# They would wait for an answer for ever.
_NOBODY_TO_ASK = tuple(
    {"permission": name, "pattern": "*", "action": "deny"}
    for name in ("question", "plan_enter", "plan_exit")
)

# How the files begin that models read as they are.
_SIGNATURES = {
    "image/png": rb"\x89PNG\r\n\x1a\n",
    "image/jpeg": rb"\xff\xd8\xff",
    "image/gif": rb"GIF8[79]a",
    "image/webp": rb"RIFF.{4}WEBP",
    "application/pdf": rb"%PDF-",
}


def check_server_wide(cfg: RunConfig, server: RunConfig) -> None:
    """Refuse a run's setting that is the server's, unless it is the same or left out.

    Raises:
        OpenCodeConfigError: Names the setting.
    """
    for field in dataclasses.fields(RunConfig):
        value = getattr(cfg, field.name)
        if field.name in SERVER_WIDE and value not in (field.default, getattr(server, field.name)):
            raise OpenCodeConfigError(
                f"{field.name} is the same for all runs of a server: set it in the run_cfg that "
                "the server is started with"
            )


def session_body(prompt: str, cfg: RunConfig, **allowed: bool) -> dict[str, Any]:
    """A new session for *prompt*; *allowed* is for :func:`permission_rules`."""
    # Without a title the model is asked for one, with each prompt.
    title = cfg.title or _head(prompt) or UNTITLED
    rules = permission_rules(cfg, **allowed)
    return {"title": title, "permission": [*_NOBODY_TO_ASK, *rules]}


def _head(prompt: str) -> str:
    line = prompt.strip().partition("\n")[0].strip()
    return line if len(line) <= TITLE_CHARACTERS else line[: TITLE_CHARACTERS - 3] + "..."


def permission_rules(
    cfg: RunConfig, *, with_questions: bool = False, with_output: bool = False
) -> list[Rule]:
    """*permission* and *tools* as rules of a session; of those that match, the last one counts.

    Args:
        with_questions: There is somebody who answers the model's questions.
        with_output: It is to call the tool that takes down structured output.
    """
    rules = [make_rule("question", "*", "allow")] if with_questions else []
    # Not with the prompt, where OpenCode takes "tools" for the session's only rules.
    rules += rules_of(cfg)
    if with_output:
        rules.append(make_rule(OUTPUT_TOOL, "*", "allow"))
    return rules


def missing_rules(has: Sequence[Rule], wanted: Sequence[Rule]) -> list[Rule]:
    """What a session that *has* rules lacks for those *wanted* to be its last."""
    # The rule for structured output comes and goes with the prompts that need it.
    lasting = [rule for rule in wanted if rule["permission"] != OUTPUT_TOOL]
    standing = [rule for rule in has if rule["permission"] != OUTPUT_TOOL]
    if lasting and standing[-len(lasting) :] != lasting:
        return list(wanted)
    passing = list(wanted[len(lasting) :])
    return passing if passing and has[-1:] != passing else []


def prompt_body(
    prompt: str, cfg: RunConfig, workspace: Path, output: OutputSchema | None = None
) -> dict[str, Any]:
    """*prompt* with its files, for ``prompt_async``.

    Args:
        output: What the answer has to look like.

    Raises:
        OpenCodeConfigError: If a file cannot be read.
    """
    body: dict[str, Any] = {"parts": [*_files(cfg, workspace), {"type": "text", "text": prompt}]}
    if cfg.model is not None:
        provider, _, model = cfg.model.partition("/")
        body["model"] = {"providerID": provider, "modelID": model}
    if output is not None:
        body["format"] = {"type": "json_schema", "schema": output.tool_schema}
    return body | _who(cfg)


# As OpenCode splits arguments for $1, $2, ...; what stands between the words stays as it is.
_WORD = re.compile(
    r"""(\[Image[ ]\d+\])|"([^"]*)"|'([^']*)'|([^\t\n\v\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029"""
    r"""\u202f\u205f\u3000\ufeff"']+)""",
    re.IGNORECASE,
)
_INTO_SHELL = re.compile(r"!`[^`]*\$(ARGUMENTS|\d)[^`]*`")
_EXPANDED = re.compile(r"[`$@]")


def sealed(arguments: str) -> str:
    """*arguments* with each word as letters that mean nothing, until our plugin opens it.

    OpenCode expands arguments together with the template: ``$&`` and the like, ``@file``, and
    !`command` by the shell, whatever the permissions say (1.18.33).
    """
    return _WORD.sub(_sealed_word, arguments)


def _sealed_word(match: re.Match[str]) -> str:
    whole = match[0]
    quote = whole[0] if match[2] is not None or match[3] is not None else ""
    word = whole[1:-1] if quote else whole
    letters = base64.urlsafe_b64encode(word.encode()).decode().rstrip("=")
    return f"{quote}ocs.{letters}.ocs{quote}"


def check_command(command: str, template: str, arguments: str, *, has_plugin: bool) -> None:
    """Refuse arguments that OpenCode would expand.

    Args:
        has_plugin: They go sealed, to be opened by our plugin.

    Raises:
        OpenCodeConfigError: If the template hands them to the shell, or nothing opens them.
    """
    if _INTO_SHELL.search(template):
        raise OpenCodeConfigError(into_shell(command))
    if not has_plugin and (found := _EXPANDED.search(arguments)) is not None:
        raise OpenCodeConfigError(
            f"the arguments of command {command!r} hold {found[0]!r}, which OpenCode expands, by "
            "the shell too: a server that runs elsewhere takes arguments without '`', '$' and '@'"
        )


def into_shell(command: str) -> str:
    """Why the arguments of *command* are refused."""
    return (
        f"command {command!r} puts its arguments into a shell command, where they could do "
        "anything: run it without arguments, or give its text as the prompt"
    )


OPENED = b'opencode-sync: {"arguments":true}'
"""What our plugin says on stderr when it has opened a command's arguments."""


def not_opened() -> OpenCodeError:
    """The error for an OpenCode that would give the model sealed arguments."""
    return OpenCodeError(
        "this opencode did not load plugin.js, so that the command's arguments would reach the "
        "model as letters without a meaning; the run was stopped: give its text as the prompt"
    )


def command_body(arguments: str, cfg: RunConfig, workspace: Path) -> dict[str, Any]:
    """The command with its *arguments*.

    Raises:
        OpenCodeConfigError: If a file cannot be read.
    """
    body: dict[str, Any] = {"command": cfg.command, "arguments": arguments}
    if cfg.files:
        body["parts"] = _files(cfg, workspace)
    if cfg.model is not None:
        body["model"] = cfg.model
    return body | _who(cfg)


def _who(cfg: RunConfig) -> dict[str, str]:
    return {key: value for key in ("agent", "variant") if (value := getattr(cfg, key)) is not None}


def _files(cfg: RunConfig, workspace: Path) -> list[dict[str, str]]:
    return [_file(workspace / os.path.expanduser(file)) for file in cfg.files]


def media_type_of(name: str, content: bytes) -> str:
    """What a file is by its *content*, and where that does not tell, by its *name*."""
    import mimetypes

    for media_type, signature in _SIGNATURES.items():
        if re.match(signature, content, re.DOTALL):
            return media_type
    try:
        content.decode()
        return "text/plain"  # the model gets it as text; most providers refuse other types
    except UnicodeDecodeError:
        named = mimetypes.guess_type(name)[0]
        # A provider would refuse the prompt for an image that is none.
        return named if named and named not in _SIGNATURES else "application/octet-stream"


def _file(path: Path) -> dict[str, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OpenCodeConfigError(f"file {str(path)!r}: {error.strerror}") from None
    media_type = media_type_of(path.name, content)
    url = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
    return {"type": "file", "mime": media_type, "filename": path.name, "url": url}
