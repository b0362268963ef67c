"""FedProx: every local step is pulled back to the server's model (Li et al. 2020, arXiv:1812.06127)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import nn

from fedpress.federation.algorithms.base import AlgorithmRow, ClientState
from fedpress.federation.algorithms.optimizers import Average, Server
from fedpress.federation.local import LocalWork, Measures
from fedpress.federation.vectors import UPDATE, Vectors


class FedProx(AlgorithmRow):
    """`algorithm = { kind = "fedprox", proximal_mu = 0.1 }`: adds proximal_mu / 2 |w - w_server|^2 to the loss."""

    kind: Literal["fedprox"] = "fedprox"
    proximal_mu: float = Field(default=0.1, ge=0, description="strength of the pull")
    server: Server = Field(
        default=Average(), description="optimizer of the server: average, momentum or adam"
    )

    @property
    def optimizer(self) -> Server:
        """The one that was asked for."""
        return self.server

    @property
    def corrects_gradients(self) -> bool:
        """The pull is zero in the first step and acts in those after it."""
        return True

    @property
    def penalties(self) -> Mapping[str, float]:
        """At a rate of 2 / proximal_mu the pull overshoots."""
        return {"proximal_mu": self.proximal_mu}

    def client_update(
        self, model: nn.Module, work: LocalWork, down: Vectors, state: ClientState
    ) -> tuple[Vectors, ClientState, Measures]:
        """Adds proximal_mu (w - w_server) to every gradient."""
        run = work.begin(model)
        for number, step in enumerate(run):
            if number == 0:
                start = [p.clone() for p in step.params]
            for gradient, now, before in zip(step.gradients, step.params, start, strict=True):
                gradient.add_(now - before, alpha=self.proximal_mu)
        return {UPDATE: run.update()}, state, run.measures
