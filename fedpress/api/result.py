"""The result of a call on one model: the new model, its metrics before and after, and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fedpress.api import shown
from fedpress.errors import RunError
from fedpress.models import ModelSpec, memory
from fedpress.reports.comparison import comparison_table
from fedpress.workspace.atomic import read_json
from fedpress.workspace.damage import CURES
from fedpress.workspace.folder import RunFolder


@dataclass(frozen=True, eq=False)
class Result:
    """The result of a call on one model. The next call takes it as its model.

    Attributes:
        spec: how to build the model; None for a module from memory of which nothing was kept.
        model: the new model.
        before: what the old model is worth and what it costs: accuracy, parameters, macs,
            file_bytes, latency_ms.
        after: the same of the new model, and what the stage reports: bytes sent, epsilon, what was
            left as it was.
        mean: of each channel of the inputs that the model takes, see
            `fedpress.core.examples.Preprocess`.
        std: likewise.
        records: a line for each epoch or round of the stage, as `records.jsonl` of a run has them.
        folder: the new model's folder, to be given to the next command; None if nothing was kept.
        artifact: the file that export or pack wrote; None if nothing was kept.
        files: what export or pack wrote, by name, where nothing was kept: the bytes of the file (of
            two for OpenVINO; `inputs.json` too where the data are a table).
    """

    spec: ModelSpec | None
    model: nn.Module
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    folder: Path | None
    artifact: Path | None
    files: Mapping[str, bytes] = field(default_factory=dict)
    records: tuple[Mapping[str, Any], ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def read(cls, run: RunFolder, kind: str) -> Result:
        """Reads what a finished command left in `run`."""
        facts = read_json(run.path / "result.json", cure=CURES["result.json"]).get("final")
        if not isinstance(facts, dict) or "name" not in facts:
            raise RunError(
                "corrupt (it has no final.name)",
                place=f"{run.path / 'result.json'}",
                cure=f"{CURES['result.json']}",
            )
        stage = run.stage(0, kind, facts["name"])
        spec, model = stage.load()
        memory.remember_spec(model, spec)  # a later measurement says the same size
        artifact = run.path / facts["artifact"] if "artifact" in facts else None
        before = read_json(run.path / "before.json", cure=CURES["before.json"])
        records = tuple(run.records.of_stage(0))
        return cls(
            spec, model, before, facts, stage.path, artifact, {}, records, spec.mean, spec.std
        )

    def __str__(self) -> str:
        """Returns a table of what changed: metrics, parameters, file, latency."""
        return shown.as_text(comparison_table(dict(self.before), dict(self.after)))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Returns the same table for a notebook."""
        return shown.as_html(comparison_table(dict(self.before), dict(self.after)))
