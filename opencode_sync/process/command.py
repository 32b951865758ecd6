"""Which program is run, with which arguments, in which environment.

    binary ------------> resolve_binary() --> the program: named, on PATH, or the managed copy
    Request, lease ----> run_command() -----> Command: argv, the whole environment, stdin
    RunConfig ---------> server_env() ------> the environment of ``opencode serve``

The only place that knows OpenCode's flags and variables, as measured with 1.18.33. Layers of an
environment, later ones over earlier ones: the process's own; the switches of the settings; their
``extra_env``; the configuration, merged over one that is there; directories; what our scripts in
OpenCode (plugin.js, preload.js) need. Starts nothing and writes nothing.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.config import RunConfig, merged
from ..core.denials import denials_of, marked
from ..core.errors import (
    OpenCodeBinaryNotFoundError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodePermissionError,
)
from ..core.request import Request

TESTED_VERSION = "1.18.33"
"""The version of OpenCode that this package is tested with, and installs by default."""

VERSION = re.compile(r"(?:opencode )?v?(?P<version>(?P<numbers>\d+(?:\.\d+)+)(?:[-+][\w.+-]+)?)")
"""What ``opencode --version`` has printed over time; the group ``version`` is the plain form."""

DEFAULT_BINARY = "opencode"

PLUGIN = Path(__file__).parent.parent / "server" / "plugin.js"
BUN_TEMPORARY = "BUN_TMPDIR"
PRELOAD = "BUN_INSPECT_PRELOAD"
PRELOAD_FILE = Path(__file__).parent / "preload.js"
DENIALS = "OPENCODE_SYNC_DENIALS"
"""The variable that tells preload.js what is denied."""
ENFORCED = b'opencode-sync: {"denials":true}'
"""What preload.js says on stderr when OpenCode looks for rules the first time."""
_NPM = {"npm_config_fetch_retries": "0", "npm_config_fetch_timeout": "5000"}  # milliseconds

OPENED = b'opencode-sync: {"arguments":true}'
"""What our plugin says on stderr when it has opened a command's arguments."""

# As OpenCode splits arguments for $1, $2, ...; what is between the words stays as it is.
_WORD = re.compile(
    r"""(\[Image[ ]\d+\])|"([^"]*)"|'([^']*)'|([^\t\n\v\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029"""
    r"""\u202f\u205f\u3000\ufeff"']+)""",
    re.IGNORECASE,
)

# These hold configuration of the user's; left out with inherit_user_config=False.
_USER_CONFIG_VARIABLES = (
    "OPENCODE_CONFIG",
    "OPENCODE_CONFIG_DIR",
    "OPENCODE_CONFIG_CONTENT",
    "OPENCODE_PERMISSION",
)

# These lead to the user's own files: the first to ~/.config/opencode; the second to ~/.opencode,
# for which there is no other switch, and to skills and instructions in ~/.claude and ~/.agents.
_USER_CONFIG_DIRECTORIES = ("XDG_CONFIG_HOME", "OPENCODE_TEST_HOME")

# Strings are matched first and kept, whatever is in them.
_STRING = r'("(?:[^"\\]|\\.)*")'
_COMMENT = re.compile(_STRING + r"|//[^\n]*|/\*.*?\*/", re.DOTALL)
_TRAILING_COMMA = re.compile(_STRING + r"|,(?=\s*[}\]])")

# These switch off what a single run rarely needs. OPENCODE_DISABLE_FFF is not among them: it has
# OpenCode download ripgrep.
_LEAN_ENVIRONMENT = {
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
    "OPENCODE_DISABLE_SHARE": "1",
    "OPENCODE_DISABLE_PRUNE": "1",
    "OPENCODE_DISABLE_EMBEDDED_WEB_UI": "1",
    "OPENCODE_EXPERIMENTAL_DISABLE_FILEWATCHER": "1",
    # Ten times the default: the last stage of the JavaScript engine's compiler takes a tenth of the
    # CPU of a run that is over before it pays.
    "BUN_JSC_thresholdForFTLOptimizeAfterWarmUp": "1000000",
}
_LEAN_CONFIG: dict[str, Any] = {"snapshot": False, "share": "disabled", "lsp": False}


# --- the program ----------------------------------------------------------------------------------


