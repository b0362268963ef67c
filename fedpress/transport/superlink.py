"""The SuperLink's process: Flower's own program, behind a guard, for as long as its parent lives.

In Flower's open-source build whoever reaches the port may submit runs, register nodes and stop
runs: its control interface asks nobody who he is. The guard lets only the server through there, by
a secret file, and limits how long a request may be.
"""

from __future__ import annotations

import hmac
import os
import sys
from pathlib import Path
from typing import Any

from fedpress.transport.flower import CHUNK, QUIET, SECRET_HEADER

MOST = 2 * CHUNK
"""Longest request in bytes; a longer body travels in several."""
OPEN = ("/v1/fleet/", "/health")
"""What clients may ask for."""


class Guard:
    """Middleware (ASGI) in front of all of Flower's own."""

    def __init__(self, app: Any, secret: str) -> None:
        self._app = app
        self._secret = secret.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers 403 to strangers and 413 to long requests, and passes on the others."""
        if scope["type"] == "websocket":
            # Flower has none; one that comes with another version must not be open to all.
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(SECRET_HEADER.encode(), b"")
        if not scope["path"].startswith(OPEN) and not hmac.compare_digest(given, self._secret):
            await _refuse(send, 403, b"only the server may ask for this")
            return
        took = 0

        async def limited() -> Any:
            nonlocal took
            event = await receive()
            took += len(event.get("body", b""))
            if took > MOST:
                # Ends the request as if its sender had gone: nothing of it is kept.
                return {"type": "http.disconnect"}
            return event

        length = dict(scope["headers"]).get(b"content-length", b"0")
        # Python reads no number of thousands of digits.
        if not length.isdigit() or len(length) > 20 or int(length) > MOST:
            await _refuse(send, 413, f"at most {MOST} bytes".encode())
            return
        await self._app(scope, limited, send)


async def _refuse(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main(arguments: list[str]) -> None:
    """Runs it; `arguments` are the parent's process number, then those of `flower-superlink`."""
    os.environ.update(QUIET)
    from flwr.supercore.app_utils import start_parent_process_monitor
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink
    from starlette.middleware import Middleware

    parent, *words = arguments
    start_parent_process_monitor(int(parent))
    secret = Path(words[words.index("--superexec-auth-secret-file") + 1]).read_bytes().hex()
    extensions.get_middleware = lambda: (Middleware(Guard, secret=secret),)
    sys.argv = ["flower-superlink", *words]
    flower_superlink()


if __name__ == "__main__":
    main(sys.argv[1:])
