"""A link in memory: the slow plain twin of a network, with faults that a test switches on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from fedpress.core.names import ClientId
from fedpress.transport.link import Lost, Parcel
from fedpress.transport.remote import Presence


@dataclass(eq=False)
class MemoryClient:
    """One client behind the link.

    Attributes:
        handle: the bytes of a call -> the bytes of its answer.
        boot: of its process.
        online: whether it is connected.
        works: whether it answers; else calls stay with it.
        calls: names of all calls that it was sent, in order.
        waiting: names of the calls that it has not answered.
    """

    handle: Callable[[bytes], bytes]
    boot: str = "first"
    online: bool = True
    works: bool = True
    calls: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)

    def start_again(self) -> None:
        """Loses all calls, as a process does that is killed."""
        self.boot += "+"
        self.waiting = []


@dataclass(eq=False)
class MemoryLink:
    """See `fedpress.transport.link.Link`.

    Attributes:
        clients: by name.
        lose: so many of the next answers are lost.
        refuse: so many of the next parcels get no ticket.
        bodies: the different bodies of each batch.
    """

    clients: dict[ClientId, MemoryClient]
    lose: int = 0
    refuse: int = 0
    bodies: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sent = 0
        self.waiting: dict[str, tuple[MemoryClient, ClientId, Parcel]] = {}
        self._ready: dict[str, Parcel | Lost] = {}

    def online(self) -> Mapping[ClientId, bool]:
        return {name: client.online for name, client in self.clients.items()}

    def send(self, parcels: Mapping[ClientId, Parcel]) -> dict[ClientId, str]:
        self.bodies.append(len({id(parcel.body) for parcel in parcels.values()}))
        tickets = {}
        for name, parcel in parcels.items():
            if self.refuse:
                self.refuse -= 1
                continue
            self._sent += 1
            tickets[name] = f"ticket {self._sent}"
            client = self.clients[name]
            self.waiting[tickets[name]] = client, name, parcel
            if parcel.what == "call":
                client.calls.append(parcel.request)
                client.waiting.append(parcel.request)
        return tickets

    def answer(self, ticket: str, parcel: Parcel | Lost) -> None:
        """Lets an answer arrive that no client has given."""
        self._ready[ticket] = parcel

    def poll(self, tickets: Collection[str]) -> dict[str, Parcel | Lost]:
        for ticket in [ticket for ticket in tickets if ticket in self.waiting]:
            client, name, parcel = self.waiting[ticket]
            if not client.online:
                continue
            if parcel.what == "ping":
                pong = Presence(name, client.boot, tuple(client.waiting), "1").to_bytes()
                self._ready[ticket] = Parcel("pong", parcel.request, "", pong)
                del self.waiting[ticket]
            elif client.works and parcel.request in client.waiting:
                del self.waiting[ticket]
                client.waiting.remove(parcel.request)
                if self.lose:
                    self.lose -= 1
                    self._ready[ticket] = Lost("the SuperLink was started again")
                    continue
                body = client.handle(parcel.body)
                self._ready[ticket] = Parcel("answer", parcel.request, parcel.session, body)
        return {ticket: self._ready.pop(ticket) for ticket in tickets if ticket in self._ready}
