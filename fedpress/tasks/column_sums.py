"""The task of a query: minus the output is the loss, so that a gradient is a sum over rows.

No recipe can name it; the stage `statistics` uses it, with the network of
`fedpress.models.column_sums`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from fedpress.tasks.base import Metric, Reduction, Sums, Targets, Task, reduced


@dataclass(frozen=True)
class ColumnSums(Task):
    """The query of a stage `statistics`. The targets of the data are checked, and not used.

    Attributes:
        names: names of the classes or numbers that the data's own task predicts.
        targets: kind of the data's targets.
    """

    names: tuple[str, ...]
    targets: Targets = "classes"  # type: ignore[misc]  # that of the data

    kind = "column-sums"
    shown_metrics = (Metric("loss", "loss", "lower"),)

    @property
    def outputs(self) -> int:
        """The network has one output."""
        return 1

    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Returns minus the outputs [n, 1]."""
        del targets
        return reduced(-outputs[:, 0], reduction)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        """A query has no metrics."""
        return {"examples": torch.tensor(len(targets))}

    def summary(self, sums: Sums) -> dict[str, JsonValue]:
        """A query has no metrics."""
        return {self.primary: None}

    def to_json(self) -> dict[str, Any]:
        """Adds the kind of the targets."""
        return {**super().to_json(), "targets": self.targets}
