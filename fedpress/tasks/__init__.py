"""Tasks: what a network learns. Each task defines a loss, metrics, and the form of its targets.

A task is one file and one entry of `TASKS`; `docs/tasks.md` shows how to add a task. A recipe (the
TOML file with the settings of a run) names its task by the key `task` of the table `[data]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from torch import Tensor

from fedpress.core import consent
from fedpress.errors import RecipeError, suggestion
from fedpress.tasks import own
from fedpress.tasks.base import IGNORED, Metric, Sums, Task, merged, no_classes_error
from fedpress.tasks.binary import Binary
from fedpress.tasks.classification import Classification
from fedpress.tasks.column_sums import ColumnSums
from fedpress.tasks.forecast import Forecast
from fedpress.tasks.language import Language
from fedpress.tasks.multilabel import Multilabel
from fedpress.tasks.own import is_own
from fedpress.tasks.poisson import Poisson
from fedpress.tasks.regression import Regression
from fedpress.tasks.segmentation import Segmentation
from fedpress.tasks.survival import Survival

TASKS: dict[str, type[Task]] = {
    task.kind: task
    for task in (
        Classification,
        Binary,
        Multilabel,
        Regression,
        Poisson,
        Forecast,
        Language,
        Segmentation,
        Survival,
    )
}
"""The tasks by their names in a recipe."""

MOST_PARTS = 40
"""Largest number of classes or numbers whose names are in a result."""

QUERIES: dict[str, type[Task]] = {ColumnSums.kind: ColumnSums}
"""Tasks that only a stage of fedpress uses, and no recipe can name."""

DEFAULT: dict[str, str] = {
    "classes": Classification.kind,
    "flags": Multilabel.kind,
    "numbers": Regression.kind,
}
"""Kind of targets (see `fedpress.tasks.base.Targets`) -> name of the default task."""


def find(kind: str) -> type[Task]:
    """Returns the class of a task by its name in a recipe, such as "binary" or "boxes:Boxes".

    Raises:
        RecipeError: if there is no such task.
        ModelError: if it is the user's own (`module:Class`), and this code is not allowed or cannot
            be imported.
    """
    if is_own(kind):
        return own.load(kind)
    if kind not in TASKS:
        raise RecipeError(
            f"no task '{kind}' (known: {', '.join(TASKS)}, or your own as module:Class)",
            place="task",
            cure=suggestion(kind, list(TASKS)) or "choose one of them",
        )
    return TASKS[kind]


def kind_of(given: str | Mapping[str, Any]) -> str:
    """Returns the name of the task in a value of the recipe's key `data.task`.

    >>> kind_of("binary"), kind_of({"kind": "binary", "threshold": 0.3})
    ('binary', 'binary')
    """
    if isinstance(given, str):
        return given
    return str(given.get("kind"))


def check_settings(given: str | Mapping[str, Any]) -> None:
    """Checks the name and the options in a value of the recipe's key `data.task`.

    A task of the user's own is checked only if its code is allowed: nothing is imported before.

    Raises:
        RecipeError: if there is no such task or option.
    """
    if is_own(kind_of(given)) and not consent.allowed(kind_of(given)):
        return
    row = find(kind_of(given))
    # Class weights are not an option of a task, because [data] has a key for them.
    every = [field.name for field in fields(row)]  # type: ignore[arg-type]
    known = [name for name in every if name not in ("names", "class_weights")]
    # A task that is given by its name alone has no options to check.
    for key in () if isinstance(given, str) else given:
        if key not in (*known, "kind"):
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise RecipeError(
                f"{row.kind} has no option '{key}' ({has})",
                place="task",
                cure=suggestion(key, known) or "leave it out",
            )


def make(given: str | Mapping[str, Any], names: tuple[str, ...], public: Tensor) -> Task:
    """Creates the task of a data set.

    Args:
        given: the value of `data.task`: a name, or a table with `kind` and options.
        names: names of the classes, or of the predicted numbers.
        public: public targets [n, ...]; some tasks compute mean and std from them.

    Raises:
        RecipeError: if there is no such task or option, or a value is invalid.
    """
    check_settings(given)
    row = find(kind_of(given))
    options: dict[str, Any] = {}
    if not isinstance(given, str):
        options = {key: value for key, value in given.items() if key != "kind"}
    try:
        return row.made(names, public, _with_tuples(options))
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{row.kind} does not take {options}: {error}",
            place="task",
            cure="leave these options out, or give each a value of the same type as its default",
        ) from error


def _with_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Converts lists to tuples. Tasks are hashable, but TOML and JSON only have lists."""
    found = {}
    for key, value in options.items():
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


