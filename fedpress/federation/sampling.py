"""Client sampling: draws the clients of a round, and gives the sampling probability for privacy."""

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
    """How many clients take part in each round, and how they are drawn.

    These settings are public. The names of the clients that are drawn may have to stay secret.

    Attributes:
        size: number of clients in a round; under "poisson" the mean number.
        population: number of all clients.
        sampling: "fixed" draws exactly `size` clients without replacement. "poisson" draws each
            client independently with probability size / population, so a round may have more,
            fewer or no clients. "cyclic" shuffles all clients once and takes the next `size` in
            every round, so a client's turn comes every `period` rounds. If `size` does not divide
            `population`, the last round of each period has fewer clients.

    Raises:
        RecipeError: if `sampling` is unknown, or `size` is not between 1 and `population`.
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
        """Sampling probability of a client that the privacy accountant may use, from 0 to 1.

        Only "poisson" gives privacy amplification here. For "fixed", amplification is known only if
        neighbouring populations differ by the replacement of one client. The sensitivity is then
        twice as large, so at usual sizes nothing is gained.

        >>> Cohort(10, 100).sampling_prob, Cohort(10, 100, "poisson").sampling_prob
        (1.0, 0.1)
        """
        return self.size / self.population if self.sampling == "poisson" else 1.0

    @property
    def period(self) -> int:
        """A client that was drawn in a round is drawn again after this many rounds at the earliest.

        >>> Cohort(10, 95, "cyclic").period, Cohort(10, 95).period
        (10, 1)
        """
        return math.ceil(self.population / self.size) if self.sampling == "cyclic" else 1

    def draw(self, clients: Sequence[ClientId], *, seed: int, round: int) -> list[ClientId]:
        """Draws the clients of `round`; returns them in the order of `clients` [population].

        The draw depends on seed and round only, so a repeated round asks the same clients.

        Raises:
            RecipeError: if `clients` are not `population` many.

        >>> cohort = Cohort(2, 3)
        >>> first = cohort.draw(["a", "b", "c"], seed=1, round=1)
        >>> first == cohort.draw(["a", "b", "c"], seed=1, round=1)
        True
        """
        if len(clients) != self.population:
            raise RecipeError(
                f"planned for {self.population} clients but there are {len(clients)}",
                place="clients",
                cure="plan with the number of clients that exist",
            )
        if self.sampling == "cyclic":
            # The stream's name has no round, so there is one permutation for the whole run.
            order = private_stream(seed, "cohort").permutation(self.population)
            first = (round - 1) % self.period * self.size
            # Sorted into the order of `clients`, because float sums depend on the order.
            indices = order[first : first + self.size].sort().values
        elif self.sampling == "poisson":
            # From the private stream: amplification requires that nobody knows who was drawn.
            chance = private_stream(seed, "cohort", round)
            joins = chance.uniform(self.population) < self.sampling_prob
            indices = joins.nonzero().flatten()
        else:
            indices = private_stream(seed, "cohort", round).subset(self.population, self.size)
        return [clients[index] for index in indices.tolist()]
