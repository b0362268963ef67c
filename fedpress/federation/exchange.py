"""What the rounds ask of a transport: a list of clients, and an exchange of messages that may lose some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedpress.core.names import ClientId
from fedpress.wire.message import Message


@dataclass(frozen=True)
class Traffic:
    """Bytes of real messages: `up` from the clients, `down` to them."""

    up: int = 0
    down: int = 0

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.up - earlier.up, self.down - earlier.down)


class Transport(Protocol):
    """Carries messages to clients and back.

    A client that fails is not an exception: its reply is a message of kind "error" with a `reason` in the header,
    or does not come at all. Replies come in any order.
    """

    @property
    def traffic(self) -> Traffic:
        """Bytes carried since the transport was made."""
        ...

    def clients(self) -> Sequence[ClientId]:
        """Names of all clients that can be asked, always in the same order."""
        ...

    def exchange(self, requests: Mapping[ClientId, Message]) -> Iterator[tuple[ClientId, Message]]:
        """Sends each client its message and yields the replies as they come."""
        ...


def error(reason: str) -> Message:
    """Returns the message that stands for a reply that failed."""
    return Message("error", {"reason": reason})


def ordered(
    clients: Sequence[ClientId], replies: Iterator[tuple[ClientId, Message]]
) -> Iterator[tuple[ClientId, Message | None]]:
    """Yields (client, reply) in the order of `clients`, with None where none came; other clients' replies are ignored.

    Only replies that came too early are held, so a transport that keeps the order needs the memory of one.

    >>> list(ordered(["a", "b", "c"], iter([("b", error("x")), ("a", error("y"))])))[2]
    ('c', None)
    """
    wanted, early = set(clients), dict[ClientId, Message]()
    for client in clients:
        while client not in early:
            name, reply = next(replies, (None, None))
            if name is None or reply is None:
                break
            if name in wanted:  # only the first reply of each client counts
                wanted.discard(name)
                early[name] = reply
        yield client, early.pop(client, None)
    for _ in replies:  # let the transport finish: what comes now was not asked for, or came twice
        pass
