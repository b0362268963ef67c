"""FedAvgM: FedAvg with momentum on the server (Hsu, Qi & Brown 2019, arXiv:1909.06335)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedpress.federation.algorithms.base import AlgorithmRow
from fedpress.federation.algorithms.optimizers import Momentum, Server


class FedAvgM(AlgorithmRow):
    """The algorithm FedAvgM (`algorithm = "fedavgm"`): v = beta v + mean update; params += lr v."""

    kind: Literal["fedavgm"] = "fedavgm"
    lr: float = Field(default=1.0, gt=0, description="learning rate of the server")
    beta: float = Field(default=0.9, ge=0, lt=1, description="momentum of the server")

    @property
    def optimizer(self) -> Server:
        """Momentum with these settings."""
        return Momentum(lr=self.lr, beta=self.beta)
