"""The gate: asks a data owner's policy before a client answers the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedpress.core import consent
from fedpress.core.names import ClientId
from fedpress.stages.federate.contract import Contract
from fedpress.stages.federate.offer import Offer
from fedpress.wire.message import Message


@dataclass(frozen=True)
class Refusal:
    """The gate's no to a request; it is sent to the server.

    Attributes:
        rule: the key of the policy, such as `max_epsilon`.
        reason: a text for people; it must not say anything about the data.
    """

    rule: str
    reason: str

    def to_message(self) -> Message:
        """Returns the message "refused"."""
        return Message("refused", {"rule": self.rule, "reason": self.reason})


@dataclass(frozen=True, eq=False)
class Asked:
    """What a client is asked to take part in.

    Attributes:
        session: name of the session, which the server has drawn.
        name: name of the client.
        offer: what the server offers.
        memory: a random id of the session's memory, which holds secrets and answered rounds. If
            the memory is lost, a new one gets another id: the same question would then get an
            answer with other noise, which costs privacy again.
    """

    session: str
    name: ClientId
    offer: Offer
    memory: str = ""


class Gate(Protocol):
    """Decides about each request: None means yes. Notes what is promised and spent."""

    def code_named(self, session: str, name: str) -> Refusal | None:
        """Says whether a model may be built by the function `name` (`module:function`)."""
        ...

    def offered(self, asked: Asked, *, trial: bool) -> Refusal | None:
        """Says whether the settings, the model and the server are allowed."""
        ...

    def agreed(self, asked: Asked, contract: Contract, *, trial: bool) -> Refusal | None:
        """Says whether the whole run, with all clients known, is allowed and can be paid for."""
        ...

    def called(self, asked: Asked, contract: Contract, message: Message) -> Refusal | None:
        """Says whether a further message may be answered, and charges the answer beforehand."""
        ...

    def leaving(self, asked: Asked, answer: Message) -> Message:
        """Returns an answer without the metrics that must not leave the client."""
        ...


class NoPolicy:
    """Allows everything; for tests, and for data that are not private."""

    def code_named(self, session: str, name: str) -> Refusal | None:
        """See `Gate`."""
        return None if consent.allowed(name) else unnamed_code(name)

    def offered(self, asked: Asked, *, trial: bool) -> Refusal | None:
        """See `Gate`."""
        return None

    def agreed(self, asked: Asked, contract: Contract, *, trial: bool) -> Refusal | None:
        """See `Gate`."""
        return None

    def called(self, asked: Asked, contract: Contract, message: Message) -> Refusal | None:
        """See `Gate`."""
        return None

    def leaving(self, asked: Asked, answer: Message) -> Message:
        """See `Gate`."""
        return answer


def unnamed_code(name: str) -> Refusal:
    """Returns the refusal of a model whose building function the owner's policy does not name."""
    return Refusal("code", f"the model is built by {name[:80]}, and no code of others runs here")
