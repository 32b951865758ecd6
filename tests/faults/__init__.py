"""What the real opencode cannot be made to do, done by a stand-in: see standin.py."""

from __future__ import annotations

import sys
from pathlib import Path

from opencode_sync import OpenCodeClient
from tests.standin import VERSION

STANDIN = Path(__file__).with_name("standin.py")


def write_standin(directory: Path) -> str:
    """An executable that behaves as its prompt says; starts within 20 ms. Its version is known."""
    path = directory / "opencode-standin"
    path.write_text(f'{VERSION}exec "{sys.executable}" -S -E "{STANDIN}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def standin_client(directory: Path, **settings: object) -> OpenCodeClient:
    """A client of the stand-in; *settings* as for OpenCodeClient."""
    return OpenCodeClient(write_standin(directory), **settings)  # type: ignore[arg-type]
