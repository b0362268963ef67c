"""SCAFFOLD: control variates remove the drift of local steps on unequal clients.

Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1 with option II. x are the server's
parameters, y a client's. c is the server's control variate, c_i a client's, and g_i a client's
gradient. A client takes K local steps of learning rate lr. S are the clients of the round, N is
the number of all clients.

    K times:  y <- y - lr (g_i(y) - c_i + c)
    then      c_i' = c_i - c + (x - y) / (K lr),   sent: update y - x, control c_i' - c_i
    server    x <- x + step of its optimizer along the mean update,
              c <- c + |S| / N (mean of the sent controls)

So c stays the mean of all c_i. Where the mean gradient of all clients is zero, the corrected steps
are zero, too: local steps do not move away from the common optimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpress.codecs import AnyTransform
from fedpress.errors import RecipeError
from fedpress.federation.algorithms.base import AlgorithmRow, ClientState, RoundInfo, ServerState
from fedpress.federation.algorithms.optimizers import Average, Server
from fedpress.federation.local import LocalSettings, LocalWork, Measures, check_is_sgd
from fedpress.federation.vectors import UPDATE, ExtraVector, Vectors

CONTROL = "control"
"""Name of the control variate in messages and states."""


class Scaffold(AlgorithmRow):
    """The algorithm SCAFFOLD (`algorithm = "scaffold"`).

    Server and client both add the decoded change of the control (after clip, codec and noise). So a
    coding error becomes part of the next change, and c stays the mean of all c_i.

    Under client privacy `clip_norm` bounds the change of one client's control. This change is about
    as large as one gradient, and an update as large as K lr gradients. So with `clip_norm` = (clip
    norm of the update) / (K lr) both are clipped about equally often.

    Under sample privacy the control is computed from noised steps and the server's vectors: it is
    post-processing and costs no privacy.
    """

    kind: Literal["scaffold"] = "scaffold"
    server: Server = Field(
        default=Average(), description="optimizer of the server: average, momentum or adam"
    )
    uplink: tuple[AnyTransform, ...] = Field((), description="codecs of the sent control, in order")
    clip_norm: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="L2 bound of the sent control; needed under client privacy",
    )

    @property
    def optimizer(self) -> Server:
        """The optimizer that the key `server` names."""
        return self.server

    @property
    def extras_up(self) -> Mapping[str, ExtraVector]:
        """The change of the client's control."""
        return {CONTROL: ExtraVector(codecs=self.uplink, clip_norm=self.clip_norm)}

    @property
    def extras_down(self) -> Mapping[str, ExtraVector]:
        """The server's control."""
        return {CONTROL: ExtraVector()}

    @property
    def corrects_gradients(self) -> bool:
        """Yes, in every local step."""
        return True

    @property
    def keeps_state(self) -> bool:
        """Yes: the client's control."""
        return True

    @property
    def needs_equal_weights(self) -> bool:
        """Yes: with other weights c is not the mean of all c_i, which changes the fixed point."""
        return True

    def check(self, settings: LocalSettings) -> None:
        """Checks that the local optimizer is SGD without momentum.

        Raises:
            RecipeError: if it is not.
        """
        # With another optimizer or momentum, (x - y) / (K lr) is not the mean gradient.
        check_is_sgd(settings, "'scaffold' computes a client's mean gradient from its update")
        if settings.momentum:
            raise RecipeError(
                (
                    f"got {settings.momentum:g}, but 'scaffold' computes a client's mean gradient "
                    "from its update"
                ),
                place="momentum",
                cure='set momentum = 0; the table scaffold may set server = { kind = "momentum" }',
            )

    def client_init(self, size: int) -> ClientState:
        """Returns a control of zeros. The server's control starts with zeros, too."""
        return {CONTROL: torch.zeros(size)}

    def client_update(
        self, model: nn.Module, work: LocalWork, down: Vectors, state: ClientState
    ) -> tuple[Vectors, ClientState, Measures]:
        """Adds c - c_i to every gradient."""
        drift = down[CONTROL] - state[CONTROL]
        run = work.begin(model)
        steps = 0
        correction: list[Tensor] = []
        for step in run:
            # Split in the first step, which knows the shapes and the device of the parameters.
            correction = correction or step.split(drift)
            for gradient, part in zip(step.gradients, correction, strict=True):
                gradient.add_(part)
            steps += 1
        # The update is y - x, so (x - y) / (K lr) is -update / (K lr).
        update = run.update()
        control = -drift - update / (steps * work.lr)
        vectors = {UPDATE: update, CONTROL: control - state[CONTROL]}
        return vectors, {CONTROL: control}, run.measures

    def client_commit(
        self, before: ClientState, after: ClientState, arrived: Vectors
    ) -> ClientState:
        """Adds the decoded change of the control, as the server does, and not the exact change."""
        return {CONTROL: before[CONTROL] + arrived[CONTROL]}

    def server_init(self, params: Tensor) -> ServerState:
        """Returns the server optimizer's state, and c = 0."""
        return {**self.server.init(params), CONTROL: torch.zeros_like(params)}

    def server_down(self, state: ServerState) -> Vectors:
        """Returns c."""
        return {CONTROL: state[CONTROL]}

    def server_step(
        self, state: ServerState, params: Tensor, mean: Vectors, info: RoundInfo
    ) -> tuple[ServerState, Tensor]:
        """Moves the parameters by the optimizer, and c by |S| / N times the mean change."""
        own = {name: tensor for name, tensor in state.items() if name != CONTROL}
        own, params = self.server.step(own, params, mean[UPDATE])
        # Only |S| of the N clients have changed their controls, so the mean over all N clients
        # changes by |S| / N of the mean over these |S|.
        control = state[CONTROL] + mean[CONTROL] * (info.cohort / info.population)
        return {**own, CONTROL: control}, params
