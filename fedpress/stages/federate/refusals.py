"""A transport that leaves clients alone whose owners refused the run, until something changes there.

The clients of a stage are fixed before its first round, because the noise is planned for exactly
these. So a client that refuses the agreement stays among them, and the rounds go on asking it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from fedpress.core.names import ClientId
from fedpress.federation.exchange import Answer, RequestId, Traffic, Transport, error
from fedpress.wire.message import Message

AGREEMENT = "agree"
"""Kind of the message that a client may refuse for the whole run."""
AGREED_NOW = "it has agreed now, and takes part from the next round on"
"""The answer, in that round, of a client that agrees after a refusal."""


@dataclass(eq=False)
class WithoutRefusers:
    """Wraps a transport: gives the refusal of a refuser as its answer, and sends it nothing.

    When something has changed at such a client, it is asked once more whether it agrees.

    Attributes:
        transport: carries all other messages.
        mark: returns a text about a client that changes if the client is started again, or its
            owner approves a recipe; "" if it is not known yet.
        refused: client -> its refusal of the agreement.
    """

    transport: Transport
    mark: Callable[[ClientId], str]
    refused: dict[ClientId, Message] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._question: Message | None = None
        # The mark with which a client refused.
        self._marks: dict[ClientId, str] = {}
        # Requests that ask whether a client agrees -> its mark.
        self._agreeing: dict[RequestId, str] = {}
        # Those of them that were sent in the place of another request.
        self._instead: set[RequestId] = set()
        self._answers: dict[RequestId, tuple[ClientId, Message]] = {}
        self._own = 0

    @property
    def traffic(self) -> Traffic:
        """See `Transport`."""
        return self.transport.traffic

    def clients(self) -> Sequence[ClientId]:
        """See `Transport`."""
        return self.transport.clients()

    def send(self, client: ClientId, message: Message) -> RequestId:
        """Sends `message`, unless the client has refused the agreement; see `Transport`."""
        if message.kind == AGREEMENT:
            self._question = message
            return self._ask(client, message, self.mark(client) if client in self.refused else "")
        if client not in self.refused:
            return self.transport.send(client, message)
        now = self.mark(client)
        # The first mark that is known counts as the one of the refusal.
        before = self._marks[client] = self._marks.get(client) or now
        if now != before and self._question is not None:
            request = self._ask(client, self._question, now)
            self._instead.add(request)
            return request
        # Below 0, because the numbers of the wrapped transport are above.
        self._own -= 1
        self._answers[self._own] = client, self.refused[client]
        return self._own

    def _ask(self, client: ClientId, question: Message, mark: str) -> RequestId:
        request = self.transport.send(client, question)
        self._agreeing[request] = mark
        return request

    def receive(
        self, requests: Collection[RequestId], timeout: float | None = None
    ) -> Answer | None:
        """See `Transport`."""
        for request in requests:
            if request in self._answers:
                client, reply = self._answers.pop(request)
                return client, request, reply
        answer = self.transport.receive(requests, timeout)
        if answer is None or answer[1] not in self._agreeing:
            return answer
        client, request, reply = answer
        self._marks[client] = self._agreeing.pop(request)
        if reply.kind == "refused":
            self.refused[client] = reply
            self._marks[client] = self._marks[client] or self.mark(client)
        elif reply.kind == "agreed":
            self.refused.pop(client, None)
        if request in self._instead:
            self._instead.remove(request)
            reply = error(AGREED_NOW) if reply.kind == "agreed" else reply
        return client, request, reply

    def cancel(self, requests: Collection[RequestId]) -> None:
        """See `Transport`."""
        for request in requests:
            self._answers.pop(request, None)
            # Its mark is not kept, so the client is asked again the next time.
            self._agreeing.pop(request, None)
            self._instead.discard(request)
        self.transport.cancel(requests)
