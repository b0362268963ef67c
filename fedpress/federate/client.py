"""A client: answers a "fit" message with its update, and lets nothing else out that the privacy plan does not allow."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor, nn

from fedpress import seeds, tree
from fedpress.arrays import Arrays
from fedpress.errors import RecipeError, TrainingError, WireError
from fedpress.federate.exchange import ClientId
from fedpress.federate.local import LocalSettings, LocalUpdate, Prepare, Task, check_private, private_sgd, sgd
from fedpress.federate.transforms import Key
from fedpress.federate.uplink import Uplink
from fedpress.models.norms import freeze_batch_norm_
from fedpress.privacy.plan import PrivacyPlan
from fedpress.wire.message import JSON, Message, pack, unpack

Norm = Literal["frozen", "batch"]


def agreement(layout: tree.Layout, settings: LocalSettings, uplink: Uplink) -> str:
    """Returns a fingerprint of all that both sides must hold alike; a client refuses a request with another one."""
    return blake2b(repr((layout, settings, uplink)).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, eq=False)
class Client:
    """One client, ready to answer.

    Attributes:
        name: under which the transport knows it.
        arrays: its private examples.
        model: a model to work in; its trainable parameters are overwritten by every request, so clients in one
            process may share it. Buffers are as given before and after every round.
        settings: how to train.
        uplink: the agreed way home.
        seed: of the run; all randomness is derived from it, the name and the round; private steps add what was asked.
        prepare: raw examples [k, ...] and a generator -> network input; its `repr` tells its settings.
        local_update: `sgd` or `private_sgd`.
        plan: this client's plan under unit "sample".
        norm: "frozen" fixes the statistics of batch norm (scale and bias train); "batch" uses those of each batch.

    Raises:
        RecipeError: if the parts do not fit together.
    """

    name: ClientId
    arrays: Arrays
    model: nn.Module
    settings: LocalSettings
    uplink: Uplink
    seed: int
    prepare: Prepare
    local_update: LocalUpdate = sgd
    plan: PrivacyPlan | None = None
    norm: Norm = "frozen"

    def __post_init__(self) -> None:
        if not len(self.arrays):
            raise RecipeError(f"federate.client {self.name}: it has no examples; leave it out or partition differently")
        if (
            self.norm != "frozen"
            and self.plan is not None
            and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())
        ):
            raise RecipeError(
                "federate.norm: batch norm in training mode mixes examples, which breaks sample privacy; use 'frozen'"
            )
        planned = self.uplink.privacy is not None and self.uplink.privacy.unit == "sample"
        if planned != (self.plan is not None) or planned != (self.local_update is private_sgd):
            raise RecipeError(
                "federate.privacy: unit 'sample' needs an uplink that knows it, a plan per client and private_sgd, "
                "all three or none"
            )
        if planned:
            check_private(self.settings, self.plan)
        size = tree.Layout.of(self.model).size
        if size != self.uplink.promise.size:
            raise RecipeError(
                f"federate: the model trains {size} values but the uplink is for {self.uplink.promise.size}"
            )

    def handle(self, request: bytes) -> bytes:
        """Answers the bytes of a "fit" message with those of an "update" message.

        Raises:
            WireError: if the request is damaged or does not fit what was agreed.
            TrainingError: if the local update fails; under privacy without saying on what.
        """
        round, params = self._read(unpack(request))
        try:
            update, measured = self._fit(params, round)
        except Exception as problem:
            if self.uplink.privacy is None:
                raise
            raise TrainingError(
                f"local update: failed with {type(problem).__name__}; what on stays private"
            ) from problem
        key = Key(self.seed, round, self.name)
        header: dict[str, JSON] = {"round": round, **self.uplink.metrics(measured)}
        if not self.uplink.client_unit:  # the number of examples is public under unit "sample", not under "client"
            header["examples"] = len(self.arrays)
        return pack(Message("update", header, self.uplink.encode(update, key)))

    def _read(self, request: Message) -> tuple[int, Tensor]:
        if request.kind != "fit":
            raise WireError(f"fit.kind: got {request.kind!r}, expected 'fit'; use the same fedpress on both sides")
        round, params = request.header.get("round"), request.tensors.get("params")
        if not isinstance(round, int) or round < 1:
            raise WireError(f"fit.round: got {round!r}, expected a whole number from 1")
        agreed = agreement(tree.Layout.of(self.model), self.settings, self.uplink)
        if request.header.get("agreement") != agreed:
            raise WireError("fit.agreement: the server works with other settings or another model; use the same recipe")
        if params is None or params.dtype != torch.float32 or not bool(torch.isfinite(params).all()):
            raise WireError("fit.params: expected finite float32 values; send the server's parameters")
        return round, params

    def _fit(self, params: Tensor, round: int) -> tuple[Tensor, dict[str, JSON]]:
        """Returns the update [d] on the CPU and what the local update measured; the model's buffers are put back."""
        tree.assign_(self.model, params)
        buffers = [b.clone() for b in self.model.buffers()]
        key = Key(self.seed, round, self.name)
        self.model.train()
        if self.norm == "frozen":
            freeze_batch_norm_(self.model)
        try:
            with torch.random.fork_rng():  # dropout draws from torch's global generator
                torch.manual_seed(seeds.derive(self.seed, "client", self.name, "round", round, "dropout"))
                measured = self.local_update(self.model, Task(self.arrays, self.settings, key, self.prepare, self.plan))
        finally:  # whatever a module keeps of private examples must not reach the next request
            with torch.no_grad():
                for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
        update = tree.flatten(self.model) - params
        if not bool(torch.isfinite(update).all()):
            raise TrainingError(
                f"local update: not finite in round {round}; lower federate.lr (now {self.settings.lr})"
            )
        return update, measured
