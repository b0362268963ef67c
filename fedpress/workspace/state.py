"""The state that is passed from stage to stage, and the events of a running stage.

A recipe lists stages, such as "train" and "prune". Each stage gets the state of the stage before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field, JsonValue, StringConstraints
from torch import nn

from fedpress.core.inputs import Inputs
from fedpress.data import FederatedData
from fedpress.data.reading import Reading
from fedpress.models import ModelSpec
from fedpress.privacy.ledger import Ledger
from fedpress.training.device import find

Name = Annotated[
    str,
    StringConstraints(pattern=r"^\w[\w .-]*$", max_length=60),
    Field(description="name in folders, records and the privacy ledger; unique in the recipe"),
]
"""The name of a recipe or stage, which is also the name of its folder."""

# A function instead of a model: few runs need the model, and it would double the memory.
Loader = Callable[[], tuple[ModelSpec, nn.Module]]


class Network(Protocol):
    """Reaches clients on other machines; see `fedpress.network.server`."""

    def open(self, session: str, clients: Sequence[str] | None) -> Any:
        """Returns a transport (`fedpress.federation.Transport`) to clients.

        It also has a method `mark`, see `fedpress.transport.remote.RemoteTransport.mark`.

        Args:
            session: id of the stage to which the messages belong.
            clients: names of the clients, in this order; None: all clients that are connected now.
        """
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns to predict if the clients' data are tables."""
        ...

    @property
    def reading(self) -> Reading:
        """How clients read their tables, if they are no other than the server's."""
        ...

    def told(self, sentence: str, /) -> None:
        """Shows a sentence about a client, such as a late answer, to people who watch the run."""
        ...


class Engine(Protocol):
    """Runs the simulated clients of a stage; see `fedpress.transport.engine`."""

    def connect(self, clients: Mapping[str, Any], build: Callable[..., Any]) -> Any:
        """Returns a transport (`fedpress.federation.Transport`) to the simulated clients of a stage.

        Args:
            clients: name of the client -> object that does the client's part of the stage.
            build: `build(device=...)` makes the inputs that all clients share, in another process.
        """
        ...

    @property
    def rounding(self) -> str:
        """Name of the engine if numbers of the latest stage are rounded in its own way, else ""."""
        ...


@dataclass(frozen=True)
class State:
    """The model with its spec, the data, and the privacy spent so far.

    Attributes:
        spec: how to build the model: architecture, arguments and shapes.
        model: the model after the stage before; at first the untrained or given model.
        data: the federated data set.
        seed: the run's seed.
        dense: number of parameters before any pruning.
        ledger: the privacy spent so far; None: no privacy was spent.
        score: the task's primary metric of `model` on the test set; None before the first stage.
        facts: facts that the stage before adds to its entry in the result, such as `bytes_up`.
        parent: loads the model as it was before the first stage that made it smaller; None: no
            stage has made it smaller.
        device: device on which stages train and measure. Latency is always measured on the CPU.
        network: reaches clients on other machines; None: the clients of `data` are simulated.
        engine: runs simulated clients; None: in this process, one after another.
        given: the module that the user gave, including any pruning by earlier calls; None: the
            user gave no module.
    """

    spec: ModelSpec
    model: nn.Module
    data: FederatedData
    seed: int
    dense: int
    ledger: Ledger | None = None
    score: float | None = None
    # Only for the entry of the last stage: the next stage starts with no facts.
    facts: Mapping[str, JsonValue] = field(default_factory=dict)
    parent: Loader | None = None
    device: torch.device = field(default_factory=find)
    network: Network | None = None
    engine: Engine | None = None
    given: nn.Module | None = None

    @property
    def rounding(self) -> str:
        """Name of the engine of simulated clients if it rounds in its own way, else ""."""
        if self.engine is None or self.network is not None:
            return ""
        return self.engine.rounding

    def dense_network(self) -> nn.Module:
        """Returns the network before any pruning.

        Settings such as `keep_macs` are shares of the cost of this network.
        """
        # A user's module may be pruned already, which the spec's architecture does not know.
        return self.given if self.given is not None else self.spec.build_dense()

    def example(self, n: int) -> Inputs:
        """Returns `n` prepared examples [n, ...] to trace the model and to count operations on.

        A model with one input gets made-up examples (see `ModelSpec.example`). A model with several
        inputs gets public or test examples, if there are any: made-up integers may be invalid,
        since a length, for example, must fit the other inputs.
        """
        parts = (self.data.public, self.data.test)
        rows = next((part.x for part in parts if len(part)), None)
        if not isinstance(self.spec.input_shape, dict) or rows is None:
            return self.spec.example(n)
        # Repeats rows if there are fewer than `n`.
        return self.data.preprocess(rows[torch.arange(n) % len(rows)])

    @property
    def input_spec(self) -> tuple[int, ...] | Inputs:
        """The shape of one float32 example; for other kinds of inputs, a batch of two examples."""
        shape = self.spec.input_shape
        if isinstance(shape, tuple) and self.spec.input_dtype == "float32":
            return shape
        return self.example(2)


@dataclass(frozen=True)
class Tick:
    """Progress of a stage: `done` of `total` steps.

    Attributes:
        done: number of finished steps.
        total: number of all steps.
        note: text beside the progress bar, such as the loss.
        warning: a sentence that must stay on the screen; "": no warning.
    """

    done: int
    total: int
    note: str = ""
    warning: str = ""


@dataclass(frozen=True)
class StageStarted:
    """A stage begins. If `reused`, it is not run, because a run folder already has its result.

    Attributes:
        index: position of the stage in the recipe, from 0.
        kind: kind of the stage, such as "prune".
        name: name of the stage; by default its kind.
        reused: whether the result comes from an earlier run.
    """

    index: int
    kind: str
    name: str
    reused: bool = False


@dataclass(frozen=True)
class StageFinished:
    """A stage has ended; `result` is its entry in `result.json`, with accuracy and so on."""

    index: int
    result: Mapping[str, JsonValue]


Event = Tick | StageStarted | StageFinished
"""What a running pipeline of stages yields."""
