"""The guard before Flower's SuperLink: strangers reach the clients' paths alone, and with short requests."""

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from fedpress.transport.flower.guard import MOST, Guard
from fedpress.transport.flower.server import SECRET_HEADER

SECRET = "ab" * 32
CONTROL = "/flwr.proto.Control/StartRun"
RUNTIME = "/flwr.proto.Runtime/AcquireTask"
FLEET = "/v1/fleet/pull-messages"


class Asked:
    """Flower's side: notes who came through, and reads the body to its end."""

    def __init__(self):
        self.paths = []
        self.bodies = []

    async def __call__(self, scope, receive, send):
        self.paths.append(scope.get("path", scope["type"]))
        if scope["type"] != "http":
            return
        body = b""
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"yes"})


def ask(path, headers=None, chunks=(b"",), kind="http"):
    """Returns the status (None if the request was cut off), and what Flower saw."""
    app, sent = Asked(), []
    left = list(chunks)

    async def receive():
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(event):
        sent.append(event)

    given = [(name.encode(), value) for name, value in (headers or {}).items()]
    scope = {"type": kind, "path": path, "headers": given}
    asyncio.run(Guard(app, SECRET)(scope, receive, send))
    return (sent[0].get("status", sent[0]["type"]) if sent else None), app


@pytest.mark.parametrize("path", [FLEET, "/health"])
def test_clients_reach_what_is_theirs(path):
    assert ask(path)[0] == 200


@pytest.mark.parametrize(
    "path", [CONTROL, RUNTIME, "/", "", "/v1/control/start-run", "//v1/fleet/x", "/V1/FLEET/x"]
)
@pytest.mark.parametrize(
    "secret",
    [
        None,
        b"",
        b"cd" * 32,
        SECRET[:-1].encode(),
        SECRET.upper().encode(),
        b"\xff\xe4",
        b"0" * 9999,
    ],
)
def test_strangers_reach_nothing_else(path, secret):
    status, app = ask(path, {} if secret is None else {SECRET_HEADER: secret})
    assert status == 403
    assert app.paths == []


@pytest.mark.parametrize("path", [CONTROL, RUNTIME])
def test_the_server_reaches_all(path):
    assert ask(path, {SECRET_HEADER: SECRET.encode()})[0] == 200


@pytest.mark.parametrize("length", [MOST + 1, 1 << 31, -1, "many", "9" * 5000, ""])
def test_a_request_that_says_it_is_long_is_refused_before_its_body(length):
    status, app = ask(FLEET, {"content-length": str(length).encode()})
    assert status == 413
    assert app.paths == []


def test_a_request_that_does_not_say_how_long_it_is_ends_at_the_limit():
    mebibyte = bytes(1 << 20)
    short, app = ask(FLEET, chunks=[mebibyte] * 7)
    assert (short, len(app.bodies[0])) == (200, 7 << 20)
    long, app = ask(FLEET, chunks=[mebibyte] * 9)
    assert (long, app.bodies) == (None, [])


def test_a_request_that_says_too_little_ends_at_the_limit():
    status, app = ask(FLEET, {"content-length": b"10"}, [bytes(1 << 20)] * 9)
    assert (status, app.bodies) == (None, [])


def test_the_server_is_limited_too():
    headers = {SECRET_HEADER: SECRET.encode(), "content-length": str(MOST + 1).encode()}
    assert ask(CONTROL, headers)[0] == 413


def test_start_and_end_of_the_program_go_through_and_sockets_do_not():
    assert ask("", kind="lifespan")[1].paths == [""]
    status, app = ask(CONTROL, kind="websocket")
    assert (status, app.paths) == ("websocket.close", [])


# Starts the SuperLink's process and ends at once, as a server does that is killed.
KILLED = """
import os, subprocess, sys
words = [sys.executable, "-m", "fedpress.transport.flower.guard", str(os.getpid()), *sys.argv[1:]]
print(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid, flush=True)
os._exit(0)
"""


def test_a_superlink_whose_server_is_killed_while_it_starts_ends_too(tmp_path):
    (tmp_path / "secret").write_bytes(b"x" * 32)
    words = ["--insecure", "--host", "127.0.0.1", "--port", "0", "--isolation", "process"]
    words += ["--superexec-auth-secret-file", str(tmp_path / "secret")]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words],
        capture_output=True,
        text=True,
        check=True,
        # As in a background job of a shell, where SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    place = Path(f"/proc/{int(done.stdout)}")
    end = time.monotonic() + 30
    while place.exists() and "(zombie)" not in (place / "status").read_text():
        assert time.monotonic() < end, "it is still there"
        time.sleep(0.1)
