"""The table of server optimizers, which turn the mean update into a step of the server's model."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol, TypeAlias

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from fedpress.core.settings import SETTINGS

ServerState: TypeAlias = dict[str, Tensor]
"""The tensors that an optimizer keeps between rounds, such as `velocity`."""


class ServerOptimizer(Protocol):
    """Takes a step along the mean update, which serves as the negative gradient.

    Both methods are pure functions of flat float32 vectors. The state is a dictionary of tensors.
    """

    def init(self, params: Tensor) -> ServerState:
        """Returns the state before the first round, for `params` [d]."""
        ...

    def step(
        self, state: ServerState, params: Tensor, mean_update: Tensor
    ) -> tuple[ServerState, Tensor]:
        """Returns the next state and the next params [d]; does not change its arguments."""
        ...


class Average(BaseModel):
    """FedAvg: adds `lr` times the mean update (McMahan et al. 2017, arXiv:1602.05629).

    >>> Average().step({}, torch.zeros(2), torch.ones(2))
    ({}, tensor([1., 1.]))
    """

    model_config = SETTINGS

    kind: Literal["average"] = "average"
    lr: float = Field(default=1.0, gt=0, description="factor on the mean update; 1 is plain FedAvg")

    def init(self, params: Tensor) -> ServerState:
        """Returns an empty state."""
        return {}

    def step(
        self, state: ServerState, params: Tensor, mean_update: Tensor
    ) -> tuple[ServerState, Tensor]:
        """Returns params + lr x mean_update."""
        return state, params + self.lr * mean_update


class Momentum(BaseModel):
    """FedAvgM: v = beta v + update; x = x + lr v (Hsu, Qi & Brown 2019, arXiv:1909.06335)."""

    model_config = SETTINGS

    kind: Literal["momentum"] = "momentum"
    lr: float = Field(default=1.0, gt=0, description="factor on the velocity of the mean updates")
    beta: float = Field(default=0.9, ge=0, lt=1, description="decay of the velocity")

    def init(self, params: Tensor) -> ServerState:
        """Returns a velocity of zero."""
        return {"velocity": torch.zeros_like(params)}

    def step(
        self, state: ServerState, params: Tensor, mean_update: Tensor
    ) -> tuple[ServerState, Tensor]:
        """Returns the new velocity and the new params."""
        velocity = self.beta * state["velocity"] + mean_update
        return {"velocity": velocity}, params + self.lr * velocity


class Adam(BaseModel):
    """FedAdam: Adam without bias correction (Reddi et al. 2021, arXiv:2003.00295, algorithm 2)."""

    model_config = SETTINGS

    kind: Literal["adam"] = "adam"
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
        default=1e-3,
        gt=0,
        description="added to the root of the mean square, against a division by 0",
    )

    def init(self, params: Tensor) -> ServerState:
        """Returns a zero mean and a mean square of tau^2."""
        # tau^2 is the smallest initial value that algorithm 2 of the paper allows.
        return {"mean": torch.zeros_like(params), "square": torch.full_like(params, self.tau**2)}

    def step(
        self, state: ServerState, params: Tensor, mean_update: Tensor
    ) -> tuple[ServerState, Tensor]:
        """Returns the new running means and the new params."""
        mean = self.beta1 * state["mean"] + (1 - self.beta1) * mean_update
        square = self.beta2 * state["square"] + (1 - self.beta2) * mean_update**2
        # Without tau, steps would be huge where updates are nearly zero.
        step = self.lr * mean / (square.sqrt() + self.tau)
        return {"mean": mean, "square": square}, params + step


Server = Annotated[Average | Momentum | Adam, Field(discriminator="kind")]
"""The settings of one server optimizer, chosen by `kind`."""
SERVERS: dict[str, type[Average] | type[Momentum] | type[Adam]] = {
    "average": Average,
    "momentum": Momentum,
    "adam": Adam,
}
"""Name in a recipe -> class of the server optimizer."""
