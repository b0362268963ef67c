"""The server's end of a network: waits for clients, and opens a transport for each stage.

A transport sends messages to the clients of one stage of a run, and receives their answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from fedpress.core.log import logger
from fedpress.core.names import ClientId
from fedpress.data.reading import Reading
from fedpress.errors import NetworkError
from fedpress.transport.link import Link
from fedpress.transport.remote import LOST_AFTER, RemoteTransport

log = logger(__name__)

POLL = 0.5
"""Seconds between two questions of which clients are connected."""


@dataclass(eq=False)
class ServerNetwork:
    """Gives a run access to its clients; implements `fedpress.workspace.state.Network`.

    Attributes:
        link: sends single parcels to clients, and receives their answers.
        labels: columns that the model predicts; empty if the clients' data are not tables.
        lost_after: after so many seconds of silence, the server no longer waits for the answer of
            an offline client.
        told: is called with a sentence for people, such as "client 'a' was started again".
        min_clients: number of clients that must be connected before a stage begins; None: all
            clients that `server.toml` lists.
        timeout: seconds to wait for these clients; None: without limit.
        hidden: whether only the server may know which clients are asked in a round.
        reading: how the clients' tables are read, as the recipe says.
    """

    link: Link
    labels: tuple[str, ...] = ()
    lost_after: float = LOST_AFTER
    told: Callable[[str], None] = log.info
    min_clients: int | None = None
    timeout: float | None = None
    hidden: bool = False
    reading: Reading = field(default_factory=Reading)

    def open(self, session: str, clients: Sequence[ClientId] | None) -> RemoteTransport:
        """Returns a transport to `clients`; see `fedpress.workspace.state.Network`."""
        # None stands for a new run: it takes the clients that are connected when it begins.
        if clients is None:
            clients = self.gather()
        return RemoteTransport(
            self.link,
            clients,
            session,
            lost_after=self.lost_after,
            told=self.told,
            hidden=self.hidden,
        )

    def gather(self) -> list[ClientId]:
        """Waits until enough clients are connected, and returns the names of the connected ones.

        Raises:
            NetworkError: if too few clients have connected after `timeout` seconds.
        """
        # Without TLS there is no list of clients beforehand: then one client is enough.
        wanted = self.min_clients or max(len(self.link.online()), 1)
        there: list[ClientId] = []
        for there in self.wait(wanted, self.timeout):
            names = f" ({', '.join(there)})" if there else ""
            self.told(f"clients: {len(there)} of {wanted}{names}")
        return there

    def wait(self, wanted: int, timeout: float | None = None) -> Iterator[list[ClientId]]:
        """Waits until `wanted` clients are connected.

        Yields:
            Names of the connected clients, whenever they change.

        Raises:
            NetworkError: if fewer than `wanted` have connected after `timeout` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        before: list[ClientId] | None = None
        while True:
            there = [name for name, online in self.link.online().items() if online]
            # Yielded before the checks below, so that the caller sees the last change, too.
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
