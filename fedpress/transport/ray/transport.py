"""The transport to clients in actors: what they are sent, and what comes back."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedpress.core.log import logger
from fedpress.core.names import ClientId
from fedpress.errors import RunError
from fedpress.federation.client_state import ClientState
from fedpress.federation.exchange import Answer, RequestId, Traffic, error, failure
from fedpress.transport.actor import Reply, Stored
from fedpress.transport.packed import PackedMessage, PackedMessages, read_answer
from fedpress.transport.ray.actors import Cluster, Home
from fedpress.wire.message import MAX_BYTES, Message, pack

log = logger(__name__)

WINDOW = 2
"""Most requests that an actor has at once: the one it works on, and the next one, so that it need
not wait."""
SET_UP = ("agree", "roster")
"""Kinds of messages that a client in a new process must get again, in this order."""
LOST = "the process of this client was lost; a new one takes its place"
"""Text of the answer to a request whose actor was lost."""


class RayTransport:
    """Carries messages to clients in actors, which work at the same time.

    If an actor is lost, the request that it worked on gets an answer of kind "error". A new actor
    is started, and answers the requests that the lost one had not begun.

    What a client stores comes back with its answer, and `receive` writes it to the server's storage
    (`memories`) when it returns the answer. A request that is cancelled while a client works on it
    leaves no trace, as with the local transport: before its next request the client is set back to
    what is stored in `memories`. This is enough, because a schedule never sends a client two
    requests at a time.
    """

    def __init__(
        self,
        cluster: Cluster,
        homes: Sequence[Home],
        memories: Mapping[ClientId, ClientState],
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Makes a transport.

        Args:
            cluster: starts a lost actor again.
            homes: the started actors.
            memories: name of each client -> where its state is stored between rounds.
            max_bytes: largest accepted answer, in bytes.
        """
        self._cluster = cluster
        self._ray = cluster.ray
        self.homes = list(homes)
        self._home = {name: home for home in homes for name in home.clients}
        self._memories = dict(memories)
        self._max_bytes = max_bytes
        self._traffic = Traffic()
        self._sent = 0
        self._open: dict[RequestId, tuple[ClientId, PackedMessage]] = {}
        self._replies: dict[RequestId, Reply] = {}
        # Clients whose stored state must be sent to their actor with their next request.
        self._away = set(self._memories)
        self._set_up: dict[ClientId, dict[str, bytes]] = {name: {} for name in self._memories}
        # The bytes of a message to many clients are put into Ray's object store only once.
        self._packed = PackedMessages(self._ray.put)

    @property
    def traffic(self) -> Traffic:
        """Bytes carried since the transport was made."""
        return self._traffic

    def clients(self) -> Sequence[ClientId]:
        """Names of the clients, in the order in which they were given."""
        return list(self._memories)

    def send(self, client: ClientId, message: Message) -> RequestId:
        """Gives `message` to the actor of `client`, or lets it wait for its turn."""
        packed = self._packed.of(message)
        self._traffic += Traffic(down=len(packed.data))
        self._sent += 1
        self._open[self._sent] = client, packed
        home = self._home[client]
        home.waiting.append(self._sent)
        self._feed(home)
        return self._sent

    def receive(
        self, requests: Collection[RequestId], timeout: float | None = None
    ) -> Answer | None:
        """Waits for the answer to the first of `requests`, in the order in which they were sent.

        The answer to a later request may be ready sooner, but it waits: a schedule that takes the
        first answers must choose the same clients as with the local transport.

        Args:
            requests: the requests to wait for.
            timeout: seconds after which None is returned; None: no limit.

        Returns:
            The answer; None after `timeout` seconds, or if none of `requests` is open.

        Raises:
            NetworkError: if a lost actor cannot be started again.
        """
        end = None if timeout is None else time.monotonic() + timeout
        first = next((request for request in self._open if request in requests), None)
        if first is None:
            return None
        while first not in self._replies:
            working: dict[Any, Home] = {}
            for home in self.homes:
                working |= dict.fromkeys(home.working.values(), home)
            left = None if end is None else max(0.0, end - time.monotonic())
            ready, _ = self._ray.wait(list(working), num_returns=1, timeout=left)
            if not ready:
                return None
            self._collect(working[ready[0]])
        return self._deliver(first)

    def cancel(self, requests: Collection[RequestId]) -> None:
        """Forgets `requests`. A request that was not sent to an actor yet costs no work."""
        for request in requests:
            if request not in self._open:
                continue
            client, _ = self._open.pop(request)
            waiting = self._home[client].waiting
            if request in waiting:
                waiting.remove(request)
            else:
                self._replies.pop(request, None)
                self._away.add(client)

    def close(self) -> None:
        """Ends the actors."""
        self._cluster.end(self.homes)

    def _feed(self, home: Home) -> None:
        """Sends waiting requests to an actor; if it was lost, a new actor is started first."""
        while home.waiting and len(home.working) < WINDOW:
            if home.actor is None:
                log.warning("the actor of %s is started again", ", ".join(home.clients[:3]))
                self._cluster.start([home])
            request = home.waiting.popleft()
            client, packed = self._open[request]
            try:
                stored = self._stored(client)
            # A damaged file: the client fails, as it does in the local transport.
            except RunError as problem:
                self._replies[request] = Reply(pack(failure(problem)))
                continue
            self._away.discard(client)
            kind = packed.message.kind
            if kind in SET_UP:
                self._set_up[client][kind] = packed.data
            home.working[request] = home.actor.answer.remote(client, packed.shared, stored)

    def _stored(self, client: ClientId) -> Stored | None:
        """Returns the state to send with a client's next request; None if its actor has it."""
        if client not in self._away:
            return None
        known = self._set_up[client]
        set_up = tuple(known[kind] for kind in SET_UP if kind in known)
        return Stored(self._memories[client].copied(), set_up)

    def _collect(self, home: Home) -> None:
        """Takes the replies that an actor has ready, and gives it more work."""
        while home.working:
            request, reference = next(iter(home.working.items()))
            # The actor works in order, so no later reply is ready if this one is not.
            if not self._ray.wait([reference], timeout=0)[0]:
                break
            del home.working[request]
            try:
                reply: Reply = self._ray.get(reference)
            except self._ray.exceptions.RayError as problem:
                log.warning("an actor was lost: %s", problem)
                reply = Reply(pack(error(LOST)))
                self._leave(home)
            # The request may have been cancelled meanwhile.
            if request in self._open:
                self._replies[request] = reply
        self._feed(home)

    def _leave(self, home: Home) -> None:
        """Ends a lost actor. Requests that it had not begun wait for the next actor."""
        self._cluster.end([home])
        for request in reversed(home.working):
            if request in self._open:
                home.waiting.appendleft(request)
        home.working.clear()
        self._away.update(home.clients)

    def _deliver(self, request: RequestId) -> Answer:
        """Writes what the client has stored to the server's storage, and returns the answer."""
        client, _ = self._open.pop(request)
        reply = self._replies.pop(request)
        data = reply.data
        # Before the answer is used: after a crash a client must still know what it has answered.
        try:
            for write in reply.writes:
                write.store(self._memories[client])
        # A full disk: the client fails, as it does in the local transport.
        except Exception as problem:
            data = pack(failure(problem))
            self._away.add(client)
        self._traffic += Traffic(up=len(data))
        return client, request, read_answer(data, self._max_bytes)
