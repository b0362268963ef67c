"""The state that is passed from stage to stage, and the events of a running stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field, JsonValue, StringConstraints
from torch import nn

from fedpress.core.inputs import Inputs
from fedpress.data import FederatedData
from fedpress.models import ModelSpec
from fedpress.privacy.ledger import Ledger
from fedpress.training.device import find

Name = Annotated[
    str,
    StringConstraints(pattern=r"^\w[\w .-]*$", max_length=60),
    Field(description="name in folders, records and the privacy ledger; unique in the recipe"),
]
"""The name of a recipe or stage, which is also the name of its folder."""

Loader = Callable[[], tuple[ModelSpec, nn.Module]]


class Network(Protocol):
    """Reaches clients on other machines; see `fedpress.network.server`."""

    def open(self, session: str, clients: Sequence[str] | None) -> Any:
        """Returns a transport (`fedpress.federation.Transport`) to clients.

        Args:
            session: id of the stage of the run that the messages belong to.
            clients: names of the clients, in this order; None: all clients connected now.
        """
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns to predict if the clients' data are tables."""
        ...

    def told(self, sentence: str, /) -> None:
        """Reports an event of a client, such as a late answer, to those who watch the run."""
        ...


class Engine(Protocol):
    """Runs the simulated clients of a stage; see `fedpress.transport.engine`."""

    def connect(self, clients: Mapping[str, Any], build: Callable[..., Any]) -> Any:
        """Returns a transport (`fedpress.federation.Transport`) to simulated clients.

        Args:
            clients: name -> client's side of the stage.
            build: makes the inputs that all sides share, for another process: `build(device=...)`.
        """
        ...


@dataclass(frozen=True)
class State:
    """The model with its spec, the data, and the privacy spent so far.

    Attributes:
        spec: the model's spec.
        model: the model after the last stage.
        data: the federated data set.
        seed: the run's seed.
        dense: number of parameters before any pruning.
        ledger: the privacy spent so far; None: no privacy was spent.
        score: the task's primary metric on the test set after the last stage; None before the
            first.
        facts: facts that the last stage adds to its entry in the result, such as `bytes_up`.
        parent: loads the model from before the first stage that made it smaller; None: there was no
            such stage.
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
    facts: Mapping[str, JsonValue] = field(default_factory=dict)
    parent: Loader | None = None
    device: torch.device = field(default_factory=find)
    network: Network | None = None
    engine: Engine | None = None
    given: nn.Module | None = None

    def dense_network(self) -> nn.Module:
        """Returns the network before any pruning; shares such as keep_macs refer to it."""
        return self.given if self.given is not None else self.spec.build_dense()

    def example(self, n: int) -> Inputs:
        """Returns `n` prepared examples [n, ...] to trace the model and to count operations on.

        For a model with one input see `ModelSpec.example`. For several inputs these are public or
        test examples, if there are any: random integers may be invalid. A length, for example,
        must fit the other inputs.
        """
        parts = (self.data.public, self.data.test)
        rows = next((part.x for part in parts if len(part)), None)
        if not isinstance(self.spec.input_shape, dict) or rows is None:
            return self.spec.example(n)
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
        done: steps so far.
        total: steps in all.
        note: text beside the progress bar, such as the loss.
        warning: a sentence that must stay on the screen; "": no warning.
    """

    done: int
    total: int
    note: str = ""
    warning: str = ""


@dataclass(frozen=True)
class StageStarted:
    """A stage begins; `reused`: it is not run, since its result is already in a run folder."""

    index: int
    kind: str
    name: str
    reused: bool = False


@dataclass(frozen=True)
class StageFinished:
    """A stage has ended; `result` is its entry in result.json."""

    index: int
    result: Mapping[str, JsonValue]


Event = Tick | StageStarted | StageFinished
