"""What `import opencode_sync` takes and loads."""

from __future__ import annotations

import json
import subprocess
import sys

from .measuring import Row, at_most, compare, interleave
from .setting import ROOT, Setting

# Loaded only when used: each would take longer than all of ours.
HEAVY = ("httpx2", "httpcore2", "tqdm", "psutil", "filelock", "platformdirs", "asyncio", "ssl",
         "pydantic", "jsonschema", "jinja2", "distributed", "IPython", "http.client")  # fmt: skip

_PROGRAM = """\
import sys, time
began = time.perf_counter()
import {modules}
took = time.perf_counter() - began
import json
print(json.dumps([took, sorted(sys.modules)]))
"""


def measure(setting: Setting) -> list[Row]:
    loaded: set[str] = set()

    def once(modules: str) -> float:
        command = [sys.executable, "-c", _PROGRAM.format(modules=modules)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        took, names = json.loads(done.stdout)
        if modules == "opencode_sync":
            loaded.update(names)
        return 1000 * float(took)

    ways = ("opencode_sync", "subprocess, json")
    found = interleave({way: (lambda way=way: once(way)) for way in ways}, 15)
    row = compare("import", "import opencode_sync", f"import {ways[1]}",
                  found[ways[0]], found[ways[1]], "ms", "time")  # fmt: skip
    heavy = [name for name in HEAVY if name in loaded]
    note = "nothing heavy loaded" if not heavy else f"loads {', '.join(heavy)}"
    own = Row("import", "import opencode_sync", unit="ms", ours=row.ours, value=row.ours,
              aim=at_most(100, " ms"), note=note)  # fmt: skip
    return [own, row]
