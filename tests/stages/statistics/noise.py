"""The noise of a query, in units of the standard deviation that is planned for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedpress.core import parameters
from fedpress.federation import Start
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.binding import bind
from fedpress.stages.statistics.stage import noise_std


def noise_of(text: str, unit: str, trust: str, seeds: int) -> list[float]:
    """Returns the noise of every sum of the first stage of a recipe, over some seeds.

    Args:
        text: the recipe; its first stage says `unit = "sample"`, which is replaced.
        unit: what is protected.
        trust: who adds the noise.
        seeds: how many times the query is made.
    """
    recipe = recipes.load(text.replace('"sample"', f'"{unit}", trust = "{trust}"'))
    first, drawn = recipe.stage[0], []
    for seed in range(seeds):
        state = replace(first_state(recipe, load_data(recipe)), seed=seed)
        inner, stage = first.as_round(state, first.query(state))
        each = [inner.model.phi(one.x).double() for one in inner.data.clients.values()]
        exact = torch.cat(each).mean(0)
        if unit == "client":
            exact = torch.stack([one.mean(0) for one in each]).mean(0)
        server = bind(stage, inner).server
        start = Start(parameters.flatten(server.model))
        params = next(iter(server.rounds(start))).params.double()
        drawn += ((params - exact) / noise_std(server)).tolist()
    return drawn
