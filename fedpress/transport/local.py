"""Clients in this process, one after another, through the same bytes that a network would carry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from fedpress.core.names import ClientId
from fedpress.errors import WireError
from fedpress.federation.exchange import Traffic, error
from fedpress.wire.message import MAX_BYTES, Message, pack, unpack

Handler: TypeAlias = Callable[[bytes], bytes]


class LocalTransport:
    """Calls one handler per client; a handler that raises drops that client from the round, not the run."""

    def __init__(self, handlers: Mapping[ClientId, Handler], *, max_bytes: int = MAX_BYTES) -> None:
        """Takes `handlers` by client name; replies above `max_bytes` are refused."""
        self._handlers = dict(handlers)
        self._max_bytes = max_bytes
        self._traffic = Traffic()

    @property
    def traffic(self) -> Traffic:
        """Bytes carried since the transport was made."""
        return self._traffic

    def clients(self) -> Sequence[ClientId]:
        """Names of the clients, in the order in which they were given."""
        return list(self._handlers)

    def exchange(self, requests: Mapping[ClientId, Message]) -> Iterator[tuple[ClientId, Message]]:
        """Yields the reply of each client, in the order of `requests`; a failure is a message of kind "error"."""
        packed: dict[int, bytes] = {}  # a broadcast is one message object: pack it once
        for client, message in requests.items():
            if id(message) not in packed:
                packed[id(message)] = pack(message)
            yield client, self._ask(client, packed[id(message)])

    def _ask(self, client: ClientId, request: bytes) -> Message:
        self._traffic = Traffic(self._traffic.up, self._traffic.down + len(request))
        try:
            reply = self._handlers[client](request)
        except Exception as problem:  # whatever a client does wrong must not end the run
            reply = pack(error(f"{type(problem).__name__}: {problem}"))
        self._traffic = Traffic(self._traffic.up + len(reply), self._traffic.down)
        try:
            return unpack(reply, max_bytes=self._max_bytes)
        except WireError as problem:
            return error(f"WireError: {problem}")
