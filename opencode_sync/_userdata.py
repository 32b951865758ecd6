"""A directory that stands in for the one where OpenCode keeps the user's data.

    ~/.local/share/opencode/auth.json  <-- link --  DATA/opencode/auth.json

Credentials are never copied: OpenCode writes a refreshed OAuth token in place, so a copy would
leave the user with a revoked one. Knows where they are; nothing of what is in them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from .core.errors import OpenCodeError

_log = logging.getLogger("opencode_sync")

CREDENTIALS = ("auth.json", "mcp-auth.json", "account.json")


def user_data(env: Mapping[str, str]) -> Path:
    """OpenCode's own data directory under *env*."""
    # Of a user without a home there is none, and nothing is found below a directory "~".
    home = env.get("HOME") or os.path.expanduser("~")
    return Path(env.get("XDG_DATA_HOME") or Path(home) / ".local/share") / "opencode"


def user_database(env: Mapping[str, str]) -> Path | None:
    """OpenCode's database under *env*; None for one in memory."""
    name = env.get("OPENCODE_DB") or "opencode.db"
    return None if name == ":memory:" else user_data(env) / name  # which an absolute one replaces


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


@contextmanager
def in_words(kept: Path | None) -> Iterator[None]:
    """Raise OpenCodeError for what cannot be read or written inside the block."""
    try:
        yield
    except OSError as error:
        # There may be no place for a temporary one, and then there is no name to tell.
        where = error.filename or kept
        name = "data directory" if where is None else f"data directory {str(where)!r}"
        raise OpenCodeError(f"{name}: {error.strerror}") from error
