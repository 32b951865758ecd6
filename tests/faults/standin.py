"""Stands in for `opencode` where the real one cannot be made to fail as a test needs it.

    sh wrapper --> python -S -E standin.py run --format json ... < "flood 1000"

The prompt is the name of a function below, and its arguments. Imports next to nothing: it has to
start fast.
"""

import contextlib
import json
import os
import signal
import sys
import time

SESSION = "ses_standin"


def event(kind, **fields):
    return json.dumps({"type": kind, "timestamp": 1, "sessionID": SESSION, **fields})


def say(*lines):
    for line in lines:
        data = line if isinstance(line, bytes) else line.encode()
        view = memoryview(data + b"\n")
        while view:
            view = view[os.write(1, view) :]


def complain(text):
    os.write(2, text.encode() + b"\n")


def start():
    say(event("step_start", part={"type": "step-start"}))


def text(words):
    say(event("text", part={"type": "text", "text": words}))


def finish(reason="stop", cost=0.25):
    tokens = {"total": 12, "input": 10, "output": 2, "reasoning": 0, "cache": {}}
    say(event("step_finish", part={"reason": reason, "cost": cost, "tokens": tokens}))


def sleep():
    while True:
        time.sleep(600)


# --- what a prompt can ask for --------------------------------------------------------------------


def well(words="done"):
    start()
    text(words)
    finish()


def flood(count):
    start()
    block = b"\n".join([event("text", part={"type": "text", "text": "x"}).encode()] * 1000)
    for _ in range(int(count) // 1000):
        say(block)
    finish()


def endless_flood():
    start()
    block = b"\n".join([event("text", part={"type": "text", "text": "x"}).encode()] * 100)
    while True:
        say(block)


def cut_line():
    start()
    text("whole")
    os.write(1, event("text", part={"type": "text", "text": "half"}).encode()[:-9])


def no_closing_step():
    start()
    text("that is all")


def complain_and_end_well():
    complain("\x1b[91mError: \x1b[0mno such model")


def complain_long(words):
    """So that the end of it that an error tells begins in the middle of *words*."""
    complain(words + "x" * (1_999 - len(words) // 2))
    sys.exit(1)


def refused_for(words):
    error = {"name": "APIError", "data": {"message": f"no: {words}", "statusCode": 401}}
    say(event("error", error=error))
    sys.exit(1)


def fail_silently(status):
    sys.exit(int(status))


def nothing():
    pass


def garbage():
    start()
    say(b"\0\0 no json \0", b"[1, 2]", b"", b'{"type": 7}', b"\x1b[31mred\x1b[0m", b"{" * 5000)
    text("after the garbage")
    finish()


def invalid_utf8():
    start()
    say(b'{"type": "text", "part": {"text": "a\xff\xfeb"}}')
    finish()


def long_line(megabytes):
    start()
    text("x" * (int(megabytes) << 20))
    finish()


def fail_with_long_stderr(megabytes):
    for _ in range(int(megabytes) << 10):
        complain("e" * 1023)
    complain("the last words")
    sys.exit(3)


def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start()
    text("I do not hear you")
    sleep()


def silent():
    sleep()


def fall_silent():
    start()
    text("so far")
    sleep()


def chatter():
    start()
    while True:
        text("and")
        time.sleep(0.02)


def log_chatter():
    start()
    while True:
        complain('timestamp=1 level=INFO run=1 message="still here"')
        time.sleep(0.02)


def refused(status):
    start()
    complain("opencode-sync: " + json.dumps({"status": int(status), "retry_after": "3600"}))
    _log_refusal()
    sleep()


def refused_without_status(then="sleep"):
    start()
    _log_refusal()
    if then == "sleep":
        sleep()
    complain('timestamp=1 level=ERROR message=process error="slow down" stack="..."')
    say(event("error", error={"name": "APIError", "data": {"message": "no", "statusCode": 401}}))
    sys.exit(1)


def _log_refusal():
    complain(
        'timestamp=1 level=ERROR message="stream error" small=false session.id=ses_standin '
        'error.error="AI_APICallError: slow down"'
    )


def die(number):
    start()
    text("last words")
    with contextlib.suppress(OSError):  # SIGKILL
        signal.signal(int(number), signal.SIG_DFL)  # Python has its own ways with some
    os.kill(os.getpid(), int(number))
    sleep()


def fail(status, *words):
    complain(" ".join(words))
    sys.exit(int(status))


def locked(times):
    """Fail as a start-up does that lost the race for its database, so many times in all."""
    with open("starts", "ab") as starts:
        starts.write(b"x")
        count = starts.tell()  # and not the file's size by its name: a test may have removed it
    if count <= int(times):
        fail(1, "SQLiteError: database is locked")
    well()


def locked_after_an_event():
    start()
    with open("starts", "ab") as starts:
        starts.write(b"x")
    fail(1, "SQLiteError: database is locked")


def full_disk():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    start()
    text("x" * 1000)
    finish()


def steps(count, cost):
    for _ in range(int(count)):
        start()
        finish("tool-calls", float(cost))
    sleep()


def with_tools():
    """Start three tools as OpenCode does: in sessions of their own, and with no parent."""
    start()
    tools = "(setsid sh -c 'sleep 901 & sleep 902' &); sleep 903"
    if os.fork() == 0:
        os.setsid()
        os.execvp("sh", ["sh", "-c", tools])
    text("started")
    sleep()


def leave_tools():
    if os.fork() == 0:
        os.setsid()
        os.execvp("sleep", ["sleep", "904"])
    well()


def leave_tool_with_our_stdout():
    if os.fork() == 0:
        os.setsid()
        time.sleep(0.2)
        say(b"too late")
        os.execvp("sleep", ["sleep", "905"])
    well()


def remove_workspace():
    start()
    os.rmdir(os.getcwd())
    text("gone")
    finish()


def look_around():
    """Write down what a process listing would show of us."""
    with open("/proc/self/environ", "rb") as file:
        environ = file.read().decode("utf-8", "replace").split("\0")
    start()
    text(json.dumps({"argv": sys.argv, "environ": environ, "cwd": os.getcwd()}))
    finish()


def echo(*words):
    well(" ".join(words))


if __name__ == "__main__":
    name, *arguments = sys.stdin.buffer.read().decode("utf-8", "replace").split()
    globals()[name](*arguments)
