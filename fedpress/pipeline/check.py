"""Checks all stages of a recipe without training, to find mistakes before a long run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from fedpress.compress import cost
from fedpress.data import FederatedData
from fedpress.errors import Argument, DataError
from fedpress.pipeline.measure import macs_of
from fedpress.pipeline.places import errors_of_stage
from fedpress.pipeline.recipe import Recipe
from fedpress.pipeline.start import NO_DATA, first_state, spec_and_model, with_parent
from fedpress.workspace.state import Network

ELSEWHERE = "on other machines: fedpress server checks this stage with them before the run"
"""What is said of a stage that needs clients which cannot be asked now."""


def check_recipe(
    recipe: Recipe,
    data: FederatedData,
    network: Network | None = None,
    *,
    clients_elsewhere: bool = False,
    sizes: bool = True,
) -> list[dict[str, Any]]:
    """Checks every stage in order, and returns what is known about its result before the run.

    Args:
        recipe: the checked settings.
        data: the loaded data set.
        network: reaches clients on other machines; None: the clients are simulated.
        clients_elsewhere: whether the clients are on other machines and cannot be asked now. Then
            stages that need clients are not checked.
        sizes: whether the parameters and MACs of the model are counted. Without them the model
            still computes one example after each stage.

    Returns:
        One dictionary for each stage: its kind, its name, the parameters and MACs of the model
        after the stage, and further facts that depend on the kind, such as `epsilon`.

    Raises:
        FedpressError: the first error that would stop the run.
    """
    found = checks(recipe, data, network, clients_elsewhere=clients_elsewhere, sizes=sizes)
    return list(found)


def checks(
    recipe: Recipe,
    data: FederatedData,
    network: Network | None = None,
    *,
    clients_elsewhere: bool = False,
    sizes: bool = True,
) -> Iterator[dict[str, Any]]:
    """Checks one stage after the other, and yields the dictionary of each (see `check_recipe`).

    Raises:
        FedpressError: the first error that would stop the run.
    """
    # Before the model is built: this mistake is the cheapest to find.
    _check_clients(recipe, data)
    state = replace(first_state(recipe, data), network=network)
    trained = recipe.model.trained
    for index, stage in enumerate(recipe.stage):
        # `stage.check` returns a model with the shapes after the stage: the next stage needs them.
        before = state
        facts: dict[str, Any] = {"clients": ELSEWHERE}
        if not (clients_elsewhere and stage.needs_clients):
            with errors_of_stage(index, stage):
                state, facts = stage.check(state)
        state = with_parent(state, before, partial(spec_and_model, before) if trained else None)
        # Any stage may train, so from here on the model counts as trained.
        trained = True
        size = {}
        if sizes:
            size = {"parameters": cost.parameters(state.model), "macs": macs_of(state)}
        else:
            cost.compute_one(state.model.to("cpu"), state.example(1))
        yield {"kind": stage.kind, "name": stage.name, **size, **facts}


def _check_clients(recipe: Recipe, data: FederatedData) -> None:
    """Refuses a recipe that needs clients but has no data.

    Without this check, the stage would train on the random example that stands for missing data.

    Raises:
        DataError: if there are no data and a stage needs clients.
    """
    if data.name == NO_DATA and any(stage.needs_clients for stage in recipe.stage):
        raise DataError(
            "there are no clients: no data were given, or those of this run lived in the memory of "
            "another process",
            place="data",
            cure=("give ", Argument("data", "SOURCE"), ", or in Python clients={name: dataset}"),
        )
