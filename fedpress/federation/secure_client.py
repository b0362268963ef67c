"""How a client answers the questions of a secure sum."""

from __future__ import annotations

from fedpress.secagg import SecAggClient, SecAggMessage
from fedpress.wire.message import Message


def answer_secure(member: SecAggClient, message: Message) -> Message:
    """Answers a question of a secure sum, "join", "roster" or "unmask", for `member`.

    Raises:
        WireError: if the question is faulty.
        SecureError: if it asks for what would open a single client's update.
    """
    part = SecAggMessage(dict(message.header), dict(message.tensors))
    if message.kind == "join":
        answer = member.join()
        return Message("join", answer.header, answer.tensors)
    if message.kind == "roster":
        answer = member.accept(part)
        return Message("accepted", answer.header, answer.tensors)
    answer = member.unmask(part)
    return Message("shares", answer.header, answer.tensors)
