"""Everything that would stop a run is found before it begins: each stage is bound in turn, without training."""

from __future__ import annotations

from functools import partial
from typing import Any

from fedpress.compress import cost
from fedpress.data import FederatedData
from fedpress.pipeline.measure import macs_of
from fedpress.pipeline.places import placed
from fedpress.pipeline.recipe import Recipe
from fedpress.pipeline.start import first_state, pair_of, with_parent


def check_recipe(recipe: Recipe, data: FederatedData) -> list[dict[str, Any]]:
    """Binds every stage in turn without training and returns what each will do, cost and send.

    Raises:
        FedpressError: the first thing that would stop the run.
    """
    state, lines = first_state(recipe, data), []
    trained = recipe.model.trained
    for index, stage in enumerate(recipe.stage):
        before = state
        with placed(index, stage):
            state, facts = stage.check(state)
        state = with_parent(state, before, partial(pair_of, before) if trained else None)
        trained = True
        size = {"parameters": cost.parameters(state.model), "macs": macs_of(state)}
        lines.append({"kind": stage.kind, "name": stage.name, **size, **facts})
    return lines
