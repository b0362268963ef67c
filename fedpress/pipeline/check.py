"""Everything that would stop a run is found before it begins: each stage is bound in turn, without training."""

from __future__ import annotations

from functools import partial
from typing import Any

from fedpress.compress import cost
from fedpress.data import FederatedData
from fedpress.errors import FedpressError
from fedpress.pipeline.measure import macs_of
from fedpress.pipeline.recipe.settings import Recipe
from fedpress.pipeline.start import first_state, pair_of, with_parent
from fedpress.stages.base import Stage


def check_recipe(recipe: Recipe, data: FederatedData) -> list[dict[str, Any]]:
    """Binds every stage in turn without training and returns what each will do, cost and send.

    Raises:
        FedpressError: the first thing that would stop the run.
    """
    state, lines = first_state(recipe, data), []
    trained = recipe.model.trained
    for index, stage in enumerate(recipe.stage):
        before = state
        try:
            state, facts = stage.check(state)
        except FedpressError as error:
            raise type(error)(placed(str(error), index, stage)) from error
        state = with_parent(state, before, partial(pair_of, before) if trained else None)
        trained = True
        size = {"parameters": cost.parameters(state.model), "macs": macs_of(state)}
        lines.append({"kind": stage.kind, "name": stage.name, **size, **facts})
    return lines


def placed(message: str, index: int, stage: Stage) -> str:
    """Says where a mistake is: `federate.norm: ...` of a stage that knows no numbers -> `recipe.stage[3].norm: ...`."""
    at = f"recipe.stage[{index}]"
    for word in (stage.kind, "stage"):
        if message.startswith((f"{word}.", f"{word}:")):
            return at + message.removeprefix(word)
    return f"{at} ({stage.name}): {message}"
