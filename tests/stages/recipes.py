"""Small recipes of the sparse stages, run as a person would run them, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedpress.models import load_model
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import load_data
from fedpress.workspace.folder import RunFolder

HEAD = """
name = "sparse"
[data]
source = "digits"
num_clients = 2
examples_per_client = 60
public_share = 0.3
validation = 60
[model]
architecture = "mlp"
arguments = { in_features = 64, hidden = [48, 30] }
"""
TRAIN = '[[stage]]\nkind = "train"\nepochs = 1\nbatch_size = 32\nlr = 0.05\n'


class Killed(BaseException):
    """Stands for the end of the process."""


def begun(text: str, path: Path, *, resume: bool = False) -> Iterator[Any]:
    """Starts or resumes a run."""
    recipe = recipes.load(text, ())
    settings = settings_of(recipe)
    folder = RunFolder.resume(path, settings) if resume else RunFolder.create(path, text, settings)
    return runs.execute(recipe, folder, load_data(recipe))


def finish(text: str, path: Path, *, resume: bool = False) -> dict[str, Any]:
    """Runs to the end; returns the result."""
    for _ in begun(text, path, resume=resume):
        pass
    return json.loads((path / "result.json").read_text())


def told(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a run."""
    return [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]


def checked(text: str) -> list[dict[str, Any]]:
    """Returns what checking a recipe tells of each stage."""
    recipe = recipes.load(text, ())
    return check_recipe(recipe, load_data(recipe))


def zeros(path: Path) -> tuple[int, int]:
    """Counts the entries and the kept ones of the sparse weights of a saved model."""
    spec, model = load_model(path)
    weights = dict(model.named_parameters())
    return sum(weights[n].numel() for n in spec.sparse), sum(
        int((weights[n] != 0).sum()) for n in spec.sparse
    )
