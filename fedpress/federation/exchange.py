"""What the rounds need of a transport: send a message to a client, and wait for the answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from fedpress.core.names import ClientId
from fedpress.wire.message import Message

RequestId: TypeAlias = int
"""Names one message that was sent; unique within a transport."""
Answer: TypeAlias = tuple[ClientId, RequestId, Message]


@dataclass(frozen=True)
class Traffic:
    """Bytes of real messages: `up` from the clients, `down` to them."""

    up: int = 0
    down: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.up + other.up, self.down + other.down)

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.up - earlier.up, self.down - earlier.down)


class Transport(Protocol):
    """Carries messages to clients and their answers back.

    A client that fails does not raise: its answer is a message of kind "error" with a `reason` in
    the header, or does not come at all. Answers come in any order, each once, under the id of the
    request that it answers. So a late update is never taken for the answer to another question.
    """

    @property
    def traffic(self) -> Traffic:
        """Bytes carried since the transport was made."""
        ...

    def clients(self) -> Sequence[ClientId]:
        """Names of all clients that can be asked, always in the same order."""
        ...

    def send(self, client: ClientId, message: Message) -> RequestId:
        """Sends `message` and returns at once.

        One message object that is sent to many clients is packed once.
        """
        ...

    def receive(
        self, requests: Collection[RequestId], timeout: float | None = None
    ) -> Answer | None:
        """Waits for the next answer to one of `requests`; answers to others are kept for later.

        Returns:
            The client, the request and its answer. None if none came within `timeout` seconds, or
            none of the requests is open.
        """
        ...

    def cancel(self, requests: Collection[RequestId]) -> None:
        """Stops waiting for `requests`: clients may stop, answers that still come are dropped."""
        ...


def exchange(
    transport: Transport, requests: Mapping[ClientId, Message], *, timeout: float | None = None
) -> Iterator[tuple[ClientId, Message]]:
    """Sends each client its message and yields the answers as they come.

    Other requests may be open at the same time; their answers stay with the transport.

    Args:
        transport: reaches the clients.
        requests: a message for each client.
        timeout: seconds to wait for the next answer; None to wait for all.
    """
    # All are sent before any answer is read, so that clients work at the same time.
    waiting = {transport.send(client, message) for client, message in requests.items()}
    try:
        while waiting:
            answer = transport.receive(waiting, timeout)
            if answer is None:
                return
            client, request, reply = answer
            # Removed first: the caller may stop the loop, and must not cancel what was answered.
            waiting.remove(request)
            yield client, reply
    finally:
        # Also if the caller stops early: an answer nobody reads must not stay open for ever.
        transport.cancel(waiting)


def error(reason: str) -> Message:
    """Returns the message that stands for a reply that failed."""
    return Message("error", {"reason": reason})
