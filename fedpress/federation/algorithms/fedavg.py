"""FedAvg: plain local steps and the mean of the updates (McMahan et al. 2017, arXiv:1602.05629)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedpress.federation.algorithms.base import AlgorithmRow
from fedpress.federation.algorithms.optimizers import Average, Server


class FedAvg(AlgorithmRow):
    """The algorithm FedAvg, the default (`algorithm = "fedavg"`), with any server optimizer."""

    kind: Literal["fedavg"] = "fedavg"
    server: Server = Field(
        default=Average(), description="optimizer of the server: average, momentum or adam"
    )

    @property
    def optimizer(self) -> Server:
        """The optimizer that the key `server` names."""
        return self.server
