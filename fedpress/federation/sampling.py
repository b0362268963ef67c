"""Which clients take part in a round, and how much the draw amplifies privacy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedpress.core.names import ClientId
from fedpress.core.random_source import private_stream
from fedpress.errors import RecipeError


@dataclass(frozen=True)
class Cohort:
    """A public plan of how many clients take part in each round.

    Attributes:
        size: clients in a round; the mean under "poisson".
        population: all clients.
        sampling: "fixed" draws exactly `size` clients without replacement. "poisson" draws each
            client independently with probability size / population, so a round may have more,
            fewer or no clients, and only the mean is public. "cyclic" shuffles the population once
            and lets all take turns: a client takes part again `period` rounds later.

    Raises:
        RecipeError: if `size` is not between 1 and `population`.
    """

    size: int
    population: int
    sampling: Literal["fixed", "poisson", "cyclic"] = "fixed"

    def __post_init__(self) -> None:
        if self.sampling not in ("fixed", "poisson", "cyclic"):
            raise RecipeError(
                f"got {self.sampling!r}, expected 'fixed', 'poisson' or 'cyclic'",
                place="sampling",
            )
        if not 1 <= self.size <= self.population:
            raise RecipeError(
                (
                    f"got {self.size}, expected between 1 and the population of {self.population} "
                    "clients"
                ),
                place="size",
                cure="ask for fewer per round or make more clients",
            )

    @property
    def sampling_prob(self) -> float:
        """Sampling probability that the accountant may use for a client, in 0..1.

        A fixed-size draw is charged as if everybody took part: its amplification holds only for
        replace-one neighbours at twice the sensitivity, which is worth nothing at usual sizes.

        >>> Cohort(10, 100).sampling_prob, Cohort(10, 100, "poisson").sampling_prob
        (1.0, 0.1)
        """
        return self.size / self.population if self.sampling == "poisson" else 1.0

    @property
    def period(self) -> int:
        """Least number of rounds between two rounds in which the same client takes part.

        >>> Cohort(10, 95, "cyclic").period, Cohort(10, 95).period
        (10, 1)
        """
        return math.ceil(self.population / self.size) if self.sampling == "cyclic" else 1

    def draw(self, clients: Sequence[ClientId], *, seed: int, round: int) -> list[ClientId]:
        """Returns the clients of `round` in the order of `clients` [population].

        It depends on seed and round alone, so a round that is repeated asks the same clients.

        >>> cohort = Cohort(2, 3)
        >>> one, again = (cohort.draw(["a", "b", "c"], seed=1, round=1) for _ in range(2))
        >>> one == again
        True
        """
        if len(clients) != self.population:
            raise RecipeError(
                f"planned for {self.population} clients but there are {len(clients)}",
                place="clients",
                cure="plan with the number of clients that exist",
            )
        if self.sampling == "cyclic":
            # One permutation for the whole run, without the round in its name.
            order = private_stream(seed, "cohort").permutation(self.population)
            first = (round - 1) % self.period * self.size
            # Sorted, so that updates are added in the order of `clients`, as in any other round.
            indices = order[first : first + self.size].sort().values
        elif self.sampling == "poisson":
            # From the private stream: amplification holds only if nobody knows who was drawn.
            chance = private_stream(seed, "cohort", round)
            joins = chance.uniform(self.population) < self.sampling_prob
            indices = joins.nonzero().flatten()
        else:
            indices = private_stream(seed, "cohort", round).subset(self.population, self.size)
        return [clients[index] for index in indices.tolist()]
