"""A client: one process for its lifetime, which holds data, state, policy and ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedpress.network.node import Correspondence
from fedpress.network.sessions import Sessions


@dataclass(frozen=True)
class Answered:
    """One call that the client has answered; `serve` yields it, for instance to print it.

    Attributes:
        session: name of the session that the call belongs to.
        bytes_in: length of the request.
        bytes_out: length of the answer.
        seconds: time that the answer took.
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

    Raises:
        NetworkError: if the server refuses this client.
    """
    correspondence.start()
    try:
        while not stopped():
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
        correspondence.stop()
