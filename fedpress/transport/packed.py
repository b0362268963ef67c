"""Converts messages to bytes and back, or counts their bytes, for all transports.

A message that goes to many clients, such as the model, is converted or counted only once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from fedpress.errors import WireError
from fedpress.federation.exchange import error, failure
from fedpress.wire.message import Message, deliver, pack, packed_size, unpack


@dataclass(frozen=True, eq=False)
class PackedMessage:
    """A message and its bytes.

    Attributes:
        message: the message. It is kept alive here, because `PackedMessages` looks it up by its
            Python id, and Python gives the id of a deleted object to a new one.
        data: bytes of the message.
        shared: reference to bytes that all receivers can read, such as an object of Ray; None if
            the transport shares nothing.
    """

    message: Message
    data: bytes
    shared: Any = None


class PackedMessages:
    """Packs each message once, although it is sent to many clients.

    A `PackedMessage` is forgotten when no transport holds it any more. A transport holds it as long
    as the request is open, because the message may have to be sent again.

    >>> packed, message = PackedMessages(), Message("hello")
    >>> first = packed.of(message)
    >>> packed.of(message) is first
    True
    """

    def __init__(self, share: Callable[[bytes], Any] | None = None) -> None:
        """Makes an empty table.

        Args:
            share: puts bytes where all receivers can read them, and returns a reference to them;
                None: nothing is shared.
        """
        self._share = share
        # By id, since hashing a message would read all its tensors. Weak, so that the bytes of a
        # model are freed when its round is over.
        self._by_id: WeakValueDictionary[int, PackedMessage] = WeakValueDictionary()

    def of(self, message: Message) -> PackedMessage:
        """Returns `message` with its bytes; the same object as before while that is still held."""
        packed = self._by_id.get(id(message))
        if packed is None:
            data = pack(message)
            packed = PackedMessage(message, data, self._share(data) if self._share else None)
            self._by_id[id(message)] = packed
        return packed


@dataclass(frozen=True, eq=False)
class CountedMessage:
    """A message that is handed over without being packed.

    Attributes:
        message: the message; kept alive here for the reason given at `PackedMessage`.
        size: number of bytes that it would have.
        arrived: the message as receivers get it, or why they refuse it.
    """

    message: Message
    size: int
    arrived: Message | WireError

    @classmethod
    def of(cls, message: Message) -> CountedMessage:
        """Counts the bytes of `message`.

        Raises:
            WireError: if it cannot be packed.
        """
        size = packed_size(message)
        try:
            return cls(message, size, deliver(message, size))
        # Kept, because over a network only the receiver finds this fault.
        except WireError as problem:
            return cls(message, size, problem)

    def delivered(self) -> Message:
        """Returns the message as the receiver of its bytes would read it; tensors are shared.

        Raises:
            WireError: if the receiver would refuse its bytes.
        """
        if isinstance(self.arrived, WireError):
            raise self.arrived
        return self.arrived


class CountedMessages:
    """Counts the bytes of each message once, although it is sent to many clients.

    >>> counted, message = CountedMessages(), Message("hello")
    >>> first = counted.of(message)
    >>> counted.of(message) is first, first.size == len(pack(message))
    (True, True)
    """

    def __init__(self) -> None:
        # By id and weak, as in `PackedMessages`.
        self._by_id: WeakValueDictionary[int, CountedMessage] = WeakValueDictionary()

    def of(self, message: Message) -> CountedMessage:
        """Returns `message` with its size; the same object as before while that is still held."""
        counted = self._by_id.get(id(message))
        if counted is None:
            counted = CountedMessage.of(message)
            self._by_id[id(message)] = counted
        return counted


def deliver_answer(answer: Message, max_bytes: int) -> tuple[Message, int]:
    """Returns an answer as the server would read its bytes, and their number.

    Args:
        answer: the answer of a client in this process; tensors are shared with it.
        max_bytes: longest accepted message, in bytes.

    Returns:
        The message and its size. A message that cannot be packed is replaced by the error that the
        client would send; one that the server would refuse, by a message of kind "error".
    """
    try:
        size = packed_size(answer)
    # The client packs its answer, so this is its failure, like any other.
    except Exception as problem:
        answer = failure(problem)
        size = packed_size(answer)
    try:
        return deliver(answer, size, max_bytes=max_bytes), size
    except WireError as problem:
        return error(f"WireError: {problem}"), size


def read_answer(data: bytes, max_bytes: int) -> Message:
    """Reads an answer.

    Args:
        data: bytes of the answer. They are not trusted: any client may have sent them.
        max_bytes: longest accepted message, in bytes.

    Returns:
        The message; a message of kind "error" if the bytes are not a valid message.
    """
    try:
        return unpack(data, max_bytes=max_bytes)
    # Returned and not raised: the bytes of one client must not end the run for all clients.
    except WireError as problem:
        return error(f"WireError: {problem}")
