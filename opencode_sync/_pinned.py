"""What stays in its process: threads and a run hang on it, which no copy would have."""

from __future__ import annotations

from typing import ClassVar, NoReturn, SupportsIndex

from .errors import OpenCodeConfigError


class Pinned:
    """Neither pickled nor copied."""

    _instead: ClassVar[str] = "pass on its result"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        kind = type(self).__name__
        raise OpenCodeConfigError(f"a {kind} cannot leave its process: {self._instead}")
