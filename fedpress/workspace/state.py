"""What travels from stage to stage, and what a stage tells while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

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
    Field(description="what folders, records and charges call it; no two stages may share one"),
]
"""The name of a recipe or stage: folders are called by it."""

Loader = Callable[[], tuple[ModelSpec, nn.Module]]


@dataclass(frozen=True)
class State:
    """The model with its spec, the data, and the privacy spent so far.

    `score` is the task's primary metric on the test set after the last stage, None before the first; `facts` are
    what the last stage adds to its line of the result (for instance `bytes_up`); `dense` is the parameter count before
    any pruning; `parent` loads the model as it was before the first stage that made it smaller, None before such a
    stage. `device` is where the stages train and measure; latency is always that of the CPU.
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

    def example(self, n: int) -> Inputs:
        """Returns `n` prepared examples to trace the model and to count on, see `ModelSpec.example`.

        Of several inputs these are public ones, or of the test part, where there are any: what whole numbers mean,
        such as lengths, nobody here knows.
        """
        parts = (self.data.public, self.data.test)
        rows = next((part.x for part in parts if len(part)), None)
        if not isinstance(self.spec.input_shape, dict) or rows is None:
            return self.spec.example(n)
        return self.data.preprocess(rows[torch.arange(n) % len(rows)])

    @property
    def given(self) -> tuple[int, ...] | Inputs:
        """What files for devices are made for: the shape of one float32 example, or a batch of any other inputs."""
        shape = self.spec.input_shape
        return (
            shape
            if isinstance(shape, tuple) and self.spec.input_dtype == "float32"
            else self.example(2)
        )


@dataclass(frozen=True)
class Tick:
    """`done` of `total` steps of a stage are done; `note` is what a person wants to see beside the bar.

    `warning` is a sentence that must stay on the screen.
    """

    done: int
    total: int
    note: str = ""
    warning: str = ""


@dataclass(frozen=True)
class StageStarted:
    """A stage begins; `reused` says that its finished result was taken from the run folder."""

    index: int
    kind: str
    name: str
    reused: bool = False


@dataclass(frozen=True)
class StageFinished:
    """A stage has ended with `result`, its line of result.json."""

    index: int
    result: Mapping[str, JsonValue]


Event = Tick | StageStarted | StageFinished
