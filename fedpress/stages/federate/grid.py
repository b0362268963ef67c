"""Plans the integer grid of a secure sum: scale, bits, and the noise that clients add.

In a secure sum the server learns only the sum of the clients' vectors. The vectors are integers
modulo 2^bits: each client multiplies its update by `scale`, rounds it, and adds its share of the
noise. There must be enough bits to hold the sum of all clients without overflow.
"""

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
"""Default bits of a secure sum without noise. The rounding error is far below the update's size."""
CLIP_NORM = 10.0
"""Default clip norm of a secure sum without privacy. Usual updates are shorter, so the clip leaves
them as they are: it only prevents overflow."""
NOISED_LIST = 'uplink = [{ kind = "rotate" }, { kind = "discretize" }]'
PLAIN_LIST = (
    f'uplink = [{{ kind = "clip", clip_norm = {CLIP_NORM} }}, {{ kind = "rotate" }}, '
    '{ kind = "discretize" }]'
)
"""Recipe lines for a secure sum, with privacy (`NOISED_LIST`) and without. Error messages suggest
them. With privacy a clip is added automatically."""


@dataclass(frozen=True)
class SumGrid:
    """The grid of integers of a secure sum.

    Attributes:
        plan: the secure sum: number of clients, bits, and how many clients may drop out.
        size: number of values in the vector of each client.
        scale: number of grid steps for a value of 1.0 in the update.
        coordinate_limit: largest absolute value of an update's coordinate before scaling; larger
            values are clamped.
        limit: largest absolute value in the sum of all honest clients, in grid steps.
        noise: the planned noise of the clients; None without privacy.
    """

    plan: SecurePlan
    size: int
    scale: float
    coordinate_limit: float
    limit: int
    noise: distributed.DistributedPlan | None = None

    def planned_chain(self, chain: Sequence[Settings]) -> tuple[Settings, ...]:
        """Fills this grid into a list of codecs.

        Args:
            chain: codecs of the uplink, with a `discretize` that rounds to integers.

        Returns:
            The codecs with bits, scale and limit set in `discretize`, and with the noise after it.
        """
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
            # After rounding, because Skellam noise is on integers: the sum of the clients' shares
            # then has exactly the planned distribution.
            if self.noise is not None:
                filled.append(Noise(std=math.sqrt(self.noise.variance)))
        return tuple(filled)


def default_secure_chain(private: bool) -> tuple[Settings, ...]:
    """Returns the default codecs of a secure sum.

    Args:
        private: whether the stage has privacy. Then the planner adds a clip, so there is none here.
    """
    # A rotation makes all coordinates similar in size, so that the grid can be finer.
    rest: tuple[Settings, ...] = (Rotate(), Discretize())
    return rest if private else (Clip(clip_norm=CLIP_NORM), *rest)


def noise_makers(plan: SecurePlan) -> int:
    """Returns the number of clients whose noise the guarantee may rely on.

    Clients that drop out add no noise. Corrupt clients may reveal their noise. And every client
    knows its own noise and can subtract it, so at least one client is not counted.
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
    """Plans scale, bits and noise of the grid.

    Args:
        stage: the settings.
        chain: codecs of the uplink, with a `discretize`.
        start: bounds of the norms of an update before the first codec.
        cohort: how the clients of a round are chosen.
        sensitivity: largest L2 norm of the change that one protected unit (an example or a client)
            can make to a client's vector; None: the bound on the norm of the vector itself.
        sampling_prob: probability that an example is used in a round.
        times: number of rounds in which a protected unit takes part; None: all rounds.

    Raises:
        RecipeError: if the codecs do not fit a secure sum.
        PrivacyError: if no amount of noise keeps the budget.
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
        # The bits are not known yet. Only numbers of clients are read from this plan, so any valid
        # number of bits does.
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
    """Returns the `discretize` in a list of codecs, and the bound of its input.

    Raises:
        RecipeError: if there is no `discretize`, or its input is not bounded, or a codec before it
            is not additive. Additive: the sum of coded vectors decodes to the sum of the vectors.
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
            "a secure sum adds integers, and no codec rounds updates to integers",
            place="uplink",
            cure=f'end the list with {{ kind = "discretize" }}, as in {line}',
        )
    discretize = chain[at]
    assert isinstance(discretize, Discretize)
    if not bound.l2 < math.inf:
        raise RecipeError(
            "a secure sum could overflow, because the norm of updates is not bounded",
            place="uplink",
            cure=f"keep 'discretize' and put 'clip' before it, as in {line}",
        )
    return discretize, bound


def _open_grid(
    stage: FederateSettings, bits: int, clients: int, size: int, limit: float
) -> SumGrid:
    """Plans the grid of a secure sum without noise.

    Args:
        stage: the settings.
        bits: bits of each value of the sum.
        clients: number of clients in a round.
        size: number of values of each client.
        limit: largest absolute value of a coordinate.

    Raises:
        RecipeError: if the bits cannot hold the sum.
    """
    half = distributed.USED_RANGE * 2 ** (bits - 1)
    # No client may send a larger value, so that the sum of all honest clients cannot overflow.
    largest = math.floor(half / clients)
    if largest < 2:
        least = math.ceil(math.log2(2 * clients / distributed.USED_RANGE)) + 1
        raise RecipeError(
            f"{bits} bits cannot hold the sum of {clients} clients",
            place="uplink.discretize.bits",
            cure=f"take {least} or more",
        )
    secure = SecurePlan(clients, bits, stage.max_dropout, bound=largest)
    # One less than the largest value, because rounding may add one.
    scale = (largest - 1) / limit
    return SumGrid(secure, size, scale, limit, math.floor(half))
