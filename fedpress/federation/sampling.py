"""Who takes part in a round: a draw that depends only on seed and round, and what it is worth to privacy."""

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
    """A public plan of how many clients of a `population` take part in each round.

    `fixed` draws exactly `size` clients without replacement. `poisson` lets each client join on its
    own with probability size / population, so a round may have more, fewer or no clients; only
    `size`, its mean, is public. `cyclic` shuffles the population once and lets everybody take
    turns, so nobody takes part again before all the others have: `period` rounds later.

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
        """Probability with which the accountant may believe that a client takes part, in 0..1.

        A fixed-size draw is charged as if everybody took part: its amplification holds only for
        replace-one neighbours at twice the sensitivity, which is worth nothing at usual sizes.

        >>> Cohort(10, 100).sampling_prob, Cohort(10, 100, "poisson").sampling_prob
        (1.0, 0.1)
        """
        return self.size / self.population if self.sampling == "poisson" else 1.0

    @property
    def period(self) -> int:
        """Least number of rounds from one turn of a client to its next.

        >>> Cohort(10, 95, "cyclic").period, Cohort(10, 95).period
        (10, 1)
        """
        return math.ceil(self.population / self.size) if self.sampling == "cyclic" else 1

    def draw(self, clients: Sequence[ClientId], *, seed: int, round: int) -> list[ClientId]:
        """Returns the clients of `round` in the order of `clients` [population].

        >>> Cohort(2, 3).draw(["a", "b", "c"], seed=1, round=1) == Cohort(2, 3).draw(["a", "b", "c"], seed=1, round=1)
        True
        """
        if len(clients) != self.population:
            raise RecipeError(
                f"planned for {self.population} clients but there are {len(clients)}",
                place="clients",
                cure="plan with the number of clients that exist",
            )
        if self.sampling == "cyclic":
            order = private_stream(seed, "cohort").permutation(self.population)
            turn = order[(round - 1) % self.period * self.size :][: self.size].sort().values
            return [clients[at] for at in turn.tolist()]
        chance = private_stream(seed, "cohort", round)
        if self.sampling == "poisson":
            joins = chance.uniform(self.population) < self.sampling_prob
            return [
                client for client, joined in zip(clients, joins.tolist(), strict=True) if joined
            ]
        return [clients[at] for at in chance.subset(self.population, self.size).tolist()]
