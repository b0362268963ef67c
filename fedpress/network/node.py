"""A client's connection thread: it talks to the server while another thread trains.

The thread receives calls (requests of the server) and passes them to the training thread. It sends
the answers back, and connects again after a failure. It answers pings at once, so the server sees
that the client is alive even while a round trains for an hour.
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
"""Largest number of answers that are kept, for calls that arrive twice."""
REMEMBERED_BYTES = 64 << 20
"""Largest number of bytes of all kept answers; the newest is kept even if it is longer."""
LONGEST_WAIT = 5.0
"""Longest pause between two attempts to connect, in seconds; chance adds up to 20%."""


class Wire(Protocol):
    """The client's connection to the server, such as `fedpress.transport.flower.NodeLink`."""

    def connect(self) -> None:
        """Connects, for the first time or again.

        From then on until `close`, the connection tells the server regularly that this client is
        online.

        Raises:
            NetworkError: if connecting fails.
        """
        ...

    def receive(self) -> Any:
        """Returns the next incoming item, or None if there is none now.

        Its attribute `parcel` is the `Parcel`: one call or ping of the server.
        """
        ...

    def reply(self, incoming: Any, parcel: Parcel, seconds: float = 0.0) -> bool:
        """Sends an answer.

        Args:
            incoming: the item from `receive` that is answered.
            parcel: the answer.
            seconds: time that the answer took to compute.

        Returns:
            False if the server no longer waits for this answer.
        """
        ...

    def close(self) -> None:
        """Tells the server that this client leaves, and closes the connection."""
        ...


class Correspondence:
    """The connection thread, and the queues between it and the training thread.

    Attributes:
        name: name of the client.
        boot: random id of this process. A new id tells the server that the client was restarted.
        consent: text that changes when the owner approves a recipe; the server reads it in pongs.
        answered: id of a call -> its answer, for the latest calls, in case one arrives twice.
    """

    def __init__(self, wire: Wire, name: ClientId, told: Callable[[str], None]) -> None:
        """Prepares the thread; `start` starts it.

        Args:
            wire: the connection; only this thread uses it.
            name: name of the client.
            told: is called with a sentence when the client connects, waits, or is disconnected.
        """
        self.name = name
        self.boot = secrets.token_hex(8)
        self.consent = ""
        self._wire = wire
        self._told = told
        self._calls: queue.Queue[Any] = queue.Queue()
        self._answers: queue.Queue[tuple[Any, Parcel, float]] = queue.Queue()
        self._working: dict[str, Any] = {}
        self.answered: OrderedDict[str, Parcel] = OrderedDict()
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._was_connected = False
        # A daemon, so that it cannot keep a process alive whose training thread has failed.
        self._thread = threading.Thread(target=self._run, name="fedpress-network", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def next_call(self, timeout: float | None = None) -> Any | None:
        """Waits for the next call; returns None after `timeout` seconds (None: waits for ever).

        Raises:
            NetworkError: if the server refuses this client, for instance because of its key.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._failure is not None:
                raise self._failure
            # At most half a second at once, so that a failure of the thread is noticed soon.
            left = 0.5 if end is None else min(0.5, end - time.monotonic())
            if left <= 0:
                return None
            try:
                return self._calls.get(timeout=left)
            except queue.Empty:
                continue

    def answer(self, call: Any, body: bytes, seconds: float) -> None:
        """Passes the answer to a call on to the connection thread, which sends it.

        Args:
            call: what `next_call` returned.
            body: bytes of the answer.
            seconds: time that the answer took to compute.
        """
        parcel = Parcel("answer", call.parcel.request, call.parcel.session, body)
        self._answers.put((call, parcel, seconds))

    def stop(self) -> None:
        """Ends the thread, which first tells the server that this client leaves."""
        self._stopped.set()
        # Not for ever: the thread may wait for a server that does not answer.
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                if self._connect():
                    self._correspond()
            self._wire.close()
        # An exception in a thread reaches nobody: `next_call` raises it in the training thread.
        except BaseException as failure:
            self._failure = failure

    def _connect(self) -> bool:
        """Tries to connect until it succeeds; raises only if the server refuses this client.

        Returns False if the thread was stopped before it could connect.
        """
        wait = 0.5
        told = ""
        while not self._stopped.is_set():
            try:
                self._wire.connect()
            except NetworkError as problem:
                # A server that let this client in before may do so again, for instance once a
                # clock that was set wrong is right.
                if problem.refused and not self._was_connected:
                    raise
                # The same reason is told once, not at every attempt.
                if str(problem) != told:
                    told = str(problem)
                    self._told(f"waiting for the server: {told}")
                log.info("no connection: %s", problem)
                # 80 to 120% of the pause, so that after a restart of the server its clients do not
                # all connect in the same moment.
                self._stopped.wait(wait * (0.8 + 0.4 * secrets.randbelow(1000) / 1000))
                # Exponential backoff: a server that is down for hours is not asked twice a second.
                wait = min(2 * wait, LONGEST_WAIT)
            else:
                self._told("connected")
                self._was_connected = True
                return True
        return False

    def _correspond(self) -> None:
        """Receives calls and sends answers until the connection fails or the thread is stopped."""
        pace = Pace()
        try:
            while not self._stopped.is_set():
                busy = self._send_answers()
                incoming = self._wire.receive()
                if incoming is not None:
                    self._take(incoming)
                    busy = True
                if busy:
                    pace.reset()
                    continue
                # The pause waits on the queue of answers: a ready answer ends it at once.
                try:
                    ready = self._answers.get(timeout=pace.seconds())
                except queue.Empty:
                    continue
                self._send(*ready)
                pace.reset()
        except NetworkError as problem:
            self._told(f"the connection was lost: {problem}")

    def _take(self, incoming: Any) -> None:
        """Handles one parcel: answers a ping, or passes a new call to the training thread."""
        parcel = incoming.parcel
        if parcel.what == "ping":
            working = tuple(self._working)
            presence = Presence(self.name, self.boot, working, __version__, self.consent)
            pong = Parcel("pong", parcel.request, "", presence.to_bytes())
            self._wire.reply(incoming, pong)
        elif parcel.what != "call":
            log.warning("a parcel of the kind %s was dropped", parcel.what)
        # The server asks again because the answer was lost: it is sent again, not computed again.
        elif parcel.request in self.answered:
            self._wire.reply(incoming, self.answered[parcel.request])
        elif parcel.request in self._working:
            # The call was sent twice while the client works on it. The answer goes to the later
            # sending, because the server may no longer wait for the earlier one.
            self._working[parcel.request] = incoming
        else:
            self._working[parcel.request] = incoming
            self._calls.put(incoming)

    def _send_answers(self) -> bool:
        """Sends all answers that are ready; returns whether there were any."""
        sent = False
        while not self._answers.empty():
            self._send(*self._answers.get())
            sent = True
        return sent

    def _send(self, call: Any, parcel: Parcel, seconds: float) -> None:
        # Stored before it is sent: if sending fails, the server asks again and gets this answer.
        self.answered[parcel.request] = parcel
        # The newest answer is kept even if it exceeds the limit of bytes, because it is the one
        # that the server most likely asks for again.
        while len(self.answered) > 1 and (
            len(self.answered) > REMEMBERED
            or sum(len(one.body) for one in self.answered.values()) > REMEMBERED_BYTES
        ):
            self.answered.popitem(last=False)
        # Not `call` itself: the server may have sent the same call again since (see `_take`).
        newest = self._working.pop(parcel.request, call)
        self._wire.reply(newest, parcel, seconds)
