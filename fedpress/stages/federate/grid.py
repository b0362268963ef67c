"""The grid of a secure sum: how wide its numbers are, how fine, and which noise the clients make on it together."""

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
"""Bits of a secure sum without noise, where none are asked for: coarser than float32, finer than updates need."""
CLIP_NORM = 10.0
"""Longest update of a secure sum without privacy, where the recipe gives no list: longer than those of usual rounds."""
NOISED_LIST = 'uplink = [{ kind = "rotate" }, { kind = "discretize" }]'
PLAIN_LIST = (
    f'uplink = [{{ kind = "clip", clip_norm = {CLIP_NORM} }}, {{ kind = "rotate" }}, '
    '{ kind = "discretize" }]'
)
"""What a secure sum needs, with privacy (which clips by itself) and without; as a line of a recipe."""


@dataclass(frozen=True)
class SumGrid:
    """The grid of a secure sum of `size` values by so many clients.

    Attributes:
        plan: of the secure sum.
        size: values that every client sends.
        scale: grid units per unit of the update.
        coordinate_limit: where each value is clamped, in units of the update.
        limit: no value of an honest sum is larger, in grid units.
        noise: the privacy it was planned for, None without.
    """

    plan: SecurePlan
    size: int
    scale: float
    coordinate_limit: float
    limit: int
    noise: distributed.DistributedPlan | None = None

    def planned_chain(self, chain: Sequence[Settings]) -> tuple[Settings, ...]:
        """Returns `chain` with the plan in its `discretize`, and each client's share of the noise behind it."""
        filled: list[Settings] = []
        for transform in chain:
            filled.append(transform)
            if isinstance(transform, Discretize):
                planned = {
                    "bits": self.plan.bits,
                    "scale": self.scale,
                    "limit": self.coordinate_limit,
                }
                if self.noise is not None:
                    planned["again"] = self.noise.rounds_again
                filled[-1] = transform.model_copy(update=planned)
                if self.noise is not None:
                    filled.append(Noise(std=math.sqrt(self.noise.variance)))
        return tuple(filled)


def default_secure_chain(private: bool) -> tuple[Settings, ...]:
    """Returns the transforms of a secure sum where the recipe names none; under privacy a clip comes before them."""
    rest: tuple[Settings, ...] = (Rotate(), Discretize())
    return rest if private else (Clip(clip_norm=CLIP_NORM), *rest)


def noise_makers(plan: SecurePlan) -> int:
    """Returns how many clients' noise a promise may count on.

    Of those who must stay, the corrupt ones tell their noise to others; and every client can take
    its own away.
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
    """Plans scale, bits and noise of the grid from what is promised just before it.

    `sensitivity` is how much one protected unit moves a client's vector, its whole bound unless
    given; `times` how often a unit takes part, every round unless given.
    """
    at = next((i for i, transform in enumerate(chain) if isinstance(transform, Discretize)), None)
    before = chain[:at]
    transforms, bound = bind_chain(before, start)
    check_additive({one.kind: transform for one, transform in zip(before, transforms, strict=True)})
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
    limit = discretize.limit or coordinate_limit(bound)
    private = stage.privacy
    if private is None:
        return _open_grid(stage, discretize.bits or BITS, cohort.size, bound.size, limit)
    planned = distributed.plan(
        size=bound.size,
        clip_norm=sensitivity or bound.l2,
        coordinate_limit=limit,
        clients=cohort.size,
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


def _open_grid(
    stage: FederateSettings, bits: int, clients: int, size: int, limit: float
) -> SumGrid:
    """Plans the grid of a sum without noise, of vectors of `size` values up to `limit`."""
    half = distributed.ROOM * 2 ** (bits - 1)
    largest = math.floor(half / clients)  # of one client's values: no honest sum can overflow
    if largest < 2:
        least = math.ceil(math.log2(2 * clients / distributed.ROOM)) + 1
        raise RecipeError(
            f"{bits} bits cannot hold the sum of {clients} clients",
            place="uplink.discretize.bits",
            cure=f"take {least} or more",
        )
    secure = SecurePlan(clients, bits, stage.max_dropout, bound=largest)
    return SumGrid(secure, size, (largest - 1) / limit, limit, math.floor(half))
