"""The server's side of a network: waits for clients, and opens transports for the stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedpress.core.log import logger
from fedpress.core.names import ClientId
from fedpress.errors import NetworkError
from fedpress.transport.link import Link
from fedpress.transport.remote import LOST_AFTER, RemoteTransport

log = logger(__name__)

POLL = 0.5
"""Seconds between two looks for clients."""


@dataclass(eq=False)
class ServerNetwork:
    """Reaches the clients of a run; see `fedpress.workspace.state.Network`.

    Attributes:
        link: the server's end of the wire.
        labels: the columns that are predicted, where the clients' data are tables.
        lost_after: seconds of silence after which an offline client counts as lost for a call.
        told: is called with a sentence when a client goes, comes back, or is called again.
        min_clients: how many clients must be connected before a stage begins; None: all that are
            listed.
        timeout: seconds to wait for these clients; None: for ever.
    """

    link: Link
    labels: tuple[str, ...] = ()
    lost_after: float = LOST_AFTER
    told: Callable[[str], None] = log.info
    min_clients: int | None = None
    timeout: float | None = None

    def open(self, session: str, clients: Sequence[ClientId] | None) -> RemoteTransport:
        """See `Network`."""
        if clients is None:
            clients = self.gather()
        return RemoteTransport(
            self.link,
            clients,
            session,
            lost_after=self.lost_after,
            told=self.told,
        )

    def gather(self) -> list[ClientId]:
        """Waits until enough clients are connected, and returns those that are.

        Raises:
            NetworkError: if they have not come in time.
        """
        # Without TLS nobody is listed beforehand: one client is enough then.
        wanted = self.min_clients or max(len(self.link.online()), 1)
        there: list[ClientId] = []
        for there in self.wait(wanted, self.timeout):
            names = f" ({', '.join(there)})" if there else ""
            self.told(f"clients: {len(there)} of {wanted}{names}")
        return there

    def wait(self, wanted: int, timeout: float | None = None) -> Iterator[list[ClientId]]:
        """Waits until `wanted` clients are connected; yields who is there, as often as it changes.

        Raises:
            NetworkError: if they have not come after `timeout` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        before: list[ClientId] | None = None
        while True:
            there = [name for name, online in self.link.online().items() if online]
            if there != before:
                yield there
                before = there
            if len(there) >= wanted:
                return
            if end is not None and time.monotonic() > end:
                raise NetworkError(
                    f"{len(there)} of {wanted} clients came within {timeout:.0f} s",
                    place="min_clients",
                    cure="start the others, or wait for fewer with --min-clients",
                )
            time.sleep(POLL)
