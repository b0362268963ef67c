"""The main loop of a client process: wait for a call of the server, answer it, wait again.

A call is one request of the server, such as "train in round 3".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedpress.network.node import Correspondence
from fedpress.network.sessions import Sessions


@dataclass(frozen=True)
class Answered:
    """Record of one answered call. `serve` yields it; the command line prints it.

    Attributes:
        session: id of the session (one stage of one run) that the call belongs to.
        bytes_in: length of the request.
        bytes_out: length of the answer.
        seconds: time that the client took to compute the answer.
    """

    session: str
    bytes_in: int
    bytes_out: int
    seconds: float


def serve(
    correspondence: Correspondence,
    sessions: Sessions,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Answered]:
    """Answers calls, one after another, until `stopped` returns True.

    Args:
        correspondence: thread that holds the connection to the server.
        sessions: the training sessions of this client, which compute the answers.
        stopped: returns True to stop. It is called between two answers, and every second while the
            client waits.

    Yields:
        A record of each answered call.

    Raises:
        NetworkError: if the server refuses this client.
    """
    # Read here and not in the connection's thread, because a ledger is used by one thread.
    correspondence.consent = sessions.gate.consent()
    correspondence.start()
    try:
        while not stopped():
            correspondence.consent = sessions.gate.consent()
            # Waits at most a second, so that `stopped` is called often enough.
            call = correspondence.next_call(timeout=1.0)
            if call is None:
                continue
            began = time.monotonic()
            parcel = call.parcel
            body = sessions.answer(parcel.session, parcel.body)
            seconds = time.monotonic() - began
            correspondence.answer(call, body, seconds)
            yield Answered(parcel.session, len(parcel.body), len(body), seconds)
    finally:
        # Also after an error, so that the server learns that this client has gone.
        correspondence.stop()
