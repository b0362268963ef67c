"""A client's correspondence: one thread that keeps the connection, while another one trains.

After a failure the thread tries to connect until it succeeds. It answers pings at once, hands calls
over, and sends answers back. So the server sees that a client is at work even while a round takes
an hour.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

from fedpress import __version__
from fedpress.core.log import logger
from fedpress.core.names import ClientId
from fedpress.errors import NetworkError
from fedpress.transport.link import Pace, Parcel
from fedpress.transport.remote import Presence

log = logger(__name__)

REMEMBERED = 8
"""Answers that are kept, for calls that arrive twice."""
REMEMBERED_BYTES = 64 << 20
"""Most bytes of the answers that are kept; the newest is kept even if it is longer."""
LONGEST_WAIT = 5.0
"""Most seconds between two attempts to connect."""


class Wire(Protocol):
    """The client's end of a network; `fedpress.transport.flower.NodeLink` is one."""

    def connect(self) -> None:
        """Connects, or connects again; NetworkError if that fails."""
        ...

    def beat(self) -> None:
        """Shows the server that this client is online, if it was last shown long enough ago."""
        ...

    def receive(self) -> Any:
        """Returns the next parcel for this client; None if there is none now."""
        ...

    def reply(self, incoming: Any, parcel: Parcel, seconds: float = 0.0) -> bool:
        """Sends an answer; returns False if nobody waits for it any more."""
        ...

    def close(self) -> None:
        """Says goodbye."""
        ...


class Correspondence:
    """The thread that owns the connection.

    Attributes:
        name: of the client.
        boot: a random id of this process.
    """

    def __init__(self, wire: Wire, name: ClientId, told: Callable[[str], None]) -> None:
        """Prepares the thread; `start` starts it.

        Args:
            wire: used by the thread alone.
            name: of the client.
            told: is called with a sentence when the connection comes or goes.
        """
        self.name = name
        self.boot = secrets.token_hex(8)
        self._wire = wire
        self._told = told
        self._calls: queue.Queue[Any] = queue.Queue()
        self._answers: queue.Queue[tuple[Any, Parcel, float]] = queue.Queue()
        self._working: dict[str, Any] = {}
        self.answered: OrderedDict[str, Parcel] = OrderedDict()
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fedpress-network", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def next_call(self, timeout: float | None = None) -> Any | None:
        """Waits for the next call; returns None after `timeout` seconds.

        Raises:
            NetworkError: if the server refuses this client, so that waiting makes no sense.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._failure is not None:
                raise self._failure
            left = 0.5 if end is None else min(0.5, end - time.monotonic())
            if left <= 0:
                return None
            try:
                return self._calls.get(timeout=left)
            except queue.Empty:
                continue

    def answer(self, call: Any, body: bytes, seconds: float) -> None:
        """Hands over the answer to a call, which the thread then sends."""
        parcel = Parcel("answer", call.parcel.request, call.parcel.session, body)
        self._answers.put((call, parcel, seconds))

    def stop(self) -> None:
        """Says goodbye and ends the thread."""
        self._stopped.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                if self._connect():
                    self._correspond()
            self._wire.close()
        except BaseException as failure:
            self._failure = failure

    def _connect(self) -> bool:
        """Connects; tries again for ever unless the server refuses."""
        wait = 0.5
        told = ""
        while not self._stopped.is_set():
            try:
                self._wire.connect()
            except NetworkError as problem:
                if problem.refused:
                    raise
                # Each reason is told once, not at every attempt.
                if str(problem) != told:
                    told = str(problem)
                    self._told(f"waiting for the server: {told}")
                log.info("no connection: %s", problem)
                # With a random part, so that clients do not all come back in the same moment.
                self._stopped.wait(wait * (0.8 + 0.4 * secrets.randbelow(1000) / 1000))
                wait = min(2 * wait, LONGEST_WAIT)
            else:
                self._told("connected")
                return True
        return False

    def _correspond(self) -> None:
        """Receives and sends until the connection fails."""
        pace = Pace()
        try:
            while not self._stopped.is_set():
                self._wire.beat()
                busy = self._send_answers()
                incoming = self._wire.receive()
                if incoming is not None:
                    self._take(incoming)
                    busy = True
                if busy:
                    pace.reset()
                    continue
                # An answer must not wait for the end of a long pause.
                try:
                    ready = self._answers.get(timeout=pace.seconds())
                except queue.Empty:
                    continue
                self._send(*ready)
                pace.reset()
        except NetworkError as problem:
            self._told(f"the connection was lost: {problem}")

    def _take(self, incoming: Any) -> None:
        parcel = incoming.parcel
        if parcel.what == "ping":
            working = tuple(self._working)
            presence = Presence(self.name, self.boot, working, __version__)
            pong = Parcel("pong", parcel.request, "", presence.to_bytes())
            self._wire.reply(incoming, pong)
        elif parcel.what != "call":
            log.warning("a parcel of the kind %s was dropped", parcel.what)
        elif parcel.request in self.answered:
            self._wire.reply(incoming, self.answered[parcel.request])
        elif parcel.request in self._working:
            # The call was sent twice. The answer goes to the later one, since nobody may wait for
            # the first.
            self._working[parcel.request] = incoming
        else:
            self._working[parcel.request] = incoming
            self._calls.put(incoming)

    def _send_answers(self) -> bool:
        sent = False
        while not self._answers.empty():
            self._send(*self._answers.get())
            sent = True
        return sent

    def _send(self, call: Any, parcel: Parcel, seconds: float) -> None:
        # Kept before it is sent: if the connection fails now, the server asks again.
        self.answered[parcel.request] = parcel
        # The newest stays however long it is: it is the likeliest to be asked for again.
        while len(self.answered) > 1 and (
            len(self.answered) > REMEMBERED
            or sum(len(one.body) for one in self.answered.values()) > REMEMBERED_BYTES
        ):
            self.answered.popitem(last=False)
        newest = self._working.pop(parcel.request, call)
        self._wire.reply(newest, parcel, seconds)
