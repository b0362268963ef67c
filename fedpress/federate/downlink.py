"""How the model travels to the clients: whole, or as coded differences against what each client last held.

The server keeps one copy of what an up-to-date client holds, `held`. Each round it codes the difference of its model
to that copy, adds what the code decodes to, and so makes up for coding errors later: error feedback with one memory
for all clients (Tang et al. 2019, "DoubleSqueeze", arXiv:1905.05957, section 3). A client that missed rounds gets
their differences too, and the whole of `held` where that would be shorter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpress.errors import WireError
from fedpress.federate.exchange import ClientId
from fedpress.federate.transforms import (
    Bound,
    Chain,
    Key,
    Settings,
    bind_chain,
    check_float,
    decode_chain,
    encode_chain,
)
from fedpress.wire.message import Message, pack

SERVER = "server"
PARAMS = "params"
LOST = "send the whole model"


@dataclass(frozen=True)
class Downlink:
    """The agreed code of the model on its way to the clients; without a `chain` it travels whole every round.

    `first` codes the whole model in the first round, when clients hold nothing: as a difference to zero.
    """

    size: int
    shapes: tuple[tuple[int, ...], ...] = ()
    chain: tuple[Settings, ...] = ()
    first: tuple[Settings, ...] = ()

    def bound(self, round: int) -> Chain:
        """Returns the chain of `round`.

        Raises:
            RecipeError: if its transforms do not fit together.
        """
        return bind_chain(self.first if round == 1 else self.chain, Bound(self.size, shapes=self.shapes))[0]

    def decode(self, tensors: Mapping[str, Tensor], seed: int, round: int) -> Tensor:
        """Returns the difference [d] that was coded for `round`.

        Raises:
            WireError: if that is not what the tensors hold.
        """
        difference = decode_chain(self.bound(round), tensors, Key(seed, round, SERVER))
        return check_float(difference, self.size, "fit")

    def receive(self, tensors: Mapping[str, Tensor], key: Key, held: Tensor | None, version: int) -> Tensor:
        """Returns the model of round `key.round` that a client holds after a request.

        Args:
            tensors: of the request: `params`, or `<round>/<name>` for each round that the client may have missed.
            key: with the seed of the run and the round of the request.
            held: what the client held before, None for nothing.
            version: the round of `held`, 0 for nothing.

        Raises:
            WireError: if a difference is missing, damaged, or not finite.
        """
        if PARAMS in tensors:
            if len(tensors) > 1:
                raise WireError("fit.tensors: got 'params' and differences; send one of them")
            return check_float(tensors[PARAMS], self.size, "fit.params")
        held = torch.zeros(self.size) if version == 0 else held
        for round, difference in sorted(_by_round(tensors).items()):
            if round <= version:
                continue
            if round != version + 1 or held is None:
                break
            held, version = held + self.decode(difference, key.seed, round), round
        if version != key.round or held is None:
            raise WireError(f"fit.tensors: this client holds the model of round {version}; {LOST}")
        return held


@dataclass(eq=False)
class Broadcast:
    """The server's side of a downlink: what clients hold, and the coded differences that led there."""

    downlink: Downlink
    seed: int
    held: Tensor
    versions: dict[ClientId, int] = field(default_factory=dict)
    history: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def open(cls, downlink: Downlink, seed: int, clients: Sequence[ClientId], state: Mapping[str, Tensor]) -> Broadcast:
        """Begins, or goes on from what `state` gave."""
        if not state:
            return cls(downlink, seed, torch.zeros(downlink.size), dict.fromkeys(clients, 0))
        versions = dict(zip(clients, state["versions"].tolist(), strict=True))
        rest = {name: tensor for name, tensor in state.items() if name not in ("versions", "held")}
        history = _by_round(rest)
        sizes = {round: _size(tensors) for round, tensors in history.items()}
        return cls(downlink, seed, state["held"], versions, history, sizes)

    def state(self) -> dict[str, Tensor]:
        """Returns all that is needed to go on."""
        past = {f"{round}/{name}": t for round, tensors in self.history.items() for name, t in tensors.items()}
        return {"held": self.held, "versions": torch.tensor(list(self.versions.values())), **past}

    def code(self, round: int, params: Tensor) -> None:
        """Codes the difference of `params` [d] to what clients hold, as the message of `round`."""
        tensors = encode_chain(self.downlink.bound(round), params - self.held, Key(self.seed, round, SERVER))
        self.history[round], self.sizes[round] = tensors, _size(tensors)
        self.held = self.held + self.downlink.decode(tensors, self.seed, round)
        whole = 4 * self.downlink.size
        while sum(self.sizes.values()) > whole:  # nobody will be sent so many differences any more
            oldest = min(self.sizes)
            del self.sizes[oldest], self.history[oldest]

    def tensors(self, client: ClientId, round: int) -> dict[str, Tensor]:
        """Returns what to send to `client` so that it holds the model of `round`, the shorter of the two ways."""
        missed = range(self.versions[client] + 1, round + 1)
        if any(r not in self.history for r in missed):
            return {PARAMS: self.held}
        return {f"{r}/{name}": tensor for r in missed for name, tensor in self.history[r].items()}

    def arrived(self, cohort: Iterable[ClientId], refused: Mapping[ClientId, str], round: int) -> None:
        """Notes who holds the model of `round` now: all of `cohort` but the `refused`, given with the reason.

        A refused client may hold it too; it then skips the differences that it does not need.
        """
        self.versions |= {client: round for client in cohort if client not in refused}
        # No difference reaches back to -1: the client gets the whole model.
        self.versions |= {client: -1 for client, reason in refused.items() if LOST in reason}


def _by_round(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Sorts `<round>/<name>` into a table for each round; WireError for other names."""
    rounds: dict[int, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        number, slash, name = full.partition("/")
        if not slash or not number.isascii() or not number.isdigit() or len(number) > 9:
            raise WireError(f"fit.tensors.{full[:60]}: no such tensor is read; use the same fedpress on both sides")
        rounds.setdefault(int(number), {})[name] = tensor
    return rounds


def _size(tensors: Mapping[str, Tensor]) -> int:
    return len(pack(Message("", {}, tensors)))
