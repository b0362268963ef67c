"""The interface of a federated algorithm: the client's update and the server's step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from pydantic import BaseModel
from torch import Tensor, nn

from fedpress.core.settings import SETTINGS
from fedpress.errors import RecipeError
from fedpress.federation.algorithms.optimizers import Average, Server
from fedpress.federation.local import LocalSettings, LocalWork, Measures
from fedpress.federation.vectors import UPDATE, ExtraVector, Vectors

ClientState: TypeAlias = Vectors
"""The algorithm's vectors that a client stores between its rounds."""
ServerState: TypeAlias = dict[str, Tensor]
"""The tensors that the server keeps between rounds, such as a momentum."""


@dataclass(frozen=True)
class RoundInfo:
    """Public facts about a round, for the server's step.

    Attributes:
        round: number of the server step, from 1.
        cohort: number of clients in the mean. If it is secret who replied, the planned number.
        population: number of all clients.
    """

    round: int
    cohort: int
    population: int


class Algorithm(Protocol):
    """Settings and steps of an algorithm; equal on server and clients, and immutable.

    The base class of the algorithms is `AlgorithmRow`, whose methods do what FedAvg does.
    """

    @property
    def kind(self) -> str:
        """Name of the algorithm in a recipe, such as "fedprox"."""
        ...

    @property
    def optimizer(self) -> Server:
        """The server optimizer. If a run diverges, the error names its `lr`."""
        ...

    @property
    def extras_up(self) -> Mapping[str, ExtraVector]:
        """Name -> further vector from each client; it is aggregated and noised like the update."""
        ...

    @property
    def extras_down(self) -> Mapping[str, ExtraVector]:
        """Name -> further vector from the server to the clients."""
        ...

    @property
    def corrects_gradients(self) -> bool:
        """Whether the algorithm changes the gradients of local steps."""
        ...

    @property
    def keeps_state(self) -> bool:
        """Whether clients store a state between rounds."""
        ...

    @property
    def needs_equal_weights(self) -> bool:
        """Whether the algorithm is correct only if all clients have the same weight."""
        ...

    @property
    def reads_loss(self) -> bool:
        """Whether a client's vectors depend on the value of its loss, not only on gradients.

        This is not allowed under sample privacy, because the loss gets no noise.
        """
        ...

    @property
    def penalties(self) -> Mapping[str, float]:
        """Recipe key -> strength of a penalty. Example: {"proximal_mu": 0.1}.

        If training diverges, the error names penalties that are too strong for the learning rate.
        """
        ...

    def check(self, settings: LocalSettings) -> None:
        """Checks that the algorithm is correct with these settings of local training.

        Raises:
            RecipeError: if it is not.
        """
        ...

    def client_init(self, size: int) -> ClientState:
        """Returns the state of a client before its first round, for a model of `size` values."""
        ...

    def client_update(
        self, model: nn.Module, work: LocalWork, down: Vectors, state: ClientState
    ) -> tuple[Vectors, ClientState, Measures]:
        """Trains `model` in place, starting from the server's parameters.

        Args:
            model: the model; its parameters are `down["params"]`.
            work: the client's training in this round; `work.begin` gives the local steps.
            down: vectors from the server: "params", and the vectors of `extras_down`.
            state: state of this client after its last answer that the server used.

        Returns:
            The vectors to send ("update", and those of `extras_up`), float32 on the CPU; the next
            state; and measures such as {"loss": 0.3, "steps": 12}.
        """
        ...

    def client_commit(
        self, before: ClientState, after: ClientState, arrived: Vectors
    ) -> ClientState:
        """Returns the state that the client stores when it sends its vectors.

        Args:
            before: the state before the local update.
            after: the state that `client_update` returned.
            arrived: the vectors after clip, codec and noise, as the server will decode them.
        """
        ...

    def server_init(self, params: Tensor) -> ServerState:
        """Returns the state before the first round, for `params` [d]."""
        ...

    def server_down(self, state: ServerState) -> Vectors:
        """Returns the vectors of `extras_down`, which are sent beside the parameters."""
        ...

    def server_step(
        self, state: ServerState, params: Tensor, mean: Vectors, info: RoundInfo
    ) -> tuple[ServerState, Tensor]:
        """Returns the next state and the next params [d]; does not change its arguments.

        Args:
            state: state of the server before the step.
            params: the server's parameters [d].
            mean: name -> mean of this vector over the clients.
            info: number of the round, and numbers of clients.
        """
        ...


