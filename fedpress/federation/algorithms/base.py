"""What an algorithm is: the client's update, the server's step, and everything both need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fedpress.errors import RecipeError
from fedpress.federation.algorithms.optimizers import Average, Server
from fedpress.federation.local import LocalSettings, LocalWork, Measures
from fedpress.federation.vectors import UPDATE, ExtraVector, Vectors

ClientState: TypeAlias = Vectors
"""What a client keeps from one of its rounds to the next."""
ServerState: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class RoundInfo:
    """What the server may know of a round when it takes a step; all of it is public.

    Attributes:
        round: number of the server step, from 1.
        cohort: clients behind the mean: those whose vectors came, or the planned cohort where who
            replied is secret.
        population: all clients.
    """

    round: int
    cohort: int
    population: int


class Algorithm(Protocol):
    """One row of the table: frozen settings, the same on both sides.

    `AlgorithmRow` implements all of it as FedAvg does.
    """

    @property
    def kind(self) -> str:
        """Name of the row."""
        ...

    @property
    def optimizer(self) -> Server:
        """The server optimizer of the update; an error names its `lr` if a run diverges."""
        ...

    @property
    def extras_up(self) -> Mapping[str, ExtraVector]:
        """Further vectors from clients, by name; aggregated like the update, and charged."""
        ...

    @property
    def extras_down(self) -> Mapping[str, ExtraVector]:
        """Further vectors to clients, by name."""
        ...

    @property
    def corrects_gradients(self) -> bool:
        """Whether it changes gradients of local steps; a joint noised step has none to change."""
        ...

    @property
    def keeps_state(self) -> bool:
        """Whether clients keep something from round to round."""
        ...

    @property
    def needs_equal_weights(self) -> bool:
        """Whether it holds only if every client counts the same."""
        ...

    @property
    def reads_loss(self) -> bool:
        """Whether it needs the loss of a client's examples, which sample privacy forbids."""
        ...

    @property
    def penalties(self) -> Mapping[str, float]:
        """Strengths of its penalties, by recipe key, such as {"proximal_mu": 0.1}.

        An error names those that make training diverge at a large learning rate.
        """
        ...

    def check(self, settings: LocalSettings) -> None:
        """Raises RecipeError if it does not hold with these local settings."""
        ...

    def client_init(self, size: int) -> ClientState:
        """Returns the state of a client that was never asked, for a model of `size` values."""
        ...

    def client_update(
        self, model: nn.Module, work: LocalWork, down: Vectors, state: ClientState
    ) -> tuple[Vectors, ClientState, Measures]:
        """Trains `model` in place, beginning with the server's parameters.

        Args:
            model: holds `down["params"]`.
            work: yields the local steps; see `LocalWork.begin`.
            down: what the server sent: "params", and every name of `extras_down`.
            state: of this client, as its last round that counted left it.

        Returns:
            The "update" and every name of `extras_up`, float32 on the CPU; the next state; what was
            measured.
        """
        ...

    def client_commit(
        self, before: ClientState, after: ClientState, arrived: Vectors
    ) -> ClientState:
        """Returns the state that a client keeps after its vectors were sent.

        Args:
            before: the state before the local update.
            after: the state that `client_update` returned.
            arrived: the vectors as the server decodes them, after clip, codec and noise.
        """
        ...

    def server_init(self, params: Tensor) -> ServerState:
        """Returns the state before the first round, for `params` [d]."""
        ...

    def server_down(self, state: ServerState) -> Vectors:
        """Returns every name of `extras_down`, to be sent beside the parameters."""
        ...

    def server_step(
        self, state: ServerState, params: Tensor, mean: Vectors, info: RoundInfo
    ) -> tuple[ServerState, Tensor]:
        """Returns the next state and the next params [d]; its arguments stay unchanged.

        Args:
            state: of the server, before the step.
            params: the server's parameters [d].
            mean: the mean of each named vector.
            info: number of the round and of the clients.
        """
        ...


class AlgorithmRow(BaseModel):
    """FedAvg, as a base: an algorithm overrides what it does differently."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def optimizer(self) -> Server:
        """Adds the mean update."""
        return Average()

    @property
    def extras_up(self) -> Mapping[str, ExtraVector]:
        """None."""
        return {}

    @property
    def extras_down(self) -> Mapping[str, ExtraVector]:
        """None."""
        return {}

    @property
    def corrects_gradients(self) -> bool:
        """Leaves gradients as they are."""
        return False

    @property
    def keeps_state(self) -> bool:
        """Keeps nothing."""
        return False

    @property
    def needs_equal_weights(self) -> bool:
        """Any weights."""
        return False

    @property
    def reads_loss(self) -> bool:
        """It needs gradients only."""
        return False

    @property
    def penalties(self) -> Mapping[str, float]:
        """None."""
        return {}

    def check(self, settings: LocalSettings) -> None:
        """Accepts any settings."""

    def client_init(self, size: int) -> ClientState:
        """Nothing."""
        return {}

    def client_update(
        self, model: nn.Module, work: LocalWork, down: Vectors, state: ClientState
    ) -> tuple[Vectors, ClientState, Measures]:
        """Takes the local steps as they are."""
        run = work.begin(model).finish()
        return {UPDATE: run.update()}, state, run.measures

    def client_commit(
        self, before: ClientState, after: ClientState, arrived: Vectors
    ) -> ClientState:
        """Keeps what the client computed."""
        return after

    def server_init(self, params: Tensor) -> ServerState:
        """The state of the server optimizer."""
        return self.optimizer.init(params)

    def server_down(self, state: ServerState) -> Vectors:
        """Nothing."""
        return {}

    def server_step(
        self, state: ServerState, params: Tensor, mean: Vectors, info: RoundInfo
    ) -> tuple[ServerState, Tensor]:
        """Takes a step of the server optimizer along the mean update."""
        return self.optimizer.step(state, params, mean[UPDATE])


def check_fits(
    algorithm: Algorithm, settings: LocalSettings, *, steps: str, unit: str | None
) -> None:
    """Checks that an algorithm works with these settings, gradients and protected unit.

    Args:
        algorithm: the row.
        settings: of the local training.
        steps: source of the gradients, see `Trust.steps`.
        unit: "sample", "client" or None.

    Raises:
        RecipeError: naming what does not fit, and the cure.
    """
    algorithm.check(settings)
    # A joint step is one noised sum of gradients over all clients: there are no local steps.
    if steps == "joint" and algorithm.corrects_gradients:
        raise RecipeError(
            (
                f"'{algorithm.kind}' corrects several local steps, but with unit 'sample' and "
                "this trust the clients take one step together"
            ),
            place="algorithm",
            cure='set trust = "local", or algorithm = "fedavg"',
        )
    # Under sample privacy the noise is in the gradients; a loss would leave without any.
    if unit == "sample" and algorithm.reads_loss:
        raise RecipeError(
            (
                f"'{algorithm.kind}' asks for the loss of a client's examples, which no noise "
                "covers under unit 'sample'"
            ),
            place="algorithm",
            cure='take unit = "client", or algorithm = "fedavg"',
        )
