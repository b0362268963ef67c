"""A client's answers to the messages with which the server prepares and opens a secure sum.

"join" asks for the client's public key, "roster" brings the keys of all clients, and "unmask" asks
for the shares that open the sum of a round.
"""

from __future__ import annotations

from fedpress.secagg import SecAggClient, SecAggMessage
from fedpress.wire.message import Message


def answer_secure(member: SecAggClient, message: Message) -> Message:
    """Answers a message of kind "join", "roster" or "unmask".

    Args:
        member: the client's side of the secure sum.
        message: the server's message.

    Raises:
        WireError: if the message is faulty.
        SecureError: if the answer would reveal a single client's update.
    """
    # The secure sum has a message type of its own, so that it does not depend on the wire format.
    if message.kind == "join":
        answer = member.join()
        return Message("join", answer.header, answer.tensors)
    received = SecAggMessage(dict(message.header), dict(message.tensors))
    if message.kind == "roster":
        answer = member.accept(received)
        return Message("accepted", answer.header, answer.tensors)
    answer = member.unmask(received, by_hand=message.by_hand)
    return Message("shares", answer.header, answer.tensors, unmade=answer.unmade)
