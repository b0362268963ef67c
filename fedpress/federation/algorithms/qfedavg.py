"""q-FedAvg: clients that do badly count for more (Li et al. 2020, arXiv:1905.10497, algorithm 2)."""

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
"""Losses and sums of curvatures are taken to be at least this."""


class QFedAvg(AlgorithmRow):
    """`algorithm = { kind = "qfedavg", q = 1 }`: lowers the mean of loss^(q+1), so that losses become more alike.

    A client with loss F at the server's model, update u and rate lr sends F^q u and the curvature
    F^q + q F^(q-1) |u|^2 / lr; the server adds the quotient of their means. With q = 0 it is
    FedAvg.
    """

    kind: Literal["qfedavg"] = "qfedavg"
    q: float = Field(default=1.0, ge=0, description="how much more a large loss counts")
    clip_norm: float | None = Field(
        default=None, gt=0, description="largest curvature of a client; needed under client privacy"
    )

    @property
    def extras_up(self) -> Mapping[str, ExtraVector]:
        """The curvature."""
        return {"curvature": ExtraVector(size=1, clip_norm=self.clip_norm)}

    @property
    def reads_loss(self) -> bool:
        """Asks for the loss at the server's model."""
        return True

    def check(self, settings: LocalSettings) -> None:
        """Refuses all but SGD: 1 / lr stands for the Lipschitz constant of the gradient."""
        check_is_sgd(settings, "'qfedavg' measures the curvature of the loss by the rate of SGD")

    def client_update(
        self, model: nn.Module, work: LocalWork, down: Vectors, state: ClientState
    ) -> tuple[Vectors, ClientState, Measures]:
        """Sends the update times loss^q, and the curvature."""
        loss = max(float(work.loss(model)), TINY)
        run = work.begin(model).finish()
        update = run.update()
        square = float(update.double().square().sum())
        curvature = loss**self.q + self.q * loss ** (self.q - 1) * square / work.lr
        vectors = {UPDATE: update * loss**self.q, "curvature": torch.tensor([curvature])}
        return vectors, state, run.measures

    def server_step(
        self, state: ServerState, params: Tensor, mean: Vectors, info: RoundInfo
    ) -> tuple[ServerState, Tensor]:
        """Adds the mean update over the mean curvature; noise makes the latter no less than a tenth of its bound."""
        least = TINY if self.clip_norm is None else self.clip_norm / 10
        return state, params + mean[UPDATE] / mean["curvature"].clamp(min=least)
