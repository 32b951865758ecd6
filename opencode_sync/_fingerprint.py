"""Fingerprints of jobs: equal for what asks the same of OpenCode, and no secret goes into them.

Passwords, variables' values and whatever a key of a configuration calls a secret are left out
before anything is hashed, so a fingerprint tells nothing of them, and a new key is no new job.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .core.config import RunConfig
from .core.secrets import VALUES_ARE_SECRET, is_secret, setting_name

_DIGITS = 32  # 128 bits: no two of any number of jobs are alike by chance
_USER_IN_URL = re.compile(r"://[^/@\s]*@")


def settings_fingerprint(cfg: RunConfig, schema: Mapping[str, Any] | None = None) -> str:
    """What *cfg* asks for, without its secrets, and what the answers have to look like."""
    settings = {
        field.name: value
        for field in fields(cfg)
        if field.name != "password" and (value := getattr(cfg, field.name)) != field.default
    }
    if isinstance(environment := settings.get("extra_env"), Mapping):
        settings["extra_env"] = sorted(environment)
    plain = _without_secrets(settings)
    return _hashed(plain if schema is None else [plain, schema])


def job_fingerprint(prompt: str, workspace: str, settings: str) -> str:
    """A job's, given that of its settings."""
    return _hashed([prompt, workspace, settings])


def _without_secrets(value: Any, name: str = "") -> Any:
    """*value*, a setting that is called *name*."""
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


def _hashed(value: Any) -> str:
    # ASCII, so that lone surrogates pass.
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
