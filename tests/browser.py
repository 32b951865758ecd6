"""A headless Chromium, driven through its DevTools protocol over a pair of pipes.

    Chromium() --> open(url) --> Page: evaluate(), click(), press(), type()
                                       requests, complaints: what it asked for and what went wrong

No driver and no port: messages are JSON that ends with a zero byte, written to the browser's
descriptor 3 and read from its 4.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests import leaks

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ANSWER_S = 60.0  # bound on each answer, on a machine that does much else
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-crash-reporter",
    "--disable-breakpad",
    "--no-first-run",
    "--mute-audio",
    "--no-default-browser-check",
    # One process draws all pages, and none is kept ready for the next: a test leaves none behind.
    "--disable-features=SpareRendererForSitePerProcess",
    "--disable-site-isolation-trials",
    "--renderer-process-limit=1",
)
# The descriptors as the browser expects them; they may be each other's numbers before.
_LAUNCH = """
import fcntl, os, sys
there, back = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(there, 3)
os.dup2(back, 4)
os.closerange(5, 64)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """Path of a browser: CHROMIUM_BINARY, or one on PATH."""
    return os.environ.get("CHROMIUM_BINARY") or next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """The browser's process, with a profile of its own. A context manager."""

    def __init__(self, binary: str, profile: Path) -> None:
        there, self._write = os.pipe()
        self._read, back = os.pipe()
        own = f"--user-data-dir={profile}"
        home = {"HOME": str(profile), "XDG_CONFIG_HOME": str(profile), "TMPDIR": str(profile)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(there), str(back), binary, *_FLAGS, own],
            pass_fds=(there, back),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **home},
            start_new_session=True,
        )
        os.close(there)
        os.close(back)
        self._buffer = b""
        self._number = 0
        self.on_event: Callable[[dict[str, Any]], None] = lambda message: None

    def __enter__(self) -> Chromium:
        leaks.families.add(self._process.pid)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(ANSWER_S)
        psutil.wait_procs(family, ANSWER_S)
        leaks.families.discard(self._process.pid)
        os.close(self._write)
        os.close(self._read)

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its answer; events that come before it are told of."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_S
        while True:
            answer = self.receive(deadline)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.on_event(answer)

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message; raises TimeoutError at *deadline*."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("the browser does not answer")
            chunk = os.read(self._read, 1 << 20)
            if not chunk:
                raise RuntimeError(f"the browser ended: {self._process.poll()}")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def open(
        self, url: str, *, width: int = 1280, height: int = 900, scheme: str = "light"
    ) -> Page:
        """A new tab with *url*, loaded to its end."""
        return Page(self, url, width, height, scheme)


class Page:
    """One tab.

    Attributes:
        requests: Every URL that was asked for.
        complaints: Console messages, exceptions and log entries that are warnings or errors.
        load_s: Seconds from the order to open it to its load event.
    """

    def __init__(self, browser: Chromium, url: str, width: int, height: int, scheme: str) -> None:
        self._browser = browser
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._is_loaded = False
        self._target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.ask("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session: str = attached["sessionId"]
        browser.on_event = self._note
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        self.resize(width, height)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self._ask("Emulation.setEmulatedMedia", features=media)
        began = time.monotonic()
        self._ask("Page.navigate", url=url)
        while not self._is_loaded:
            self._note(browser.receive(began + ANSWER_S))
        self.load_s = time.monotonic() - began

    def close(self) -> None:
        self._browser.ask("Target.closeTarget", targetId=self._target)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", **size)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self._ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def settle(self) -> None:
        """Wait until what was ordered is drawn."""
        frame = "new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
        self.evaluate(frame)
        self.evaluate(frame)

    def wait_until(self, expression: str, within_s: float = 10.0) -> None:
        deadline = time.monotonic() + within_s
        while not self.evaluate(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(expression)
            self.settle()

    def click(self, selector: str) -> None:
        """A real click into the middle of an element, which is brought into sight."""
        code = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{code}.scrollIntoView({{block: 'center'}})")
        self.settle()
        box = self.evaluate(f"{code}.getBoundingClientRect().toJSON()")
        self.click_at(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def click_at(self, x: float, y: float, *, to_x: float | None = None) -> None:
        """A click, or a drag to *to_x*."""
        end = x if to_x is None else to_x
        for kind, at, buttons in (
            ("mouseMoved", x, 0),
            ("mousePressed", x, 1),
            ("mouseMoved", end, 1),
            ("mouseReleased", end, 0),
        ):
            button = "none" if kind == "mouseMoved" else "left"
            self._ask(
                "Input.dispatchMouseEvent",
                type=kind,
                x=at,
                y=y,
                button=button,
                buttons=buttons,
                clickCount=1,
            )
        self.settle()

    def press(self, key: str, code: int) -> None:
        """One stroke of a key that has a name."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            pressed = {"type": kind, "key": key, "windowsVirtualKeyCode": code}
            self._ask("Input.dispatchKeyEvent", **pressed, **(text if kind == "keyDown" else {}))
        self.settle()

    def type(self, text: str) -> None:
        self._ask("Input.insertText", text=text)
        self.settle()

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.ask(method, self._session, **params)

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if message.get("sessionId") != self._session:
            return
        if method == "Page.loadEventFired":
            self._is_loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{params['type']}: {params['args']}")
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.complaints.append(params["entry"]["text"])
