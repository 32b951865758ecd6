"""The options of a prompt, and what is refused before anything starts."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from opencode_sync import OpenCodeClient, OpenCodeConfigError, RunConfig
from opencode_sync.api.session import Session
from opencode_sync.batch.batch import Options
from opencode_sync.core.request import (
    BATCH_DEFAULTS,
    RENAMED,
    BatchOptions,
    Request,
    RunSettings,
    StreamOptions,
    check_keywords,
    directory,
    shows,
)
from tests.scripted import ScriptedRunner

# --- options -------------------------------------------------------------------------------------


def test_a_verb_shows_each_of_its_options_with_the_default_that_it_has() -> None:
    @shows(StreamOptions)
    def verb(prompt: str, **options: Any) -> None:
        pass

    parameters = inspect.signature(verb).parameters
    made, limits = RunSettings.of({}), RunSettings.of({}).limits
    assert list(parameters) == ["prompt", *StreamOptions.__annotations__]
    assert parameters["timeout_s"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["timeout_s"].annotation == "float | None"
    for name in parameters.keys() - {"prompt", "schema"}:
        now = RENAMED.get(name, name)
        assert parameters[name].default == getattr(made, now, getattr(limits, now, None))


def test_a_verb_has_type_hints_for_each_parameter_that_it_shows() -> None:
    verbs: list[Any] = [
        *(OpenCodeClient.run, OpenCodeClient.stream, OpenCodeClient.submit, OpenCodeClient.map),
        *(OpenCodeClient.session, Session.send, Session.stream),
    ]
    for verb in verbs:
        hints = get_type_hints(verb)

        assert hints.keys() == {*inspect.signature(verb).parameters, "return"} - {"self"}
        assert hints["timeout_s"] == float | None


FLAGS = ["keep_events", "keep_raw", "ordered", "retry_failed", "adaptive"]


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("value", ["no", None, 1], ids=repr)
def test_a_flag_is_true_or_false(flag: str, value: object) -> None:
    options: dict[str, Any] = {flag: value}

    with OpenCodeClient() as client, pytest.raises(OpenCodeConfigError) as raised:
        client.map([], **options)

    assert str(raised.value) == f"{flag} is {value!r}: use True or False"


def test_each_option_of_a_batch_has_a_default_and_a_place() -> None:
    own, shared = set(BATCH_DEFAULTS), set(RunSettings.of({}).limits.__dict__)

    assert own < {each.name for each in dataclasses.fields(Options)}
    assert BatchOptions.__annotations__.keys() - own - shared == {
        *("run_cfg", "schema", "keep_events", "keep_raw", *RENAMED),
    }


def test_each_option_of_a_run_arrives_in_its_settings(tmp_path: Path) -> None:
    limits = {"timeout_s": 1, "idle_timeout_s": 2, "max_cost": 3, "max_steps": 4, "max_tokens": 5}
    tries = {"startup_retries": 6, "startup_retry_delay_s": 7, "max_repairs": 8}
    others = {"log_file": tmp_path, "run_cfg": RunConfig(), "keep_events": False, "keep_raw": False}
    options = {**limits, **tries, **others}

    settings = RunSettings.of({**options, "schema": dict})

    assert {*options, "schema", *RENAMED} == StreamOptions.__annotations__.keys()
    assert {name: getattr(settings.limits, name) for name in limits | tries} == limits | tries
    assert {name: getattr(settings, name) for name in others} == others
    assert settings.output is not None


def test_an_unknown_keyword_is_pythons_own_error_with_the_likely_name() -> None:
    @shows(StreamOptions)
    def verb(**options: Any) -> None:
        check_keywords(verb, options)

    with pytest.raises(TypeError) as caught:
        verb(timeout=3)

    assert str(caught.value).endswith(
        "verb() got an unexpected keyword argument 'timeout'. Did you mean 'timeout_s'?"
    )


def test_a_former_name_does_what_it_did_and_warns_at_the_call() -> None:
    runner = ScriptedRunner()
    with pytest.warns(
        DeprecationWarning, match="max_retries is called startup_retries now"
    ) as told:
        runner.run("a", max_retries=0)
    is_renamed = pytest.warns(DeprecationWarning, match="retry_delay_s is called")
    with is_renamed, pytest.raises(OpenCodeConfigError) as refused:
        runner.map(["a"], retry_delay_s=-1)

    assert told[0].filename == __file__
    assert str(refused.value).startswith("startup_retry_delay_s is -1")


# --- refusals ------------------------------------------------------------------------------------


def request(prompt: Any = "Explain", workspace: Any = "/", **settings: Any) -> Request:
    return Request(prompt, directory(workspace), RunConfig(**settings))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "blank": ({"prompt": " \n\t"}, "the prompt is blank"),
    "bytes": ({"prompt": b"Explain"}, "prompt is bytes: use a str"),
    "list": ({"prompt": ["Explain"]}, "prompt is list: use a str"),
    "lone surrogate": ({"prompt": "\ud800"}, "the prompt cannot be encoded as UTF-8"),
    "no workspace": ({"workspace": "/none/repo"}, "workspace '/none/repo' does not exist"),
    "file as workspace": ({"workspace": __file__}, f"workspace {__file__!r} is not a directory"),
    "empty workspace": ({"workspace": ""}, "workspace is '': use the path of a directory"),
    "number as workspace": ({"workspace": 3}, "workspace is 3: use the path of a directory"),
    "NUL in the workspace": ({"workspace": "a\0b"}, "workspace is 'a\\x00b': use the path of"),
    "long workspace": ({"workspace": "x" * 5000}, f"workspace '{'x' * 200}': File name too long"),
    "home of nobody": ({"workspace": "~nobody-of-that-name"}, "workspace '"),
    "no file": ({"files": ("none.txt",)}, "no file 'none.txt' (relative to /)"),
    "directory as file": ({"files": ("/",)}, "files: '/' is a directory: name files, or"),
}


@pytest.mark.parametrize("given, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_run_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OpenCodeConfigError) as raised:
        request(**given)

    assert str(raised.value).startswith(message)


def test_a_blank_prompt_will_do_for_a_command() -> None:
    assert request("", command="init").prompt == ""


def test_files_count_from_the_workspace_and_an_image_may_not_be_empty(tmp_path: Path) -> None:
    for name in ("empty.png", "empty.txt"):
        (tmp_path / name).touch()

    request(workspace=tmp_path, files=("empty.txt",))
    with pytest.raises(OpenCodeConfigError, match=r"files: 'empty\.png' is empty, and so"):
        request(workspace=tmp_path, files=("empty.png",))


def test_a_link_as_workspace_leads_to_the_directory(tmp_path: Path) -> None:
    for name, target in (("link", "."), ("to nothing", "none"), ("to itself", "to itself")):
        (tmp_path / name).symlink_to(tmp_path / target)

    assert directory(tmp_path / "link") == tmp_path.resolve()
    for name in ("to nothing", "to itself"):
        with pytest.raises(OpenCodeConfigError, match=r"^workspace '.*'(:| does not exist)"):
            directory(tmp_path / name)


# --- plugins of the workspace, which OpenCode executes whatever it is told ------------------------


@pytest.mark.parametrize("file", [".opencode/plugin/a.js", "sub/.opencode/plugins/b.ts"])
@pytest.mark.parametrize("setting", [{"pure": True}, {"inherit_project_config": False}], ids=repr)
def test_plugins_are_refused_where_they_are_to_be_left_out(
    tmp_path: Path, file: str, setting: dict[str, bool]
) -> None:
    for place in (".git", "sub", Path(file).parent):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()

    with pytest.raises(OpenCodeConfigError, match=r"would execute '.*[ab]\.[jt]s' nevertheless"):
        request(workspace=tmp_path / "sub", **setting)

    assert request(workspace=tmp_path / "sub").prompt


def test_plugins_outside_of_the_repository_are_not_its_own(tmp_path: Path) -> None:
    for place in (".opencode/plugin", "repository/.git"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / ".opencode/plugin/own.js").touch()

    assert request(workspace=tmp_path / "repository", pure=True).prompt
