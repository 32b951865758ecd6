"""What the errors say, what they carry, and that they survive being copied and sent away."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle
from collections.abc import Callable

import pytest

from opencode_sync import (
    OpenCodeBinaryNotFoundError,
    OpenCodeBudgetError,
    OpenCodeCancelledError,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeIncompleteError,
    OpenCodeOutputError,
    OpenCodePermissionError,
    OpenCodeProcessError,
    OpenCodeServerError,
    OpenCodeTimeoutError,
    RunResult,
    aggregate_run_result,
)


def partial_result() -> RunResult:
    return aggregate_run_result(
        events=[
            {"type": "text", "sessionID": "ses_1", "part": {"text": "so far"}},
            {"type": "error", "error": {"name": "APIError", "data": {"message": "bad key"}}},
        ],
        raw_stdout_lines=["a line"],
        exit_code=1,
        stderr="\x1b[91mred\x1b[0m",
    )


def every_error() -> list[OpenCodeError]:
    """One of each class, with all that it can carry."""
    result = partial_result()
    return [
        OpenCodeError("something", result=result),
        OpenCodeBinaryNotFoundError("no 'opencode' on PATH", result=result),
        OpenCodeConfigError("fork=True has no session", result=result),
        OpenCodeProcessError(1, "stderr", result.events, ["a"], reason="bad key", result=result),
        OpenCodeIncompleteError("broke off", result=result),
        OpenCodeTimeoutError("slow", limit="idle_timeout_s", limit_s=3, elapsed_s=4, result=result),
        OpenCodeCancelledError("closed", result=result),
        OpenCodeBudgetError("dear", limit=1.0, spent=1.5, result=result),
        OpenCodePermissionError("denied", tool="bash", result=result),
        OpenCodeOutputError("odd", errors=["/age: no int"], text="{}", result=result),
        OpenCodeServerError("refused", status_code=401, result=result),
    ]


def test_the_text_of_an_error_is_safe_in_a_terminal() -> None:
    odd = "a\x1b]0;title\x07\x9b2Jb\u202e\n\tc"

    for error in (OpenCodeServerError(odd), OpenCodeProcessError(None, odd, reason=odd)):
        assert str(error).endswith("a2Jb\n\tc")
        assert not set(str(error)) & {"\x1b", "\x07", "\x9b", "\u202e"}


def name_of(value: object) -> str:
    return type(value).__name__


# --- copies --------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[OpenCodeError], OpenCodeError]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),  # type: ignore[no-any-return]
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("error", every_error(), ids=name_of)
def test_a_copy_of_an_error_is_equal_to_it(
    error: OpenCodeError, copied: Callable[[OpenCodeError], OpenCodeError]
) -> None:
    error.prompt, error.index, error.key = "Explain", 3, "job-3"

    twin = copied(error)

    assert twin == error
    assert hash(twin) == hash(error)
    assert (type(twin), str(twin), vars(twin)) == (type(error), str(error), vars(error))


def test_a_deep_copy_of_an_error_has_a_result_of_its_own() -> None:
    error = OpenCodeError("something", result=partial_result())

    twin = copy.deepcopy(error)
    error.result.events.clear()  # type: ignore[union-attr]

    assert twin.result == partial_result()


def test_a_class_derived_from_an_error_pickles_whatever_its_constructor_takes() -> None:
    error = Derived("x", 7)

    assert pickle.loads(pickle.dumps(error)).seven == 7


class Derived(OpenCodeError):
    def __init__(self, word: str, seven: int) -> None:
        super().__init__(f"{word}!")
        self.seven = seven


@pytest.mark.parametrize(
    "other",
    [
        OpenCodeError("another", result=partial_result()),
        OpenCodeError("something"),
        OpenCodeIncompleteError("something", result=partial_result()),
        ValueError("something"),
        "something",
    ],
    ids=["message", "result", "class", "foreign error", "no error"],
)
def test_errors_that_differ_are_not_equal(other: object) -> None:
    assert OpenCodeError("something", result=partial_result()) != other


# --- what they carry -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, base",
    [
        (OpenCodeBinaryNotFoundError("x"), FileNotFoundError),
        (OpenCodeConfigError("x"), ValueError),
        (OpenCodeTimeoutError("x"), TimeoutError),
        (OpenCodeCancelledError("x"), concurrent.futures.CancelledError),
    ],
    ids=name_of,
)
def test_an_error_is_also_what_the_standard_library_calls_it(
    error: OpenCodeError, base: type[BaseException]
) -> None:
    assert isinstance(error, base)
    assert str(error) == "x"


# --- what they say -------------------------------------------------------------------------------


ENDINGS = {
    "opencode exited with status 1": OpenCodeProcessError(1),
    "opencode exited with status 1: bad key": OpenCodeProcessError(1, reason="bad key"),
    "opencode exited with status 1: bad key\na warning": OpenCodeProcessError(
        1, "a warning\n", reason="bad key"
    ),
    "opencode exited with status 3\nboom": OpenCodeProcessError(3, "boom\n"),
    "opencode was ended by signal 9 (SIGKILL)": OpenCodeProcessError(-9),
    "opencode was ended by signal 45": OpenCodeProcessError(-45),  # a real-time signal
    "opencode reported an error: bad key": OpenCodeProcessError(0, reason="bad key"),
    "opencode reported an error": OpenCodeProcessError(None),
}


@pytest.mark.parametrize("message, error", ENDINGS.items(), ids=ENDINGS)
def test_a_process_error_says_first_how_it_ended_and_why(
    message: str, error: OpenCodeProcessError
) -> None:
    assert str(error) == message


def test_a_process_error_does_not_say_the_same_twice() -> None:
    coloured = "\x1b[91mModel not found\x1b[0m\n"

    error = OpenCodeProcessError(1, coloured, reason=coloured)

    assert str(error) == "opencode exited with status 1: Model not found"


def test_a_process_error_shows_the_last_2000_characters_of_stderr() -> None:
    error = OpenCodeProcessError(1, "old" + "\x1b[91mx\x1b[0m" * 2_000)

    assert str(error) == "opencode exited with status 1\n" + "x" * 2_000
