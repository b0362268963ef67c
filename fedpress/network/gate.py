"""The gate: decides before each answer whether the data owner allows the client to give it.

`fedpress.network.owner.OwnerGate` decides by a policy file; `NoPolicy` allows everything.
"""

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
    """Why the gate forbids an answer. The server receives the refusal instead of the answer.

    Attributes:
        rule: the key of the policy that forbids the answer, such as `privacy.max_epsilon`.
        reason: a sentence for people, with a cure after a semicolon. The server gets it too, so it
            must not tell anything about the data.
    """

    rule: str
    reason: str

    def to_message(self) -> Message:
        """Returns the refusal as a message of kind "refused"."""
        return Message("refused", {"rule": self.rule, "reason": self.reason})


@dataclass(frozen=True, eq=False)
class Asked:
    """The question to the gate: may client `name` take part in this stage of a run?

    Attributes:
        session: id of the session (one stage of one run). The server draws this id at random.
        name: name of the client.
        offer: first message of the server, with the settings of the stage and the model.
        memory: random id of the client's stored state for this session (its secrets and the list
            of answered rounds). If the state is lost, a new state gets another id. Then the
            answer to a repeated question has other noise, so the answer costs privacy again.
    """

    session: str
    name: ClientId
    offer: Offer
    memory: str = ""


class Gate(Protocol):
    """Decides about each request. A method returns None for yes and a `Refusal` for no.

    A session calls the methods in the order in which they are listed here. `trial` is True if the
    server only asks before a run whether the client would accept. A trial stores no session.
    """

    def code_named(self, session: str, name: str) -> Refusal | None:
        """Decides whether the installed code `name` (`module:function`) may be called.

        It builds the model, or is the class of the task.
        """
        ...

    def offered(self, asked: Asked, *, trial: bool) -> Refusal | None:
        """Decides whether the settings, the model and the server are allowed."""
        ...

    def agreed(self, asked: Asked, contract: Contract, *, trial: bool) -> Refusal | None:
        """Decides whether the whole run is allowed, and whether the privacy budget suffices.

        `contract` is the plan of the run; it lists all clients.
        """
        ...

    def called(self, asked: Asked, contract: Contract, message: Message) -> Refusal | None:
        """Decides whether a message after the agreement may be answered.

        If yes, it charges the answer's privacy cost, before the answer is computed and sent.
        """
        ...

    def consent(self) -> str:
        """Returns a text that changes when the owner approves a recipe or takes it back.

        The server gets it, and asks again where the owner refused before. So it must tell nothing
        else.
        """
        ...

    def leaving(self, asked: Asked, answer: Message) -> Message:
        """Returns `answer` without the metrics that the owner does not allow to leave."""
        ...


class NoPolicy:
    """The gate that allows everything. It is for tests and for data that are not private."""

    def code_named(self, session: str, name: str) -> Refusal | None:
        """See `Gate`."""
        # Code is the exception: only a function that this machine's user has allowed may run.
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

    def consent(self) -> str:
        """See `Gate`."""
        return ""

    def leaving(self, asked: Asked, answer: Message) -> Message:
        """See `Gate`."""
        return answer


def unnamed_code(name: str) -> Refusal:
    """Returns the refusal of an offer that needs the code `name`, which the owner does not allow."""
    # Cut, because the name comes from the server and may be of any length.
    named = f"model or task need the code {name[:80]}, which is not allowed here"
    return Refusal("code", f"{named}; its owner can name it in the policy, under code")
