"""Converts messages to bytes and back, for all transports.

A message that goes to many clients, such as the model, is converted to bytes only once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from fedpress.errors import WireError
from fedpress.federation.exchange import error
from fedpress.wire.message import Message, pack, unpack


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
