"""What is learned: how outputs become a loss, which metrics tell the result, which targets fit.

One file and one row of `TASKS` for each task; `docs/tasks.md` shows how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpress.errors import RecipeError, did_you_mean
from fedpress.tasks.base import Metric, Sums, Task, merged
from fedpress.tasks.binary import Binary
from fedpress.tasks.classification import Classification
from fedpress.tasks.multilabel import Multilabel
from fedpress.tasks.regression import Regression

TASKS: dict[str, type[Task]] = {
    task.kind: task for task in (Classification, Binary, Multilabel, Regression)
}
"""Every task by its word in a recipe."""


def find(kind: str) -> type[Task]:
    """Returns the task that a recipe names.

    Raises:
        RecipeError: if there is none of this name.
    """
    if kind not in TASKS:
        near = did_you_mean(kind, list(TASKS))
        raise RecipeError(f"data.task: no task '{kind}' (known: {', '.join(TASKS)}){near}")
    return TASKS[kind]


def task_of(line: Mapping[str, Any]) -> type[Task]:
    """Returns the task of a line of `result.json`; lines of version 0.1.0, which name none, are of classifications."""
    return TASKS.get(str(line.get("task")), Classification)


__all__ = [
    "TASKS",
    "Binary",
    "Classification",
    "Metric",
    "Multilabel",
    "Regression",
    "Sums",
    "Task",
    "find",
    "merged",
    "task_of",
]
