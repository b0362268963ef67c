"""Checks a recipe before it runs: each stage in turn, without training."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from fedpress.compress import cost
from fedpress.data import FederatedData
from fedpress.errors import Argument, DataError
from fedpress.pipeline.measure import macs_of
from fedpress.pipeline.places import placed
from fedpress.pipeline.recipe import Recipe
from fedpress.pipeline.start import NO_DATA, first_state, pair_of, with_parent
from fedpress.workspace.state import Network


def check_recipe(
    recipe: Recipe, data: FederatedData, network: Network | None = None
) -> list[dict[str, Any]]:
    """Binds every stage in turn without training and returns what each will do, cost and send.

    Raises:
        FedpressError: the first thing that would stop the run.
    """
    _check_clients(recipe, data)
    state, lines = replace(first_state(recipe, data), network=network), []
    trained = recipe.model.trained
    for index, stage in enumerate(recipe.stage):
        # Shapes of later stages follow from earlier ones, so each gets the state before it.
        before = state
        with placed(index, stage):
            state, facts = stage.check(state)
        state = with_parent(state, before, partial(pair_of, before) if trained else None)
        trained = True
        size = {"parameters": cost.parameters(state.model), "macs": macs_of(state)}
        lines.append({"kind": stage.kind, "name": stage.name, **size, **facts})
    return lines


def _check_clients(recipe: Recipe, data: FederatedData) -> None:
    """Refuses a federation without data: it would train on the placeholder noise.

    Raises:
        DataError: saying how to give some.
    """
    if data.name == NO_DATA and any(stage.needs_clients for stage in recipe.stage):
        raise DataError(
            "there are no clients: no data were given, or those of this run lived in the memory of "
            "another process",
            place="data",
            cure=("give ", Argument("data", "SOURCE"), ", or in Python clients={name: dataset}"),
        )
