"""A process ``opencode serve`` of our own, from its start to its end.

    stdout, stderr --> output thread --> the URL, the last lines; what our plugins tell --+
    exit ------------> exit thread ----> how it ended; its tools are stopped --------------+--> feed

The password goes out in the child's environment: preload.js overwrites it where other processes
could read it, and plugin.js takes it away from tools. Knows a process and its lines, nothing of
requests.
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from ..core.errors import OpenCodeBinaryNotFoundError, OpenCodeServerError, exit_words
from ..core.lifetime import CancelScope, Flag
from ..core.reading import asked_to_wait_s
from ..core.secrets import without_quotes
from ..core.text import strip_ansi
from ..process import tree
from ..process.stderr import (
    PRELOAD_PREFIX,
    no_space,
    refused_by_bun,
    split_told,
    unwritable_home,
)
from .feed import REFUSED, EventStream, Message

LINES_KEPT = 1_000  # so that a quoted configuration is seen whole, and can be cut out
LINES_TOLD = 20
WORDS_S = 0.5  # bound on reading what one that has ended before it listened had still to say
JOIN_S = 2.0  # bound on waiting for our own threads, once the child is gone

NEXT = "the next call starts a new one"
_LISTENING = "listening on http"


class ServerProcess:
    """A started server, listening on loopback.

    Attributes:
        binary: The program.
        pid: Its process id.
        token: Marks it and all that it starts.
        env: What it was started with.
        url, password: Where it listens, and the password that it asks for.
        ending: How it has ended by itself, in words; None before, and where :meth:`stop` ended it.
        feed: Told of its ending, of refusals by a provider and of errors of our plugin; None until
            somebody listens.
    """

    def __init__(
        self,
        binary: str,
        env: Mapping[str, str],
        directory: Path,
        *,
        timeout_s: float,
        scope: CancelScope,
    ) -> None:
        """Start it in *directory*, and wait until it listens.

        Args:
            scope: Ends the waiting too.

        Raises:
            OpenCodeBinaryNotFoundError: If the binary cannot be run.
            OpenCodeServerError: If it ends, or does not listen within *timeout_s* seconds; with
                what it has printed.
        """
        self.binary = binary
        self.token = tree.run_token()
        self.password = secrets.token_urlsafe(32)
        self.env = env
        self.url = ""
        self.ending: str | None = None
        self.feed: EventStream | None = None
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._is_decided = Flag()  # it listens, or has ended
        self._exited = Flag()
        self._is_stopping = False
        self._output, childs_end = socket.socketpair()
        try:
            self._popen = self._start(directory, childs_end)
        except BaseException:
            self._output.close()
            tree.stop(self.token)
            raise
        finally:
            childs_end.close()
        self.pid = self._popen.pid
        self._root: tree.Seen | None = None
        self._threads: list[threading.Thread] = []
        try:
            self._root = tree.mark(self.pid, self.token)
            self._threads.append(self._thread("output", self._read))
            self._threads.append(self._thread("exit", self._wait))
            if not scope.wait(self._is_decided, timeout_s) or not self.url:
                raise OpenCodeServerError(self._why_not(timeout_s))
            self._check_password()
        except BaseException:
            self.stop(at_once=scope.is_over)
            raise

    def _start(self, directory: Path, output: socket.socket) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                # Port 0 is 4096, or a free one where that is taken.
                [self.binary, "serve", "--hostname", "127.0.0.1", "--port", "0"],
                stdin=subprocess.DEVNULL,
                # A socket and not a pipe, so that we can stop reading while others hold it open.
                stdout=output.fileno(),
                stderr=output.fileno(),
                cwd=directory,
                env={
                    **self.env,
                    "OPENCODE_SERVER_PASSWORD": self.password,
                    "OPENCODE_SERVER_USERNAME": "opencode",
                    "PWD": str(directory),
                    tree.MARKER: tree.chain(self.token, self.env),
                },
                start_new_session=True,
            )
        except OSError as error:
            raise OpenCodeBinaryNotFoundError(
                f"{self.binary!r} cannot be run: {error.strerror}"
            ) from error

    def _check_password(self) -> None:
        """Refuse a server whose environment shows its tools the password, where we can see that."""
        with suppress(OSError):  # no such file (not Linux), or it has just ended
            if self.password.encode() in Path(f"/proc/{self.pid}/environ").read_bytes():
                raise OpenCodeServerError(
                    "the server's password is in its environment, where its tools could read "
                    "it: name the opencode program itself, not one that starts it, as binary= "
                    "('opencode-sync install' installs one), or use OpenCodeClient"
                )

    def _thread(self, what: str, target: Callable[[], None]) -> threading.Thread:
        name = f"opencode-{self._popen.pid}-{what}"
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread

    @property
    def has_exited(self) -> bool:
        return self._exited.is_set()

    def wait_exited(self, timeout: float) -> bool:
        """Whether it has ended, after at most *timeout* seconds."""
        return self._exited.wait(timeout)

    def memory(self) -> int:
        """Bytes of memory that it takes, without what it started; 0 where it has ended."""
        import psutil

        with suppress(psutil.Error):
            return int(psutil.Process(self.pid).memory_info().rss)
        return 0

    def cpu_s(self) -> float:
        """Seconds of processor time that it has used; 0.0 where it has ended."""
        import psutil

        with suppress(psutil.Error):
            times = psutil.Process(self.pid).cpu_times()
            return float(times.user + times.system)
        return 0.0

    def stop(self, *, at_once: bool = False) -> None:
        """Stop it with all that it started. Bounded, idempotent, from any thread.

        Args:
            at_once: Kill a server that does not respond to a request to end.
        """
        self._is_stopping = True
        if at_once and not self.has_exited:
            self._popen.kill()
        # Another process may have the pid of one that has ended.
        tree.stop(self.token, root=None if self.has_exited else self._root)
        self._exited.wait(JOIN_S)
        with suppress(OSError):
            self._output.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            if thread is not threading.current_thread():  # a finaliser may run in any thread
                thread.join(JOIN_S)
        self._output.close()

    # -- helper threads ------------------------------------------------------------------------

    def _wait(self) -> None:
        status = self._popen.wait()
        try:
            if not self._is_stopping:
                # Before the exit can be seen: the one who sees it may ask for the reason.
                self.ending = f"the server (pid {self.pid}) {exit_words(status)}; {NEXT}"
                if self.feed is not None:
                    self.feed.lose(self.ending)
        finally:
            self._exited.set()
            if not self.url and not self._is_stopping:
                self._threads[0].join(WORDS_S)  # its last words tell why
            self._is_decided.set()
        if not self._is_stopping:
            tree.stop(self.token)

    def _read(self) -> None:
        rest = b""
        with suppress(OSError):  # closed by stop()
            while block := self._output.recv(65536):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    self._take(line.decode("utf-8", "replace"))
        if rest:
            self._take(rest.decode("utf-8", "replace"))

    def _take(self, line: str) -> None:
        line, told = split_told(line)
        if told is not None:
            self._pass_on(told[len(PRELOAD_PREFIX) :])
            if not line:
                return
        self._lines.append(strip_ansi(line))
        if not self.url and _LISTENING in line:
            self.url = line[line.index("http") :].strip()
            self._is_decided.set()

    def _pass_on(self, told: str) -> None:
        """Make a message for the session of what plugin.js or preload.js has printed."""
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            seen = json.loads(told)
            if seen.get("type") == "error":
                message = Message(str(seen["sessionID"]), "session.error", {"error": seen["error"]})
            else:
                wait_s = asked_to_wait_s(seen.get("retry_after"), seen.get("retry_after_ms"))
                refusal = {"status": int(seen["status"]), "retry_after_s": wait_s}
                message = Message(str(seen["session"]), REFUSED, refusal)
            if self.feed is not None:
                self.feed.put(message)

    def _why_not(self, timeout_s: float) -> str:
        said = without_quotes("\n".join(self._lines)).strip()
        words = "\n".join(said.split("\n")[-LINES_TOLD:])
        if self.has_exited:
            what = f"opencode serve {exit_words(self._popen.returncode)} before it listened"
            known = unwritable_home(words) or refused_by_bun(words) or no_space(self.env)
            words = "\n".join(filter(None, (known, words)))
        else:
            what = f"opencode serve did not listen within {timeout_s:g} s (startup_timeout_s)"
        return f"{what}: {words}" if words else what
