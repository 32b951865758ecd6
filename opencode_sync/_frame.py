"""Results as rows, for pandas and for whoever else takes a list of mappings.

Knows results and errors; where they come from is the caller's matter.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ._markup import tools_used
from .errors import OpenCodeError
from .result import RunResult


def results_to_records(results: Iterable[RunResult | OpenCodeError]) -> list[dict[str, Any]]:
    """One flat row for each result, or each error that stands in a result's place.

    All rows have the same keys: those of RunResult that are plain values, ``error`` as one str or
    None, ``tools``, ``denied_tools`` and ``warnings`` as one str each, and the tokens as
    ``tokens_input`` and so on.
    """
    return [_record(result) for result in results]


def results_to_frame(results: Iterable[RunResult | OpenCodeError]) -> Any:
    """The same as a ``pandas.DataFrame``, also where there are no results.

    Raises:
        ImportError: If pandas, which this package does not ask for, is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError("results_to_frame needs pandas: run 'pip install pandas'") from error
    columns = list(_record(RunResult()))
    return pandas.DataFrame.from_records(results_to_records(results), columns=columns)


def _record(end: RunResult | OpenCodeError) -> dict[str, Any]:
    if isinstance(end, RunResult):
        result, reason = end, None if end.error is None else str(end.error)
    else:
        result = end.result or RunResult(prompt=end.prompt or "", index=end.index, key=end.key)
        reason = f"{type(end).__name__}: {end}".partition("\n")[0]
    has_begun = isinstance(end, RunResult) or end.result is not None
    return {
        "index": result.index,
        "key": result.key,
        "status": result.status if has_begun else "error",
        "error": reason,
        "prompt": result.prompt,
        "answer": result.answer,
        "tools": ", ".join(tools_used(result)),
        "denied_tools": ", ".join(result.denied_tools),
        "warnings": "; ".join(result.warnings),
        "total_cost": result.total_cost,
        **{f"tokens_{name}": value for name, value in asdict(result.token_usage).items()},
        "sub_agents": len(result.sub_agents),
        "turns": result.turns,
        "duration_s": result.duration_s,
        "attempts": result.attempts,
        "finish_reason": result.finish_reason,
        "workspace": result.workspace,
        "session_id": result.session_id,
        "parsed": result.parsed,
    }
