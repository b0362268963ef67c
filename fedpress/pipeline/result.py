"""Writes `result.json`, the results of a run: accuracy, size and more after each stage."""

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
    data: dict[str, Any],
) -> None:
    """Writes `result.json`, and `ledger.json` if the last stage has a ledger of privacy spent.

    Args:
        recipe: the recipe of the run.
        folder: folder of the run.
        results: for each finished stage a dictionary, such as `{"kind": "train", "accuracy": 0.9}`.
        finished: whether all stages are finished.
        left_out: sentence about rows of the data that were not used; "" if all were used.
        data: what the report draws of the data.
    """
    if results[-1].get("ledger"):
        write_json_with_checksum(folder.path / "ledger.json", results[-1]["ledger"], folder.path)
    lines = []
    for result in results:
        lines.append({key: value for key, value in result.items() if key != "ledger"})
    replace_simulated_metrics_(recipe.stage[: len(lines)], lines)
    # The total leaves out time between stages, such as loading data.
    total = round(sum(line["seconds"] for line in lines), 2)
    # Keeps the last value of each fact. So the `epsilon` of a federated stage is still there after
    # an export stage.
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
            "data": data,
            "stages": lines,
            "final": final | {"seconds": total},
        },
        folder.path,
    )


def replace_simulated_metrics_(stages: Sequence[Stage], lines: Sequence[dict[str, Any]]) -> None:
    """Puts the metrics of an exported file in place of the metrics that torch only simulated.

    torch computes a quantized model on floats; a device runs the exported file on integers. So the
    metrics of the file count. The simulated value of the main metric moves to another key, such as
    `accuracy_simulated`.

    Args:
        stages: the finished stages.
        lines: the results of these stages; changed in place.
    """
    source: dict[str, Any] | None = None  # line of the last stage that changed the model
    simulated = False
    for stage, line in zip(stages, lines, strict=True):
        if stage.changes_model:
            source, simulated = line, stage.simulates_device
        task = task_of(line)
        if not (stage.reports_artifact and simulated and line.get(task.primary) is not None):
            continue
        assert source is not None
        # `setdefault`: at a second export, the value here is already that of the first file, and
        # must not replace the simulated value.
        source.setdefault(f"{task.primary}_simulated", source[task.primary])
        source.update({key: line[key] for key in task.keys if key in line})


def read_finished(folder: RunFolder) -> bool:
    """Whether all stages of the run are finished."""
    path = folder.path / "result.json"
    return path.exists() and bool(read_json(path, cure=CURES[path.name]).get("finished"))
