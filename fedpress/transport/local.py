"""The transport of simulations: all clients are in this process, and are called as functions.

Messages are converted to bytes and back, exactly as over a network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

from fedpress.core.names import ClientId
from fedpress.federation.exchange import Answer, RequestId, Traffic, failure
from fedpress.transport.packed import PackedMessage, PackedMessages, read_answer
from fedpress.wire.message import MAX_BYTES, Message, pack

Handler: TypeAlias = Callable[[bytes], bytes]
"""A client's function: the bytes of a request -> the bytes of its answer."""


class LocalTransport:
    """Sends a message by calling a function of the client, its handler.

    If a handler raises, the answer has kind "error": the client is dropped from the round, and the
    run continues. A handler is called only by `receive`, so a request that is cancelled before
    costs no work.
    """

    def __init__(self, handlers: Mapping[ClientId, Handler], *, max_bytes: int = MAX_BYTES) -> None:
        """Makes a transport.

        Args:
            handlers: name of each client -> its handler.
            max_bytes: longest accepted answer, in bytes.
        """
        self.handlers = dict(handlers)
        self._max_bytes = max_bytes
        self._traffic = Traffic()
        self._open: dict[RequestId, tuple[ClientId, PackedMessage]] = {}
        self._sent = 0
        self._packed = PackedMessages()

    @property
    def traffic(self) -> Traffic:
        """Bytes carried since the transport was made."""
        return self._traffic

    def clients(self) -> Sequence[ClientId]:
        """Names of the clients, in the order in which they were given."""
        return list(self.handlers)

    def send(self, client: ClientId, message: Message) -> RequestId:
        """Packs `message` and keeps it until `receive` or `cancel` is called for the request."""
        packed = self._packed.of(message)
        self._traffic += Traffic(down=len(packed.data))
        self._sent += 1
        self._open[self._sent] = client, packed
        return self._sent

    def receive(
        self, requests: Collection[RequestId], timeout: float | None = None
    ) -> Answer | None:
        """Calls the handler of the oldest open request in `requests`, and returns its answer.

        Args:
            requests: the requests to wait for.
            timeout: ignored, because answers come at once. Slow clients are simulated by the
                virtual clock of the schedule (`fedpress.federation.delays`).

        Returns:
            The answer, of kind "error" if the client failed; None if none of `requests` is open.
        """
        # In the order of sending, so that the same run always gives the same order of answers.
        first = next((request for request in self._open if request in requests), None)
        if first is None:
            return None
        client, packed = self._open.pop(first)
        return client, first, self._ask(client, packed.data)

    def cancel(self, requests: Collection[RequestId]) -> None:
        """Forgets `requests`; their handlers are not called."""
        for request in requests:
            self._open.pop(request, None)

    def _ask(self, client: ClientId, request: bytes) -> Message:
        """Calls a client's handler, and reads its answer."""
        try:
            reply = self.handlers[client](request)
        except Exception as problem:
            # As over a network, a client that fails must not end the run.
            reply = pack(failure(problem))
        self._traffic += Traffic(up=len(reply))
        # Checked like a reply from a network, so that tests with malicious clients are realistic.
        return read_answer(reply, self._max_bytes)