def managed_root() -> Path:
    """The directory below which ``opencode-sync install`` puts its copies of OpenCode.

    Raises:
        OpenCodeConfigError: If there is no home for it: no ``HOME``, and a user without one.
    """
    import platformdirs

    try:
        root = platformdirs.user_data_path("opencode-sync", appauthor=False)
    except RuntimeError:
        root = Path("~")
    if not root.is_absolute():
        raise OpenCodeConfigError("there is no home directory: set HOME or XDG_DATA_HOME")
    return root / "opencode"


def managed_path(version: str) -> Path:
    """Where the managed copy of *version* is, or would be."""
    return managed_root() / version / "bin" / "opencode"


def managed_binary() -> Path | None:
    """The managed copy of the tested version, else of the highest other one, else None."""
    try:
        tested = managed_path(TESTED_VERSION)
        if os.path.isfile(tested):
            return tested
        versions = [entry.name for entry in managed_root().iterdir()]
    except (OSError, OpenCodeConfigError):  # there is no copy, or no home directory
        return None
    others = [version for version in versions if os.path.isfile(managed_path(version))]
    highest = max(others, key=lambda version: version_numbers(version) or (), default=None)
    return None if highest is None else managed_path(highest)


def version_numbers(version: str) -> tuple[int, ...] | None:
    """The numbers of a version, or None where it has none: ``"local"``, ``"0.0.0-dev-2026"``."""
    match = VERSION.fullmatch(version)
    numbers = tuple(map(int, match["numbers"].split("."))) if match else ()
    return numbers if any(numbers) else None


def resolve_binary(binary: str | os.PathLike[str] = DEFAULT_BINARY) -> str:
    """The absolute path of the OpenCode program.

    An existing file (``~`` expanded) or a name on ``PATH``. For the default name, the variable
    ``OPENCODE_BINARY`` comes first, and the copy of ``opencode-sync install`` last.

    Raises:
        OpenCodeBinaryNotFoundError: Names what was looked for, and how to get it.
    """
    name = os.fspath(binary)
    is_default = name == DEFAULT_BINARY
    if is_default:
        name = os.environ.get("OPENCODE_BINARY") or name
    if found := _program(name):
        return found
    if is_default and name == DEFAULT_BINARY and (managed := managed_binary()):
        return str(managed)
    if is_default and name != DEFAULT_BINARY:
        raise OpenCodeBinaryNotFoundError(
            f"{_why_not(name)}, which OPENCODE_BINARY names: fix or unset the variable"
        )
    raise OpenCodeBinaryNotFoundError(
        f"{_why_not(name)}: run 'opencode-sync install', or pass binary=\"path/to/opencode\""
    )


def _program(name: str) -> str | None:
    # A bare name is looked up on PATH first: a file of that name in the current directory must
    # not stand in for the program.
    if os.path.basename(name) == name and (found := shutil.which(name)):
        return os.path.abspath(found)
    if name == DEFAULT_BINARY:  # the user has not named a file
        return None
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.isfile(path) and os.access(path, os.X_OK) else None


def _why_not(name: str) -> str:
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return f"{name!r} is not executable"
    if os.path.basename(name) == name:
        return f"no {name!r} on PATH"
    return f"{name!r} is a directory, not a program" if os.path.isdir(path) else f"no file {name!r}"


# --- its arguments --------------------------------------------------------------------------------


def build_argv(binary_resolved: str, prompt: str | None, run_cfg: RunConfig) -> list[str]:
    """The command line of ``opencode run``.

    *prompt*, if there is one, comes last, after ``--``. The clients of this package pass None: on
    argv OpenCode wraps a prompt that has spaces in quotes, while stdin is verbatim. ``password`` is
    never among the arguments; :func:`build_env` has it.
    """
    cfg = run_cfg
    argv = [binary_resolved, "run", "--format", "json"]
    argv += _switch("--print-logs", cfg.print_logs)
    argv += _option("--log-level", cfg.log_level)
    argv += _option("--command", cfg.command)
    argv += _switch("--continue", cfg.continue_session)
    argv += _option("--session", cfg.session_id)
    argv += _switch("--fork", cfg.fork)
    argv += _switch("--share", cfg.share)
    argv += _option("-m", cfg.model)
    argv += _option("--agent", cfg.agent)
    for file in cfg.files:
        argv += _option("-f", os.path.expanduser(file))
    argv += _option("--title", cfg.title)
    argv += _option("--attach", cfg.attach)
    argv += _option("--username", cfg.username)
    argv += _option("--dir", cfg.remote_dir)
    argv += _option("--port", cfg.port)
    argv += _option("--variant", cfg.variant)
    argv += _switch("--thinking", cfg.thinking)
    argv += _switch("--auto", cfg.auto)
    argv += _switch("--pure", cfg.pure)
    # "--" also ends the list of -f, which would take the prompt for a file name.
    return [*argv, "--", prompt] if prompt else argv


