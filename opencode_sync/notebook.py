"""``%load_ext opencode_sync``: a cell that begins with ``%%opencode`` is a prompt.

    %%opencode --workspace repo --into result
    Which tests are missing?

The answer is shown below the cell as it comes.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any, NoReturn

from .api.client import OpenCodeClient
from .api.runner import Runner
from .api.server import OpenCodeServer
from .core.config import RunConfig
from .core.errors import OpenCodeConfigError, OpenCodeError
from .core.result import RunResult
from .display.stream import live

_VARIABLE = re.compile(r"\{\{([^\W\d]\w*)\}\}|\{([^\W\d]\w*)\}")

_loaded: Magic | None = None


def load(shell: Any) -> None:
    """Register the magic with IPython's *shell*."""
    global _loaded
    unload(shell)
    _loaded = Magic(shell)
    shell.register_magic_function(_loaded.opencode, "cell", "opencode")


def unload(shell: Any) -> None:
    """Stop the runs and the server that cells have started."""
    global _loaded
    if _loaded is not None:
        _loaded.close()
        _loaded = None


class Magic:
    """The magic, and the runners that its cells share."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._runners: dict[type[Runner], Runner] = {}

    def opencode(self, line: str, cell: str) -> None:
        """Run the cell as a prompt, and show the answer as it comes.

        %%opencode [--workspace W] [--model M] [--server] [--into NAME] [--fill]

        --workspace W  where to work (default: the notebook's directory)
        --model M      provider/model
        --server       use a warm server, which the first such cell starts
        --into NAME    put the result into a variable, a partial one if the run fails or is
                       stopped, or None if none was begun
        --fill         put the value of each {variable} into the prompt; write {{name}} for {name}
        """
        into = _into(line)
        result: RunResult | None = None
        try:
            options = _options(line)
            prompt = cell.removesuffix("\n")
            if options.fill:
                prompt = filled(prompt, self._shell.user_ns)
            stream = self._runner(OpenCodeServer if options.server else OpenCodeClient).stream(
                prompt, options.workspace, run_cfg=RunConfig(model=options.model)
            )
            result = stream.result
            live(stream)
        except OpenCodeError as error:
            result = result or error.result
            raise
        finally:
            if into is not None:  # in every ending: an older value would be taken for this run's
                self._shell.user_ns[into] = result

    def close(self) -> None:
        """Stop the current runs, and the server. Idempotent."""
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()

    def _runner(self, kind: type[OpenCodeClient | OpenCodeServer]) -> Runner:
        if kind not in self._runners:
            self._runners[kind] = kind()
        return self._runners[kind]


def filled(template: str, names: Mapping[str, Any]) -> str:
    """Replace each ``{name}`` in *template* by its value; other braces stay as they are.

    Raises:
        OpenCodeConfigError: A name is not defined. ``{{name}}`` gives ``{name}``.
    """

    def value(match: re.Match[str]) -> str:
        if (literal := match[1]) is not None:
            return f"{{{literal}}}"
        name = match[2]
        if name not in names:
            raise OpenCodeConfigError(
                f"--fill: there is no variable {name!r}: define it, or write {{{{{name}}}}} for "
                "the braces"
            )
        return str(names[name])

    return _VARIABLE.sub(value, template)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from IPython.core.error import UsageError  # IPython shows it in one line

        raise UsageError(f"{message}; see %%opencode?")


def _options(line: str) -> argparse.Namespace:
    parser = _parser()
    try:
        words = shlex.split(line)
    except ValueError as error:  # a quotation mark that is not closed
        parser.error(str(error))
    return parser.parse_args(words)


def _into(line: str) -> str | None:
    """The variable that *line* names, whatever may be wrong with its other words."""
    try:
        words = shlex.split(line)
    except ValueError:
        words = line.split()
    named, _ = _into_parser().parse_known_args(words)
    return str(named.into) if named.into else None


def _variable(text: str) -> str:
    if not text.isidentifier() or iskeyword(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a variable name")
    return text


def _into_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="%%opencode", add_help=False, allow_abbrev=False)
    parser.add_argument("--into", type=_variable)
    return parser


def _parser() -> argparse.ArgumentParser:
    parents = [_into_parser()]
    parser = _Parser(prog="%%opencode", add_help=False, allow_abbrev=False, parents=parents)
    parser.add_argument("-w", "--workspace", default=".")
    parser.add_argument("-m", "--model")
    parser.add_argument("--server", action="store_true")
    parser.add_argument("--fill", action="store_true")
    return parser
