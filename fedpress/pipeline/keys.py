"""What a result hangs on: the settings of a run, resolved, and one key for each of its stages."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fedpress import storage
from fedpress.core.random import fingerprint
from fedpress.pipeline.recipe import Recipe
from fedpress.stages.teaching import saved_teacher

ADDED_TO_DATA = ("classes", "words", "public_words", "unknown", "encoding", "decimal")
"""Keys that older run folders do not know: left out of the settings where they say nothing, so that those resume."""


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Returns the resolved recipe as JSON, without what may differ between machines: the data's path.

    A checkpoint or a teacher stands in it by its content.
    """
    tree: dict[str, Any] = json.loads(recipe.model_dump_json())
    tree["data"].pop("path", None)
    for key in ADDED_TO_DATA:
        if type(recipe.data).model_fields[key].default == getattr(recipe.data, key):
            tree["data"].pop(key)
    if recipe.model.checkpoint is not None:
        model = storage.load(recipe.model.checkpoint)[1]
        tree["model"]["checkpoint"] = fingerprint(*model.state_dict().values())
    if recipe.model.weights is not None:
        tree["model"]["weights"] = hashlib.sha256(recipe.model.weights.read_bytes()).hexdigest()
    for stage, table in zip(recipe.stage, tree["stage"], strict=True):
        for key, words in stage.saved_models.items():
            if table[key] not in (None, *words):
                teacher = saved_teacher(table[key])[1]
                table[key] = fingerprint(*teacher.state_dict().values())
    return tree


def stage_keys(recipe: Recipe) -> list[str]:
    """Names the result of each stage: equal keys mean equal data, model, seed and stages up to there."""
    tree = settings_of(recipe)
    same = {key: tree[key] for key in ("seed", "data", "model")}
    texts = (
        json.dumps({**same, "stage": tree["stage"][: at + 1]}, sort_keys=True)
        for at in range(len(tree["stage"]))
    )
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]
