"""The transport of simulations: all clients are in this process, and are called as functions.

Messages are handed over as they are, and their bytes are counted without being made. On request
they are converted to bytes and back, exactly as over a network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from fedpress.core.names import ClientId
from fedpress.core.threads import torch_threads
from fedpress.federation.exchange import Answer, RequestId, Traffic, failure
from fedpress.transport.packed import (
    CountedMessages,
    PackedMessages,
    deliver_answer,
    read_answer,
)
from fedpress.wire.message import MAX_BYTES, Message, pack

Handler: TypeAlias = Callable[[bytes], bytes]
"""A client's function: the bytes of a request -> the bytes of its answer."""
Answering: TypeAlias = Callable[[Message], Message]
"""A client's function: a request -> its answer."""


class Way(Protocol):
    """How a request gets to a client, and its answer back: as bytes, or as it is."""

    def prepare(self, message: Message) -> tuple[Any, int]:
        """Returns what `ask` needs of a request, and the request's size in bytes."""
        ...

    def ask(self, client: ClientId, prepared: Any) -> tuple[Message, int]:
        """Calls a client; returns its answer (of kind "error" if it fails), and its size."""
        ...


class LocalTransport:
    """Sends a message by calling a function of the client, its handler.

    If a handler raises, the answer has kind "error": the client is dropped from the round, and the
    run continues. A handler is called only by `receive`, so a request that is cancelled before
    costs no work.

    Attributes:
        handlers: name of each client -> the function that is called. One that is replaced here is
            called from the next request on.
    """

    def __init__(self, handlers: Mapping[ClientId, Handler], *, max_bytes: int = MAX_BYTES) -> None:
        """Makes a transport that converts every message to bytes and back.

        Args:
            handlers: name of each client -> its handler.
            max_bytes: longest accepted answer, in bytes.
        """
        self.handlers: dict[ClientId, Callable[..., Any]] = dict(handlers)
        self._way: Way = _ByBytes(self.handlers, max_bytes, PackedMessages())
        self._traffic = Traffic()
        self._open: dict[RequestId, tuple[ClientId, Any]] = {}
        self._sent = 0

    @classmethod
    def of_messages(
        cls, answering: Mapping[ClientId, Answering], *, max_bytes: int = MAX_BYTES
    ) -> LocalTransport:
        """Returns a transport that hands messages over without making their bytes.

        Traffic, limits and errors are those of the bytes. The tensors of a message are shared by
        both sides, so no side may change them in place.

        Args:
            answering: name of each client -> its handler, which takes and returns messages.
            max_bytes: longest accepted answer, in bytes.
        """
        transport = cls({}, max_bytes=max_bytes)
        transport.handlers = dict(answering)
        transport._way = _ByMessages(transport.handlers, max_bytes, CountedMessages())
        return transport

    @property
    def traffic(self) -> Traffic:
        """Bytes carried since the transport was made."""
        return self._traffic

    def clients(self) -> Sequence[ClientId]:
        """Names of the clients, in the order in which they were given."""
        return list(self.handlers)

    def send(self, client: ClientId, message: Message) -> RequestId:
        """Keeps `message` until `receive` or `cancel` is called for the request."""
        prepared, size = self._way.prepare(message)
        self._traffic += Traffic(down=size)
        self._sent += 1
        self._open[self._sent] = client, prepared
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
        client, prepared = self._open.pop(first)
        # One thread, as in every engine: it decides in which order floats are added.
        with torch_threads(1):
            answer, size = self._way.ask(client, prepared)
        self._traffic += Traffic(up=size)
        return client, first, answer

    def cancel(self, requests: Collection[RequestId]) -> None:
        """Forgets `requests`; their handlers are not called."""
        for request in requests:
            self._open.pop(request, None)


@dataclass(frozen=True, eq=False)
class _ByBytes:
    """Converts requests and answers to bytes and back."""

    handlers: Mapping[ClientId, Handler]
    max_bytes: int
    packed: PackedMessages

    def prepare(self, message: Message) -> tuple[Any, int]:
        """See `Way`."""
        packed = self.packed.of(message)
        return packed, len(packed.data)

    def ask(self, client: ClientId, prepared: Any) -> tuple[Message, int]:
        """See `Way`."""
        try:
            reply = self.handlers[client](prepared.data)
        except Exception as problem:
            # As over a network, a client that fails must not end the run.
            reply = pack(failure(problem))
        # Checked like a reply from a network, so that tests with malicious clients are realistic.
        return read_answer(reply, self.max_bytes), len(reply)


@dataclass(frozen=True, eq=False)
class _ByMessages:
    """Hands requests and answers over, and computes their sizes."""

    answering: Mapping[ClientId, Answering]
    max_bytes: int
    counted: CountedMessages

    def prepare(self, message: Message) -> tuple[Any, int]:
        """See `Way`."""
        counted = self.counted.of(message)
        return counted, counted.size

    def ask(self, client: ClientId, prepared: Any) -> tuple[Message, int]:
        """See `Way`."""
        try:
            answer = self.answering[client](prepared.delivered())
        except Exception as problem:
            # As over a network, a client that fails must not end the run.
            answer = failure(problem)
        return deliver_answer(answer, self.max_bytes)
