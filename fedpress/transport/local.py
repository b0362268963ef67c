"""Clients in this process, one after another, through the same bytes that a network would carry."""

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


@dataclass(frozen=True, eq=False)
class _Packed:
    """A message and its bytes."""

    message: Message
    data: bytes


class LocalTransport:
    """Calls one handler per client; a handler that raises drops that client from the round, not the run.

    A client works when its answer is received, so a request that is cancelled before costs no work.
    """

    def __init__(self, handlers: Mapping[ClientId, Handler], *, max_bytes: int = MAX_BYTES) -> None:
        """Takes `handlers` by client name; replies above `max_bytes` are refused."""
        self._handlers = dict(handlers)
        self._max_bytes = max_bytes
        self._traffic = Traffic()
        self._open: dict[RequestId, tuple[ClientId, _Packed]] = {}
        self._sent = 0
        # By the id of the message object, as long as a request that holds it is open: a broadcast is packed once.
        self._packed: WeakValueDictionary[int, _Packed] = WeakValueDictionary()

    @property
    def traffic(self) -> Traffic:
        """Bytes carried since the transport was made."""
        return self._traffic

    def clients(self) -> Sequence[ClientId]:
        """Names of the clients, in the order in which they were given."""
        return list(self._handlers)

    def send(self, client: ClientId, message: Message) -> RequestId:
        """Packs `message` and keeps it until its answer is received."""
        packed = self._packed.get(id(message))
        if packed is None:
            packed = self._packed[id(message)] = _Packed(message, pack(message))
        self._traffic += Traffic(down=len(packed.data))
        self._sent += 1
        self._open[self._sent] = client, packed
        return self._sent

    def receive(
        self, requests: Collection[RequestId], timeout: float | None = None
    ) -> Answer | None:
        """Lets the client of the first of `requests` work and returns its answer; a failure is of kind "error".

        `timeout` is not looked at: answers are there at once. Slow clients are simulated by the schedule's clock.
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
        except Exception as problem:  # whatever a client does wrong must not end the run
            reply = pack(error(f"{type(problem).__name__}: {problem}"))
        self._traffic += Traffic(up=len(reply))
        try:
            return unpack(reply, max_bytes=self._max_bytes)
        except WireError as problem:
            return error(f"WireError: {problem}")
