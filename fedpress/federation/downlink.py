"""The downlink: compresses the model on its way to the clients, as a difference to their old copy.

The server remembers which copy of the model each client has. It encodes the difference between its
own model and this copy. Server and client then both add the decoded difference to the copy. So an
encoding error becomes part of the next difference. This is error feedback from server to client
(Tang et al. 2019, "DoubleSqueeze", arXiv:1905.05957). Clients that were asked in the same rounds
have the same copy.
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
"""Name of the server in the keys of random streams."""
NO_COPY = (0, 0)
"""The entry in `Broadcast.holds` of a client without a copy."""
LOST_MODEL = "send the full model"
"""The cure in the error of a client that lost its copy. The server looks for these words, and then
sends the full model."""
MAX_COPY_BYTES = 1 << 30
"""Memory limit for copies on the server, which always keeps at least one. Beyond the limit the
oldest copies are dropped, and clients that have a dropped copy get the full model next time."""


@dataclass(frozen=True)
class Downlink:
    """The codecs of the model from server to clients, agreed by both sides.

    Attributes:
        size: number of trained values d of the model.
        shapes: shapes of the model's parameters, for codecs that work on whole matrices.
        chain: codecs of a difference, in the order in which they encode.
        first: codecs of the full model, for clients without a copy.
    """

    size: int
    shapes: tuple[tuple[int, ...], ...] = ()
    chain: tuple[Settings, ...] = ()
    first: tuple[Settings, ...] = ()

    def bound(self, *, whole: bool) -> Chain:
        """Returns the codecs as a chain of transforms that encodes and decodes.

        Args:
            whole: True for the full model, False for a difference.

        Raises:
            RecipeError: if the codecs do not fit together.
        """
        chain = self.first if whole else self.chain
        with renaming({"chain": "first"} if whole else {}):
            return bind_chain(chain, Bound(self.size, shapes=self.shapes))[0]

    def packed_floats(self, tensors: Mapping[str, Tensor], *, whole: bool) -> frozenset[str]:
        """Returns the names of encoded `tensors` whose floats are packed in the shortest form.

        A full model without codecs is sent raw.
        """
        chain = self.first if whole else self.chain
        return frozenset(tensors if chain else ())

    def encode(self, params: Tensor, held: Tensor | None, key: Key) -> dict[str, Tensor]:
        """Encodes `params` [d] for clients whose copy is `held` [d] (None: they have no copy)."""
        # A difference has smaller values than the model, so it needs fewer bits.
        difference = params if held is None else params - held
        return encode_chain(self.bound(whole=held is None), difference, key)

    def decode(self, tensors: Mapping[str, Tensor], held: Tensor | None, key: Key) -> Tensor:
        """Returns a client's new copy [d].

        Args:
            tensors: the encoded model or difference.
            held: the client's old copy [d]; None: it has no copy.
            key: seeds the random streams with which the server encoded.

        Raises:
            WireError: if the tensors do not decode to d finite values.
        """
        decoded = decode_chain(self.bound(whole=held is None), tensors, key)
        difference = check_float(decoded, self.size, "fit")
        if held is None:
            return difference
        # The sum of two finite vectors may overflow, so it is checked too.
        return check_float(held + difference, self.size, "fit")


@dataclass(eq=False)
class Broadcast:
    """The server's side of a downlink: remembers which copy of the model each client has.

    A copy is named (round, number). A round may make several copies, because clients with
    different old copies get slightly different new copies.

    Attributes:
        downlink: the agreed codecs.
        seed: seed of the run.
        holds: client -> name of its copy, or `NO_COPY`.
        copies: name of a copy -> model [d].
        sent: client -> name of the copy that the client will have when the last message arrives.
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
        """Restores the object from `state`, a result of `Broadcast.state`.

        If `state` is empty, no client has a copy.
        """
        rows = state["holds"].tolist() if state else [NO_COPY] * len(clients)
        holds = {}
        for client, row in zip(clients, rows, strict=True):
            holds[client] = (int(row[0]), int(row[1]))
        copies = {}
        for name, tensor in state.items():
            if name != "holds":
                # Tensor files have text as names, so a copy is stored as "<round>.<number>".
                round, _, number = name.partition(".")
                copies[int(round), int(number)] = tensor
        return cls(downlink, seed, holds, copies)

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors from which `open` restores this object."""
        copies = {f"{round}.{number}": copy for (round, number), copy in self.copies.items()}
        return {"holds": torch.tensor(list(self.holds.values()), dtype=torch.int64), **copies}

    def encode_for(
        self, round: int, params: Tensor, cohort: Sequence[ClientId]
    ) -> dict[ClientId, tuple[int, dict[str, Tensor]]]:
        """Encodes the model for the clients of a cohort, once for all clients with the same copy.

        Args:
            round: number of the round.
            params: the server's model [d].
            cohort: the clients that are asked.

        Returns:
            For each client the round of its old copy (0: it has no copy), and the tensors to send.
        """
        # The key contains no client's name: clients with the same copy get the same message.
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
            # The decoded model and not `params`, because the client will decode the same.
            self.copies[made[old]] = self.downlink.decode(tensors, held, key)
            messages[old] = (0 if held is None else old[0], tensors)
        self.sent = {client: made[self.holds[client]] for client in cohort}
        return {client: messages[self.holds[client]] for client in cohort}

    def mark_arrived(self, refused: Mapping[ClientId, str]) -> None:
        """Stores that the last message arrived at all its receivers, except at refused clients.

        Args:
            refused: client -> why its answer was not used. Such a client still has its old copy,
                unless the reason says that the copy is lost.
        """
        for client, copy in self.sent.items():
            if client not in refused:
                self.holds[client] = copy
            elif LOST_MODEL in refused[client]:
                self.holds[client] = NO_COPY

        # Drops copies that no client has, and the oldest beyond the memory limit. A float32 value
        # has 4 bytes.
        most = max(1, MAX_COPY_BYTES // (4 * max(1, self.downlink.size)))
        # Names begin with the round, so sorting puts the newest copies last.
        kept = sorted(set(self.holds.values()) - {NO_COPY})[-most:]
        self.copies = {name: copy for name, copy in self.copies.items() if name in kept}
        for client, copy in self.holds.items():
            if copy not in kept:
                self.holds[client] = NO_COPY