def of_model(saved: Mapping[str, Any], class_names: tuple[str, ...]) -> Task:
    """Returns the task of a saved model.

    Args:
        saved: the entry `task` of the saved model, as `Task.to_json` returns it; empty for
            classification.
        class_names: the entry `class_names` of the saved model.

    Raises:
        RecipeError: if this version has no such task.
        ModelError: if the task is the user's own, and its code is not allowed.
    """
    options = {key: value for key, value in saved.items() if key not in ("kind", "names")}
    # Classification stores no task: its names are the class names.
    kind = str(saved.get("kind", Classification.kind))
    row = QUERIES.get(kind) or find(kind)
    names = tuple(saved.get("names", class_names))
    return replace(row(names), **_with_tuples(options))  # type: ignore[call-arg, type-var]


def task_of(line: Mapping[str, Any]) -> type[Task]:
    """Returns the class of the task in the result of a stage.

    Args:
        line: the stage's entry in the file `result.json`; its key "task" has the task's name.
            Without a known name the task is classification.
    """
    kind = str(line.get("task"))
    # A report must not import code of the user, so a result describes the metrics of such a task.
    if is_own(kind):
        return own.loaded(kind) or _described(kind, line)
    # Version 0.1.0 only had classification, and did not store the task.
    return TASKS.get(kind, Classification)


def description(task: Task | type[Task]) -> dict[str, Any]:
    """Returns the entries of a stage's result that name the task, for `task_of`.

    `parts` are the names of its classes or numbers, if they are few enough for a figure. For a task
    of the user's own the metrics are described, so that a report can show them without importing
    the user's code.
    """
    told: dict[str, Any] = {"task": task.kind}
    if isinstance(task, Task) and 1 < len(task.names) <= MOST_PARTS:
        told["parts"] = list(task.names)
    if not is_own(task.kind):
        return told
    told["task_metrics"] = [asdict(metric) for metric in task.shown_metrics]
    if task.by_part:
        told["task_by_part"] = [asdict(metric) for metric in task.by_part]
    return told


def _described(kind: str, line: Mapping[str, Any]) -> type[Task]:
    """Returns a class with the metrics that a result describes; it cannot be instantiated."""
    shown = _metrics(line.get("task_metrics")) or Classification.shown_metrics
    body = {"kind": kind, "shown_metrics": shown, "by_part": _metrics(line.get("task_by_part"))}
    return type("Described", (Task,), body)


def _metrics(described: Any) -> tuple[Metric, ...]:
    """Returns metrics that a result describes; none of another version's, or a damaged one's."""
    try:
        return tuple(Metric(**metric) for metric in described or ())
    except TypeError:
        return ()


__all__ = [
    "DEFAULT",
    "IGNORED",
    "QUERIES",
    "TASKS",
    "Binary",
    "Classification",
    "ColumnSums",
    "Forecast",
    "Language",
    "Metric",
    "Multilabel",
    "Poisson",
    "Regression",
    "Segmentation",
    "Sums",
    "Survival",
    "Task",
    "check_settings",
    "description",
    "find",
    "is_own",
    "kind_of",
    "make",
    "merged",
    "no_classes_error",
    "of_model",
    "task_of",
]
