"""q-FedAvg: clients with a large loss weigh more (Li et al. 2020, arXiv:1905.10497, alg. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpress.federation.algorithms.base import AlgorithmRow, ClientState, RoundInfo, ServerState
from fedpress.federation.local import LocalSettings, LocalWork, Measures, check_is_sgd
from fedpress.federation.vectors import UPDATE, ExtraVector, Vectors

TINY = 1e-10
"""Lower bound of the loss, and without `clip_norm` of the mean curvature, against divisions by
0."""


class QFedAvg(AlgorithmRow):
    """The algorithm q-FedAvg, which makes the clients' losses more equal.

    In a recipe: `algorithm = { kind = "qfedavg", q = 1 }`. It minimises the mean of loss^(q+1) over
    the clients, so a client with a large loss weighs more.

    A client with loss F at the server's model, update u and learning rate lr sends the vector F^q u
    and the number h = F^q + q F^(q-1) |u|^2 / lr, an estimate of the curvature. The server adds
    mean(F^q u) / mean(h). With q = 0 this is FedAvg.
    """

    kind: Literal["qfedavg"] = "qfedavg"
    q: float = Field(default=1.0, ge=0, description="exponent on a client's loss; 0 is FedAvg")
    clip_norm: float | None = Field(
        default=None, gt=0, description="largest curvature of a client; needed under client privacy"
    )

    @property
    def extras_up(self) -> Mapping[str, ExtraVector]:
        """The estimate h of the curvature: one value."""
        return {"curvature": ExtraVector(size=1, clip_norm=self.clip_norm)}

    @property
    def reads_loss(self) -> bool:
        """Yes: the loss at the server's model."""
        return True

    def check(self, settings: LocalSettings) -> None:
        """Checks that the local optimizer is SGD.

        The estimate of the curvature uses 1 / lr as the Lipschitz constant of the gradient.

        Raises:
            RecipeError: if it is not.
        """
        check_is_sgd(settings, "'qfedavg' estimates the curvature from the learning rate of SGD")

    def client_update(
        self, model: nn.Module, work: LocalWork, down: Vectors, state: ClientState
    ) -> tuple[Vectors, ClientState, Measures]:
        """Sends the update times loss^q, and the curvature."""
        # Computed before the local steps: the algorithm needs the loss at the server's model.
        loss = max(float(work.loss(model)), TINY)
        run = work.begin(model).finish()
        update = run.update()
        # In float64: the squares of millions of values would lose digits in float32.
        square = float(update.double().square().sum())
        curvature = loss**self.q + self.q * loss ** (self.q - 1) * square / work.lr
        vectors = {UPDATE: update * loss**self.q, "curvature": torch.tensor([curvature])}
        return vectors, state, run.measures

    def server_step(
        self, state: ServerState, params: Tensor, mean: Vectors, info: RoundInfo
    ) -> tuple[ServerState, Tensor]:
        """Adds the mean update divided by the mean curvature."""
        # Privacy noise may make the mean curvature tiny or negative, and the step huge or reversed.
        # If `clip_norm` bounds a client's curvature, the mean is kept at a tenth of it or above.
        least = TINY if self.clip_norm is None else self.clip_norm / 10
        return state, params + mean[UPDATE] / mean["curvature"].clamp(min=least)
