"""FedAdam: FedAvg with Adam on the server (Reddi et al. 2021, arXiv:2003.00295, algorithm 2)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedpress.federation.algorithms.base import AlgorithmRow
from fedpress.federation.algorithms.optimizers import Adam, Server


class FedAdam(AlgorithmRow):
    """The algorithm FedAdam (`algorithm = "fedadam"`).

    The server takes a step of Adam, without bias correction. Its gradient is the mean update with
    the opposite sign.
    """

    kind: Literal["fedadam"] = "fedadam"
    lr: float = Field(default=0.01, gt=0, description="learning rate of the server")
    beta1: float = Field(
        default=0.9, ge=0, lt=1, description="decay of the running mean of the updates"
    )
    beta2: float = Field(
        default=0.99,
        ge=0,
        lt=1,
        description="decay of the running mean of the squared updates",
    )
    tau: float = Field(
        default=1e-3, gt=0, description="added to the root of the mean square (Adam's epsilon)"
    )

    @property
    def optimizer(self) -> Server:
        """Adam with these settings."""
        return Adam(lr=self.lr, beta1=self.beta1, beta2=self.beta2, tau=self.tau)
