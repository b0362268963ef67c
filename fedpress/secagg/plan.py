"""The plan of a secure sum: how many clients, how many may vanish or be corrupt, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from fedpress.errors import RecipeError
from fedpress.secagg import graph

WHOLE_COMMITTEE = 100  # up to this cohort everybody is in the committee
MAX_COHORT = 5_000


@dataclass(frozen=True)
class SecurePlan:
    """What both sides agree on; its fields are in all that is signed, so two sides with other plans refuse each other.

    Args:
        cohort: clients in every round.
        bits: sums are exact modulo 2^bits, from 2 to 62.
        max_dropout: share of the cohort that may vanish in a round, at whichever step.
        max_corrupt: share of the cohort that may work for a dishonest server.
        bound: largest absolute value a client may hand in, so that no sum can overflow; None takes any value modulo
            2^bits, and it is for the caller to see that the sum fits.

    Raises:
        RecipeError: if a number is out of range or the shares leave no safe threshold.

    >>> plan = SecurePlan(cohort=10, bits=18)
    >>> plan.survivors, plan.committee, plan.threshold, plan.edge_prob
    (7, 10, 7, 1.0)
    """

    cohort: int
    bits: int
    max_dropout: float = 1 / 3
    max_corrupt: float = 0.05
    bound: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.cohort <= MAX_COHORT:
            raise RecipeError(
                f"got {self.cohort}, expected 2 to {MAX_COHORT} clients", place="cohort"
            )
        if not 2 <= self.bits <= 62:
            raise RecipeError(f"got {self.bits}, expected 2 to 62", place="bits")
        for name in ("max_dropout", "max_corrupt"):
            if not 0 <= getattr(self, name) < 0.5:
                raise RecipeError(
                    f"got {getattr(self, name)}, expected a share from 0 to below 0.5",
                    place=name,
                )
        if self.bound is not None and not 0 < self.bound * self.cohort < 1 << (self.bits - 1):
            needed = (self.bound * self.cohort).bit_length() + 1
            raise RecipeError(
                (
                    f"got {self.bits}, and {self.cohort} values up to {self.bound} need {needed} "
                    "bits"
                ),
                place="bits",
                cure=f"take {needed} or more",
            )
        if self.survivors - self.corrupt < 2:
            raise RecipeError(
                (
                    f"with {self.cohort} clients a sum may hold {self.survivors - self.corrupt} "
                    "honest ones, which hides nobody"
                ),
                place="max_dropout",
                cure="take a larger cohort or a lower max_dropout",
            )
        if not all(_committee(self.cohort, self.dropped, self.corrupt)):
            raise RecipeError(
                (
                    f"{self.corrupt} corrupt and twice {self.dropped} vanishing clients are not "
                    f"fewer than the cohort of {self.cohort}"
                ),
                place="max_corrupt",
                cure="lower max_dropout or max_corrupt",
            )

    @property
    def dropped(self) -> int:
        """Clients that may vanish."""
        return min(_floor(self.cohort * self.max_dropout), self.cohort - 2)

    @property
    def corrupt(self) -> int:
        """Clients that may be corrupt."""
        return _floor(self.cohort * self.max_corrupt)

    @property
    def survivors(self) -> int:
        """Fewest clients that a sum may hold."""
        return self.cohort - self.dropped

    @property
    def committee(self) -> int:
        """Clients that hold shares."""
        return _committee(self.cohort, self.dropped, self.corrupt)[0]

    @property
    def threshold(self) -> int:
        """Members of the committee who must give the same answer: more than half of the honest ones and all corrupt."""
        return _committee(self.cohort, self.dropped, self.corrupt)[1]

    @property
    def edge_prob(self) -> float:
        """Probability that two clients mask with each other."""
        return graph.density(self.cohort, self.dropped, self.corrupt)[0]

    @property
    def least_neighbours(self) -> int:
        """Fewest neighbours in the sum that every client in the sum must have."""
        return graph.density(self.cohort, self.dropped, self.corrupt)[1]

    @property
    def degree(self) -> float:
        """Expected number of clients that one client masks with."""
        return self.edge_prob * (self.cohort - 1)


def _floor(x: float) -> int:
    return math.floor(x + 1e-9)  # 0.1 * 30 is a little more, 0.29 * 100 a little less than meant


@lru_cache(maxsize=64)
def _committee(cohort: int, dropped: int, corrupt: int) -> tuple[int, int]:
    """Returns (size, threshold) of the smallest committee that is safe and alive, or (0, 0) if none is.

    Two labellings cannot both find `threshold` members if 2 threshold > size + the corrupt ones: each honest member
    answers one of them. A committee smaller than the cohort is drawn at random, so both sides hold up to a probability.
    """
    for size in range(WHOLE_COMMITTEE, cohort, 10):
        threshold = _reached(cohort, cohort - dropped, size)
        if _tail(cohort, corrupt, size, 2 * threshold - size) <= graph.RISK:
            return size, threshold
    threshold = cohort - dropped
    return (cohort, threshold) if 2 * threshold > cohort + corrupt else (0, 0)


def _reached(cohort: int, alive: int, size: int) -> int:
    """Returns the largest number of `size` drawn clients that are alive, up to the probability `MISS`."""
    ways, below, number = math.comb(cohort, size), 0, 0
    while number <= size:
        below += math.comb(alive, number) * math.comb(cohort - alive, size - number)
        if below / ways > graph.MISS:  # whole numbers, too large for floats on their own
            break
        number += 1
    return number


def _tail(cohort: int, marked: int, size: int, least: int) -> float:
    """Returns the probability that `least` or more of `size` drawn clients are among the `marked`."""
    if least <= 0:
        return 1.0
    ways = sum(
        math.comb(marked, k) * math.comb(cohort - marked, size - k) for k in range(least, size + 1)
    )
    return ways / math.comb(cohort, size)
