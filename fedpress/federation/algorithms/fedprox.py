"""FedProx: a proximal term pulls local steps towards the server's model (Li et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from fedpress.federation.algorithms.base import AlgorithmRow, ClientState
from fedpress.federation.algorithms.optimizers import Average, Server
from fedpress.federation.local import LocalWork, Measures
from fedpress.federation.vectors import UPDATE, Vectors


class FedProx(AlgorithmRow):
    """The algorithm FedProx (arXiv:1812.06127, algorithm 2).

    In a recipe: `algorithm = { kind = "fedprox", proximal_mu = 0.1 }`. It adds
    proximal_mu / 2 |w - w_server|^2 to the loss of every local step.
    """

    kind: Literal["fedprox"] = "fedprox"
    proximal_mu: float = Field(default=0.1, ge=0, description="strength of the proximal term")
    server: Server = Field(
        default=Average(), description="optimizer of the server: average, momentum or adam"
    )

    @property
    def optimizer(self) -> Server:
        """The optimizer that the key `server` names."""
        return self.server

    @property
    def corrects_gradients(self) -> bool:
        """Yes: it adds the gradient of the proximal term."""
        return True

    @property
    def penalties(self) -> Mapping[str, float]:
        """The proximal term. A local learning rate of 2 / proximal_mu or more may diverge."""
        return {"proximal_mu": self.proximal_mu}

    def client_update(
        self, model: nn.Module, work: LocalWork, down: Vectors, state: ClientState
    ) -> tuple[Vectors, ClientState, Measures]:
        """Adds proximal_mu (w - w_server) to every gradient."""
        run = work.begin(model)
        start: list[Tensor] = []
        for step in run:
            # The parameters of the first step are the server's, in the shapes of the gradients.
            start = start or [p.clone() for p in step.params]
            # Added to the gradient and not to the loss, so that it works with DP-SGD, too.
            for gradient, now, before in zip(step.gradients, step.params, start, strict=True):
                gradient.add_(now - before, alpha=self.proximal_mu)
        return {UPDATE: run.update()}, state, run.measures
