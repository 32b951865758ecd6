"""The real opencode in front of a scripted model, with a process per run and with a warm server.

    script --says what--> model <--cfg-- runner: a client, then a server
                                         server: the latter alone

One server is for all modules that a worker runs. A module that needs another model or other
settings defines `script` or `cfg` of its own, and has runners of its own then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import OpenCodeClient, OpenCodeServer, RunConfig
from opencode_sync.api.runner import Runner
from opencode_sync.testing import Answer, ChatRequest, ScriptedModel
from tests.live.warm import MakeModel, MakeRunner, Script, config, make_what_stays

HERE = Path(__file__).parent
TIMEOUT_S = 240  # a loaded machine takes its time to start OpenCode


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what a test marked with only() would do with the other runner."""
    items[:] = [item for item in items if not _is_left_out(item)]
    for item in items:
        if item.path.is_relative_to(HERE) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


def _is_left_out(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("only")
    callspec = getattr(item, "callspec", None)
    return mark is not None and callspec is not None and mark.args[0] not in callspec._idlist


@dataclass
class Shared:
    """What modules without a script or settings of their own have in common."""

    script: Script
    model: ScriptedModel
    cfg: RunConfig
    _binary: str
    _open: ExitStack
    _server: OpenCodeServer | None = None

    def server(self) -> OpenCodeServer:
        if self._server is None:
            self._server = self._open.enter_context(OpenCodeServer(self._binary, run_cfg=self.cfg))
            make_what_stays(self._server)
        return self._server


@pytest.fixture(scope="session")
def shared(opencode_binary: str) -> Iterator[Shared]:
    script = Script()
    with ScriptedModel(script) as model, ExitStack() as stack:
        yield Shared(script, model, config(model), opencode_binary, stack)


@pytest.fixture(scope="module")
def script(shared: Shared) -> Callable[[ChatRequest], Answer]:
    """What the module's model answers."""
    shared.script.clear()
    return shared.script


@pytest.fixture(scope="module")
def model(script: Callable[[ChatRequest], Answer], shared: Shared) -> Iterator[ScriptedModel]:
    if script is shared.script:
        yield shared.model
        return
    with ScriptedModel(script) as model:
        yield model


@pytest.fixture(scope="module")
def cfg(model: ScriptedModel, shared: Shared) -> RunConfig:
    """Of the model; a run may change of it what a server's runs can differ in."""
    return shared.cfg if model is shared.model else config(model)


@pytest.fixture(scope="module", params=[OpenCodeClient, OpenCodeServer], ids=["process", "server"])
def kind(request: pytest.FixtureRequest) -> type[Runner]:
    chosen: type[Runner] = request.param
    return chosen


@pytest.fixture(scope="module")
def runner(
    kind: type[Runner], opencode_binary: str, cfg: RunConfig, shared: Shared
) -> Iterator[Runner]:
    """One of each kind for all tests of the module."""
    if kind is OpenCodeServer and cfg is shared.cfg:
        yield shared.server()
        return
    with kind(opencode_binary, run_cfg=cfg) as runner:  # type: ignore[arg-type]
        make_what_stays(runner)
        yield runner


@pytest.fixture(scope="module")
def server(shared: Shared, script: Script) -> OpenCodeServer:
    return shared.server()


@pytest.fixture
def make(kind: type[Runner], opencode_binary: str, cfg: RunConfig) -> Iterator[MakeRunner]:
    """Makes runners of a test's own, and closes them after it."""
    with ExitStack() as made:

        def make(**settings: Any) -> Runner:
            settings = {"run_cfg": cfg, **settings}
            return made.enter_context(kind(opencode_binary, **settings))  # type: ignore[arg-type]

        yield make


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to work in, which the module's tests share."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture
def scripted() -> Iterator[MakeModel]:
    """Starts scripted models of a test's own, and closes them after it."""
    with ExitStack() as models:

        def start(
            replies: Answer | Iterable[Answer] | Callable[[ChatRequest], Answer], **settings: Any
        ) -> ScriptedModel:
            return models.enter_context(ScriptedModel(replies, **settings))

        yield start


@pytest.fixture
def client(opencode_binary: str) -> Iterator[OpenCodeClient]:
    """A client of a test's own, with the default settings."""
    with OpenCodeClient(opencode_binary) as client:
        yield client
