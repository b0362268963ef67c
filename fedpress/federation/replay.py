"""Replay guard: under privacy a client answers each round once, and no more rounds than planned."""

from __future__ import annotations

from fedpress.core import random
from fedpress.errors import WireError
from fedpress.federation.agreement import Terms
from fedpress.federation.client_state import ClientState, load_json, save_json
from fedpress.wire.message import Message

SHOWN = 16
"""Hexadecimal digits of a question's fingerprint that are stored: 64 bits tell questions apart."""


def answer_once(message: Message, round: int, terms: Terms, memory: ClientState) -> None:
    """Notes in `memory` that a client answers the "fit" of `round`, or refuses to.

    A server that asks again, with other parameters, would get a second noised answer about the same
    examples: each costs epsilon that nobody planned. The same question again is allowed: it gets
    the same answer, bit for bit, which reveals nothing new.

    Args:
        message: the "fit".
        round: number of the round whose model the task starts from; it names the task.
        terms: the planned numbers of rounds and tasks.
        memory: where the answered questions are stored.

    Raises:
        WireError: if the round or the number of tasks is beyond the plan, or another question was
            answered in this round.
    """
    if terms.num_rounds is not None and round > terms.num_rounds:
        raise WireError(
            f"got {round}, but privacy is planned for {terms.num_rounds} rounds",
            place="fit.round",
            cure="stop here",
        )
    # Sorted: the order of fields and tensors in a message must not make it another question.
    tensors = [message.tensors[name] for name in sorted(message.tensors)]
    asked = random.fingerprint(sorted(message.header.items()), *tensors)[:SHOWN]
    answered = load_json(memory, "answered")
    known = answered.get(str(round))
    if known is not None and known != asked:
        raise WireError(
            f"round {round} was answered to another question",
            place="fit.round",
            cure="go on with the next round",
        )
    if known is not None:
        return

    most = terms.max_tasks
    if most is not None and len(answered) >= most:
        raise WireError(
            (f"this client has answered {len(answered)} tasks, and privacy is planned for {most}"),
            place="fit.round",
            cure="stop here",
        )
    # Stored before the answer is computed: after a crash the question still counts as answered.
    save_json(memory, "answered", {**answered, str(round): asked})
