"""The result of a call such as `fedpress.prune`: the new model, metrics before and after, files."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fedpress.api import shown
from fedpress.errors import RunError
from fedpress.models import ModelSpec, memory
from fedpress.reports.comparison import comparison_table
from fedpress.reports.detail_tables import unchanged_table
from fedpress.reports.headline import score_warning
from fedpress.reports.table import Table
from fedpress.workspace.atomic import read_json
from fedpress.workspace.damage import CURES
from fedpress.workspace.folder import RunFolder


@dataclass(frozen=True, eq=False)
class Result:
    """The result of a call on one model. The next call takes a `Result` as its argument `model`.

    Attributes:
        spec: how to build the model: architecture, arguments and shapes. None if only this process
            can build the model, because the user gave a module without a known constructor.
        model: the new model.
        before: facts about the old model, such as accuracy, parameters, macs, file_bytes and
            latency_ms.
        after: the same facts about the new model, and facts of the stage such as `bytes_up` (bytes
            that all clients have sent) and `epsilon`.
        mean: mean of each input channel; the model expects inputs (x - mean) / std.
        std: standard deviation of each input channel.
        records: one record per epoch or round, as in `records.jsonl` of a run.
        folder: folder of the new model; None if the call had no `out`.
        artifact: file that export or pack wrote; None for other stages, or if the call had no
            `out`.
        files: name -> bytes of the files that export or pack made, if the call had no `out`.
            OpenVINO makes two files. For data from a table, such as a CSV file, `preparation.json`
            says how a row becomes the model's input.
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
        """Reads the result of a finished call of kind `kind` from the files of its run folder."""
        facts = read_json(run.path / "result.json", cure=CURES["result.json"]).get("final")
        # A file that was edited or damaged may be valid JSON and still lack these entries.
        if not isinstance(facts, dict) or "name" not in facts:
            raise RunError(
                "corrupt (it has no final.name)",
                place=f"{run.path / 'result.json'}",
                cure=CURES["result.json"],
            )
        stage = run.stage(0, kind, facts["name"])
        spec, model = stage.load()
        memory.remember_spec(model, spec)  # so that a later measurement reports the same file size
        artifact = run.path / facts["artifact"] if "artifact" in facts else None
        before = read_json(run.path / "before.json", cure=CURES["before.json"])
        records = tuple(run.records.of_stage(0))
        return cls(
            spec, model, before, facts, stage.path, artifact, {}, records, spec.mean, spec.std
        )

    def __str__(self) -> str:
        """Returns a table of the old and the new model: metrics, size, latency, bytes, epsilon.

        A second table gives the reasons for layers that the stage did not change, and for settings
        that it chose itself. It is left out if there are none. The last line warns of a model that
        is no better than guessing.
        """
        parts = [shown.as_text(table) for table in self._tables()]
        return "\n\n".join([*parts, *self._warnings()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Returns the same tables and warning for a notebook."""
        warnings = (f"<p>{html.escape(warning)}</p>" for warning in self._warnings())
        return "".join([*(shown.as_html(table) for table in self._tables()), *warnings])

    def _warnings(self) -> list[str]:
        found = score_warning([dict(self.after)])
        return [f"warning: {found}"] if found else []

    def _tables(self) -> list[Table]:
        after = dict(self.after)
        found = [comparison_table(dict(self.before), after)]
        # A call has one stage, so its name says nothing.
        left = unchanged_table([{"name": "", **after}])
        if left.rows:
            found.append(Table(left.header[1:], [row[1:] for row in left.rows]))
        return found
