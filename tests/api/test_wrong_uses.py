"""Wrong arguments, each of which ends in a right result, or in an error that says what to use.

A setting that does not exist is Python's own TypeError, which names it (test_config.py). What is
done in a wrong order stands in test_wrong_orders.py, and what is wrong around the program
in test_wrong_surroundings.py.
"""

from __future__ import annotations

import datetime
import json
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydantic
import pytest

from opencode_sync import (
    Job,
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeServer,
    RunConfig,
)
from tests.wrong import client, workspace

__all__ = ["client", "workspace"]  # fixtures

WITHIN_S = 30.0


class Shape(pydantic.BaseModel):
    line: int


def holding_itself() -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    mapping["itself"] = mapping
    return mapping


# --- what a runner is made of --------------------------------------------------------------------

Use = Callable[[], object]

MADE: dict[str, tuple[Use, str]] = {
    "client with a dict as run_cfg": (
        lambda: OpenCodeClient(run_cfg={"model": "a/b"}),  # type: ignore[arg-type]
        "run_cfg is dict: use a RunConfig",
    ),
    "server with a dict as run_cfg": (
        lambda: OpenCodeServer(run_cfg={"model": "a/b"}),  # type: ignore[arg-type]
        "run_cfg is dict: use a RunConfig",
    ),
    "client with bytes as binary": (
        lambda: OpenCodeClient(b"opencode"),  # type: ignore[arg-type]
        "binary is b'opencode': use a path, or a name on PATH",
    ),
    "server with a number as binary": (
        lambda: OpenCodeServer(3),  # type: ignore[arg-type]
        "binary is 3: use a path, or a name on PATH",
    ),
    "client with a number as data_dir": (
        lambda: OpenCodeClient(data_dir=3),  # type: ignore[arg-type]
        "data_dir is 3: use the path of a directory",
    ),
    "client with an empty data_dir": (
        lambda: OpenCodeClient(data_dir=""),
        "data_dir is '': use the path of a directory",
    ),
    "client with a NUL in data_dir": (
        lambda: OpenCodeClient(data_dir="a\0b"),
        "data_dir is 'a\\x00b': use the path of a directory",
    ),
    "server with the home of nobody as data_dir": (
        lambda: OpenCodeServer(data_dir="~nobody-of-that-name/data"),
        "there is no such home: use an absolute path",
    ),
    "client with a word for isolate_db": (
        lambda: OpenCodeClient(isolate_db="no"),  # type: ignore[arg-type]
        "isolate_db is 'no': use True or False",
    ),
    "client with True workers": (
        lambda: OpenCodeClient(max_workers=True),
        "max_workers is True: use 1 or more, or None",
    ),
    "server without workers": (
        lambda: OpenCodeServer(max_workers=0),
        "max_workers is 0: use 1 or more, or None",
    ),
    "server that has no number of seconds to start": (
        lambda: OpenCodeServer(startup_timeout_s=math.nan),
        "startup_timeout_s is nan: use a number above 0",
    ),
    "server with words for its memory": (
        lambda: OpenCodeServer(max_memory_mb="2 GB"),  # type: ignore[arg-type]
        "max_memory_mb is '2 GB': use 1 or more, or None",
    ),
    "settings that hold themselves": (
        lambda: RunConfig(permission=holding_itself()),
        "permission is nested too deeply: does it hold itself",
    ),
}


@pytest.mark.parametrize("use, message", MADE.values(), ids=MADE)
def test_what_nothing_can_be_made_of_is_refused(use: Use, message: str) -> None:
    with pytest.raises(OpenCodeConfigError) as caught:
        use()

    assert message in str(caught.value)


