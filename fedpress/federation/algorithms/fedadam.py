"""FedAdam: FedAvg with Adam on the server (Reddi et al. 2021, arXiv:2003.00295, algorithm 2)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedpress.federation.algorithms.base import AlgorithmRow
from fedpress.federation.algorithms.optimizers import Adam, Server


class FedAdam(AlgorithmRow):
    """`algorithm = "fedadam"`: Adam on the server, with the mean update in place of a gradient."""

    kind: Literal["fedadam"] = "fedadam"
    lr: float = Field(default=0.01, gt=0, description="of the server")
    beta1: float = Field(
        default=0.9, ge=0, lt=1, description="share of the old in the running mean of the updates"
    )
    beta2: float = Field(
        default=0.99,
        ge=0,
        lt=1,
        description="share of the old in the running mean of their squares",
    )
    tau: float = Field(default=1e-3, gt=0, description="keeps steps bounded where updates vanish")

    @property
    def optimizer(self) -> Server:
        """Adam."""
        return Adam(lr=self.lr, beta1=self.beta1, beta2=self.beta2, tau=self.tau)
