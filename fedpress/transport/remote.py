"""The transport to clients on other machines. It notices lost calls, and sends them again.

A call is one request to one client. While an answer is missing, the server pings the client. The
client replies with the ids of the calls that it works on. If an id is missing there (because the
client was killed and started again), the server sends the call again with the same id.

A call that arrives twice does no harm: a client process works on each id once and keeps its latest
answers, and a new process computes the same answer again.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fedpress.core.log import logger
from fedpress.core.names import ClientId
from fedpress.errors import WireError
from fedpress.federation.exchange import Answer, RequestId, Traffic, error
from fedpress.transport.link import Link, Lost, Pace, Parcel
from fedpress.transport.packed import PackedMessage, PackedMessages, read_answer
from fedpress.wire.message import MAX_BYTES, Message

log = logger(__name__)

PING_AFTER = 3.0
"""Seconds between two checks of a call without an answer. A check pings the client if it is online
and has no open ping."""
PONG_WITHIN = 12.0
"""Seconds after which a ping counts as lost. The client may have been killed after it got it."""
LOST_AFTER = 60.0
"""A call is given up if its client is offline and has sent nothing for so many seconds."""
MOST_LOSSES = 5
"""A call is given up when the network has lost it, or its answer, so many times."""


@dataclass(frozen=True)
class Presence:
    """Content of a pong, a client's answer to a ping.

    Attributes:
        name: name of the client.
        boot: random id that the client's process draws when it starts. A different id shows that
            the client was started again.
        working: ids of the calls that the client has received but not yet answered.
        fedpress: the client's version of fedpress.
        consent: text that changes when the owner approves a recipe, or takes an approval back.
    """

    name: ClientId
    boot: str
    working: tuple[str, ...] = ()
    fedpress: str = ""
    consent: str = ""

    def to_bytes(self) -> bytes:
        """Returns the body of a pong, as JSON."""
        content = {
            "name": self.name,
            "boot": self.boot,
            "working": list(self.working),
            "fedpress": self.fedpress,
            "consent": self.consent,
        }
        return json.dumps(content).encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> Presence:
        """Reads the body of a pong. It is not trusted: any client may have sent it.

        Raises:
            WireError: if `body` is not a pong.
        """
        try:
            content = json.loads(body)
            working = tuple(map(str, content["working"]))
            name = str(content["name"])
            # An older client sends no `consent`.
            consent = str(content.get("consent", ""))
            return cls(name, str(content["boot"]), working, str(content["fedpress"]), consent)
        # RecursionError: JSON may nest thousands of lists.
        except (ValueError, KeyError, TypeError, RecursionError) as problem:
            raise WireError(
                f"not a pong ({type(problem).__name__})",
                place="pong",
                cure="use the same fedpress on both sides",
            ) from problem


@dataclass(eq=False)
class _Call:
    """A call whose answer is missing. All times are those of `time.monotonic`, in seconds.

    Attributes:
        client: name of the called client.
        parcel: the parcel that was sent.
        packed: the message and its bytes, which all calls with this message share. Kept here
            because `RemoteTransport._packed` refers to it only weakly.
        ticket: the link's ticket of the latest sending, by which the answer is found; empty if the
            link could not send the call.
        heard: when the client last sent a pong; before the first pong, when the call was sent.
        ping: ticket of a ping that is not answered yet; empty if there is none.
        asked: when this call was last sent, or last checked by `_look_after`.
        pinged: when the ping was sent.
        losses: how often the network lost the call or its answer.
    """

    client: ClientId
    parcel: Parcel
    packed: PackedMessage
    ticket: str = ""
    heard: float = 0.0
    ping: str = ""
    asked: float = 0.0
    pinged: float = 0.0
    losses: int = 0


@dataclass(eq=False)
class RemoteTransport:
    """Sends messages to clients through a link, and receives their answers.

    Attributes:
        link: the server's connection to all clients.
        names: names of the clients of this run, in a fixed order.
        session: id of the session (one stage of one run).
        max_bytes: longest accepted answer, in bytes.
        lost_after: seconds; a call is given up if its client is offline and silent for longer.
        traffic: bytes of all messages so far.
        told: is called with a sentence when a client is offline or was started again, or when two
            processes answer as one client.
        hidden: whether only the server may know which clients are asked in a round. Then the
            sentences name no client: they are about clients that are asked.
    """

    link: Link
    names: Sequence[ClientId]
    session: str
    max_bytes: int = MAX_BYTES
    lost_after: float = LOST_AFTER
    told: Callable[[str], None] = lambda sentence: log.info("%s", sentence)
    traffic: Traffic = field(default_factory=Traffic)
    hidden: bool = False

    def __post_init__(self) -> None:
        # Part of every call's id. Random: after a crash of the server, late answers to calls of the
        # earlier process must not be taken for answers to new calls.
        self._prefix = secrets.token_hex(8)
        self._calls: dict[RequestId, _Call] = {}
        self._answers: dict[RequestId, tuple[ClientId, Message]] = {}
        self._boots: dict[ClientId, list[str]] = {}
        self._marks: dict[ClientId, str] = {}
        # Pings of `mark` that are not answered yet: ticket and time.
        self._mark_pings: dict[ClientId, tuple[str, float]] = {}
        self._sent = 0
        # Calls that wait to be sent; a dictionary as an ordered set. Two checks may find the same
        # call lost, but it must be sent again only once.
        self._unsent: dict[RequestId, None] = {}
        self._packed = PackedMessages()

    def clients(self) -> Sequence[ClientId]:
        """Names of the clients of this run, in their fixed order."""
        return list(self.names)

    def send(self, client: ClientId, message: Message) -> RequestId:
        """Converts `message` to bytes. They are sent later, at the next `receive`.

        Returns:
            Id of the request, for `receive` and `cancel`.
        """
        packed = self._packed.of(message)
        self.traffic += Traffic(down=len(packed.data))
        self._sent += 1
        request = self._sent
        parcel = Parcel("call", f"{self._prefix}-{request}", self.session, packed.data)
        self._calls[request] = _Call(client, parcel, packed)
        # Not sent at once: if all calls of a round are sent together, the link transfers the body
        # that they share only once.
        self._unsent[request] = None
        return request

    def receive(
        self, requests: Collection[RequestId], timeout: float | None = None
    ) -> Answer | None:
        """Waits for the next answer to one of `requests`.

        Returns:
            Client, request and answer; None after `timeout` seconds, or if none of the requests is
            open.

        Raises:
            NetworkError: if the network itself no longer works.
        """
        end = None if timeout is None else time.monotonic() + timeout
        pace = Pace()
        while True:
            self._flush()
            for request in requests:
                if request in self._answers:
                    client, message = self._answers.pop(request)
                    return client, request, message
            if not any(request in self._calls for request in requests):
                return None
            if self._poll():
                pace.reset()
                continue
            now = time.monotonic()
            if end is not None and now >= end:
                return None
            pause = pace.seconds()
            time.sleep(pause if end is None else min(pause, max(end - now, 0.0)))

    def cancel(self, requests: Collection[RequestId]) -> None:
        """Forgets `requests`; answers that arrive later are dropped.

        A client is not told: if it works on such a request, it finishes the work.
        """
        for request in requests:
            self._calls.pop(request, None)
            self._answers.pop(request, None)
            self._unsent.pop(request, None)

    def mark(self, client: ClientId) -> str:
        """Pings a client that is not called, and returns what is known of it without waiting.

        Returns:
            Text of its latest pong that changes if the client was started again, or its owner
            approved a recipe; "" if no pong has come yet.
        """
        self._poll()
        now = time.monotonic()
        open_ping = self._mark_pings.get(client)
        if open_ping is None or now - open_ping[1] > PONG_WITHIN:
            self._mark_pings[client] = self._ping(client), now
        return self._marks.get(client, "")

    def _ping(self, client: ClientId) -> str:
        """Sends a ping, and returns its ticket."""
        ping = Parcel("ping", f"{self._prefix}-ping", "", b"")
        # There is no ticket if the SuperLink (Flower's server) restarts at this moment.
        return self.link.send({client: ping}).get(client, "")

    def _flush(self) -> None:
        """Sends all waiting calls."""
        waiting, self._unsent = list(self._unsent), {}
        # `Link.send` takes at most one parcel for each client, so a second call to the same client
        # is sent in a further batch.
        while waiting:
            batch: dict[ClientId, RequestId] = {}
            later = []
            for request in waiting:
                client = self._calls[request].client
                if client in batch:
                    later.append(request)
                else:
                    batch[client] = request
            self._send(list(batch.values()))
            waiting = later

    def _send(self, requests: Sequence[RequestId]) -> None:
        """Sends calls to different clients."""
        calls = {self._calls[request].client: self._calls[request] for request in requests}
        tickets = self.link.send({client: call.parcel for client, call in calls.items()})
        now = time.monotonic()
        for client, call in calls.items():
            call.ticket = tickets.get(client, "")
            call.heard = call.asked = now

    def _poll(self) -> bool:
        """Handles all parcels that have arrived; returns whether one of them finished a call."""
        tickets = {call.ticket: request for request, call in self._calls.items() if call.ticket}
        pings = {call.ping: request for request, call in self._calls.items() if call.ping}
        marks = {ticket: client for client, (ticket, _) in self._mark_pings.items() if ticket}
        found = self.link.poll([*tickets, *pings, *marks])
        took = False
        for ticket, answer in found.items():
            if ticket in marks:
                del self._mark_pings[marks[ticket]]
                self._read_pong(marks[ticket], answer)
            elif ticket in pings:
                self._take_pong(pings[ticket], answer)
            # An earlier parcel of this loop may have closed the call.
            elif tickets[ticket] in self._calls:
                took = self._take(tickets[ticket], answer) or took
        self._look_after()
        return took

    def _take(self, request: RequestId, answer: Parcel | Lost) -> bool:
        """Handles an answer, or its loss; returns whether the call is finished."""
        call = self._calls[request]
        if isinstance(answer, Lost) and not answer.again:
            self._close(request, error(f"WireError: {answer.reason}"))
            return True
        if isinstance(answer, Lost):
            # Nobody knows whether the network lost the call or its answer: the call is sent again.
            log.info("a call to %s was lost (%s)", self._shown(call.client), answer.reason)
            call.ticket = ""
            # `_look_after` sends it when the client is back, or gives up after `lost_after`.
            if not self.link.online().get(call.client):
                return False
            call.losses += 1
            if call.losses >= MOST_LOSSES:
                self._close(request, error(f"lost: {answer.reason}"))
                return True
            self._unsent[request] = None
            return False
        # A client must not answer a call of another client or of an earlier round.
        if answer.what != "answer" or answer.request != call.parcel.request:
            message = error("WireError: it answered another call")
        else:
            self.traffic += Traffic(up=len(answer.body))
            message = read_answer(answer.body, self.max_bytes)
        self._close(request, message)
        return True

    def _close(self, request: RequestId, message: Message) -> None:
        """Stores the answer to a call (or an error in its place), and closes the call."""
        client = self._calls.pop(request).client
        self._unsent.pop(request, None)
        self._answers[request] = client, message

    def _take_pong(self, request: RequestId, answer: Parcel | Lost) -> None:
        """Handles a pong: if the client does not work on the call, the call is sent again."""
        call = self._calls.get(request)
        if call is None:
            return
        call.ping = ""
        presence = self._read_pong(call.client, answer)
        if presence is None:
            return
        call.heard = time.monotonic()
        # Usually the client works on the call. If not, the call was lost when the client's process
        # was killed, or the answer is on its way; sending the call again is right in both cases.
        if call.ticket and call.parcel.request not in presence.working:
            self._unsent[request] = None

    def _read_pong(self, client: ClientId, answer: Parcel | Lost) -> Presence | None:
        """Notes what a pong says about its client; returns None if it was lost or is unreadable."""
        if isinstance(answer, Lost):
            return None
        try:
            presence = Presence.from_bytes(answer.body)
        except WireError as problem:
            log.warning("%s: %s", self._shown(client), problem)
            return None
        self._marks[client] = f"{presence.boot} {presence.consent}"
        self._note_boot(client, presence.boot)
        return presence

    def _note_boot(self, client: ClientId, boot: str) -> None:
        """Reports that a client was started again, or that two processes answer as one client.

        A restarted client never has an old id again. So an old id that comes back after a new one
        shows that two processes run.
        """
        boots = self._boots.setdefault(client, [])
        if boots and boot == boots[-1]:
            return
        if boot in boots:
            self.told(
                f"two processes answer as {self._shown(client)}, with one key: end one of them, or "
                "give it a folder of its own (fedpress network add)"
            )
        elif boots:
            self.told(f"{self._shown(client)} was started again")
        # The latest boot comes last.
        self._boots[client] = [*(one for one in boots if one != boot), boot]

    def _shown(self, client: ClientId) -> str:
        return "a client of the round" if self.hidden else f"client '{client}'"

    def _look_after(self) -> None:
        """Pings online clients that have not answered for long, and reports offline clients.

        Calls to clients that have been offline and silent for too long are given up.
        """
        now = time.monotonic()
        late = {
            request: call
            for request, call in self._calls.items()
            if request not in self._unsent and now - call.asked > PING_AFTER
        }
        # In an ordinary round no call is late, and the network need not be asked who is online.
        if not late:
            return
        online = self.link.online()
        for request, call in late.items():
            call.asked = now
            if online.get(call.client):
                # The client was not connected when the call was sent, and has come since.
                if not call.ticket:
                    self._unsent[request] = None
                elif not call.ping or now - call.pinged > PONG_WITHIN:
                    call.ping = self._ping(call.client)
                    call.pinged = now
                continue
            call.ping = ""
            silent = now - call.heard
            self.told(f"{self._shown(call.client)} is offline for {silent:.0f} s")
            if silent > self.lost_after:
                reason = f"it is offline for more than {self.lost_after:.0f} s"
                self._close(request, error(f"lost: {reason}"))


def presences(
    link: Link, names: Mapping[ClientId, bool], *, timeout: float
) -> dict[ClientId, Presence]:
    """Pings all clients that are online, and returns their pongs.

    Args:
        link: the server's connection to all clients.
        names: client name -> whether it is online.
        timeout: seconds to wait for pongs.

    Returns:
        Client name -> content of its pong. Clients that did not answer in time are missing.

    Raises:
        WireError: if a client's reply is not a pong.
        NetworkError: if the network itself does not work.
    """
    ping = Parcel("ping", secrets.token_hex(8), "", b"")
    tickets = link.send({name: ping for name, there in names.items() if there})
    clients = {ticket: name for name, ticket in tickets.items()}
    found: dict[ClientId, Presence] = {}
    end = time.monotonic() + timeout
    while clients and time.monotonic() < end:
        for ticket, answer in link.poll(list(clients)).items():
            name = clients.pop(ticket)
            if isinstance(answer, Parcel):
                found[name] = Presence.from_bytes(answer.body)
        time.sleep(Pace.SHORTEST)
    return found
