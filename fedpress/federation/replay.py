"""The guard against a second question: under privacy each would cost more than was planned."""

from __future__ import annotations

from fedpress.core import random
from fedpress.errors import WireError
from fedpress.federation.agreement import Terms
from fedpress.federation.client_state import ClientState, load_json, save_json
from fedpress.wire.message import Message


def answer_once(message: Message, round: int, terms: Terms, memory: ClientState) -> None:
    """Notes in `memory` that a client answers the "fit" of `round`, and holds the server to the planned tasks.

    It is asked under privacy alone: without it nothing is planned. A task is named by the number of
    the round whose model it starts from. The same question again gets the same answer, which costs
    nothing.

    Raises:
        WireError: if the round or the number of tasks is beyond the plan, or another question was
            answered in it.
    """
    if terms.num_rounds is not None and round > terms.num_rounds:
        raise WireError(
            f"got {round}, but privacy is planned for {terms.num_rounds} rounds",
            place="fit.round",
            cure="stop here",
        )
    asked = random.fingerprint(
        sorted(message.header.items()), *(message.tensors[n] for n in sorted(message.tensors))
    )
    answered = load_json(memory, "answered")
    if answered.get(str(round), asked[:16]) != asked[:16]:
        raise WireError(
            f"round {round} was answered to another question",
            place="fit.round",
            cure="go on with the next round",
        )
    most = terms.max_tasks
    if most is not None and str(round) not in answered and len(answered) >= most:
        raise WireError(
            (f"this client has answered {len(answered)} tasks, and privacy is planned for {most}"),
            place="fit.round",
            cure="stop here",
        )
    if str(round) not in answered:
        save_json(memory, "answered", {**answered, str(round): asked[:16]})
