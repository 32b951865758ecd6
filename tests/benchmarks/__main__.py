"""Our figures beside a bare loop's and a rival's, from one run, as the table of the README.

python -m tests.benchmarks [NAME ...] [--quick]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from . import imports, real, scale, server, timeouts
from .measuring import Row, table
from .setting import CannotRun, Setting, setting

BENCHMARKS: dict[str, Callable[[Setting], list[Row]]] = {
    "import": imports.measure,
    "timeout": timeouts.measure,
    "one-run": real.one_run,
    "at-once": real.at_once,
    "server": server.measure,
    "server-busy": server.busy,
    "scale": scale.measure,
}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 also where an aim is missed, which the table says."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *BENCHMARKS],
                        help=f"some of {', '.join(BENCHMARKS)}; all without any")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer and smaller, in a few minutes")
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    with setting(arguments.quick) as where:
        for name in arguments.names or BENCHMARKS:
            rows += _measured(name, where)
        print(where.describe())
    print(table(rows))
    return 0


def _measured(name: str, where: Setting) -> list[Row]:
    began = time.monotonic()
    try:
        return BENCHMARKS[name](where)
    except CannotRun as error:
        return [Row(name, "not measured", note=str(error))]
    finally:
        where.end_contenders()
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
