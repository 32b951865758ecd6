"""Things done in a wrong order, or from a wrong thread or process: a right result, or an error.

A fork after a start, and both start methods of multiprocessing, are tried in test_threads.py.
"""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from opencode_sync import (
    OpenCodeCancelledError,
    OpenCodeClient,
    OpenCodeConfigError,
    OpenCodeError,
    OpenCodeServer,
    OpenCodeServerError,
)
from opencode_sync.display import stream as display
from tests.wrong import client, workspace

__all__ = ["client", "workspace"]  # fixtures

WITHIN_S = 30.0


# --- in a wrong order ----------------------------------------------------------------------------

Misuse = Callable[[OpenCodeClient], object]


def send_in_its_own_turn(client: OpenCodeClient) -> None:
    chat = client.session()
    with chat.stream("fall_silent"):
        chat.send("well")


def send_after_close(client: OpenCodeClient) -> None:
    with client.session() as chat:
        chat.send("well")
    chat.send("well")


def send_after_the_client_was_closed(client: OpenCodeClient) -> None:
    chat = client.session()
    client.close()
    chat.send("well")


def close_the_client_in_a_stream_s_loop(client: OpenCodeClient) -> None:
    for _ in client.stream("fall_silent"):
        client.close()


def close_the_client_in_a_batch_s_loop(client: OpenCodeClient) -> None:
    for _ in client.map(["well", "fall_silent"], ordered=False):
        client.close()


def map_after_close(client: OpenCodeClient) -> None:
    client.close()
    client.close()
    client.map(["well"])


def ask_a_closed_server(client: OpenCodeClient) -> None:
    server = OpenCodeServer()
    server.close()
    server.url  # noqa: B018 - asking for it starts one


ORDERS: dict[str, tuple[Misuse, type[OpenCodeError], str]] = {
    "send in its own turn": (send_in_its_own_turn, OpenCodeConfigError, "let its stream end"),
    "send after close": (send_after_close, OpenCodeConfigError, "resume it by its session_id"),
    "send after the client was closed": (
        send_after_the_client_was_closed,
        OpenCodeCancelledError,
        "the runner was closed",
    ),
    "fork before the first prompt": (
        lambda client: client.session().fork(),
        OpenCodeConfigError,
        "the session has not begun: send a prompt first",
    ),
    "ask a process for permission": (
        lambda client: client.session(on_permission=print),
        OpenCodeConfigError,
        "use a session of OpenCodeServer",
    ),
    "close the client in a stream's loop": (
        close_the_client_in_a_stream_s_loop,
        OpenCodeCancelledError,
        "the runner was closed",
    ),
    "close the client in a batch's loop": (
        close_the_client_in_a_batch_s_loop,
        OpenCodeCancelledError,
        "the runner was closed",
    ),
    "map after close": (map_after_close, OpenCodeConfigError, "is closed: make a new one"),
    "ask a closed server": (ask_a_closed_server, OpenCodeConfigError, "is closed: make a new one"),
    "connect to nobody": (
        lambda client: OpenCodeServer.connect("http://127.0.0.1:1").run("well"),
        OpenCodeServerError,
        "http://127.0.0.1:1 does not answer",
    ),
    "connect with a number as password": (
        lambda client: OpenCodeServer.connect("http://127.0.0.1:1", 3).run("well"),  # type: ignore[arg-type]
        OpenCodeConfigError,
        "password is no text: use a str",
    ),
    "show what has ended": (
        lambda client: display.live(client.run("well")),  # type: ignore[arg-type]
        OpenCodeConfigError,
        "stream is RunResult: use what a runner's stream() returns",
    ),
}


@pytest.mark.parametrize("misuse, kind, message", ORDERS.values(), ids=ORDERS)
def test_what_comes_in_a_wrong_order_is_told(
    client: OpenCodeClient, misuse: Misuse, kind: type[OpenCodeError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        misuse(client)

    assert message in str(caught.value)


def test_a_closed_stream_has_no_more_events_and_a_result(client: OpenCodeClient) -> None:
    stream = client.stream("fall_silent")
    stream.close()
    stream.close()

    assert list(stream) == []
    assert stream.wait().status == "cancelled"


def test_a_closed_batch_just_ends(client: OpenCodeClient) -> None:
    with client.map(["well"] * 3) as batch:
        next(batch)

    assert list(batch) == []


def test_closing_the_client_where_a_result_comes_ends_the_others(client: OpenCodeClient) -> None:
    first, *others = [client.submit(prompt) for prompt in ("well", "fall_silent", "fall_silent")]

    first.add_done_callback(lambda future: client.close())

    assert first.result(WITHIN_S).status == "ok"
    for future in others:
        with pytest.raises(OpenCodeCancelledError):
            future.result(WITHIN_S)


# --- in a wrong thread or process ----------------------------------------------------------------


@pytest.mark.parametrize("verb", ["stream", "map", "submit", "session"])
@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy], ids=["pickled", "copied"])
def test_what_is_under_way_stays_in_its_process(
    client: OpenCodeClient, verb: str, copied: Callable[[object], object]
) -> None:
    prompt = {"map": [["well"]], "session": []}.get(verb, ["well"])
    under_way = getattr(client, verb)(*prompt)

    with pytest.raises(OpenCodeConfigError, match=r"cannot leave its process: (pass|resume)"):
        copied(under_way)


def test_a_result_that_is_pickled_in_mid_run_is_what_has_come(client: OpenCodeClient) -> None:
    with client.stream("fall_silent") as stream:
        while not stream.result.final_text:
            next(stream)

        partial = pickle.loads(pickle.dumps(stream.result))

    assert (partial.status, partial.final_text) == ("incomplete", "so far")


def test_of_two_threads_on_one_stream_one_is_told(client: OpenCodeClient) -> None:
    errors: list[OpenCodeError] = []
    are_ready = threading.Barrier(2)
    stream = client.stream("fall_silent")
    for _ in range(2):  # all that comes: from then on, whoever iterates waits
        next(stream)

    def iterate() -> None:
        are_ready.wait(WITHIN_S)
        try:
            for _ in stream:
                pass
        except OpenCodeError as error:
            errors.append(error)
            stream.close()  # the other one would wait for ever

    threads = [threading.Thread(target=iterate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S)

    assert [str(error) for error in errors] == [
        "this stream is being iterated already: one at a time",
        "the stream was closed",
    ]


def test_two_event_loops_in_two_threads_may_each_block_in_a_run(client: OpenCodeClient) -> None:
    async def main(number: int) -> str:
        return client.run(f"echo {number}").answer

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda number: asyncio.run(main(number)), range(2)))

    assert answers == ["0", "1"]


def test_a_future_that_an_event_loop_cancels_ends_its_run(client: OpenCodeClient) -> None:
    future = client.submit("fall_silent")

    async def main() -> None:
        waiting = asyncio.wrap_future(future)
        waiting.cancel()
        await waiting

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert future.cancelled()


@pytest.mark.parametrize("verb, jobs", [("stream", "well"), ("map", ["well"])])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_that_it_owns_nothing(
    client: OpenCodeClient, verb: str, jobs: Any
) -> None:
    under_way = getattr(client, verb)(jobs)

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            next(under_way)
        except OpenCodeConfigError as error:
            status = 0 if "belongs to the process that was forked from" in str(error) else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)

    assert status == 0
    assert next(under_way)
