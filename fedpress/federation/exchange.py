"""The interface of a transport: send a message to a client, and wait for its answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from fedpress.core.names import ClientId
from fedpress.wire.message import Message

RequestId: TypeAlias = int
"""Number of one sent message; unique within a transport."""
Answer: TypeAlias = tuple[ClientId, RequestId, Message]
"""The client, the id of the request, and the client's answer."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of serialized messages: `up` from clients to server, `down` from server to clients."""

    up: int = 0
    down: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.up + other.up, self.down + other.down)

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.up - earlier.up, self.down - earlier.down)


class Transport(Protocol):
    """Carries messages to clients, and their answers back.

    A client that fails causes no exception on the server. Its answer has the kind "error" and a
    `reason` in the header, or no answer comes. Answers come in any order, each of them once. Each
    has the id of its request, so a late update is never mistaken for the answer to another request.
    """

    @property
    def traffic(self) -> Traffic:
        """Bytes carried since the transport was created."""
        ...

    def clients(self) -> Sequence[ClientId]:
        """Returns the names of all clients that can be asked, in the same order at every call."""
        ...

    def send(self, client: ClientId, message: Message) -> RequestId:
        """Sends `message`, and returns the id of the request without waiting.

        If the same message object is sent to many clients, it is serialized once.
        """
        ...

    def receive(
        self, requests: Collection[RequestId], timeout: float | None = None
    ) -> Answer | None:
        """Waits for the next answer to one of `requests`.

        Answers to other requests are kept for later calls.

        Returns:
            The client, the request and its answer. None if no answer came within `timeout`
            seconds, or if none of `requests` is open.
        """
        ...

    def cancel(self, requests: Collection[RequestId]) -> None:
        """Closes `requests`: their clients may stop, and answers that come later are dropped."""
        ...


def exchange(
    transport: Transport, requests: Mapping[ClientId, Message], *, timeout: float | None = None
) -> Iterator[tuple[ClientId, Message]]:
    """Sends each client its message, and yields client and answer for each answer that comes.

    Ends when all have answered, or when no answer came within `timeout`.

    Other requests may be open at the same time; the transport keeps their answers.

    Args:
        transport: carries messages to the clients.
        requests: client -> the message for it.
        timeout: seconds to wait for the next answer; None: no limit.
    """
    # All are sent before any answer is read, so that clients work at the same time.
    waiting = {transport.send(client, message) for client, message in requests.items()}
    try:
        while waiting:
            answer = transport.receive(waiting, timeout)
            if answer is None:
                return
            client, request, reply = answer
            # Removed before the yield: if the caller stops its loop, the `finally` below must not
            # cancel this request, which was answered.
            waiting.remove(request)
            yield client, reply
    finally:
        # Runs also if the caller stops early. Otherwise the transport would for ever keep answers
        # that nobody reads.
        transport.cancel(waiting)


def error(reason: str) -> Message:
    """Returns the message that takes the place of an answer if a client failed."""
    return Message("error", {"reason": reason})


def failure(problem: Exception) -> Message:
    """Returns the message that takes the place of an answer if its computation raised `problem`."""
    try:
        text = str(problem)
    # The class may be a user's own, and a client that fails must not end the run.
    except Exception:
        text = "an error without a text"
    return error(f"{type(problem).__name__}: {text}")
