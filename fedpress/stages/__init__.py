"""The stages of a recipe, a table: one settings class with `kind`, `check` and `run` each."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

from fedpress.stages.export import ExportStage
from fedpress.stages.federate.stage import FederateStage
from fedpress.stages.l0 import L0Stage
from fedpress.stages.measure import MeasureStage
from fedpress.stages.pack import PackStage
from fedpress.stages.prune.stage import PruneStage
from fedpress.stages.quantize import QuantizeStage
from fedpress.stages.sparsify import SparsifyStage
from fedpress.stages.train import TrainStage
from fedpress.workspace.folder import StageFolder
from fedpress.workspace.state import State, Tick


class Stage(Protocol):
    """Frozen settings; the fields are the recipe's keys."""

    @property
    def kind(self) -> str:
        """Which row of the table this is."""
        ...

    @property
    def name(self) -> str:
        """What this stage is called in the recipe, unlike any other there."""
        ...

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Binds to `state` without doing the work: returns the state as it will be shaped, and facts to show."""
        ...

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Does the work from the last checkpoint in `folder`; yields progress, returns the new state."""
        ...


AnyStage = (
    TrainStage
    | PruneStage
    | SparsifyStage
    | L0Stage
    | FederateStage
    | QuantizeStage
    | PackStage
    | ExportStage
    | MeasureStage
)

__all__ = [
    "AnyStage",
    "ExportStage",
    "FederateStage",
    "L0Stage",
    "MeasureStage",
    "PackStage",
    "PruneStage",
    "QuantizeStage",
    "SparsifyStage",
    "Stage",
    "TrainStage",
]
