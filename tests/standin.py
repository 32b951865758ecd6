"""A small program in the place of opencode: it prints the events that a test wrote.

Its prompt is Python: what the test sends is what the program does, with these words at hand. What
we add to a prompt comes after a line "# end", which ends the program.
"""

from __future__ import annotations

import sys
from pathlib import Path

from opencode_sync import TESTED_VERSION
from tests import serving

# How a program begins that is a shell script: it has the version that the tests are of, and says
# what preload.js says where something is denied.
_TOLD = """[ -z "$OPENCODE_SYNC_DENIALS" ] || echo 'opencode-sync: {"denials":true}' >&2\n"""
VERSION = f'#!/bin/sh\n[ "$1" = --version ] && {{ echo {TESTED_VERSION}; exit; }}\n{_TOLD}'

_PROGRAM = """\
import json, os, signal, sys, time

def show(**event):
    print(json.dumps({"sessionID": "ses_1", **event}), flush=True)

def step(*, text=None, tool=None, reason="stop", cost=0.01):
    show(type="step_start", part={})
    if text is not None:
        show(type="text", part={"id": "prt_1", "text": text})
    if tool is not None:
        show(type="tool_use", part={"tool": tool[0], "state": tool[1]})
    tokens = {"total": 120, "input": 100, "output": 20}
    show(type="step_finish", part={"reason": reason, "cost": cost, "tokens": tokens})

def fail(message, status=401):
    data = {"message": message, "statusCode": status}
    show(type="error", error={"name": "APIError", "data": data})
    sys.exit(1)

if sys.argv[1:] == ["--version"]:
    print("1.18.33")
else:
    if "OPENCODE_SYNC_DENIALS" in os.environ:  # as preload.js says it
        print('opencode-sync: {"denials":true}', file=sys.stderr, flush=True)
    exec(sys.stdin.read().partition("\\n# end\\n")[0])
"""


def write_standin(path: Path) -> Path:
    """Write the program to *path*, and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable} -IS\n{_PROGRAM}")
    path.chmod(0o755)
    return path


def write_serving(path: Path) -> Path:
    """Write a program to *path* that stands in for ``opencode serve``, see serving.py."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{VERSION}exec "{sys.executable}" "{serving.__file__}" "$@"\n')
    path.chmod(0o755)
    return path
