"""The last answer of each client that the server used; the client resumes from its state then."""

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
    """For each client, the number of the last task whose answer the server used (0: none).

    Only algorithms whose clients keep a state need it, such as SCAFFOLD. A lost or refused answer
    changes nothing on the server. The number tells the client from which of its stored states it
    must continue.

    >>> counted = Counted.open(["a", "b"], {})
    >>> counted.note_answer("a", 3, refused="")
    >>> counted.last, counted.state()["tasks"].tolist()
    ({'a': 3, 'b': 0}, [3, 0])
    """

    last: dict[ClientId, int]

    @classmethod
    def open(cls, clients: Sequence[ClientId], state: Mapping[str, Tensor]) -> Counted:
        """Starts with zeros, or restores what `state` returned."""
        tasks = state["tasks"].tolist() if state else [0] * len(clients)
        return cls(dict(zip(clients, tasks, strict=True)))

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors from which `open` restores this object."""
        return {"tasks": torch.tensor(list(self.last.values()), dtype=torch.int64)}

    def note_answer(self, client: ClientId, task: int, *, refused: str) -> None:
        """Notes that the answer to `task` was used, or `refused` for a reason ("" if used)."""
        if not refused:
            self.last[client] = task
        elif LOST_STATE in refused:
            self.last[client] = 0
