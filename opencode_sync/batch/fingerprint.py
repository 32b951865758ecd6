"""What makes two jobs the same: what is asked, of which model, with which rights, and where.

    RunConfig, schema --settings_of()--> {"model": "a/b", "permission": "#1f0c...", ...}
    prompt, workspace, RunSettings --Identities.of()--> Identity: a fingerprint, and its parts

What only decides how a run is carried out, logged or shown is left out, and so are words of a
schema that are not asked for. Files count by their content, and a workspace by its place in the
batch's. Passwords, values of variables and whatever a configuration's key calls a secret are left
out before anything is hashed, so a fingerprint reveals none of them, and a new API key does not
make a new job.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import PurePath
from typing import Any, NamedTuple

from ..core.config import RunConfig
from ..core.request import RunSettings
from ..core.secrets import VALUES_ARE_SECRET, is_secret, setting_name

Settings = Mapping[str, "str | bool | None"]
"""Settings that are not the default, by their names: a short value, or "#" and a hash."""

# Fields of RunConfig that do not change what is asked; files count by their content.
_LEFT_OUT = frozenset(
    {
        *("title", "share", "attach", "username", "password", "port", "extra_env", "thinking"),
        *("print_logs", "log_level", "disable_autoupdate", "keep_background", "lean"),
        *("fallback_models", "files"),
    }
)
_DIGITS = 32  # 128 bits: no two of any number of jobs are alike by chance
_DIGITS_OF_A_SETTING = 12  # it is only compared with the same setting of the same job
_MOST_SHOWN = 100  # characters of a value
_USER_IN_URL = re.compile(r"://[^/@\s]*@")


class Identity(NamedTuple):
    """What a job asks.

    Attributes:
        place: The workspace, relative to the batch's where it is inside of it.
        files: Hash of the content of the attached files, or None.
        settings: Those of the batch.
        own: Those that the job has in place of the batch's; None for the default.
        fingerprint: Hash of all that.
        earlier: What earlier versions may have made of its settings.
    """

    prompt: str
    workspace: str
    place: str
    files: str | None
    settings: Settings
    own: Settings
    fingerprint: str
    earlier: tuple[str, ...] = ()

    def under(self, settings: Settings | str) -> str:
        """The fingerprint of the same job in a batch with *settings*, as a line has them."""
        if isinstance(settings, str):  # of an earlier version
            return _hashed([self.prompt, self.workspace, settings], _DIGITS)
        return _fingerprint(self.prompt, self.place, self.files, _hash_of(settings, self.own))

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint's line has of it."""
        return {"settings": self.settings, "own": self.own, "files": self.files}

    def differences(self, line: Mapping[str, Any]) -> list[str]:
        """Name what differs in *line*, which has another fingerprint; empty if nothing matters.

        Args:
            line: Of a checkpoint.
        """
        if line.get("prompt") != self.prompt:
            return ["prompt"]
        if isinstance(line["settings"], str):
            return ["workspace or settings (an earlier version wrote it, and did not say which)"]
        there = _joined(line["settings"], line.get("own") or {})
        here = _joined(self.settings, self.own)
        found = [
            f"{name}{_change(there.get(name), here.get(name))}"
            for name in sorted({*there, *here})
            if there.get(name) != here.get(name)
        ]
        found += ["files"] if line.get("files") != self.files else []
        if not found and line.get("workspace") != _real(self.workspace):
            return ["workspace"]
        return found  # the same directory, where the batch's workspace is another one


class Identities:
    """The identities of a batch's jobs."""

    def __init__(self, settings: RunSettings, workspace: str, *, with_earlier: bool) -> None:
        """
        Args:
            settings: Those of a job that has none of its own.
            workspace: The same; its absolute path.
            with_earlier: Find jobs in lines of earlier versions too.
        """
        self._run_cfg, self._output = settings.run_cfg, settings.output
        self._real = lru_cache(maxsize=1024)(_real)  # a link may lead elsewhere in the next batch
        self._root = self._real(str(workspace))
        self._with_earlier = with_earlier
        self._settings = self._settings_of(settings)
        self._hash = _hash_of(self._settings, {})
        self._earlier = self._earlier_settings(settings)

    def of(self, prompt: str, workspace: str, settings: RunSettings) -> Identity:
        """Identify a job.

        Args:
            workspace: Its absolute path.
        """
        own: Settings = {}
        hashed, earlier = self._hash, self._earlier
        if settings.run_cfg is not self._run_cfg:
            here, those = self._settings, self._settings_of(settings)
            own = {n: those.get(n) for n in sorted({*here, *those}) if here.get(n) != those.get(n)}
            hashed, earlier = _hash_of(here, own), self._earlier_settings(settings)
        real = self._real(str(workspace))  # one that is not a path is refused where the run begins
        place, files = _place(real, self._root), _content(settings.run_cfg, real)
        fingerprint = _fingerprint(prompt, place, files, hashed)
        return Identity(prompt, workspace, place, files, self._settings, own, fingerprint, earlier)

    def _settings_of(self, settings: RunSettings) -> Settings:
        schema = None if settings.output is None else settings.output.json_schema
        return settings_of(settings.run_cfg or RunConfig(), schema)

    def _earlier_settings(self, settings: RunSettings) -> tuple[str, ...]:
        """What earlier versions made of them: with all fields, or with those that count now."""
        if not self._with_earlier:
            return ()
        cfg = settings.run_cfg or RunConfig()
        default: dict[str, Any] = {
            f.name: f.default for f in fields(cfg) if f.name in _LEFT_OUT - {"files"}
        }
        schema = None if settings.output is None else settings.output.json_schema
        return tuple(
            dict.fromkeys(_earlier_hash(each, schema) for each in (cfg, cfg.replace(**default)))
        )


