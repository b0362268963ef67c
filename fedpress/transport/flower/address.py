"""The address of a SuperLink (Flower's server process), and errors about connections to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.common.constant import (
    HEARTBEAT_MIN_INTERVAL,
    HEARTBEAT_PATIENCE,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
)

from fedpress.errors import NetworkError

T = TypeVar("T")

BEAT = float(HEARTBEAT_MIN_INTERVAL)
"""Seconds between two heartbeats of a client, by which the SuperLink knows that it is online.

Flower's default is 30 s. Here it is shorter, because a client that was killed and started again is
refused until two of these intervals have passed."""


@dataclass(frozen=True)
class Address:
    """Where a SuperLink listens, and how its certificate is checked.

    Attributes:
        host: host name or IP address.
        port: number of the SuperLink's only port.
        ca: file with the certificate of the authority that signed the server's certificate; None:
            the connection does not use TLS.
    """

    host: str
    port: int
    ca: Path | None = None

    @property
    def text(self) -> str:
        """`host:port`, with brackets around an IPv6 address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The address as a URL: http without TLS, else https."""
        return f"{'http' if self.ca is None else 'https'}://{self.text}"

    def client(self, kind: type[T], interceptors: Iterable[Any]) -> T:
        """Returns a client of one of Flower's APIs.

        Args:
            kind: Flower's class of the client, such as `FleetHttpClient`.
            interceptors: objects that change each request before it is sent.

        Raises:
            NetworkError: if the certificate cannot be read.
        """
        try:
            root = None if self.ca is None else self.ca.read_bytes()
            made: T = kind.from_server_address(  # type: ignore[attr-defined]
                self.text, self.ca is None, root, [*interceptors]
            )
        except (OSError, ValueError) as error:
            raise NetworkError(
                f"no certificate can be read ({error})",
                place=str(self.ca),
                cure="copy ca.crt anew from whoever runs the server",
            ) from error
        return made


@contextmanager
def explained(address: Address) -> Iterator[None]:
    """Converts errors of the connection in the block to a `NetworkError` that says what to do."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise _status_problem(error, address) from error
    except (httpx.HTTPError, ObjectPullError, ObjectPushError, OSError) as error:
        raise transport_problem(error, address) from error


def _status_problem(error: httpx.HTTPStatusError, address: Address) -> NetworkError:
    status = error.response.status_code
    said = error.response.text[:200]
    # Without `refused`, so that the client tries again: a SuperLink that was just started gets the
    # keys of clients a moment later, and the user may add a missing key while the client waits.
    asked = error.request.url.path
    if status == httpx.codes.PRECONDITION_FAILED and asked.endswith("/activate-node"):
        return NetworkError(
            (
                "the server does not list the key of this client, or a client with this key is "
                "connected"
            ),
            place=address.text,
            cure=(
                "give node.pub to whoever runs the server, who writes it to server.toml and starts "
                f"the server again; a second client needs a key of its own (fedpress network add); "
                f"a killed client can connect again after {HEARTBEAT_PATIENCE * BEAT:.0f} s"
            ),
        )
    if status == httpx.codes.UNAUTHORIZED:
        return NetworkError(
            "the server does not know this key, or this machine's clock is wrong",
            place=address.text,
            cure=(
                "give node.pub to whoever runs the server, who writes it to server.toml, and "
                "compare the clocks (5 minutes apart is too much)"
            ),
            refused=True,
        )
    return NetworkError(
        f"the server answered {status} ({said})",
        place=address.text,
        cure="see superlink.log on the server",
    )


def transport_problem(error: Exception, address: Address) -> NetworkError:
    """Returns an error that says what to do if there is no connection or a wrong certificate.

    Args:
        error: what the connection raised.
        address: address of the SuperLink.
    """
    said = f"{type(error).__name__}: {error}"
    low = said.lower()
    if "certificate has expired" in low:
        return NetworkError(
            "the server's certificate has expired",
            place=address.text,
            cure="whoever runs the server makes a new one with fedpress network renew",
            refused=True,
        )
    if "hostname mismatch" in low or "ip address mismatch" in low:
        return NetworkError(
            "the server's certificate was made for another host",
            place=address.text,
            cure="connect by the name that fedpress network init --host was given",
            refused=True,
        )
    if "certificate" in low:
        return NetworkError(
            f"the server's certificate is not signed by {address.ca} ({said})",
            place=address.text,
            cure="copy ca.crt anew from whoever runs the server",
            refused=True,
        )
    # Not `refused`: a proxy breaks off the handshake while the server behind it is started again.
    if "ssl" in low or "tls" in low:
        return NetworkError(
            f"no secure connection can be made ({said})",
            place=address.text,
            cure="see whether fedpress server runs there, and whether another program has the port",
        )
    return NetworkError(
        f"the server cannot be reached ({said})",
        place=address.text,
        cure="see whether fedpress server runs there and the port is open",
    )
