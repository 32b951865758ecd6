"""The types that a user's own type checker sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_package_and_a_users_program_are_well_typed() -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "opencode_sync", "tests/typed_usage.py"]

    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    assert done.returncode == 0, done.stdout
