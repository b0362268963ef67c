"""What all transports do with messages: pack each once for all clients, and read what comes back."""

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
        message: kept here, so that Python cannot give its id to another object meanwhile.
        data: the message, packed.
        shared: where a transport has put the bytes for all receivers, if it was asked to.
    """

    message: Message
    data: bytes
    shared: Any = None


class PackedMessages:
    """Packs a message that goes to many clients once.

    An entry disappears when nobody holds its `PackedMessage` any more: a transport keeps it with
    the open request.

    >>> packed, message = PackedMessages(), Message("hello")
    >>> first = packed.of(message)
    >>> packed.of(message) is first
    True
    """

    def __init__(self, share: Callable[[bytes], Any] | None = None) -> None:
        """Makes an empty table.

        Args:
            share: puts bytes where all receivers find them, and returns a reference to them.
        """
        self._share = share
        self._by_id: WeakValueDictionary[int, PackedMessage] = WeakValueDictionary()

    def of(self, message: Message) -> PackedMessage:
        """Returns `message` packed; the same object for the same message."""
        packed = self._by_id.get(id(message))
        if packed is None:
            data = pack(message)
            packed = PackedMessage(message, data, self._share(data) if self._share else None)
            self._by_id[id(message)] = packed
        return packed


def read_answer(data: bytes, max_bytes: int) -> Message:
    """Returns the message in an answer, which may come from anybody; "error" if it is none."""
    try:
        return unpack(data, max_bytes=max_bytes)
    except WireError as problem:
        return error(f"WireError: {problem}")
