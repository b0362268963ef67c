"""Runs recipes for tests as a person would, and reads what they left."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import load_data
from fedpress.workspace.folder import RunFolder


def tiered(cases: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Returns the values of a parameter: those in `quick` are unit tests, the others belong to the recipe tier."""
    first = list(quick)
    return [
        case if case in first else pytest.param(case, marks=pytest.mark.recipe) for case in cases
    ]


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def begun(
    text: str,
    path: Path,
    *overrides: str,
    resume: bool = False,
    reuse: Path | RunFolder | None = None,
) -> Iterator[Any]:
    """Starts or resumes a run in the folder `path`, and returns its events.

    Args:
        text: the recipe.
        path: the run folder; made unless `resume`.
        overrides: `key=value`, as on the command line.
        resume: go on with the run that lies there.
        reuse: another run whose equal stages are taken over.
    """
    recipe = recipes.load(text, overrides)
    settings = settings_of(recipe)
    folder = RunFolder.resume(path, settings) if resume else RunFolder.create(path, text, settings)
    other = RunFolder.open(reuse) if isinstance(reuse, Path) else reuse
    return runs.execute(recipe, folder, load_data(recipe), reuse=other)


def finish(text: str, path: Path, *overrides: str, **how: Any) -> dict[str, Any]:
    """Runs to the end; takes the arguments of `begun` and returns `result.json`."""
    for _ in begun(text, path, *overrides, **how):
        pass
    return json.loads((path / "result.json").read_text())


def told(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a run."""
    return [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]


def checked(text: str, *overrides: str) -> list[dict[str, Any]]:
    """Returns what checking a recipe tells of each stage."""
    recipe = recipes.load(text, overrides)
    return check_recipe(recipe, load_data(recipe))


def stages(text: str, path: Path, *overrides: str, **how: Any) -> list[dict[str, Any]]:
    """Runs to the end; takes the arguments of `begun` and returns the result of each stage."""
    return finish(text, path, *overrides, **how)["stages"]
