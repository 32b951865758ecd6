"""Our figures beside a bare loop's and a rival's, from one run: prints a table in Markdown.

python -m tests.benchmarks [NAME ...] [--quick] [--rst] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from . import delays, flood, imports, lasting, memory, overhead, real, timeouts, warm_server
from .measuring import Row, rst_table, table
from .setting import CannotRun, Setting, setting

BENCHMARKS: dict[str, Callable[[Setting], list[Row]]] = {
    "import": imports.measure,
    "overhead": overhead.measure,
    "flood": flood.measure,
    "delays": delays.measure,
    "memory": memory.measure,
    "timeout": timeouts.measure,
    "one-run": real.one_run,
    "at-once": real.at_once,
    "server": warm_server.measure,
    "server-busy": warm_server.busy,
}
LONG: dict[str, Callable[[Setting], list[Row]]] = {
    "scale": lasting.batch,
    "server-length": lasting.server,
}


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 0 also where an aim is missed, which the table says."""
    arguments = _parser().parse_args(argv)
    names = arguments.names or list(BENCHMARKS)
    rows: list[Row] = []
    with setting(arguments.quick) as where:
        about = _about(where, arguments.quick)
        for name in names:
            rows += _measured(name, where)
    print("\n".join(f"- {key}: {value}" for key, value in about.items()))
    print(f"\n{rst_table(rows) if arguments.rst else table(rows)}")
    if arguments.json is not None:
        told = {"about": about, "rows": [row.to_dict() for row in rows]}
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser("python -m tests.benchmarks", description=summary)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *BENCHMARKS, *LONG],
                        help=f"some of {', '.join(BENCHMARKS)}; all these without any; "
                        f"by name also {', '.join(LONG)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer and smaller, within 3 minutes")
    parser.add_argument("--rst", action="store_true", help="print it as the README has it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def _measured(name: str, where: Setting) -> list[Row]:
    began = time.monotonic()
    try:
        return (BENCHMARKS | LONG)[name](where)
    except CannotRun as error:
        return [Row(name, "not measured", note=str(error))]
    finally:
        where.end_contenders()
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)


def _about(where: Setting, is_quick: bool) -> dict[str, str]:
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"date": date, "sizes": "quick" if is_quick else "full", **where.describe()}


if __name__ == "__main__":
    sys.exit(main())
