"""What a remote transport needs of a network: parcels to named clients, and their answers.

A link knows nothing of rounds. `fedpress.transport.flower` is the link that people use; a test may
take another one.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from fedpress.core.names import ClientId

What = Literal["call", "answer", "ping", "pong"]
"""Kinds of parcels: the server calls or pings, a client answers or pongs."""


@dataclass(frozen=True)
class Parcel:
    """What travels between the server and one client.

    Attributes:
        what: kind of the parcel.
        request: names the call; the answer repeats it. A call that is sent again, because nobody
            knows whether it arrived, keeps its name, so a client works on it once.
        session: the stage of the run that the call belongs to; empty for a ping.
        body: a packed message; for a pong the JSON of `Presence`.
    """

    what: What
    request: str
    session: str
    body: bytes


@dataclass(frozen=True)
class Lost:
    """Stands for an answer that will not come.

    Attributes:
        reason: why the answer will not come.
        again: whether the network lost the answer, so that the call is worth sending again; False
            if the answer's sender made it unreadable.
    """

    reason: str
    again: bool = True


class Link(Protocol):
    """The server's end of a network."""

    def online(self) -> Mapping[ClientId, bool]:
        """Returns whether each known client is connected, in the order of their names."""
        ...

    def send(self, parcels: Mapping[ClientId, Parcel]) -> dict[ClientId, str]:
        """Sends a parcel to each client; equal bodies travel to the network once.

        Returns:
            For each client a ticket, by which the answer is found; none for those that were never
            connected.

        Raises:
            NetworkError: if the network itself does not work.
        """
        ...

    def poll(self, tickets: Collection[str]) -> dict[str, Parcel | Lost]:
        """Returns the answers that have come since, by ticket; does not wait."""
        ...


class Pace:
    """How long to sleep between two polls: a fixed share of the time waited so far.

    A poll then delays an answer by at most `SHARE` of the time that it took, and an idle process
    polls every `LONGEST` seconds.

    >>> pace = Pace(now=lambda: 100.0)
    >>> pace.seconds() == Pace.SHORTEST
    True
    """

    SHARE = 0.05
    SHORTEST = 0.01
    LONGEST = 2.0

    def __init__(self, now: object = time.monotonic) -> None:
        self._now = now
        self._last = self._read()

    def _read(self) -> float:
        return float(self._now())  # type: ignore[operator]

    def reset(self) -> None:
        """Begins anew: something has just come."""
        self._last = self._read()

    def seconds(self) -> float:
        """Returns the pause before the next poll, in seconds."""
        waited = self._read() - self._last
        return min(max(self.SHARE * waited, self.SHORTEST), self.LONGEST)
