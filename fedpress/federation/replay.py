"""Under privacy a client answers one request in each round, and only in the planned rounds."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedpress.core import random
from fedpress.errors import WireError
from fedpress.federation.agreement import Terms
from fedpress.federation.client_state import ClientState, load_json, save_json
from fedpress.wire.message import Message

FINGERPRINT_DIGITS = 16
"""Hexadecimal digits of a request's fingerprint that are stored (64 bits)."""


def answer_once(message: Message, round: int, terms: Terms, memory: ClientState) -> None:
    """Stores that the client answers the training request ("fit") of a round.

    Refuses a second, different request of the same round. Otherwise a server could ask twice with
    different parameters and get two noised answers about the same examples; the second answer would
    cost epsilon that was not planned. An identical request is allowed: its answer is the same bit
    for bit, and reveals nothing new.

    Args:
        message: the message "fit".
        round: number of the round that the request belongs to.
        terms: the planned numbers of rounds and of tasks (trainings of one client).
        memory: stores the fingerprints of answered requests.

    Raises:
        WireError: if the round or the number of tasks exceeds the plan, or if a different request
            was answered in this round.
    """
    if terms.num_rounds is not None and round > terms.num_rounds:
        raise WireError(
            f"got {round}, but privacy is planned for {terms.num_rounds} rounds",
            place="fit.round",
            cure="stop here",
        )
    asked = _asked.fingerprint(message)[:FINGERPRINT_DIGITS]
    answered = load_json(memory, "answered")
    known = answered.get(str(round))
    if known is not None and known != asked:
        raise WireError(
            f"this client has answered a different request of round {round}",
            place="fit.round",
            cure="go on with the next round",
        )
    # A repeated request does not count as another task.
    if known is not None:
        return

    most = terms.max_tasks
    if most is not None and len(answered) >= most:
        raise WireError(
            f"this client has answered {len(answered)} tasks, and privacy is planned for {most}",
            place="fit.round",
            cure="stop here",
        )
    # Stored before the answer is computed: after a crash the request must count as answered,
    # because the answer may have been sent.
    save_json(memory, "answered", {**answered, str(round): asked})


@dataclass(eq=False)
class _Latest:
    """The fingerprint of the latest request of this process.

    In a simulation many clients get the same tensors in a row, and hashing a large model takes a
    while. A tensor is the same only if it is the same object, since nobody changes a message.
    """

    # Header, tensors and fingerprint, replaced together, so that no thread sees half of a change.
    known: tuple[str, Sequence[weakref.ref[Tensor]], str] = ("", (), "")

    def fingerprint(self, message: Message) -> str:
        """Returns the digest of header and tensors; it does not depend on their order."""
        items = sorted(message.header.items())
        tensors = [message.tensors[name] for name in sorted(message.tensors)]
        # As text, in which 1 and True differ.
        header = repr((items, sorted(message.tensors)))
        known_header, known_tensors, value = self.known
        same = header == known_header and len(tensors) == len(known_tensors)
        if same and all(ref() is one for ref, one in zip(known_tensors, tensors, strict=True)):
            return value
        value = random.fingerprint(items, *tensors)
        self.known = (header, [weakref.ref(one) for one in tensors], value)
        return value


_asked = _Latest()
