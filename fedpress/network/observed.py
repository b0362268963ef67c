"""A link to clients that also records which are online, late or refusing, for `fedpress watch`.

A link is the server's connection to its clients. The record is the file `presence.json` in the
folder of the run; the command `fedpress watch` shows it.
"""

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
from fedpress.stages.statistics.settings import StatisticsSettings
from fedpress.transport.link import Link, Lost, Parcel
from fedpress.wire.message import kind_of, unpack
from fedpress.workspace.presence import MOST_LETTERS, ClientNow, PresenceNow, RefusedNow

log = logger(__name__)

EVERY = 1.0
"""Seconds between two writings of the file `presence.json`."""
LOOK_EVERY = 5.0
"""Least seconds between two questions of who is online, while answers are waited for."""
LONGEST_REFUSAL = 4096
"""Longest answer that is read here, in bytes; longer ones are no refusals."""
SHOWN_IF_HIDDEN = "offer"
"""Kind of message whose refusals are recorded even if the cohort is hidden.

An offer goes to all clients, and those that refuse it take no part at all. A refusal of a later
message would tell something about the clients of a round, so it is not recorded.
"""


def hides_cohort(stages: Iterable[Stage]) -> bool:
    """Whether the privacy of any stage needs a secret cohort.

    A cohort is the set of clients of one round. It is secret if client sampling amplifies the
    privacy, and then nobody but the server may learn it.
    """
    asking = [one for one in stages if isinstance(one, FederateSettings | StatisticsSettings)]
    private = [one.privacy for one in asking]
    return any(one is not None and trust_of(one.unit, one.trust).hides_cohort for one in private)


@dataclass(eq=False)
class _Open:
    """The latest call to a client that is not answered yet.

    Attributes:
        request: id of the call.
        ticket: id under which the link finds the answer. Each time that the call is sent, the link
            gives it a new ticket.
        kind: kind of the message, such as "fit".
        at: when the call was first sent, in seconds since 1970.
        awaited: whether the server still waits for the answer.
    """

    request: str
    ticket: str
    kind: str
    at: float
    awaited: bool = True


class ObservedLink:
    """Wraps a link: passes all parcels on, and writes `presence.json` in its own thread."""

    def __init__(self, link: Link, *, hidden: bool) -> None:
        """Wraps `link`; `write_into` begins to write the file.

        Args:
            link: the link that carries the parcels.
            hidden: whether nobody may learn which clients take part in a round. Then the file
                contains counts, but no names.
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
        """Starts to write the file into the folder of the run, at most once a second."""
        # In its own thread, so that a slow disk does not delay the run.
        name = "fedpress-presence"
        self._thread = threading.Thread(target=self._write, args=(folder,), name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Writes the file for the last time; the wrapped link stays open."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def online(self) -> Mapping[ClientId, bool]:
        """See `Link`."""
        began = time.monotonic()
        found = self.link.online()
        ended = time.monotonic()
        # On a slow network at most a tenth of the time is spent on this question.
        self._next_look = ended + max(LOOK_EVERY, 10 * (ended - began))
        with self._lock:
            self._changed = self._changed or found != self._online
            self._online = dict(found)
        return found

    def send(self, parcels: Mapping[ClientId, Parcel]) -> dict[ClientId, str]:
        """See `Link`."""
        tickets = self.link.send(parcels)
        # Wall-clock time, since another process reads it from the file.
        now = time.time()
        with self._lock:
            for client, ticket in tickets.items():
                parcel = parcels[client]
                if parcel.what == "call":
                    self._asked(client, parcel, ticket, now)
        return tickets

    def _asked(self, client: ClientId, parcel: Parcel, ticket: str, now: float) -> None:
        """Records that a call was sent."""
        before = self._open.get(client)
        if before is not None and before.request == parcel.request:
            # The same call was sent again. `at` stays: the client is late since the first sending.
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
        """Records new answers, and which calls the server no longer waits for."""
        now = time.time()
        for client, call in list(self._open.items()):
            answer = found.get(call.ticket)
            if isinstance(answer, Parcel) and answer.what == "answer":
                del self._open[client]
                self._heard[client] = now
                self._seconds[client] = now - call.at
                self._take(client, call, answer)
                self._changed = True
            # The server has given the call up: it polls for other tickets only.
            elif call.awaited and call.ticket not in asked_for:
                call.awaited = False
                self._changed = True

    def _take(self, client: ClientId, call: _Open, answer: Parcel) -> None:
        """Records whether the answer is a refusal."""
        if self._hidden and call.kind != SHOWN_IF_HIDDEN:
            return
        self._refused.pop(client, None)
        if len(answer.body) > LONGEST_REFUSAL:
            return
        try:
            message = unpack(answer.body, max_bytes=LONGEST_REFUSAL)
        except WireError:
            # Not reported here: `RemoteTransport` reads the same answer and reports the damage.
            return
        if message.kind == "refused":
            # Cut, because the client chose these texts: the file must stay small.
            rule = str(message.header.get("rule", ""))[:MOST_LETTERS]
            reason = str(message.header.get("reason", ""))[:MOST_LETTERS]
            self._refused[client] = RefusedNow(client, rule, reason)

    def now(self) -> PresenceNow:
        """Returns the state of all clients at this moment."""
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
        """Writes the file when something has changed, until `close` is called."""
        silent = False
        stopped = False
        while not stopped:
            stopped = self._stopped.wait(EVERY)
            # While an answer is missing the file is always written: its time shows the reader that
            # the server is alive and still waits.
            if not (self._changed or self._open):
                continue
            # Cleared before the file is written, so that a change meanwhile is written next time.
            self._changed = False
            try:
                self.now().write(folder)
                silent = False
            except OSError as problem:
                # The run goes on, because it does not need the file. If the disk is full, the run
                # itself soon stops with an error that names a cure. Here one warning is enough.
                if not silent:
                    log.warning("%s: %s", folder, problem)
                silent = True
