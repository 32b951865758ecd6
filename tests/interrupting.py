"""A Ctrl-C in the middle of something."""

from __future__ import annotations

import signal
from typing import Any

import pytest


def interrupt_once(patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Have a Ctrl-C come at the start of the next call of the method *name* of *owner*.

    All that *patch* has changed is taken back then.
    """
    method = getattr(owner, name)

    def interrupted(*arguments: Any) -> Any:
        patch.undo()
        signal.raise_signal(signal.SIGINT)
        return method(*arguments)

    patch.setattr(owner, name, interrupted)
