"""What a client is made of, and what it refuses before anything is started."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeBinaryNotFoundError,
    OpenCodeClient,
    OpenCodeConfigError,
    RunConfig,
)

NO_BINARY = "/none/opencode"


@pytest.fixture
def client() -> Iterator[OpenCodeClient]:
    """A client that could start nothing: what it refuses, it refuses before that."""
    with OpenCodeClient(NO_BINARY) as client:
        yield client


# --- settings ------------------------------------------------------------------------------------


def test_making_a_client_needs_no_binary_and_makes_nothing(tmp_path: Path) -> None:
    with OpenCodeClient(NO_BINARY, data_dir=tmp_path / "kept"):
        made = list(tmp_path.iterdir())

    assert made == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"startup_concurrency": -1}, "startup_concurrency is -1: use 0 or more, or None"),
        ({"startup_concurrency": "1"}, "startup_concurrency is '1': use 0 or more, or None"),
        ({"startup_concurrency": 1.5}, "startup_concurrency is 1.5: use 0 or more, or None"),
        ({"startup_delay_s": -0.1}, "startup_delay_s is -0.1: use a number of 0 or more"),
        ({"startup_delay_s": None}, "startup_delay_s is None: use a number of 0 or more"),
        ({"startup_delay_s": float("nan")}, "startup_delay_s is nan: use a number of 0 or more"),
        ({"max_workers": 0}, "max_workers is 0: use 1 or more, or None"),
        ({"max_workers": "4"}, "max_workers is '4': use 1 or more, or None"),
        *(
            ({"data_dir": value}, f"data_dir is {value!r}: use the path of a directory")
            for value in ("", 5, b"kept", "a\0b")
        ),
        (
            {"data_dir": "~nobody-of-that-name/kept"},
            "data_dir '~nobody-of-that-name/kept': there is no such home: use an absolute path",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(OpenCodeConfigError) as raised:
        OpenCodeClient(**settings)

    assert str(raised.value) == message


@pytest.mark.parametrize("concurrency", [None, 0, 1, 8], ids=repr)
def test_any_number_of_starts_may_be_allowed(concurrency: int | None) -> None:
    OpenCodeClient(NO_BINARY, concurrency, 0).close()


def test_a_client_takes_the_wrappers_arguments_in_the_wrappers_order() -> None:
    parameters = list(inspect.signature(OpenCodeClient).parameters.values())

    assert [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        ("binary", "opencode"),
        ("startup_concurrency", 1),
        ("startup_delay_s", 0.3),
        ("isolate_db", True),
    ]


# --- the binary ----------------------------------------------------------------------------------


def test_a_missing_binary_is_named_with_the_first_run(client: OpenCodeClient) -> None:
    with pytest.raises(OpenCodeBinaryNotFoundError, match="no file '/none/opencode'"):
        client.run("Explain")


def test_the_binary_is_looked_for_once(tmp_path: Path) -> None:
    program = tmp_path / "oc"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with OpenCodeClient(program) as client:
        first = client.resolved_binary()

        program.unlink()

        assert client.resolved_binary() == first == str(program)


def test_a_binary_that_was_missing_is_looked_for_again(tmp_path: Path) -> None:
    program = tmp_path / "oc"
    with OpenCodeClient(program) as client:
        with pytest.raises(OpenCodeBinaryNotFoundError):
            client.resolved_binary()

        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)

        assert client.resolved_binary() == str(program)


# --- a client as a value -------------------------------------------------------------------------


def settings_of(client: OpenCodeClient) -> Any:
    return client.__getstate__()


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda client: pickle.loads(pickle.dumps(client))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_of_a_client_has_its_settings_and_a_life_of_its_own(
    tmp_path: Path, copied: Any
) -> None:
    cfg = RunConfig(model="a/b", permission={"bash": "deny"})
    client = OpenCodeClient(
        NO_BINARY, 2, 0.5, False, data_dir=tmp_path, run_cfg=cfg, max_workers=3, watchdog=False
    )

    with copied(client) as twin:
        client.close()

        assert settings_of(twin) == settings_of(client)
        with pytest.raises(OpenCodeBinaryNotFoundError):
            twin.run("Explain")


def test_the_repr_tells_binary_and_state(client: OpenCodeClient) -> None:
    before = repr(client)
    client.close()

    assert before == "<OpenCodeClient binary='/none/opencode', 0 running>"
    assert repr(client) == "<OpenCodeClient binary='/none/opencode', closed>"


def test_a_client_closes_as_often_as_one_likes(client: OpenCodeClient) -> None:
    client.close()
    client.close()


@pytest.mark.parametrize("verb", ["run", "stream", "submit"])
def test_a_closed_client_starts_nothing(client: OpenCodeClient, verb: str) -> None:
    client.close()

    with pytest.raises(OpenCodeConfigError, match="this OpenCodeClient is closed: make a new one"):
        getattr(client, verb)("Explain")


def test_a_closed_client_cannot_be_entered(client: OpenCodeClient) -> None:
    client.close()

    with pytest.raises(OpenCodeConfigError, match="closed"):
        client.__enter__()


# --- refusals ------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "blank prompt": ({"prompt": " \n\t"}, "the prompt is blank"),
    "empty prompt": ({"prompt": ""}, "the prompt is blank"),
    "prompt of a type": ({"prompt": b"Explain"}, "prompt is bytes: use a str"),
    "prompt beyond UTF-8": ({"prompt": "\ud800"}, "the prompt cannot be encoded as UTF-8"),
    "missing workspace": ({"workspace": "/none/repo"}, "workspace '/none/repo' does not exist"),
    "workspace that is a file": ({"workspace": __file__}, f"workspace {__file__!r} is not a dir"),
    "empty workspace": ({"workspace": ""}, "workspace is '': use the path of a directory"),
    "workspace of a type": ({"workspace": 3}, "workspace is 3: use the path of a directory"),
    "workspace with NUL": ({"workspace": "a\0b"}, "workspace 'a\\x00b'"),
    "run_cfg of a type": ({"run_cfg": {"model": "a/b"}}, "run_cfg is dict: use a RunConfig"),
    "ask": ({"run_cfg": RunConfig(permission={"edit": {"*.py": "ask"}})}, "permission 'edit.*.py'"),
    "fork": ({"run_cfg": RunConfig(fork=True)}, "fork=True has no session"),
    "missing file": ({"run_cfg": RunConfig(files=("none.txt",))}, "no file 'none.txt' (counted"),
    "directory as file": ({"run_cfg": RunConfig(files=("/",))}, "files: '/' is a directory: name"),
    "timeout": ({"timeout_s": 0}, "timeout_s is 0: use a number above 0"),
    "idle timeout": ({"idle_timeout_s": -1}, "idle_timeout_s is -1: use a number above 0"),
    "budget": ({"max_cost": "1"}, "max_cost is '1': use a number of 0 or more"),
    "retries": ({"max_retries": 1.5}, "max_retries is 1.5"),
    "delay": ({"retry_delay_s": -1}, "retry_delay_s is -1: use a number of 0 or more"),
}


@pytest.mark.parametrize("verb", ["run", "stream"])
@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_run_is_refused_before_a_start(
    client: OpenCodeClient, verb: str, changes: dict[str, Any], message: str
) -> None:
    arguments = {"prompt": "Explain", **changes}

    with pytest.raises(OpenCodeConfigError) as raised:
        getattr(client, verb)(**arguments)

    assert str(raised.value).startswith(message)
    assert raised.value.result is None


def test_an_empty_image_is_refused_and_an_empty_text_is_not(
    client: OpenCodeClient, tmp_path: Path
) -> None:
    for name in ("empty.png", "empty.txt"):
        (tmp_path / name).touch()

    with pytest.raises(OpenCodeConfigError, match=r"files: 'empty\.png' is empty, and so"):
        client.run("Look", tmp_path, run_cfg=RunConfig(files=("empty.png",)))
    with pytest.raises(OpenCodeBinaryNotFoundError):
        client.run("Look", tmp_path, run_cfg=RunConfig(files=("empty.txt",)))


def test_the_clients_own_settings_are_checked_with_a_run() -> None:
    with (
        OpenCodeClient(NO_BINARY, run_cfg=RunConfig(model="gpt")) as client,
        pytest.raises(OpenCodeConfigError, match="model 'gpt' names no provider"),
    ):
        client.run("Explain")


def test_the_settings_of_a_run_stand_in_place_of_the_clients() -> None:
    with (
        OpenCodeClient(NO_BINARY, run_cfg=RunConfig(model="gpt")) as client,
        pytest.raises(OpenCodeBinaryNotFoundError),
    ):
        client.run("Explain", run_cfg=RunConfig())


def test_a_blank_prompt_will_do_for_a_command(client: OpenCodeClient) -> None:
    with pytest.raises(OpenCodeBinaryNotFoundError):
        client.run("", run_cfg=RunConfig(command="init"))


def test_a_file_counts_from_the_workspace(client: OpenCodeClient, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")

    with pytest.raises(OpenCodeBinaryNotFoundError):
        client.run("Explain", tmp_path, run_cfg=RunConfig(files=("notes.txt",)))