# --- what a run is asked for ---------------------------------------------------------------------

ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "list as prompt": ({"prompt": ["well"]}, "prompt is list: use a str"),
    "bytes as prompt": ({"prompt": b"well"}, "prompt is bytes: use a str"),
    "lone surrogate in the prompt": ({"prompt": "\udc80"}, "the prompt cannot be encoded"),
    "True seconds": ({"timeout_s": True}, "timeout_s is True: use a number above 0"),
    "negative seconds": ({"timeout_s": -1}, "timeout_s is -1: use a number above 0"),
    "no number of seconds": ({"idle_timeout_s": math.nan}, "idle_timeout_s is nan: use a number"),
    "seconds in words": ({"timeout_s": "5 s"}, "timeout_s is '5 s': use a number above 0"),
    "a timedelta": ({"timeout_s": datetime.timedelta(0, 5)}, "timeout_s is datetime.timedelta("),
    "more seconds than a float holds": ({"timeout_s": 10**400}, "timeout_s is int: use a number"),
    "a budget for ever": ({"max_cost": math.inf}, "max_cost is inf: use a number of 0 or more"),
    "workspace with too long a name": ({"workspace": "x" * 5000}, "File name too long"),
    "workspace in nobody's home": ({"workspace": "~nobody-of-that-name"}, "does not exist"),
    "log_file that is a directory": ({"log_file": "."}, "log_file '.': Is a directory"),
    "log_file that is a number": ({"log_file": 3}, "log_file is 3: use the path of a file"),
    "name of a type as schema": ({"schema": "int"}, "schema is 'int': use a class, a type or"),
    "value as schema": ({"schema": Shape(line=1)}, "schema Shape(line=1) cannot be used"),
    "schema that holds itself": ({"schema": holding_itself()}, "schema is not valid JSON"),
    "class in place of settings": ({"run_cfg": RunConfig}, "run_cfg is type: use a RunConfig"),
}

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "ask, deep inside": ({"permission": {"bash": {"git *": "ask"}}}, "'bash.git *' is 'ask', but"),
    "fork of nothing": ({"fork": True}, "fork=True has no session: set session_id or"),
    "fork where there is no session yet": (
        {"fork": True, "continue_session": True},
        "fork=True, but there is no session yet",
    ),
    "session of somebody else": ({"session_id": "ses_1"}, "session 'ses_1' is unknown here"),
    "number as files": ({"files": 3}, "files is of type int: use paths"),
    "file that does not exist": ({"files": ["none.txt"]}, "no file 'none.txt' (counted from"),
    "pairs as environment": ({"extra_env": [("A", "B")]}, "extra_env is of type list: use a map"),
    "huge variable": (
        {"extra_env": {"A": "x" * 200_000}},
        "make title, extra_env, config_overrides or",
    ),
    "lone surrogate in a variable": ({"extra_env": {"A": "\ud800"}}, "it cannot be encoded"),
    "lone surrogate in the configuration": (
        {"config_overrides": {"theme": "\ud800"}},
        "config key 'theme' is not valid JSON",
    ),
    "set in the configuration": (
        {"config_overrides": {"x": {1}}},
        "config key 'x' is not valid JSON",
    ),
    "address without http": ({"attach": "localhost:4096"}, "use 'http://HOST:PORT'"),
}


