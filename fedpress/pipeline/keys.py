"""Computes a hash for each stage, which tells whether the result of another run can be reused.

Two stages with equal hashes ("keys") have equal data, model, seed and settings, and so do all
stages before them. So their results are equal. A run that is resumed compares whole settings;
`fedpress run --from RUN`, which reuses stages of another run, compares keys.
"""

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

A key of a later version is left out of the settings if it has its default value. So folders of
older versions have equal settings and can be resumed. For this reason the default of a key must
never change: another default needs a new key.
"""

NAMES = ("kind", "name")
"""Keys that identify a table; they are never left out."""


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Returns the settings of a recipe as JSON values, as the file `settings.json` has them.

    The device and the path or address of the data are left out: they may differ when a run is resumed on
    another machine. Paths of saved models, state dicts and teachers are replaced by hashes of what
    they contain.
    """
    tree: dict[str, Any] = json.loads(recipe.model_dump_json())
    tree["data"].pop("path", None)
    tree["data"].pop("address", None)
    # A run that began on a GPU may continue on a CPU; `write_environment` warns that bits differ.
    tree.pop("device", None)
    leave_out_defaults_(tree["data"], recipe.data, "data")
    leave_out_defaults_(tree["model"], recipe.model, "model")
    for stage, table in zip(recipe.stage, tree["stage"], strict=True):
        leave_out_defaults_(table, stage, f"stage.{stage.kind}")
    # A hash of the weights and not the path: a path may differ between machines, and the file at a
    # path may be replaced.
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
    """Removes keys that are newer than version 0.1.0 and have their default value.

    Keys and values that were renamed get their old names, since older run folders contain these.

    Args:
        table: the settings as JSON; changed in place.
        settings: the same settings as an object.
        place: where the table is, such as "data" or "stage.prune".
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
        # Older folders lack newer keys. A default value must not make the settings differ.
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
    """Returns a key for each stage: SHA-256 of seed, data, model, the stage and all before it.

    Args:
        recipe: the recipe.
        streams: version of the random streams that the run uses (`fedpress.core.random.STREAMS`).
    """
    tree = settings_of(recipe)
    same = {key: tree[key] for key in ("seed", "data", "model")}
    # fedpress 0.1.0 used version 1 and its keys had no entry "streams". They must stay valid.
    same |= {"streams": streams} if streams > 1 else {}
    texts = (
        json.dumps({**same, "stage": tree["stage"][: at + 1]}, sort_keys=True)
        for at in range(len(tree["stage"]))
    )
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]
