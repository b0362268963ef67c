"""Starts Flower's SuperLink (the server process) behind a guard that checks each HTTP request.

The control interface of Flower's open-source build has no authentication: anybody who reaches the
port may submit runs, stop runs and register nodes. The guard passes a request to this interface on
only if it has a secret, which our server reads from a file. The guard also limits the length of
requests, and of messages (see `store`). The process ends when its parent process ends.
"""

from __future__ import annotations

import gc
import hmac
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fedpress.transport.flower.pinned import QUIET
from fedpress.transport.flower.server import SECRET_HEADER

MOST = 8 << 20
"""Longest request in bytes; longer bodies are sent in several requests."""
GARBAGE = 64 << 20
"""Bytes of requests and answers after which unused memory is looked for."""
OPEN = ("/v1/fleet/", "/health")
"""Beginnings of the paths that clients may request."""


class Guard:
    """ASGI middleware that checks each request before Flower sees it.

    A client may use the paths in `OPEN`. All other paths need the secret.
    """

    def __init__(self, app: Any, secret: str) -> None:
        self._app = app
        self._secret = secret.encode()
        self._passed = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Checks a request, and passes it on to Flower if it is allowed.

        A request that needs the secret and lacks it gets the answer 403, and a request of more than
        `MOST` bytes the answer 413. A websocket is closed. The arguments are those of the ASGI
        standard.
        """
        if scope["type"] == "websocket":
            # Flower has no websockets. If a later version adds one, it must not be open to all.
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # compare_digest takes the same time for every wrong secret, so time does not reveal it.
        given = dict(scope["headers"]).get(SECRET_HEADER.encode(), b"")
        if not scope["path"].startswith(OPEN) and not hmac.compare_digest(given, self._secret):
            await _refuse(send, 403, b"only the server may ask for this")
            return
        # The body is counted while it arrives, because its length in the header may be wrong.
        took = 0

        async def limited() -> Any:
            nonlocal took
            event = await receive()
            took += len(event.get("body", b""))
            self._passed += len(event.get("body", b""))
            if took > MOST:
                # Flower then drops the request, as if the sender had closed the connection.
                return {"type": "http.disconnect"}
            return event

        length = dict(scope["headers"]).get(b"content-length", b"0")
        # At most 20 digits, because `int` raises an error for thousands of digits.
        if not length.isdigit() or len(length) > 20 or int(length) > MOST:
            await _refuse(send, 413, f"at most {MOST} bytes".encode())
            return

        async def counted(event: Any) -> None:
            self._passed += len(event.get("body", b""))
            await send(event)

        await self._app(scope, limited, counted)
        # A finished request is part of a cycle of references, so Python frees its bytes only when
        # it looks for cycles. That depends on the number of objects: gigabytes would be left.
        if self._passed > GARBAGE:
            self._passed = 0
            gc.collect()


async def _refuse(send: Any, status: int, body: bytes) -> None:
    """Sends a complete HTTP answer."""
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent process has ended.

    Flower's own monitor sends SIGINT, which is lost while the SuperLink starts: it then held the
    port for ever. Nothing is lost by an end at once, since the database is in memory.
    """
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(0)


def main(arguments: list[str]) -> None:
    """Runs the SuperLink.

    Args:
        arguments: process id of the parent, followed by the arguments of `flower-superlink`.
    """
    # Before the imports, because Flower reads these variables when it is imported.
    os.environ.update(QUIET)
    from flwr.supercore.object_store import object_store_factory
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink
    from starlette.middleware import Middleware

    from fedpress.transport.flower.store import LimitedStore

    parent, *words = arguments
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    # As hexadecimal digits, because an HTTP header cannot contain all bytes.
    secret = Path(words[words.index("--superexec-auth-secret-file") + 1]).read_bytes().hex()
    # Flower asks this function for middleware; in the open-source build it returns none.
    extensions.get_middleware = lambda: (Middleware(Guard, secret=secret),)
    object_store_factory.InMemoryObjectStore = LimitedStore  # type: ignore[attr-defined]
    # What is loaded by now is never freed: without it, looking for garbage takes a millisecond.
    gc.freeze()
    sys.argv = ["flower-superlink", *words]
    flower_superlink()


if __name__ == "__main__":
    main(sys.argv[1:])
