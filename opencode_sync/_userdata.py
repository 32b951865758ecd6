"""A directory that stands in for the one where OpenCode keeps the user's data.

    ~/.local/share/opencode/auth.json  <-- link --  DATA/opencode/auth.json

Credentials are never copied: OpenCode writes a refreshed OAuth token in place, so a copy would
leave the user with a revoked one. Knows where they are; nothing of what is in them.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OpenCodeConfigError, OpenCodeError

_log = logging.getLogger("opencode_sync")

CREDENTIALS = ("auth.json", "mcp-auth.json", "account.json")


def user_data(env: Mapping[str, str]) -> Path:
    """OpenCode's own data directory under *env*."""
    base = env.get("XDG_DATA_HOME") or Path(env.get("HOME") or "~").expanduser() / ".local/share"
    return Path(base) / "opencode"


def link_credentials(env: Mapping[str, str], data: Path, *, is_ours: bool = True) -> None:
    """Make *data* an ``XDG_DATA_HOME``, with links to the credentials that *env* leads to.

    Args:
        is_ours: Links to another place are out of date. If not, what is there stays.

    Raises:
        OSError: If it cannot be written.
    """
    target, source = data / "opencode", user_data(env).absolute()
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in CREDENTIALS:
        link, original = target / name, source / name
        if is_ours and link.is_symlink() and Path(os.readlink(link)) != original:
            link.unlink(missing_ok=True)  # the user's directory has moved since
        try:
            is_there = original.exists()
        except OSError as error:  # a directory that may not be searched, say
            _log.warning("credentials %s cannot be used: %s", original, error.strerror)
            continue
        if is_there:
            # It may be there already, also made by another run in between.
            with suppress(FileExistsError):
                link.symlink_to(original)


def kept_root(root: str | os.PathLike[str]) -> Path:
    """The setting ``data_dir`` as an absolute path.

    Raises:
        OpenCodeConfigError: If it is none.
    """
    try:
        if (text := os.fspath(root)) and "\0" not in text:
            return Path(text).expanduser().absolute()
    except (TypeError, RuntimeError):  # no path; no such user
        pass
    raise OpenCodeConfigError(f"data_dir is {root!r}: use the path of a directory, or None")


@contextmanager
def in_words(kept: Path | None) -> Iterator[None]:
    """Raise OpenCodeError for what cannot be read or written inside the block."""
    try:
        yield
    except OSError as error:
        where = error.filename or kept or tempfile.gettempdir()
        raise OpenCodeError(f"data directory {str(where)!r}: {error.strerror}") from error
