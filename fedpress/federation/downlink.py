"""How the model travels to the clients: whole, or as a coded difference to what each client holds.

The server keeps a copy of the model that each client holds. It codes the difference of its own
model to that copy, and adds what the code decodes to, as the client does. So what one code loses is
part of the next difference: error feedback from server to client (Tang et al. 2019,
"DoubleSqueeze", arXiv:1905.05957). Clients that were asked in the same rounds hold the same copy.
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
"""The copy of a client that holds no model."""
LOST_MODEL = "send the whole model"
"""Words in the error of a client that lost its model: the server then sends it whole."""
KEPT_BYTES = 1 << 30
"""Most bytes of copies on the server. Beyond it the oldest copies are dropped, and clients that
held one are sent the whole model the next time."""


@dataclass(frozen=True)
class Downlink:
    """The agreed code of the model from server to clients.

    Attributes:
        size: number of values d of the model.
        shapes: of its parameters, for codecs that work on whole matrices.
        chain: codecs of a difference.
        first: codecs of the whole model, for clients that hold none.
    """

    size: int
    shapes: tuple[tuple[int, ...], ...] = ()
    chain: tuple[Settings, ...] = ()
    first: tuple[Settings, ...] = ()

    def bound(self, *, whole: bool) -> Chain:
        """Returns the bound chain of a whole model or of a difference.

        Raises:
            RecipeError: if its codecs do not fit together.
        """
        chain = self.first if whole else self.chain
        with renaming({"chain": "first"} if whole else {}):
            return bind_chain(chain, Bound(self.size, shapes=self.shapes))[0]

    def encode(self, params: Tensor, held: Tensor | None, key: Key) -> dict[str, Tensor]:
        """Returns the tensors that bring `params` [d] to a client with `held` [d] (or None)."""
        # A difference has small values, which a code keeps at fewer bits than the model.
        difference = params if held is None else params - held
        return encode_chain(self.bound(whole=held is None), difference, key)

    def decode(self, tensors: Mapping[str, Tensor], held: Tensor | None, key: Key) -> Tensor:
        """Returns the model [d] that a client holds after it was sent `tensors`.

        Raises:
            WireError: if the tensors hold no such model.
        """
        decoded = decode_chain(self.bound(whole=held is None), tensors, key)
        difference = check_float(decoded, self.size, "fit")
        # Checked again: a finite difference may overflow when it is added to a large model.
        return check_float(difference if held is None else held + difference, self.size, "fit")


@dataclass(eq=False)
class Broadcast:
    """The server's side of a downlink: which model each client holds.

    A copy is named by (round, number): several may be made in one round, because clients that held
    different models end up with slightly different ones.

    Attributes:
        downlink: the agreed code.
        seed: of the run.
        holds: client -> name of the copy that it holds, `NOTHING` for none.
        copies: name -> model [d].
        sent: client -> name of the copy that it will hold if the last message arrives.
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
        """Begins with nothing held, or goes on from what `state` returned."""
        rows = state["holds"].tolist() if state else [NOTHING] * len(clients)
        holds = {}
        for client, row in zip(clients, rows, strict=True):
            holds[client] = (int(row[0]), int(row[1]))
        copies = {}
        for name, tensor in state.items():
            if name != "holds":
                # Stored under "<round>.<number>", because a tensor file has names of text only.
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
        """Codes the model for each client of a cohort, once for all that hold the same copy.

        Returns:
            For each client the round of the model that it holds (0 for none), and the tensors to
            send it.
        """
        # One key for all clients, so that equal copies give equal messages.
        key = Key(self.seed, round, SERVER)
        made: dict[tuple[int, int], tuple[int, int]] = {}
        messages: dict[tuple[int, int], tuple[int, dict[str, Tensor]]] = {}
        for client in cohort:
            old = self.holds[client]
            if old in made:
                continue
            held = self.copies.get(old)
            tensors = self.downlink.encode(params, held, key)
            made[old] = (round, len(made))
            # The decoded model, not `params`: it is what the client will hold.
            self.copies[made[old]] = self.downlink.decode(tensors, held, key)
            messages[old] = (0 if held is None else old[0], tensors)
        self.sent = {client: made[self.holds[client]] for client in cohort}
        return {client: messages[self.holds[client]] for client in cohort}

    def mark_arrived(self, refused: Mapping[ClientId, str]) -> None:
        """Notes that all clients hold what they were sent, except those `refused` (with a reason).

        A refused client still holds the model from before, unless it said that it lost it.
        """
        for client, copy in self.sent.items():
            if client not in refused:
                self.holds[client] = copy
            elif LOST_MODEL in refused[client]:
                self.holds[client] = NOTHING

        # Copies that nobody holds are dropped, and the oldest beyond the limit of memory (float32,
        # 4 bytes a value).
        most = max(1, KEPT_BYTES // (4 * max(1, self.downlink.size)))
        kept = sorted(set(self.holds.values()) - {NOTHING})[-most:]
        self.copies = {name: copy for name, copy in self.copies.items() if name in kept}
        for client, copy in self.holds.items():
            if copy not in kept:
                self.holds[client] = NOTHING
