"""Which answer of each client counted last: its next task goes on from the state after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpress.core.names import ClientId

LOST_STATE = "let it begin anew"
"""Words in the error of a client that lost its state: the server then treats it as never asked."""


@dataclass(eq=False)
class Counted:
    """The last task of each client whose answer counted, 0 for none.

    Only algorithms whose clients keep a state need it. A lost or refused answer changes nothing on
    the server; by this number the client learns that it must drop its own change, too.

    >>> counted = Counted.open(["a", "b"], {})
    >>> counted.note_answer("a", 3, refused="")
    >>> counted.last, counted.state()["tasks"].tolist()
    ({'a': 3, 'b': 0}, [3, 0])
    """

    last: dict[ClientId, int]

    @classmethod
    def open(cls, clients: Sequence[ClientId], state: Mapping[str, Tensor]) -> Counted:
        """Begins with zeros, or goes on from what `state` returned."""
        tasks = state["tasks"].tolist() if state else [0] * len(clients)
        return cls(dict(zip(clients, tasks, strict=True)))

    def state(self) -> dict[str, Tensor]:
        """Returns all that is needed to go on."""
        return {"tasks": torch.tensor(list(self.last.values()), dtype=torch.int64)}

    def note_answer(self, client: ClientId, task: int, *, refused: str) -> None:
        """Notes that the answer to `task` counted; or why it was `refused`, empty if it was not."""
        if not refused:
            self.last[client] = task
        elif LOST_STATE in refused:
            self.last[client] = 0
