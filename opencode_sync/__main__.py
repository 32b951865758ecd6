"""``python -m opencode_sync``: the same as ``opencode-sync``."""

from __future__ import annotations

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
