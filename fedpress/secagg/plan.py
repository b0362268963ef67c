"""The settings of a secure sum, and the numbers that follow from them for privacy and drop-outs.

In a secure sum the server learns only the sum of the clients' masked vectors. The committee of a
round is the group of clients that help to unmask its sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from fedpress.errors import RecipeError
from fedpress.secagg import graph

WHOLE_COMMITTEE = 100
"""In cohorts of up to this many clients, all clients are in the committee."""

MAX_COHORT = 5_000
"""Largest number of clients in a cohort."""


@dataclass(frozen=True)
class SecurePlan:
    """The settings on which server and clients agree before a run.

    Every signature covers all fields, so two sides with different plans refuse each other's
    messages.

    Args:
        cohort: number of clients in every round.
        bits: sums are exact modulo 2^bits; from 2 to 62.
        max_dropout: share of the cohort that may drop out in a round, before or after reporting
            (sending a masked vector).
        max_corrupt: share of the cohort that may collude with a dishonest server.
        bound: largest absolute value in a client's vector, so that no sum overflows. None allows
            any value modulo 2^bits; then the caller must make sure that the sum fits.

    Raises:
        RecipeError: if a number is out of range, if `bits` are too few for `bound`, if a sum may
            have fewer than two honest clients, or if no committee is safe.

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
        if self.bound is not None:
            self._check_bound(self.bound)
        honest = self.survivors - self.corrupt
        # Corrupt clients know their own vectors, so a sum with one honest client would reveal its
        # vector.
        if honest < 2:
            raise RecipeError(
                (
                    f"with {self.cohort} clients a sum may have fewer than 2 honest clients "
                    f"({honest}), which hides no client"
                ),
                place="max_dropout",
                cure="take a larger cohort or a lower max_dropout",
            )
        if not all(_committee(self.cohort, self.dropped, self.corrupt)):
            raise RecipeError(
                (
                    f"corrupt clients plus twice the drop-outs must be below the cohort, but "
                    f"{self.corrupt} + 2 * {self.dropped} >= {self.cohort}"
                ),
                place="max_corrupt",
                cure="lower max_dropout or max_corrupt",
            )

    def _check_bound(self, bound: int) -> None:
        if bound < 1:
            raise RecipeError(f"got {bound}, expected a whole number above 0", place="bound")
        # One bit is the sign, so the largest sum must stay below half of 2^bits.
        largest = bound * self.cohort
        if largest >= 1 << (self.bits - 1):
            needed = largest.bit_length() + 1
            raise RecipeError(
                f"got {self.bits}, but a sum of {self.cohort} values up to {bound} needs {needed}",
                place="bits",
                cure=f"take {needed} or more",
            )

    @property
    def dropped(self) -> int:
        """Number of clients that may drop out in a round."""
        # At least two must stay, because a sum of one vector is that vector.
        return min(_floor(self.cohort * self.max_dropout), self.cohort - 2)

    @property
    def corrupt(self) -> int:
        """Number of clients that may collude with the server."""
        return _floor(self.cohort * self.max_corrupt)

    @property
    def survivors(self) -> int:
        """Minimum number of clients in a sum that is unmasked."""
        return self.cohort - self.dropped

    @property
    def committee(self) -> int:
        """Number of committee members: clients of a round that get shares of all masks' seeds."""
        return _committee(self.cohort, self.dropped, self.corrupt)[0]

    @property
    def threshold(self) -> int:
        """Number of committee members that must answer for the same list of reporting clients.

        The threshold exceeds the number of corrupt members plus half of the honest members. Each
        honest member answers for one list only, so two lists can never both be opened.
        """
        return _committee(self.cohort, self.dropped, self.corrupt)[1]

    @property
    def edge_prob(self) -> float:
        """Probability that two clients are neighbours, which means that they share a mask."""
        return graph.sparsest(self.cohort, self.dropped, self.corrupt)[0]

    @property
    def least_neighbours(self) -> int:
        """Minimum number of neighbours in the sum that every client in the sum must have."""
        return graph.sparsest(self.cohort, self.dropped, self.corrupt)[1]

    @property
    def degree(self) -> float:
        """Expected number of neighbours of a client."""
        return self.edge_prob * (self.cohort - 1)


def _floor(x: float) -> int:
    # In floating point 0.29 * 100 is slightly below 29, but must give 29.
    return math.floor(x + 1e-9)


@lru_cache(maxsize=64)
def _committee(cohort: int, dropped: int, corrupt: int) -> tuple[int, int]:
    """Returns (size, threshold) of the smallest safe committee, or (0, 0) if there is none.

    Each honest member answers for one list only. So two different lists cannot both get `threshold`
    answers if 2 threshold > size + number of corrupt members. A committee smaller than the cohort
    is drawn at random. The probability that it has too many corrupt members is at most
    `graph.MAX_RISK`; the probability that too many of its members drop out is at most
    `graph.MAX_MISS`.
    """
    # In steps of ten, because a few members too many cost little.
    for size in range(WHOLE_COMMITTEE, cohort, 10):
        threshold = _staying(cohort, cohort - dropped, size)
        # With this many corrupt members, two lists could both be opened.
        too_many = 2 * threshold - size
        if _tail_probability(cohort, corrupt, size, too_many) <= graph.MAX_RISK:
            return size, threshold
    threshold = cohort - dropped
    if 2 * threshold > cohort + corrupt:
        return cohort, threshold
    return 0, 0


def _staying(cohort: int, alive: int, size: int) -> int:
    """Returns how many of `size` randomly drawn clients stay (do not drop out) at least.

    The probability that fewer stay is at most `graph.MAX_MISS`.

    Args:
        cohort: number of clients to draw from.
        alive: number of clients of the cohort that do not drop out.
        size: number of drawn clients.
    """
    ways = math.comb(cohort, size)
    below = 0
    number = 0
    while number <= size:
        below += math.comb(alive, number) * math.comb(cohort - alive, size - number)
        # Both are integers of any size: only their quotient fits into a float.
        if below / ways > graph.MAX_MISS:
            break
        number += 1
    return number


def _tail_probability(cohort: int, marked: int, size: int, least: int) -> float:
    """Returns the probability that at least `least` of `size` drawn clients are marked.

    The `size` clients are drawn from `cohort` clients, of which `marked` clients are marked.
    """
    if least <= 0:
        return 1.0
    ways = 0
    for number in range(least, size + 1):
        ways += math.comb(marked, number) * math.comb(cohort - marked, size - number)
    return ways / math.comb(cohort, size)
