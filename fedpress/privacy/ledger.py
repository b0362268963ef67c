"""The book of everything that was taken from private data: each charge is a mechanism and its steps, never an epsilon.

Epsilon is computed from the whole book, so composition over rounds and stages is that of the accountant, and a
resumed run goes on with the same book. Clients hold disjoint data, so the promise to everybody is that of the client
who was charged most (parallel composition); charges to "population" count for every client.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.accounting import accountant, losses
from fedpress.privacy.accounting.events import (
    GaussianEvent,
    MechanismEvent,
    SkellamEvent,
    gaussians,
    skellams,
)

POPULATION = "population"
VERSION = 2
READS = (1, 2)
"""Version 1 knows no Skellam charges; it is read as it is."""


FEW_PARTIES = 8
"""So many parties are all asked about; of more, a quick bound picks those that may have spent most."""


@dataclass(frozen=True)
class LedgerEntry:
    """`steps` noised sums over the data of `who` (a client's name, or "population" for all), for the purpose `what`.

    `first_round` and `last_round` say when; a charge outside rounds keeps 0. The noise is Gaussian unless `variance`
    is above 0: then it is Skellam, `l2`, `l1`, `variance` and `failure` are those of `SkellamEvent`, and
    `noise_multiplier` is only told for people. Make a charge of either kind with `LedgerEntry.of`.

    Raises:
        RecipeError: if a number is out of range, or `noise_multiplier` is not that of the Skellam noise.
    """

    who: str
    what: str
    sampling_prob: float
    noise_multiplier: float
    steps: int
    first_round: int = 0
    last_round: int = 0
    l2: float = 0.0
    l1: float = 0.0
    variance: float = 0.0
    failure: float = 0.0

    def __post_init__(self) -> None:
        phase = self.phase  # checks the numbers
        if isinstance(phase, GaussianEvent):
            if any((self.l2, self.l1, self.failure)):
                raise RecipeError(
                    "got 0 beside l2, l1 or failure, expected the Skellam noise's",
                    place="charge.variance",
                )
        elif not math.isclose(phase.noise_multiplier, self.noise_multiplier, rel_tol=1e-6):
            raise RecipeError(
                (
                    f"got {self.noise_multiplier}, expected {phase.noise_multiplier}, that of the "
                    "Skellam noise"
                ),
                place="charge.noise_multiplier",
                cure="make the charge with LedgerEntry.of",
            )

    @classmethod
    def of(
        cls, who: str, what: str, phase: MechanismEvent, first_round: int = 0, last_round: int = 0
    ) -> LedgerEntry:
        """Returns the charge of `phase`.

        >>> LedgerEntry.of("population", "federate", SkellamEvent(10.0, 80.0, 400.0, 1), 3, 3).noise_multiplier
        2.0
        """
        own = {}
        if isinstance(phase, SkellamEvent):
            own = {
                "l2": phase.l2,
                "l1": phase.l1,
                "variance": phase.variance,
                "failure": phase.failure,
            }
        return cls(
            who,
            what,
            phase.sampling_prob,
            phase.noise_multiplier,
            phase.steps,
            first_round,
            last_round,
            **own,
        )

    @property
    def phase(self) -> MechanismEvent:
        """What this charge is to the accountant."""
        if self.variance:
            return SkellamEvent(
                self.l2, self.l1, self.variance, self.steps, self.sampling_prob, self.failure
            )
        return GaussianEvent(self.sampling_prob, self.noise_multiplier, self.steps)

    def joins(self, later: LedgerEntry) -> bool:
        """Says whether `later` continues this charge."""
        return _mechanism(self) == _mechanism(later)


@dataclass(frozen=True)
class Ledger:
    """Charges in the order in which they were made; to add one gives a new ledger.

    >>> book = Ledger("sample")
    >>> for round in (1, 2, 3):
    ...     book = book.add(LedgerEntry("c0", "federate", 0.1, 2.0, 10, round, round))
    >>> [(c.who, c.steps, c.first_round, c.last_round) for c in book.charges]
    [('c0', 30, 1, 3)]
    >>> book.would_pass(LedgerEntry("c0", "federate", 0.1, 2.0, 1000), epsilon=2.0, delta=1e-5)
    True
    """

    unit: Literal["sample", "client"]
    charges: tuple[LedgerEntry, ...] = ()

    def __post_init__(self) -> None:
        if self.unit not in ("sample", "client"):
            raise RecipeError(
                f"got {self.unit!r}, expected 'sample' or 'client'", place="ledger.unit"
            )

    def add(self, *charges: LedgerEntry) -> Ledger:
        """Returns the ledger with `charges` at its end; a charge that continues its client's last one is joined."""
        book = list(self.charges)
        for charge in charges:
            last = next(
                (i for i in range(len(book) - 1, -1, -1) if book[i].who == charge.who), None
            )
            if last is not None and book[last].joins(charge):
                rounds = max(book[last].last_round, charge.last_round)
                book[last] = replace(
                    book[last], steps=book[last].steps + charge.steps, last_round=rounds
                )
            else:
                book.append(charge)
        return replace(self, charges=tuple(book))

    def phases(self) -> Iterator[tuple[MechanismEvent, ...]]:
        """Yields what each party was charged, merged; parties charged alike appear once."""
        everybody = [c.phase for c in self.charges if c.who == POPULATION]
        parties: dict[str, list[MechanismEvent]] = {POPULATION: []}
        for charge in self.charges:
            if charge.who != POPULATION:
                parties.setdefault(charge.who, []).append(charge.phase)
        yield from {accountant.merge([*everybody, *own]) for own in parties.values()}

    def epsilon(self, *, delta: float) -> float:
        """Returns the epsilon spent so far by the party that was charged most, at `delta`."""
        return self.spent(delta=delta).epsilon

    def spent(self, *, delta: float) -> accountant.Spent:
        """Returns `epsilon`, and whether it is a mere upper bound."""
        parties = _undominated(set(self.phases()))
        # Many parties share the time of a few; fewer points only raise an epsilon.
        points = max(1 << 14, 4 * losses.POINTS // max(4, len(parties)))
        if len(parties) <= FEW_PARTIES:
            found = [accountant.spent(phases, delta=delta, points=points) for phases in parties]
            return max(found, key=lambda party: party.epsilon)
        # The party of the largest epsilon alone counts: who has a smaller Renyi bound than that is not asked about.
        bounds = {phases: accountant.renyi_bound(phases, delta=delta) for phases in parties}
        most = accountant.Spent(0.0)
        for phases in sorted(bounds, key=lambda party: -bounds[party]):
            if bounds[phases] <= most.epsilon:
                break
            one = accountant.spent(phases, delta=delta, points=points)
            most = max(most, one, key=lambda party: party.epsilon)
        return most

    def would_pass(self, *charges: LedgerEntry, epsilon: float, delta: float) -> bool:
        """Says whether `charges` together would carry anybody beyond `epsilon`: ask before the data is touched."""
        return self.add(*charges).epsilon(delta=delta) > epsilon

    def spend(self, *charges: LedgerEntry, epsilon: float, delta: float) -> Ledger:
        """Returns the ledger with `charges` added.

        Raises:
            PrivacyError: if that would pass the budget `epsilon` at `delta`; nothing is charged then.
        """
        after = self.add(*charges)
        spent = after.epsilon(delta=delta)
        if spent > epsilon:
            what = charges[0].what if charges else "nothing"
            raise PrivacyError(
                (
                    f"{what} would bring epsilon to {spent:.4g}, beyond the budget {epsilon:g} at "
                    f"delta {delta:g}"
                ),
                place="ledger",
                cure="stop here, or plan fewer steps or more noise from the start",
            )
        return after

    def to_json(self) -> str:
        """Returns the ledger as JSON text with all that is needed to recompute epsilon."""
        head = {
            "version": VERSION,
            "unit": self.unit,
            "neighbours": "add or remove one",
            "mechanism": "noise on the sum of a Poisson sample: Gaussian, or Skellam where variance is above 0",
        }
        return json.dumps({**head, "charges": [asdict(c) for c in self.charges]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Reads what `to_json` wrote.

        Raises:
            PrivacyError: if the text is not a ledger; without its book a run must not go on.
        """
        try:
            page = json.loads(text)
            if page["version"] not in READS:
                raise PrivacyError(
                    f"got version {page['version']}, expected one of {READS}",
                    place="ledger",
                    cure="use the fedpress of then",
                )
            return cls(page["unit"], tuple(LedgerEntry(**c) for c in page["charges"]))
        except (ValueError, KeyError, TypeError, RecursionError, RecipeError) as error:
            raise PrivacyError(
                f"not a ledger ({error!r})",
                place="ledger",
                cure="restore ledger.json, or start a new run",
            ) from error


def _mechanism(charge: LedgerEntry) -> LedgerEntry:
    return replace(charge, steps=0, first_round=0, last_round=0)


def _undominated(parties: set[tuple[MechanismEvent, ...]]) -> list[tuple[MechanismEvent, ...]]:
    """Drops parties that spend no more than another by every number, so that 100 unequal clients cost one answer."""
    return [p for p in parties if not any(p != other and _covers(other, p) for other in parties)]


def _covers(more: tuple[MechanismEvent, ...], less: tuple[MechanismEvent, ...]) -> bool:
    """Says whether each phase of `less` has its own one in `more`, of the same kind, that spends at least as much."""
    gaussian, skellam = (gaussians(more), gaussians(less)), (skellams(more), skellams(less))
    if len(gaussian[1]) > len(gaussian[0]) or len(skellam[1]) > len(skellam[0]):
        return False
    return all(a.covers(b) for a, b in zip(*gaussian, strict=False)) and all(
        a.covers(b) for a, b in zip(*skellam, strict=False)
    )
