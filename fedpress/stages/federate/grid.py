"""The grid of a secure sum: bits and scale of its whole numbers, and the clients' noise on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedpress.codecs import Bound, Clip, Discretize, Noise, Rotate, Settings, bind_chain
from fedpress.codecs.discretize import coordinate_limit
from fedpress.errors import RecipeError
from fedpress.federation import Cohort
from fedpress.federation.aggregators.secure import check_additive
from fedpress.privacy.noise import distributed
from fedpress.secagg import SecurePlan
from fedpress.stages.federate.settings import FederateSettings

BITS = 16
"""Default bits of a secure sum without noise: coarser than float32, finer than updates need."""
CLIP_NORM = 10.0
"""Default clip norm of a secure sum without privacy: longer than the updates of usual rounds."""
NOISED_LIST = 'uplink = [{ kind = "rotate" }, { kind = "discretize" }]'
PLAIN_LIST = (
    f'uplink = [{{ kind = "clip", clip_norm = {CLIP_NORM} }}, {{ kind = "rotate" }}, '
    '{ kind = "discretize" }]'
)
"""The recipe line that a secure sum needs: with privacy, which adds a clip itself, and without."""


@dataclass(frozen=True)
class SumGrid:
    """The grid of whole numbers on which a secure sum adds.

    Attributes:
        plan: of the secure sum: clients, bits and thresholds.
        size: number of values that every client sends.
        scale: grid units per unit of the update.
        coordinate_limit: largest absolute value of a coordinate, in units of the update; larger
            ones are clamped.
        limit: largest absolute value in a sum of honest clients, in grid units.
        noise: the planned noise of the clients; None without privacy.
    """

    plan: SecurePlan
    size: int
    scale: float
    coordinate_limit: float
    limit: int
    noise: distributed.DistributedPlan | None = None

    def planned_chain(self, chain: Sequence[Settings]) -> tuple[Settings, ...]:
        """Returns `chain` with this grid in its `discretize`, and a client's noise after it."""
        filled: list[Settings] = []
        for transform in chain:
            if not isinstance(transform, Discretize):
                filled.append(transform)
                continue
            planned = {
                "bits": self.plan.bits,
                "scale": self.scale,
                "limit": self.coordinate_limit,
            }
            if self.noise is not None:
                planned["again"] = self.noise.redraws_rounding
            filled.append(transform.model_copy(update=planned))
            # After rounding: the noise is Skellam, on whole numbers, so that the clients' shares
            # add up to exactly the planned distribution.
            if self.noise is not None:
                filled.append(Noise(std=math.sqrt(self.noise.variance)))
        return tuple(filled)


def default_secure_chain(private: bool) -> tuple[Settings, ...]:
    """Returns the default codecs of a secure sum; with privacy, its clip comes before them."""
    # Rotated first: it spreads large coordinates, so that the grid can be finer.
    rest: tuple[Settings, ...] = (Rotate(), Discretize())
    return rest if private else (Clip(clip_norm=CLIP_NORM), *rest)


def noise_makers(plan: SecurePlan) -> int:
    """Returns how many clients' noise the guarantee may count on.

    Only the survivors' noise is surely in the sum. Of these, corrupt clients may reveal theirs to
    others; and every client knows its own, so at least one is subtracted.
    """
    return max(1, plan.survivors - max(plan.corrupt, 1))


def plan_grid(
    stage: FederateSettings,
    chain: tuple[Settings, ...],
    start: Bound,
    cohort: Cohort,
    *,
    sensitivity: float | None = None,
    sampling_prob: float = 1.0,
    times: int | None = None,
) -> SumGrid:
    """Plans scale, bits and noise of the grid from the bound just before it.

    Args:
        stage: the settings.
        chain: codecs of the uplink, with a `discretize`.
        start: bound of an update before the first codec.
        cohort: the clients of a round.
        sensitivity: by how much one protected unit moves a client's vector; the vector's whole
            bound if None.
        sampling_prob: probability of an example to be in a round.
        times: rounds in which a unit takes part; all if None.

    Raises:
        RecipeError: if the codecs do not fit a secure sum.
        PrivacyError: if no noise keeps the budget.
    """
    discretize, bound = _before_grid(stage, chain, start)
    limit = discretize.limit or coordinate_limit(bound)
    private = stage.privacy
    if private is None:
        return _open_grid(stage, discretize.bits or BITS, cohort.size, bound.size, limit)
    planned = distributed.plan(
        size=bound.size,
        clip_norm=sensitivity or bound.l2,
        coordinate_limit=limit,
        clients=cohort.size,
        # Two bits stand in for the real ones: only the numbers of clients are read of this plan.
        survivors=noise_makers(SecurePlan(cohort.size, 2, stage.max_dropout)),
        steps=times or max(1, stage.num_rounds),
        delta=private.delta,
        epsilon=private.epsilon,
        noise_multiplier=private.noise_multiplier,
        bits=discretize.bits,
        unit=private.unit,
        sampling_prob=sampling_prob,
    )
    secure = SecurePlan(cohort.size, planned.bits, stage.max_dropout)
    return SumGrid(secure, bound.size, planned.scale, limit, math.floor(planned.limit), planned)


def _before_grid(
    stage: FederateSettings, chain: tuple[Settings, ...], start: Bound
) -> tuple[Discretize, Bound]:
    """Returns the `discretize` of a chain, and the bound of what it rounds.

    Raises:
        RecipeError: if there is none, or what it rounds is not bounded or not additive.
    """
    places = [i for i, transform in enumerate(chain) if isinstance(transform, Discretize)]
    at = places[0] if places else None
    before = chain[:at]
    transforms, bound = bind_chain(before, start)
    kinds = [one.kind for one in before]
    check_additive(dict(zip(kinds, transforms, strict=True)))
    line = PLAIN_LIST if stage.privacy is None else NOISED_LIST
    if at is None:
        raise RecipeError(
            "a secure sum adds whole numbers",
            place="uplink",
            cure=f'end the list with {{ kind = "discretize" }}, as in {line}',
        )
    discretize = chain[at]
    assert isinstance(discretize, Discretize)
    if not bound.l2 < math.inf:
        raise RecipeError(
            "a secure sum needs updates of bounded length, or it could overflow",
            place="uplink",
            cure=f"put 'clip' before it, as in {line}",
        )
    return discretize, bound


def _open_grid(
    stage: FederateSettings, bits: int, clients: int, size: int, limit: float
) -> SumGrid:
    """Plans the grid of a sum without noise, of `size` values up to `limit` in absolute value."""
    half = distributed.USED_RANGE * 2 ** (bits - 1)
    # Largest value of one client, so that the sum of all honest clients cannot overflow.
    largest = math.floor(half / clients)
    if largest < 2:
        least = math.ceil(math.log2(2 * clients / distributed.USED_RANGE)) + 1
        raise RecipeError(
            f"{bits} bits cannot hold the sum of {clients} clients",
            place="uplink.discretize.bits",
            cure=f"take {least} or more",
        )
    secure = SecurePlan(clients, bits, stage.max_dropout, bound=largest)
    # One unit less than the largest: rounding may lift a value by one.
    scale = (largest - 1) / limit
    return SumGrid(secure, size, scale, limit, math.floor(half))
