"""The result of a run: `result.json`, a line for each stage that is done, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fedpress
from fedpress.pipeline.recipe import Recipe
from fedpress.stages.base import Stage
from fedpress.tasks import task_of
from fedpress.workspace.atomic import read_json, write_json_with_checksum
from fedpress.workspace.damage import CURES
from fedpress.workspace.folder import RunFolder


def write_result(
    recipe: Recipe,
    folder: RunFolder,
    results: list[dict[str, Any]],
    *,
    finished: bool,
    left_out: str,
) -> None:
    """Writes `result.json` from the lines so far, and `ledger.json` if privacy was spent."""
    if results[-1].get("ledger"):
        write_json_with_checksum(folder.path / "ledger.json", results[-1]["ledger"], folder.path)
    lines = [{k: v for k, v in r.items() if k != "ledger"} for r in results]
    take_metrics_of_files_(recipe.stage[: len(lines)], lines)
    # The total leaves out time between stages, such as loading data.
    total = round(sum(line["seconds"] for line in lines), 2)
    final: dict[str, Any] = {}
    for line in lines:
        final |= line
    write_json_with_checksum(
        folder.path / "result.json",
        {
            "recipe": recipe.name,
            "version": fedpress.__version__,
            "seed": recipe.seed,
            "seconds": total,
            "finished": finished,
            **({"left_out": left_out} if left_out else {}),
            "stages": lines,
            "final": final | {"seconds": total},
        },
        folder.path,
    )


def take_metrics_of_files_(stages: Sequence[Stage], lines: Sequence[dict[str, Any]]) -> None:
    """Replaces the metrics of a simulated model by those of its exported file.

    A device runs that. What the simulation reached stays as `accuracy_simulated`, or whatever the
    task goes by.

    Args:
        stages: of the recipe, as many as are done.
        lines: theirs, which are changed.
    """
    source: dict[str, Any] | None = None  # the line of the stage that made the present model
    simulated = False
    for stage, line in zip(stages, lines, strict=True):
        if stage.changes_model:
            source, simulated = line, stage.simulates_device
        task = task_of(line)
        if not (stage.reports_artifact and simulated and line.get(task.primary) is not None):
            continue
        assert source is not None
        source.setdefault(f"{task.primary}_simulated", source[task.primary])
        source.update({key: line[key] for key in task.keys if key in line})


def read_finished(folder: RunFolder) -> bool:
    """Whether the run has come to its end."""
    path = folder.path / "result.json"
    return path.exists() and bool(read_json(path, cure=CURES[path.name]).get("finished"))
