"""One bar for a batch, on a terminal or in a notebook.

Only the thread that iterates the batch touches it. tqdm is imported with the first bar.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ._tally import BatchReport

if TYPE_CHECKING:
    from tqdm import tqdm


class Progress:
    """A bar with what is done, failed, spent and left."""

    def __init__(self, total: int | None, *, always: bool = False) -> None:
        """
        Args:
            total: How many jobs there are, or None where nobody knows.
            always: Show it, also where stderr is neither a terminal nor a notebook.
        """
        self._bar: tqdm[Any] | None = None
        if _is_seen(always):
            from tqdm.auto import tqdm

            # Its own check of the terminal would hide it in notebooks, hence disable=False.
            self._bar = tqdm(total=total, unit="job", dynamic_ncols=True, disable=False)

    def show(self, report: BatchReport) -> None:
        """Bring the bar up to date."""
        if self._bar is None:
            return
        finished = report.done + report.failed + report.cached
        self._bar.set_postfix_str(_summary(report), refresh=False)
        if finished > self._bar.n:
            self._bar.update(finished - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands. Idempotent."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None


def _is_seen(always: bool) -> bool:
    stream = sys.stderr
    if stream is None or always:  # a service, or a program without a console, has none
        return stream is not None
    # A notebook's stream says that it is no terminal, and shows a bar all the same.
    return stream.isatty() or type(stream).__module__.partition(".")[0] == "ipykernel"


def _summary(report: BatchReport) -> str:
    parts = [
        f"{report.failed} failed",
        f"${report.cost:.4f}",
        f"{_short(report.tokens.total)} tokens",
    ]
    if report.cached:
        parts.insert(1, f"{report.cached} cached")
    if report.rate_limits:
        parts.append(f"{report.rate_limits} rate limits")
    return ", ".join(parts)


def _short(n: float) -> str:
    for unit in ("", "k", "M"):
        if n < 1000:
            return f"{n:.0f}{unit}" if not unit else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.1f}G"
