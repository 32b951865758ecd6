"""A worker's loop: a line of JSON in, what it names is done, a line of JSON out.

{"task": "runs", "arguments": {...}} --> {"wall_s": ..., "cpu_s": ..., "answer": ...}
                                         {"error": "..."}
"""

from __future__ import annotations

import gc
import json
import os
import resource
import time
from collections.abc import Callable
from typing import Any


def serve(*tasks: Callable[..., Any]) -> None:
    """Do tasks until stdin ends."""
    # What a task starts may inherit stdin and stdout: these are not for it.
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    by_name = {task.__name__: task for task in tasks}
    for order in orders:
        asked = json.loads(order)
        print(json.dumps(_measured(by_name[asked["task"]], asked["arguments"])), file=answers)
        answers.flush()


def _measured(task: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    gc.collect()
    cpu_s, began = _cpu_s(), time.perf_counter()
    try:
        answer = task(**arguments)
    except Exception as error:  # noqa: BLE001 - told to who asked
        return {"error": f"{type(error).__name__}: {error}"}
    wall_s = time.perf_counter() - began
    return {"wall_s": wall_s, "cpu_s": _cpu_s() - cpu_s, "answer": answer}


def _cpu_s() -> float:
    """Seconds of CPU, of this process and of the children that it has reaped."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