class AlgorithmRow(BaseModel):
    """The base class of all algorithms. It does what FedAvg does; subclasses override parts of it.

    Example: FedProx overrides `client_update`.
    """

    model_config = SETTINGS

    @property
    def optimizer(self) -> Server:
        """Adds the mean update to the parameters."""
        return Average()

    @property
    def extras_up(self) -> Mapping[str, ExtraVector]:
        """No further vectors."""
        return {}

    @property
    def extras_down(self) -> Mapping[str, ExtraVector]:
        """No further vectors."""
        return {}

    @property
    def corrects_gradients(self) -> bool:
        """No."""
        return False

    @property
    def keeps_state(self) -> bool:
        """No."""
        return False

    @property
    def needs_equal_weights(self) -> bool:
        """No."""
        return False

    @property
    def reads_loss(self) -> bool:
        """No."""
        return False

    @property
    def penalties(self) -> Mapping[str, float]:
        """No penalties."""
        return {}

    def check(self, settings: LocalSettings) -> None:
        """Accepts any settings."""

    def client_init(self, size: int) -> ClientState:
        """Returns an empty state."""
        return {}

    def client_update(
        self, model: nn.Module, work: LocalWork, down: Vectors, state: ClientState
    ) -> tuple[Vectors, ClientState, Measures]:
        """Takes all local steps without changing gradients."""
        run = work.begin(model).finish()
        return {UPDATE: run.update()}, state, run.measures

    def client_commit(
        self, before: ClientState, after: ClientState, arrived: Vectors
    ) -> ClientState:
        """Returns the state that `client_update` computed."""
        return after

    def server_init(self, params: Tensor) -> ServerState:
        """Returns the initial state of the server optimizer."""
        return self.optimizer.init(params)

    def server_down(self, state: ServerState) -> Vectors:
        """Returns no further vectors."""
        return {}

    def server_step(
        self, state: ServerState, params: Tensor, mean: Vectors, info: RoundInfo
    ) -> tuple[ServerState, Tensor]:
        """Takes a step of the server optimizer along the mean update."""
        return self.optimizer.step(state, params, mean[UPDATE])


def check_fits(
    algorithm: Algorithm, settings: LocalSettings, *, steps: str, unit: str | None
) -> None:
    """Checks that an algorithm works with the local settings and the kind of privacy.

    Args:
        algorithm: the algorithm.
        settings: settings of the local training.
        steps: how gradients are computed: "plain", "private" (DP-SGD) or "joint" (one sum of
            clipped gradients).
        unit: what privacy protects: "sample", "client", or None without privacy.

    Raises:
        RecipeError: if the algorithm does not work with these settings or this privacy.
    """
    algorithm.check(settings)
    # With joint steps each client sends one sum of gradients and takes no local steps.
    if steps == "joint" and algorithm.corrects_gradients:
        raise RecipeError(
            (
                f"'{algorithm.kind}' corrects several local steps, but with unit 'sample' and "
                "this value of trust all clients take one step together"
            ),
            place="algorithm",
            cure='set trust = "local", or algorithm = "fedavg"',
        )
    # Under sample privacy only gradients get noise; a loss would be sent without noise.
    if unit == "sample" and algorithm.reads_loss:
        raise RecipeError(
            (
                f"'{algorithm.kind}' reads the loss of a client's examples, which gets no noise "
                "under unit 'sample'"
            ),
            place="algorithm",
            cure='take unit = "client", or algorithm = "fedavg"',
        )