def settings_of(cfg: RunConfig, schema: Mapping[str, Any] | None = None) -> Settings:
    """Describe the settings *cfg*, and the *schema* of the answers, without secrets."""
    given: dict[str, Any] = {
        f.name: value
        for f in fields(cfg)
        if f.name not in _LEFT_OUT and (value := getattr(cfg, f.name)) != f.default
    }
    if schema is not None:
        given["schema"] = _asked_for(schema, is_named=True)
    return {name: _described(value) for name, value in _without_secrets(given).items()}


def _described(value: Any) -> str | bool:
    if isinstance(value, bool) or (isinstance(value, str) and len(value) <= _MOST_SHOWN):
        return value
    return f"#{_hashed(value, _DIGITS_OF_A_SETTING)}"


def _change(there: object, here: object) -> str:
    """Both values, if they can be read."""
    if any(isinstance(each, str) and each.startswith("#") for each in (there, here)):
        return ""
    before, now = ("not set" if each is None else repr(each) for each in (there, here))
    return f" ({before} there, {now} here)"


def _hash_of(settings: Settings, own: Settings) -> str:
    return _hashed(_joined(settings, own), _DIGITS)


def _fingerprint(prompt: str, place: str, files: str | None, settings: str) -> str:
    # The prompt is the last one, since it may hold any character.
    text = "\0".join((place, files or "", settings, prompt))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]


def _joined(settings: Settings, own: Settings) -> dict[str, Any]:
    return {name: each for name, each in {**settings, **own}.items() if each is not None}


# --- parts of it ----------------------------------------------------------------------------------

# Keywords of a JSON Schema below which keys are names, and those below which there are values.
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_VALUES = ("const", "enum", "default", "examples")


def _asked_for(schema: Any, *, is_named: bool = False) -> Any:
    """*schema* without titles, which pydantic makes of names, and without docstrings of classes.

    Args:
        is_named: It is the whole schema, or one that others refer to: its description is the
            docstring of a class. That of a property is asked for.
    """
    if isinstance(schema, list):
        return [_asked_for(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "title" or (key == "description" and is_named):
            continue
        if key in _NAMED and isinstance(value, Mapping):
            is_shared = key in ("$defs", "definitions")
            value = {name: _asked_for(each, is_named=is_shared) for name, each in value.items()}
        elif key not in _VALUES:
            value = _asked_for(value)
        kept[key] = value
    return kept


def _real(workspace: str) -> str:
    try:
        return os.path.realpath(workspace)
    except (OSError, ValueError):
        return workspace


@lru_cache(maxsize=1024)
def _place(workspace: str, root: str) -> str:
    path = PurePath(workspace)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else workspace


def _content(cfg: RunConfig | None, workspace: str) -> str | None:
    """Hash the attached files; one that is not there has None, and its run fails."""
    if cfg is None or not cfg.files:
        return None
    contents: list[Any] = []
    for file in cfg.files:
        path = os.path.join(workspace, os.path.expanduser(file))
        try:
            status = os.stat(path)
            is_file = stat.S_ISREG(status.st_mode)  # opening a pipe would wait for a writer
            version = (status.st_size, status.st_mtime_ns, status.st_ino)
            digest = _digest(path, *version) if is_file else None
        except OSError:
            digest = None
        contents.append([PurePath(path).suffix, digest])  # the suffix decides how it is read
    return _hashed(contents, _DIGITS)


@lru_cache(maxsize=1024)
def _digest(path: str, *version: int) -> str:
    """Hash the file *path*, once for each *version* of it."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while data := file.read(2**20):
            digest.update(data)
    return digest.hexdigest()


def _without_secrets(value: Any, name: str = "") -> Any:
    """*value* of the setting *name*, with None in the place of secrets below it."""
    if isinstance(value, Mapping):
        plain: dict[str, Any] = {}
        for key, each in value.items():
            below = setting_name(name, key)
            is_left_out = name in VALUES_ARE_SECRET or is_secret(below, each)
            plain[str(key)] = None if is_left_out else _without_secrets(each, below)
        return plain
    if isinstance(value, (list, tuple)):
        return [_without_secrets(each) for each in value]
    return _USER_IN_URL.sub("://", value) if isinstance(value, str) else value


def _hashed(value: Any, digits: int) -> str:
    # ASCII, so that lone surrogates pass.
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _earlier_hash(cfg: RunConfig, schema: Mapping[str, Any] | None) -> str:
    """Hash settings as earlier versions did: all fields, and the schema as it is."""
    settings = {
        f.name: value
        for f in fields(cfg)
        if f.name != "password" and (value := getattr(cfg, f.name)) != f.default
    }
    if isinstance(environment := settings.get("extra_env"), Mapping):
        settings["extra_env"] = sorted(environment)
    plain = _without_secrets(settings)
    return _hashed(plain if schema is None else [plain, schema], _DIGITS)