@pytest.mark.parametrize(
    "arguments, message",
    [
        *ASKED.values(),
        *(({"run_cfg": RunConfig(**fields)}, message) for fields, message in SETTINGS.values()),
    ],
    ids=[*ASKED, *SETTINGS],
)
def test_what_cannot_be_run_is_refused(
    client: OpenCodeClient, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(OpenCodeConfigError) as caught:
        client.run(**{"prompt": "well", **arguments})

    assert message in str(caught.value)


@pytest.mark.parametrize("seconds", [1e300, 10**10, sys.maxsize], ids=str)
@pytest.mark.parametrize("limit", ["timeout_s", "idle_timeout_s"])
def test_a_limit_beyond_all_clocks_is_none(
    client: OpenCodeClient, limit: str, seconds: float
) -> None:
    assert client.run("well", **{limit: seconds}).status == "ok"  # type: ignore[arg-type]


def test_a_mapping_that_its_owner_changes_later_changes_no_settings(
    client: OpenCodeClient,
) -> None:
    permission = {"bash": "deny"}
    cfg = RunConfig(permission=permission)

    permission["bash"] = "ask"

    assert client.run("well", run_cfg=cfg).status == "ok"


def test_settings_that_are_changed_inside_are_checked_once_more(client: OpenCodeClient) -> None:
    cfg = RunConfig(permission={"bash": "deny"})
    cfg.permission["bash"] = "ask"  # type: ignore[index]

    with pytest.raises(OpenCodeConfigError, match="permission 'bash' is 'ask'"):
        client.run("well", run_cfg=cfg)


def test_a_wrong_prompt_that_was_submitted_is_refused_where_its_result_is_asked_for(
    client: OpenCodeClient,
) -> None:
    future = client.submit(["well"])  # type: ignore[arg-type]

    with pytest.raises(OpenCodeConfigError, match="prompt is list: use a str"):
        future.result(WITHIN_S)


# --- what a batch is asked for -------------------------------------------------------------------

BATCHES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "str as jobs": ("well", {}, "jobs is str: use an iterable of prompts"),
    "one Job as jobs": (Job("well"), {}, "jobs is Job: use an iterable of prompts"),
    "dict as jobs": ({"well": 1}, {}, "jobs is dict: use an iterable of prompts"),
    "number as a job": ([7], {}, "job 0 is int: use a str or a Job"),
    "number as a key": ([Job("well", key=7)], {}, "job 0 has a key of type int: use a str"),  # type: ignore[arg-type]
    "dict as a job's settings": (
        [Job("well", run_cfg={})],  # type: ignore[arg-type]
        {"checkpoint": "kept.jsonl"},
        "job 0 has a run_cfg of type dict: use a RunConfig",
    ),
    "the same key twice": (
        [Job("well", key="a"), Job("well", key="a")],
        {"checkpoint": "kept.jsonl"},
        "two jobs have the key 'a': a checkpoint needs one each",
    ),
    "no buffer": (["well"], {"buffersize": 0}, "buffersize is 0: use 1 or more, or None"),
    "no workers": (["well"], {"max_workers": 0}, "max_workers is 0: use 1 or more, or None"),
    "on_error to ignore": (["well"], {"on_error": "ignore"}, "use 'raise' or 'return'"),
    "a word for progress": (["well"], {"progress": "yes"}, "use False or True or 'always'"),
    "budget of True": (["well"], {"max_total_cost": True}, "max_total_cost is True: use a number"),
    "class as executor": (["well"], {"executor": ThreadPoolExecutor}, "executor is type: use a"),
    "number as checkpoint": (["well"], {"checkpoint": 3}, "checkpoint is 3: use the path of a"),
    "checkpoint that is a directory": (["well"], {"checkpoint": "."}, "Is a directory"),
    "NUL in the checkpoint": (["well"], {"checkpoint": "a\0b"}, "checkpoint is 'a\\x00b': use"),
    "script as checkpoint": (
        ["well"],
        {"checkpoint": "../script.py"},
        "not a line of a checkpoint",
    ),
}


@pytest.mark.parametrize("jobs, arguments, message", BATCHES.values(), ids=BATCHES)
def test_what_is_no_batch_is_refused(
    client: OpenCodeClient, jobs: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(OpenCodeConfigError) as caught:
        list(client.map(jobs, **arguments))

    assert message in str(caught.value)


def test_an_executor_that_is_shut_down_is_told(client: OpenCodeClient) -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()

    with pytest.raises(OpenCodeError, match="the executor takes no more jobs"):
        list(client.map(["well"], executor=executor))


def test_a_checkpoint_that_was_edited_by_hand_is_told(
    client: OpenCodeClient, workspace: Path
) -> None:
    list(client.map(["well"], checkpoint="kept.jsonl"))
    line = json.loads((workspace / "kept.jsonl").read_text())
    (workspace / "kept.jsonl").write_text(json.dumps(line | {"token_usage": 3, "events": 3}) + "\n")

    with pytest.raises(OpenCodeConfigError, match="byte 0 begins a damaged line"):
        list(client.map(["well"], checkpoint="kept.jsonl"))


def test_jobs_that_ask_for_results_of_their_own_batch_are_told(client: OpenCodeClient) -> None:
    def jobs() -> Iterator[str]:
        yield "well"
        next(batch)

    batch = client.map(jobs())

    with pytest.raises(OpenCodeConfigError, match="this batch is being iterated already"):
        list(batch)
