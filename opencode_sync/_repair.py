"""An answer held against its schema, and sent back where it does not fit.

    result --> SchemaReview --+--> it fits: result.parsed
                              +--> it does not: the request for a further turn of the session
                              +--> once too often: OpenCodeOutputError

Knows what to ask for; starts nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from .core.denials import OUTPUT_TOOL
from .core.errors import OpenCodeOutputError
from .core.request import Request
from .core.result import ErrorInfo, RunResult, is_cut_off
from .core.schema import Fit, OutputSchema, SchemaMismatch

_NAME = "StructuredOutputError"  # OpenCode's own word for it


class SchemaReview:
    """Of one run, whose answers come one after another."""

    def __init__(self, request: Request, max_repairs: int) -> None:
        self._request = request
        self._left = self._max_repairs = max_repairs

    def __call__(self, result: RunResult) -> Request | None:
        """Set *result*'s ``parsed``, or return what to ask for next.

        Raises:
            OpenCodeOutputError: If it does not fit, and nothing is to be asked any more.
        """
        schema = self._request.output
        if schema is None:
            return None
        is_cut = is_cut_off(result)
        found = _found(schema, result, is_cut)
        if isinstance(found, SchemaMismatch):
            return self._sent_back(result, found, is_cut)
        result.parsed, result._json = found
        if is_cut:
            result.finish_reason = "stop"  # the value is whole, whatever was to follow it
        return None

    def _sent_back(self, result: RunResult, mismatch: SchemaMismatch, is_cut: bool) -> Request:
        schema = self._request.output
        if schema is None or self._left <= 0 or result.session_id is None:
            raise self._misfit(result, mismatch, is_cut) from mismatch.__cause__
        self._left -= 1
        cfg = self._request.cfg.replace(
            session_id=result.session_id,
            continue_session=False,
            fork=False,
            command=None,
            files=(),
            title=None,
            share=None,
        )
        result._json = None
        prompt = schema.repair(mismatch.faults, is_cut=is_cut)
        return dataclasses.replace(self._request, prompt=prompt, cfg=cfg, is_repair=True)

    def _misfit(
        self, result: RunResult, mismatch: SchemaMismatch, is_cut: bool
    ) -> OpenCodeOutputError:
        arguments, result._json = result._json, None
        text = result.answer if arguments is None else json.dumps(arguments, ensure_ascii=False)
        repairs = self._max_repairs - self._left
        after = f" after {repairs} repair{'s' * (repairs > 1)}" if repairs else ""
        cut = ", and was cut off at the model's output limit" if is_cut else ""
        faults = mismatch.faults
        message = f"the answer does not fit its schema{after}{cut}: {faults[0]}"
        result.error = ErrorInfo(_NAME, message)
        return OpenCodeOutputError(message, errors=faults, text=text, result=result)


def _found(schema: OutputSchema, result: RunResult, is_cut: bool) -> Fit | SchemaMismatch:
    """The value of the answer, or what is wrong with it."""
    try:
        # What a server took down, if it did; a model may have put it into words all the same.
        if result._json is None:
            return schema.find(result.answer, is_cut=is_cut)
        if (n := _n_outputs(result)) > 1:
            raise SchemaMismatch([f"{OUTPUT_TOOL} was called with {n} different values at once"])
        return schema.take(result._json)  # the tool is called with whole JSON, or not at all
    except SchemaMismatch as mismatch:
        # Without the traceback, whose frames would keep the run's stream in memory.
        return mismatch.with_traceback(None)


def _n_outputs(result: RunResult) -> int:
    """How many different values the last answer gave to the tool; OpenCode keeps the last one."""
    message_id: object = None
    values: set[str] = set()
    for event in result.tool_calls:
        part = event.get("part")
        if not isinstance(part, Mapping) or part.get("tool") != OUTPUT_TOOL:
            continue
        state = part.get("state")
        if isinstance(state, Mapping) and state.get("status") == "completed":
            if part.get("messageID") != message_id:
                message_id, values = part.get("messageID"), set()
            values.add(json.dumps(state.get("input"), sort_keys=True))
    return len(values)
