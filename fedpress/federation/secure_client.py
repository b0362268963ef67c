"""A client's answers to the messages of a secure sum: "join", "roster" and "unmask"."""

from __future__ import annotations

from fedpress.secagg import SecAggClient, SecAggMessage
from fedpress.wire.message import Message


def answer_secure(member: SecAggClient, message: Message) -> Message:
    """Answers a "join", "roster" or "unmask" for `member`.

    Raises:
        WireError: if the message is faulty.
        SecureError: if the answer would reveal a single client's update.
    """
    if message.kind == "join":
        answer = member.join()
        return Message("join", answer.header, answer.tensors)
    received = SecAggMessage(dict(message.header), dict(message.tensors))
    if message.kind == "roster":
        answer = member.accept(received)
        return Message("accepted", answer.header, answer.tensors)
    answer = member.unmask(received)
    return Message("shares", answer.header, answer.tensors)
