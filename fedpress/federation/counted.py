"""Remembers for each client the last answer that the server used.

A client that keeps a state (as in SCAFFOLD) must continue from its state after that answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpress.core.names import ClientId

LOST_STATE = "start this client without a state"
"""The cure in the error of a client that lost its state. The server looks for these words, and then
treats the client as one that it never asked."""


@dataclass(eq=False)
class Counted:
    """The number of each client's last answer that the server used (0: it has used none).

    A lost or refused answer changes nothing on the server. So the server sends this number with
    each request, and the client continues from the state that it stored with that answer. Only
    algorithms whose clients keep a state need this.

    Attributes:
        last: client -> number of the task that it answered, which is the round of the model that
            it trained; 0: no answer was used.

    >>> counted = Counted.open(["a", "b"], {})
    >>> counted.note_answer("a", 3, refused="")
    >>> counted.last, counted.state()["tasks"].tolist()
    ({'a': 3, 'b': 0}, [3, 0])
    """

    last: dict[ClientId, int]

    @classmethod
    def open(cls, clients: Sequence[ClientId], state: Mapping[str, Tensor]) -> Counted:
        """Restores the object from `state`, a result of `Counted.state`; if empty, starts with 0.

        Args:
            clients: all clients, in the same order as when the state was made.
            state: the stored tensors; empty before the first round.
        """
        tasks = state["tasks"].tolist() if state else [0] * len(clients)
        return cls(dict(zip(clients, tasks, strict=True)))

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors from which `open` restores this object."""
        return {"tasks": torch.tensor(list(self.last.values()), dtype=torch.int64)}

    def note_answer(self, client: ClientId, task: int, *, refused: str) -> None:
        """Stores whether an answer was used.

        Args:
            client: the client that answered.
            task: number of the task that it answered.
            refused: why the answer was refused; "" if it was used.
        """
        if not refused:
            self.last[client] = task
        # Any other refusal leaves the client with the state that it had before.
        elif LOST_STATE in refused:
            self.last[client] = 0
