"""The interface of a network connection: sends parcels to named clients, and gets their answers.

A link knows nothing of rounds or models. `fedpress.transport.flower` implements it with Flower; a
test may use another implementation.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from fedpress.core.names import ClientId

What = Literal["call", "answer", "ping", "pong"]
"""Kinds of parcels. The server sends a call (a request) or a ping (a check that the client is
there). A client replies to a call with an answer, and to a ping with a pong."""


@dataclass(frozen=True)
class Parcel:
    """One unit of transfer between the server and one client.

    Attributes:
        what: kind of the parcel.
        request: id of the call; the answer has the same id. If the server does not know whether a
            call arrived, it sends the call again with the same id. A client works on each id once.
        session: id of the session (one stage of one run); empty for a ping.
        body: bytes of a message; for a pong the JSON of `Presence`.
    """

    what: What
    request: str
    session: str
    body: bytes


@dataclass(frozen=True)
class Lost:
    """Takes the place of an answer that will never come.

    Attributes:
        reason: why the answer will never come.
        again: True if the network lost the answer: the call should then be sent again. False if the
            client sent an unreadable answer: it would send the same answer again.
    """

    reason: str
    again: bool = True


class Link(Protocol):
    """The server's connection to all clients."""

    def online(self) -> Mapping[ClientId, bool]:
        """Returns for each known client, in a fixed order, whether it is connected now."""
        ...

    def send(self, parcels: Mapping[ClientId, Parcel]) -> dict[ClientId, str]:
        """Sends one parcel to each of the clients; a body that several parcels share is sent once.

        Returns:
            Client name -> ticket. `poll` takes the ticket and returns the answer. A client that was
            never connected has no ticket.

        Raises:
            NetworkError: if the network itself does not work.
        """
        ...

    def poll(self, tickets: Collection[str]) -> dict[str, Parcel | Lost]:
        """Returns the answers that have arrived, by ticket. Does not wait."""
        ...


class Pace:
    """The pause between two polls: a fixed share of the time waited since the last event.

    So an answer that takes 10 s is noticed at most 0.5 s late (`SHARE` = 0.05). The pause is never
    longer than `LONGEST` seconds, also if nothing comes for hours.

    >>> pace = Pace(now=lambda: 100.0)
    >>> pace.seconds() == Pace.SHORTEST
    True
    """

    SHARE = 0.05
    SHORTEST = 0.01
    LONGEST = 2.0

    def __init__(self, now: object = time.monotonic) -> None:
        """Starts with the shortest pause.

        Args:
            now: function that returns the time in seconds.
        """
        # The clock is an argument, so that tests need not sleep.
        self._now = now
        self._last = self._read()

    def _read(self) -> float:
        return float(self._now())  # type: ignore[operator]

    def reset(self) -> None:
        """Starts with the shortest pause again; call it after each event."""
        self._last = self._read()

    def seconds(self) -> float:
        """Returns the pause before the next poll, in seconds."""
        # SHORTEST keeps a fast exchange from using a whole processor for polling.
        waited = self._read() - self._last
        return min(max(self.SHARE * waited, self.SHORTEST), self.LONGEST)
