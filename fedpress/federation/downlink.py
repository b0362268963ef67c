"""How the model travels to the clients: whole, or as coded differences to what each client last held.

The server keeps a copy of what each client holds, codes the difference of its model to that copy,
and adds what the code decodes to, as the client does. So what a code loses is part of the next
difference: error feedback on the way down (Tang et al. 2019, "DoubleSqueeze", arXiv:1905.05957).
Clients that were asked in the same rounds share one copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpress.codecs import (
    Bound,
    Chain,
    Key,
    Settings,
    bind_chain,
    check_float,
    decode_chain,
    encode_chain,
)
from fedpress.core.names import ClientId
from fedpress.errors import renaming

SERVER = "server"
NOTHING = (0, 0)
LOST_MODEL = "send the whole model"
KEPT_BYTES = 1 << 30
"""Of copies on the server: the clients that were not asked for longest fall behind and are sent the whole model."""


@dataclass(frozen=True)
class Downlink:
    """The agreed code of the model on its way to the clients.

    `chain` codes differences; `first` codes the whole model, for clients that hold nothing: the
    difference to zero.
    """

    size: int
    shapes: tuple[tuple[int, ...], ...] = ()
    chain: tuple[Settings, ...] = ()
    first: tuple[Settings, ...] = ()

    def bound(self, *, whole: bool) -> Chain:
        """Returns the chain for a whole model or a difference.

        Raises:
            RecipeError: if its transforms do not fit together.
        """
        chain = self.first if whole else self.chain
        with renaming({"chain": "first"} if whole else {}):
            return bind_chain(chain, Bound(self.size, shapes=self.shapes))[0]

    def encode(self, params: Tensor, held: Tensor | None, key: Key) -> dict[str, Tensor]:
        """Returns the tensors that bring `params` [d] to a client that holds `held` [d], None for nothing."""
        return encode_chain(
            self.bound(whole=held is None), params if held is None else params - held, key
        )

    def decode(self, tensors: Mapping[str, Tensor], held: Tensor | None, key: Key) -> Tensor:
        """Returns the model [d] that a client holds after it was sent `tensors`.

        Raises:
            WireError: if that is not what the tensors hold.
        """
        difference = check_float(
            decode_chain(self.bound(whole=held is None), tensors, key), self.size, "fit"
        )
        return check_float(difference if held is None else held + difference, self.size, "fit")


@dataclass(eq=False)
class Broadcast:
    """The server's side of a downlink: which model each client holds.

    `copies` are the models [d] by (round, number within the round); `holds` is the copy of each
    client.
    """

    downlink: Downlink
    seed: int
    holds: dict[ClientId, tuple[int, int]]
    copies: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    sent: dict[ClientId, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def open(
        cls, downlink: Downlink, seed: int, clients: Sequence[ClientId], state: Mapping[str, Tensor]
    ) -> Broadcast:
        """Begins, or goes on from what `state` gave."""
        rows = state["holds"].tolist() if state else [NOTHING] * len(clients)
        holds = {
            client: (int(row[0]), int(row[1])) for client, row in zip(clients, rows, strict=True)
        }
        copies = {}
        for name, tensor in state.items():
            if name != "holds":
                round, _, number = name.partition(".")
                copies[int(round), int(number)] = tensor
        return cls(downlink, seed, holds, copies)

    def state(self) -> dict[str, Tensor]:
        """Returns all that is needed to go on."""
        copies = {f"{round}.{number}": copy for (round, number), copy in self.copies.items()}
        return {"holds": torch.tensor(list(self.holds.values()), dtype=torch.int64), **copies}

    def encode_for(
        self, round: int, params: Tensor, cohort: Sequence[ClientId]
    ) -> dict[ClientId, tuple[int, dict[str, Tensor]]]:
        """Returns for each client of `cohort` the round of the model that it holds, 0 for none, and what to send it."""
        key, made = Key(self.seed, round, SERVER), dict[tuple[int, int], tuple[int, int]]()
        messages: dict[tuple[int, int], tuple[int, dict[str, Tensor]]] = {}
        for client in cohort:
            old = self.holds[client]
            if old not in made:
                held = self.copies.get(old)
                tensors = self.downlink.encode(params, held, key)
                made[old] = (round, len(made))
                self.copies[made[old]] = self.downlink.decode(tensors, held, key)
                messages[old] = (0 if held is None else old[0], tensors)
        self.sent = {client: made[self.holds[client]] for client in cohort}
        return {client: messages[self.holds[client]] for client in cohort}

    def mark_arrived(self, refused: Mapping[ClientId, str]) -> None:
        """Notes that all who were sent something hold it now, but for the `refused`, given with the reason.

        A refused client still has the model that it held before, unless it said that it lost it.
        """
        for client, copy in self.sent.items():
            if client not in refused:
                self.holds[client] = copy
            elif LOST_MODEL in refused[client]:
                self.holds[client] = NOTHING
        most = max(1, KEPT_BYTES // (4 * max(1, self.downlink.size)))
        kept = sorted(set(self.holds.values()) - {NOTHING})[-most:]
        self.copies = {name: copy for name, copy in self.copies.items() if name in kept}
        self.holds = {
            client: copy if copy in kept else NOTHING for client, copy in self.holds.items()
        }
