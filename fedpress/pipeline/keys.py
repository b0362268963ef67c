"""What a result hangs on: the settings of a run, resolved, and one key for each of its stages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from pydantic import BaseModel

from fedpress.core.random import STREAMS, fingerprint
from fedpress.core.renamed import ReadsOldKeys, with_old_keys
from fedpress.pipeline.recipe import Recipe
from fedpress.pipeline.start import saved_model
from fedpress.stages.teaching import saved_teacher

FIRST_KEYS = frozenset(files("fedpress.pipeline").joinpath("first_keys.txt").read_text().split())
"""The recipe keys of version 0.1.0, such as `data.source` or `stage.prune.finetune.epochs`.

A key that came later is left out of the settings where it has its default, and so says nothing:
older folders go on. Its default can therefore never change; what must change needs another key.
"""

NAMES = ("kind", "name")
"""Keys that tell tables apart: they always say something."""


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Returns the resolved recipe as JSON, without what may differ between machines.

    That is the path of the data, and the device.

    A checkpoint or a teacher stands in it by its content.
    """
    tree: dict[str, Any] = json.loads(recipe.model_dump_json())
    tree["data"].pop("path", None)
    # A run that began on a GPU may go on elsewhere: `note_environment` says that bits will differ.
    tree.pop("device", None)
    leave_out_defaults_(tree["data"], recipe.data, "data")
    leave_out_defaults_(tree["model"], recipe.model, "model")
    for stage, table in zip(recipe.stage, tree["stage"], strict=True):
        leave_out_defaults_(table, stage, f"stage.{stage.kind}")
    # Saved models count by their numbers, not by their path, which differs between machines.
    if recipe.model.checkpoint is not None:
        model = saved_model(recipe.model.checkpoint)[1]
        tree["model"]["checkpoint"] = fingerprint(*model.state_dict().values())
    if recipe.model.weights is not None:
        tree["model"]["weights"] = hashlib.sha256(recipe.model.weights.read_bytes()).hexdigest()
    for stage, table in zip(recipe.stage, tree["stage"], strict=True):
        for key, words in stage.saved_models.items():
            if (where := table.get(key)) not in (None, *words):
                teacher = saved_teacher(where)[1]
                table[key] = fingerprint(*teacher.state_dict().values())
    return tree


def leave_out_defaults_(table: dict[str, Any], settings: object, place: str) -> None:
    """Removes newer keys at their default from `table`, which is `settings` as JSON.

    What is called otherwise now stands by its old word.
    """
    if not isinstance(settings, BaseModel):
        return
    if isinstance(settings, ReadsOldKeys):
        as_of_old = with_old_keys(table, settings.renamed)
        table.clear()
        table.update(as_of_old)
    for key, field in type(settings).model_fields.items():
        value, at = getattr(settings, key), f"{place}.{key}"
        default = field.get_default(call_default_factory=True)
        # Older folders do not have newer keys: at their default they must not make a difference.
        if key not in NAMES and at not in FIRST_KEYS and value == default:
            table.pop(key, None)
            continue
        inner = table.get(key)
        if isinstance(inner, dict):
            leave_out_defaults_(inner, value, at)
        elif isinstance(inner, list) and isinstance(value, Sequence):
            for one, part in zip(value, inner, strict=True):
                leave_out_defaults_(part, one, at)


def stage_keys(recipe: Recipe, streams: int = STREAMS) -> list[str]:
    """Returns a key for each stage; equal keys: equal data, model, seed and stages so far.

    Args:
        recipe: whose stages.
        streams: the version of random streams that the run draws from; the first one says nothing.
    """
    tree = settings_of(recipe)
    same = {key: tree[key] for key in ("seed", "data", "model")}
    # Runs of version 0.1.0 have no entry for version 1 of the streams.
    same |= {"streams": streams} if streams > 1 else {}
    texts = (
        json.dumps({**same, "stage": tree["stage"][: at + 1]}, sort_keys=True)
        for at in range(len(tree["stage"]))
    )
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]
