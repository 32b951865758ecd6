"""What an argument has to be: looked at before anything is started.

Each check raises OpenCodeConfigError, with the argument's name, its value, and what to use.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .errors import OpenCodeConfigError


def check_number(
    name: str, value: object, *, optional: bool = False, positive: bool = False
) -> None:
    """Check for a finite number: above 0, or of 0 or more; None where *optional*."""
    if value is None and optional:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Not math.isfinite: that raises for an int of hundreds of digits.
    is_in_range = is_number and 0 <= value <= sys.float_info.max  # type: ignore[operator]
    if not is_in_range or (positive and value == 0):
        bound = "above 0" if positive else "of 0 or more"
        none = ", or None for no limit" if optional else ""
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use a number {bound}{none}")


def check_count(name: str, value: object, least: int) -> None:
    """Check for a whole number of *least* or more, or None."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if value is not None and not is_count:
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use {least} or more, or None")


def check_flag(name: str, value: object) -> None:
    """Check for a bool: of other values ``"no"`` would be true."""
    if not isinstance(value, bool):
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use True or False")


def check_program(name: str, value: object) -> None:
    """Check for what may name a program."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use a path, or a name on PATH")


def checked_path(name: str, value: str | os.PathLike[str], kind: str = "a file") -> Path:
    """*value* as an absolute path, ``~`` expanded; there need be nothing there.

    Args:
        kind: What it is the path of, in words.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise OpenCodeConfigError(f"{name} is {shown(value)}: use the path of {kind}")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise OpenCodeConfigError(f"{name} {text!r}: there is no such home: use an absolute path")
    try:
        path = os.path.abspath(path)
        os.fsencode(path)
    except FileNotFoundError:
        raise OpenCodeConfigError(f"{name} {text!r}: {NO_CURRENT_DIRECTORY}") from None
    except UnicodeEncodeError as error:
        raise OpenCodeConfigError(f"{name} {text!r}: {unencodable(error)}") from None
    return Path(path)


NO_CURRENT_DIRECTORY = "the current directory has vanished: use an absolute path"


def unencodable(error: UnicodeEncodeError) -> str:
    """What is wrong with a text that the system cannot take, and what to do."""
    if sys.getfilesystemencoding() == "utf-8":
        return f"it cannot be encoded: {error}"
    return f"{error}: run Python with PYTHONUTF8=1, or in a UTF-8 locale"


def shown(value: object) -> str:
    """*value* as it is written, if that is short; else its type."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a stranger's repr, or an int too long to be written
        text = ""
    return text if 0 < len(text) <= 200 else type(value).__name__
