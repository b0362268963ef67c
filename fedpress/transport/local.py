"""The local transport: clients in this process, asked with the bytes that a network would carry."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakValueDictionary

from fedpress.core.names import ClientId
from fedpress.errors import WireError
from fedpress.federation.exchange import Answer, RequestId, Traffic, error
from fedpress.wire.message import MAX_BYTES, Message, pack, unpack

Handler: TypeAlias = Callable[[bytes], bytes]
"""The bytes of a request -> the bytes of the client's answer."""


@dataclass(frozen=True, eq=False)
class _PackedMessage:
    """A message and its bytes."""

    message: Message
    data: bytes


class LocalTransport:
    """Calls one handler per client.

    A handler that raises gives an answer of kind "error": the client is dropped from the round, and
    the run goes on. A client works when its answer is received, so a request that is cancelled
    before that costs no work.
    """

    def __init__(self, handlers: Mapping[ClientId, Handler], *, max_bytes: int = MAX_BYTES) -> None:
        """Makes a transport.

        Args:
            handlers: name of each client -> the function that answers for it.
            max_bytes: longest answer that is accepted, in bytes.
        """
        self._handlers = dict(handlers)
        self._max_bytes = max_bytes
        self._traffic = Traffic()
        self._open: dict[RequestId, tuple[ClientId, _PackedMessage]] = {}
        self._sent = 0
        # A message that goes to many clients is packed once. It is found by the identity of the
        # object, and forgotten when the last request with it is answered.
        self._packed: WeakValueDictionary[int, _PackedMessage] = WeakValueDictionary()

    @property
    def traffic(self) -> Traffic:
        """Bytes carried since the transport was made."""
        return self._traffic

    def clients(self) -> Sequence[ClientId]:
        """Names of the clients, in the order in which they were given."""
        return list(self._handlers)

    def send(self, client: ClientId, message: Message) -> RequestId:
        """Packs `message` and keeps it until its answer is received or cancelled."""
        packed = self._packed.get(id(message))
        if packed is None:
            # It holds the message too, so that no other object gets the same identity meanwhile.
            packed = _PackedMessage(message, pack(message))
            self._packed[id(message)] = packed
        self._traffic += Traffic(down=len(packed.data))
        self._sent += 1
        self._open[self._sent] = client, packed
        return self._sent

    def receive(
        self, requests: Collection[RequestId], timeout: float | None = None
    ) -> Answer | None:
        """Lets the client of the first of `requests` work, and returns its answer.

        Args:
            requests: the requests that are waited for.
            timeout: ignored, since answers are there at once. Slow clients are simulated by the
                clock of the schedule.

        Returns:
            The answer, of kind "error" if the client failed; None if none of `requests` is open.
        """
        first = next((request for request in self._open if request in requests), None)
        if first is None:
            return None
        client, packed = self._open.pop(first)
        return client, first, self._ask(client, packed.data)

    def cancel(self, requests: Collection[RequestId]) -> None:
        """Forgets `requests`; their clients do nothing."""
        for request in requests:
            self._open.pop(request, None)

    def _ask(self, client: ClientId, request: bytes) -> Message:
        try:
            reply = self._handlers[client](request)
        except Exception as problem:
            # Whatever a client does wrong must not end the run, as over a network.
            reply = pack(error(f"{type(problem).__name__}: {problem}"))
        self._traffic += Traffic(up=len(reply))
        # The reply is unpacked like one from a stranger: tests with bad clients go through here.
        try:
            return unpack(reply, max_bytes=self._max_bytes)
        except WireError as problem:
            return error(f"WireError: {problem}")
