"""The sources of one run, one after another.

    open_source --> attempt, attempt, ... --> the turn ended well --review--> further turn, ...

What several have in common is put together in the result: attempts are counted, and what further
turns leave is added to what there was. Decides nothing; waits for nothing.
"""

from __future__ import annotations

from ._interrupt import CancelScope
from ._repair import is_cut_off
from ._secrets import Secrets
from ._source import OpenSource, Review, Source
from .errors import OpenCodeError, OpenCodeIncompleteError, OpenCodeProcessError
from .result import RunResult


class Attempts:
    """Of one run.

    Attributes:
        tries: How many sources were opened for the turn under way.
        is_further: It is not the run's first turn.
        has_quoted: Secrets stood in an event, and so in its raw line.
    """

    def __init__(
        self,
        open_source: OpenSource,
        result: RunResult,
        review: Review | None,
        secrets: Secrets,
    ) -> None:
        self.tries = 0
        self.is_further = self.has_quoted = False
        self._open_source = open_source
        self._result = result
        self._review = review
        self._secrets = secrets
        self._stderr = ""  # of turns before
        self._lines: list[str] = []

    def open(self, scope: CancelScope) -> Source:
        """Start the next attempt at the turn; raises what keeps it from starting."""
        self.tries += 1
        if not self.is_further:
            self._result.attempts += 1
        try:
            return self._open_source(scope)
        except OpenCodeError as error:
            self._secrets.clean_error(error)
            raise

    def settle(self, source: Source) -> OpenCodeError | None:
        """Complete the result after the end of *source*, and say what went wrong."""
        result = self._result
        # Of attempts before, at this turn, nothing stays.
        result.stderr, result.raw_stdout_lines = "", self._lines
        error = source.settle(result)
        if error is not None:
            self._secrets.clean_error(error)
        if self.has_quoted:
            lines = self._secrets.clean_lines(result.raw_stdout_lines)
            result.raw_stdout_lines = lines
            if isinstance(error, OpenCodeProcessError):
                error.raw_stdout_lines = list(lines)
        result.stderr = self._stderr + result.stderr
        return error

    def may_be_reviewed(self, error: OpenCodeError | None) -> bool:
        """Whether the turn has an answer: it ended well, or was cut, and a schema tells how much is
        missing.

        Args:
            error: What went wrong with it.
        """
        is_cut = is_cut_off(self._result) and not self._result.truncated
        is_only_cut = is_cut and isinstance(error, OpenCodeIncompleteError)
        return error is None or (is_only_cut and self._review is not None)

    def has_further(self) -> bool:
        """Whether another turn follows one that has an answer; if so, it is the next to open.

        Raises:
            OpenCodeError: What the run is to end with.
        """
        further = None if self._review is None else self._review(self._result)
        if further is None:
            return False
        self._open_source, self.tries, self.is_further = further, 0, True
        self._stderr, self._lines = self._result.stderr, self._result.raw_stdout_lines
        self._result._begin_turn()
        return True
