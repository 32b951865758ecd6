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

PROGRAM = """\
import sys, time
began = time.perf_counter()
import {modules}
took = time.perf_counter() - began
import json
print(json.dumps([1000 * took, sorted(sys.modules)]))
"""


def measure(setting: Setting) -> list[Row]:
    loaded: set[str] = set()

    def once(modules: str) -> float:
        command = [sys.executable, "-c", PROGRAM.format(modules=modules)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        took_ms, names = json.loads(done.stdout)
        if modules == "opencode_sync":
            loaded.update(names)
        return float(took_ms)

    ours, theirs = "opencode_sync", "subprocess, json"
    found = interleave({ours: lambda: once(ours), theirs: lambda: once(theirs)}, 15)
    heavy = ", ".join(loaded.intersection(HEAVY))
    return [
        Row("import", "import opencode_sync", unit="ms", ours=found[ours], aim=at_most(100, " ms"),
            note=f"loads {heavy}" if heavy else "nothing heavy loaded"),
        compare("import", "import opencode_sync", f"import {theirs}", found[ours], found[theirs],
                "ms", "of theirs"),
    ]  # fmt: skip
