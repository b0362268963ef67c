"""Checks that a federate stage can keep its privacy guarantee, and plans its noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedpress.codecs import Bound, Discretize, Settings
from fedpress.data.population import Population
from fedpress.errors import RecipeError
from fedpress.federation import Cohort, Trust
from fedpress.federation.schedules import Participation
from fedpress.stages.federate.grid import default_secure_chain, plan_grid
from fedpress.stages.federate.planners import PLANNERS, PlanningCase
from fedpress.stages.federate.protection import Protection, is_secure, trust_of_stage
from fedpress.stages.federate.settings import FederateSettings


def plan_protection(
    stage: FederateSettings,
    population: Population,
    participation: Participation,
    cohort: Cohort,
    shapes: Sequence[tuple[int, ...]],
) -> Protection:
    """Plans the noise, the integer grid of a secure sum, and the privacy cost of each round.

    Args:
        stage: the settings.
        population: all clients, with their public numbers of examples.
        participation: in which rounds each client is asked.
        cohort: how the clients of a round are chosen.
        shapes: shapes of the trained parameters.

    Raises:
        RecipeError: if settings do not fit together.
        PrivacyError: if no amount of noise gives the wanted epsilon.
    """
    private = stage.privacy
    secure = is_secure(stage)
    chain: tuple[Settings, ...] = tuple(stage.uplink)
    if secure and not chain:
        chain = default_secure_chain(private is not None)
    start = Bound(sum(math.prod(s) for s in shapes), shapes=tuple(shapes))
    _check_codecs(stage, secure, cohort)
    if private is None:
        if not secure:
            return Protection(chain)
        grid = plan_grid(stage, chain, start, cohort)
        return Protection(grid.planned_chain(chain), grid=grid)
    trust = trust_of_stage(stage)
    if trust.noise == "sum" and not secure:
        assert stage.aggregator is not None
        raise RecipeError(
            (
                f"got '{stage.aggregator.kind}' with trust '{trust.kind}', where each client adds "
                "only a share of the noise, so the server must not see single updates"
            ),
            place="aggregator",
            cure='leave aggregator out, or set trust = "local"',
        )
    _check_promise(stage, trust, population, cohort)
    # In a secure sum the server cannot clip updates, so the sensitivity for its noise is unknown.
    # If each client added the full noise, the sum would have more noise than necessary.
    if secure and trust.noise != "sum":
        raise RecipeError(
            f"got '{private.trust}' with a secure sum",
            place="privacy.trust",
            cure=('set trust = "distributed", so that the clients share the noise of the sum'),
        )
    case = PlanningCase(stage, private, trust, population, participation, cohort, chain, start)
    return PLANNERS[trust](case)


def _check_codecs(stage: FederateSettings, secure: bool, cohort: Cohort) -> None:
    """Refuses codecs and cohorts that do not work with error feedback or a secure sum.

    Error feedback: a client adds the coding error of its update to its next update.

    Raises:
        RecipeError: if a codec does not fit, or the cohorts of a secure sum differ in size.
    """
    for transform in stage.uplink:
        # An unbiased codec multiplies the sent values by a factor above 1, so its error may be
        # longer than the update. If each error were added to the next update, errors could grow
        # without limit.
        if stage.error_feedback and getattr(transform, "unbiased", False):
            raise RecipeError(
                f"'{transform.kind}' is unbiased, so its error would grow from round to round",
                place="error_feedback",
                cure="set error_feedback = false, or unbiased = false",
            )
        if secure and transform.kind == "noise":
            raise RecipeError(
                "a secure sum plans its own noise",
                place="uplink.noise",
                cure="remove this codec, and set stage.privacy to get noise",
            )
        if secure and isinstance(transform, Discretize) and transform.scale is not None:
            raise RecipeError(
                "a secure sum plans the scale itself",
                place="uplink.discretize.scale",
                cure="give bits, or leave out scale and bits",
            )
    uneven = cohort.sampling == "cyclic" and cohort.population % cohort.size
    if secure and (cohort.sampling == "poisson" or uneven):
        raise RecipeError(
            "noise and bits of a secure sum are planned for cohorts of equal size",
            place="sampling",
            cure=(
                f"got '{cohort.sampling}' cohorts of {cohort.size} in {cohort.population}; use "
                "'fixed', or 'cyclic' with a cohort that divides the population"
            ),
        )


def _check_promise(
    stage: FederateSettings, trust: Trust, population: Population, cohort: Cohort
) -> None:
    """Refuses a sampling that breaks the guarantee, and a delta with which it protects nobody.

    Raises:
        RecipeError: if there is such a setting.
    """
    private = stage.privacy
    assert private is not None
    # If a client joins, a fixed cohort drops another one, so the sum changes by two updates. In a
    # buffered schedule neighbouring runs ask the same clients in the same order and differ only in
    # the updates of one client; see docs/schedules.md.
    displaces = (
        stage.schedule.one_model
        and trust.hides_cohort
        and cohort.sampling == "fixed"
        and cohort.size < cohort.population
    )
    if trust.unit == "client" and displaces:
        raise RecipeError(
            (
                f"a fixed cohort of {cohort.size} in {cohort.population} clients breaks client "
                "privacy, since a client that joins displaces another, which changes two updates"
            ),
            place="sampling",
            cure="set sampling = 'poisson', or take all clients",
        )
    # A mechanism that publishes one unit, drawn at random, has epsilon 0 and delta = 1 / units. So
    # delta must be smaller.
    units = len(population) if trust.unit == "client" else population.total
    if private.delta >= 1 / units:
        raise RecipeError(
            (
                f"got {private.delta:g}, which would allow publishing one of the {units} protected "
                f"{private.unit}s"
            ),
            place="privacy.delta",
            cure=f"take a value well below {1 / units:.1g}",
        )