def with_title(run_cfg: RunConfig) -> RunConfig:
    """Give *run_cfg* a title, since without one OpenCode asks the model for it.

    With an empty title OpenCode takes the first 50 characters of the prompt. So the prompt is not
    on the command line, which other users of the machine can read. It would take a command's
    arguments in their sealed form: the command's name stands in their place. A session that is
    continued or forked keeps its own title.
    """
    if run_cfg.title:
        return run_cfg
    return run_cfg.replace(title="" if run_cfg.command is None else f"/{run_cfg.command}")


def _with_logs(cfg: RunConfig) -> RunConfig:
    # Without errors a provider's refusals, which OpenCode retries for minutes, would be silent, and
    # without warnings an MCP server that does not work.
    if cfg.print_logs:
        return cfg
    is_enough = cfg.log_level in ("DEBUG", "INFO", "WARN")
    return cfg.replace(print_logs=True, log_level=cfg.log_level if is_enough else "WARN")


def _switch(flag: str, value: bool | None) -> list[str]:
    return [flag] if value else []


def _option(flag: str, value: object | None) -> list[str]:
    if value is None:
        return []
    text = str(value)
    # A value with a leading dash would be read as the next flag.
    return [f"{_LONG.get(flag, flag)}={text}"] if text.startswith("-") else [flag, text]


_LONG = {"-m": "--model", "-f": "--file"}


# --- its environment, and the whole command -------------------------------------------------------


