"""A link that notes which clients are online, late or refusing, for `fedpress watch`."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpress.core.log import logger
from fedpress.core.names import ClientId
from fedpress.errors import WireError
from fedpress.federation.trust import trust_of
from fedpress.stages.base import Stage
from fedpress.stages.federate.settings import FederateSettings
from fedpress.transport.link import Link, Lost, Parcel
from fedpress.wire.message import kind_of, unpack
from fedpress.workspace.presence import MOST_LETTERS, ClientNow, PresenceNow, RefusedNow

log = logger(__name__)

EVERY = 1.0
"""Seconds between two writings of the file."""
LOOK_EVERY = 5.0
"""Seconds between two questions of who is online, while answers are waited for."""
LONGEST_REFUSAL = 4096
"""Longest answer that is read here, in bytes; longer ones are no refusals."""
SHOWN_IF_HIDDEN = "offer"
"""Where the cohort is hidden, only refusals of this message are noted.

It goes to all clients, and those that refuse it take no part at all. A refusal of a later message
would tell something about the clients of the run.
"""


def hides_cohort(stages: Iterable[Stage]) -> bool:
    """Whether in any of the stages only the server may know which clients take part in a round."""
    private = [one.privacy for one in stages if isinstance(one, FederateSettings)]
    return any(one is not None and trust_of(one.unit, one.trust).hides_cohort for one in private)


@dataclass(eq=False)
class _Open:
    """The last call to a client.

    Attributes:
        request: name of the call.
        ticket: the link's ticket of the last time that the call was sent.
        kind: kind of the message.
        at: when the call was first sent, in seconds since 1970.
        awaited: whether the server still asks for the answer.
    """

    request: str
    ticket: str
    kind: str
    at: float
    awaited: bool = True


class ObservedLink:
    """Passes everything on to another link, and writes `presence.json` in a thread of its own."""

    def __init__(self, link: Link, *, hidden: bool) -> None:
        """Prepares the link; nothing is written before `write_into`.

        Args:
            link: the link that carries the parcels.
            hidden: see `PresenceNow`.
        """
        self.link = link
        self._hidden = hidden
        self._online: dict[ClientId, bool] = {}
        self._open: dict[ClientId, _Open] = {}
        self._heard: dict[ClientId, float] = {}
        self._seconds: dict[ClientId, float] = {}
        self._refused: dict[ClientId, RefusedNow] = {}
        self._next_look = 0.0
        self._changed = True
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def write_into(self, folder: Path) -> None:
        """Begins to write the file into the folder of the run, at most once a second."""
        name = "fedpress-presence"
        self._thread = threading.Thread(target=self._write, args=(folder,), name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Writes the file for the last time; the other link stays open."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def online(self) -> Mapping[ClientId, bool]:
        """See `Link`."""
        began = time.monotonic()
        found = self.link.online()
        ended = time.monotonic()
        # A slow network is asked less often.
        self._next_look = ended + max(LOOK_EVERY, 10 * (ended - began))
        with self._lock:
            self._changed = self._changed or found != self._online
            self._online = dict(found)
        return found

    def send(self, parcels: Mapping[ClientId, Parcel]) -> dict[ClientId, str]:
        """See `Link`."""
        tickets = self.link.send(parcels)
        now = time.time()
        with self._lock:
            for client, ticket in tickets.items():
                parcel = parcels[client]
                if parcel.what == "call":
                    self._asked(client, parcel, ticket, now)
        return tickets

    def _asked(self, client: ClientId, parcel: Parcel, ticket: str, now: float) -> None:
        before = self._open.get(client)
        if before is not None and before.request == parcel.request:
            # The call was sent again: the client is as late as before.
            before.ticket, before.awaited = ticket, True
        else:
            self._open[client] = _Open(parcel.request, ticket, kind_of(parcel.body), now)
        self._changed = True

    def poll(self, tickets: Collection[str]) -> dict[str, Parcel | Lost]:
        """See `Link`."""
        found = self.link.poll(tickets)
        with self._lock:
            self._note(found, set(tickets))
        if time.monotonic() > self._next_look:
            self.online()
        return found

    def _note(self, found: Mapping[str, Parcel | Lost], asked_for: set[str]) -> None:
        now = time.time()
        for client, call in list(self._open.items()):
            answer = found.get(call.ticket)
            if isinstance(answer, Parcel) and answer.what == "answer":
                del self._open[client]
                self._heard[client] = now
                self._seconds[client] = now - call.at
                self._take(client, call, answer)
                self._changed = True
            elif call.awaited and call.ticket not in asked_for:
                call.awaited = False
                self._changed = True

    def _take(self, client: ClientId, call: _Open, answer: Parcel) -> None:
        """Notes whether the client refused what it was asked."""
        if self._hidden and call.kind != SHOWN_IF_HIDDEN:
            return
        self._refused.pop(client, None)
        if len(answer.body) > LONGEST_REFUSAL:
            return
        try:
            message = unpack(answer.body, max_bytes=LONGEST_REFUSAL)
        except WireError:
            # `RemoteTransport` reads the same answer and reports the damage.
            return
        if message.kind == "refused":
            rule = str(message.header.get("rule", ""))[:MOST_LETTERS]
            reason = str(message.header.get("reason", ""))[:MOST_LETTERS]
            self._refused[client] = RefusedNow(client, rule, reason)

    def now(self) -> PresenceNow:
        """Returns what is known of all clients."""
        with self._lock:
            clients = tuple(map(self._client, self._online))
            return PresenceNow(
                at=time.time(),
                known=len(clients),
                online=sum(self._online.values()),
                hidden=self._hidden,
                clients=clients,
                refused=tuple(self._refused[name] for name in sorted(self._refused)),
            )

    def _client(self, name: ClientId) -> ClientNow:
        call = self._open.get(name)
        return ClientNow(
            name,
            self._online[name],
            heard=self._heard.get(name),
            asked=None if call is None else call.at,
            awaited=call is not None and call.awaited,
            seconds=self._seconds.get(name),
        )

    def _write(self, folder: Path) -> None:
        """Writes the file as often as something has changed."""
        silent = False
        stopped = False
        while not stopped:
            stopped = self._stopped.wait(EVERY)
            # While an answer is missing, the time of the file shows that the server still waits.
            if not (self._changed or self._open):
                continue
            self._changed = False
            try:
                self.now().write(folder)
                silent = False
            except OSError as problem:
                # The run does not need the file: a full disk stops it elsewhere, with a cure.
                if not silent:
                    log.warning("%s: %s", folder, problem)
                silent = True