def build_env(run_cfg: RunConfig, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a run: *base* (by default the process's own), and the settings over it.

    A configuration that *base* carries in ``OPENCODE_CONFIG_CONTENT`` is merged under ours.

    Raises:
        OpenCodeConfigError: If that configuration is not a JSON object.
    """
    env = dict(os.environ if base is None else base)
    if not run_cfg.inherit_user_config:
        for name in _USER_CONFIG_VARIABLES:
            env.pop(name, None)
    if not run_cfg.inherit_project_config:
        env["OPENCODE_DISABLE_PROJECT_CONFIG"] = "1"
        # The other switch leaves the skills of the project's .claude and .agents as they are.
        env["OPENCODE_DISABLE_EXTERNAL_SKILLS"] = "1"
    if run_cfg.lean:
        env.update(_LEAN_ENVIRONMENT)
    env.update(run_cfg.extra_env or {})
    config = run_cfg.build_opencode_config_dict()
    if run_cfg.instructions and not run_cfg.inherit_user_config:
        # For OpenCode "~" is then the empty directory of without_user_config().
        config["instructions"] = [os.path.expanduser(path) for path in run_cfg.instructions]
    if run_cfg.lean:
        config = merged(_LEAN_CONFIG, config)
    if run_cfg.agent is not None:
        # For an agent that it cannot run, OpenCode takes the default one: then it refuses that too.
        config["default_agent"] = run_cfg.agent
    config = marked(config)
    if config:
        below = _parent_config(env.get("OPENCODE_CONFIG_CONTENT"))
        env["OPENCODE_CONFIG_CONTENT"] = _content(merged(below, config))
    if run_cfg.disable_autoupdate:
        env["OPENCODE_DISABLE_AUTOUPDATE"] = "1"
    if run_cfg.password is not None:
        env["OPENCODE_SERVER_PASSWORD"] = run_cfg.password
    return env


@dataclass(frozen=True)
class Command:
    """How one ``opencode run`` is started.

    Attributes:
        argv: The argument list; the prompt is not in it.
        env: The whole environment, but for the marker that the process module adds.
        prompt: For stdin. A command's arguments are sealed, see :func:`sealed`.
        must_say: What has to be on stderr before the first step, each with the error that the run
            ends with where it is not.
    """

    argv: list[str]
    env: dict[str, str]
    prompt: str
    must_say: Mapping[bytes, OpenCodeError]


def run_command(
    binary: str,
    request: Request,
    *,
    unpacked: Path,
    data_home: Path | None = None,
    empty_config: Path | None = None,
    keeps_database: bool = True,
) -> Command:
    """The command of a run.

    Args:
        unpacked: The directory for what OpenCode unpacks.
        data_home: The run's ``XDG_DATA_HOME``; None for the one of its environment.
        empty_config: A directory without configuration, for ``inherit_user_config=False``.
        keeps_database: Leave ``OPENCODE_DB``, which takes the database out of *data_home*, where
            it is. If not, it stays only where ``extra_env`` sets it.

    Raises:
        OpenCodeConfigError: If the configuration of the environment cannot be merged, or what
            enforces a setting cannot be loaded into OpenCode.
    """
    cfg, prompt = request.cfg, request.instructed
    env = add_denials(build_env(cfg), cfg)
    must_say: dict[bytes, OpenCodeError] = {}
    if DENIALS in env:
        must_say[ENFORCED] = not_enforced()
    if cfg.command is not None and prompt.strip():
        check_plugin(
            cfg,
            env,
            f"the arguments of command {cfg.command!r} from the shell",
            "run it without arguments, or give its text as the prompt",
        )
        env, prompt = add_plugin(env), sealed(prompt)
        must_say[OPENED] = not_opened()
    if not keeps_database:
        _drop_database(env, cfg)
    env = _with_directories(env, cfg, data_home, unpacked, empty_config)
    argv = build_argv(binary, None, with_title(_with_logs(cfg)))
    return Command(argv, add_preload(env), prompt, must_say)


def server_env(
    cfg: RunConfig, *, unpacked: Path, data_home: Path, empty_config: Path | None = None
) -> dict[str, str]:
    """The environment of a server, but for its password; arguments as for :func:`run_command`."""
    env = build_env(cfg.replace(agent=None))  # each prompt names its own
    env = add_denials(env, cfg, is_server=True)
    _drop_database(env, cfg)
    env = _with_directories(env, cfg, data_home, unpacked, empty_config)
    return add_preload(add_plugin(env))


def _drop_database(env: dict[str, str], cfg: RunConfig) -> None:
    """Take a database that is elsewhere out of *env*, unless ``extra_env`` sets it."""
    if "OPENCODE_DB" not in (cfg.extra_env or {}):
        env.pop("OPENCODE_DB", None)


def _with_directories(
    env: Mapping[str, str],
    cfg: RunConfig,
    data_home: Path | None,
    unpacked: Path,
    empty_config: Path | None,
) -> dict[str, str]:
    # Each start of OpenCode unpacks a library of 5.6 MB there, else into the temporary directory,
    # and leaves it (1.18.33). A variable that is set already stays.
    env = {BUN_TEMPORARY: str(unpacked), **env}
    if data_home is not None:
        env["XDG_DATA_HOME"] = str(data_home)
    if not cfg.inherit_user_config and empty_config is not None:
        env = without_user_config(env, cfg, empty_config)
    return env


def without_user_config(env: Mapping[str, str], run_cfg: RunConfig, empty: Path) -> dict[str, str]:
    """*env* with the directory *empty* where OpenCode looks for the user's own files.

    A variable that ``extra_env`` sets itself stays. Tools keep their ``HOME``.
    """
    own = run_cfg.extra_env or {}
    return {**env, **{name: str(empty) for name in _USER_CONFIG_DIRECTORIES if name not in own}}


# --- our scripts in OpenCode ----------------------------------------------------------------------


def add_preload(env: dict[str, str]) -> dict[str, str]:
    """*env* with preload.js, which reports a provider's refusals on stderr.

    It only adds detail: it is left out where the package is in an archive, or where the variable
    is set, even to nothing.
    """
    if not env.get(PRELOAD, "unset"):  # Bun exits at once where that is not a file
        return {name: value for name, value in env.items() if name != PRELOAD}
    return {PRELOAD: str(PRELOAD_FILE), **env} if PRELOAD_FILE.is_file() else env


def add_denials(env: dict[str, str], cfg: RunConfig, *, is_server: bool = False) -> dict[str, str]:
    """*env* with what *cfg* denies, for preload.js; unchanged if it denies nothing.

    Args:
        is_server: Only what is denied to single agents: a session there has rules of its own.

    Raises:
        OpenCodeConfigError: If something is denied, and preload.js cannot be loaded.
    """
    denials = denials_of(cfg, is_server=is_server)
    if not denials:
        return env
    if PRELOAD in env:
        why = f"{PRELOAD} is set: unset it"
    elif not PRELOAD_FILE.is_file():
        why = f"{PRELOAD_FILE.name} is not a file (a package in an archive?): install the package"
    else:
        return {**env, DENIALS: json.dumps(denials)}
    raise OpenCodeConfigError(
        "something is denied, and what keeps a workspace's own configuration from allowing it "
        f"again would not be loaded: {why}"
    )


def not_enforced() -> OpenCodePermissionError:
    """The error for an OpenCode that does not look for what is denied; without a tool's name."""
    return OpenCodePermissionError(
        "this opencode does not load preload.js, or looks for permissions in another way, so that "
        "the workspace's own configuration could allow what is denied; the run was stopped before "
        "its first tool: install the tested version with 'opencode-sync install', or use "
        "OpenCodeServer"
    )


def add_plugin(env: dict[str, str]) -> dict[str, str]:
    """*env* with our plugin in its configuration, beside those that are there.

    With any plugin OpenCode waits for its own installations by npm, which without a network take
    70 s in each directory, and 0.4 s without retries; where the registry takes connections and
    never answers, npm would wait for 5 minutes. The plugin gives tools npm's defaults back.
    """
    config = _parent_config(env.get("OPENCODE_CONFIG_CONTENT"))
    plugins = config.get("plugin")
    config["plugin"] = [*(plugins if isinstance(plugins, list) else []), PLUGIN.as_uri()]
    ours = {"OPENCODE_CONFIG_CONTENT": _content(config)}
    return {**_NPM, **env, **ours}


def check_plugin(
    cfg: RunConfig,
    env: Mapping[str, str],
    protects: str,
    instead: str,
    *,
    with_preload: bool = False,
) -> None:
    """Raise OpenCodeConfigError if OpenCode would not load our plugin.

    Args:
        protects: What the plugin keeps from whom.
        instead: What else the caller can do.
        with_preload: preload.js is needed too.
    """
    if cfg.pure:
        why = "pure=True leaves out all plugins: use pure=False"
    elif env.get("OPENCODE_PURE", "").lower() in ("1", "true"):
        why = "OPENCODE_PURE leaves out all plugins: unset it"
    elif with_preload and PRELOAD in env:
        why = f"{PRELOAD} is set, which leaves out {PRELOAD_FILE.name}: unset it"
    elif not PLUGIN.is_file():
        why = f"{PLUGIN.name} is not a file (a package in an archive?): install the package"
    else:
        return
    raise OpenCodeConfigError(f"our plugin keeps {protects}, but {why}; or {instead}")


def sealed(arguments: str) -> str:
    """*arguments* with each word encoded as harmless letters, which our plugin decodes.

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


def not_opened() -> OpenCodeError:
    """The error for an OpenCode that would give the model sealed arguments."""
    return OpenCodeError(
        "this opencode did not load plugin.js, so the model would get the command's arguments in "
        "an encoded form; the run was stopped: give the command's text as the prompt"
    )


# --- the configuration in the environment ---------------------------------------------------------


def _content(config: Mapping[str, Any]) -> str:
    # A variable cannot hold characters that the locale does not have.
    is_ascii = sys.getfilesystemencoding() != "utf-8"
    return json.dumps(config, ensure_ascii=is_ascii)


def _parent_config(content: str | None) -> dict[str, Any]:
    if not content:
        return {}
    try:
        config = json.loads(_without_comments(content))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise OpenCodeConfigError(
            "OPENCODE_CONFIG_CONTENT of the environment is not a JSON object, so the run's own "
            "configuration cannot be merged over it: fix or unset it"
        )
    return config


def _without_comments(text: str) -> str:
    """*text* as JSON: without the comments and trailing commas that OpenCode accepts."""
    text = _COMMENT.sub(lambda match: match[1] or " ", text)
    return _TRAILING_COMMA.sub(lambda match: match[1] or "", text)
