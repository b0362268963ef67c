"""The book of everything that was taken from private data: each charge is a mechanism and its steps, never an epsilon.

Epsilon is computed from the whole book, so composition over rounds and stages is that of the accountant, and a
resumed run goes on with the same book. Clients hold disjoint data, so the promise to everybody is that of the client
who was charged most (parallel composition); charges to "population" count for every client.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy import accounting
from fedpress.privacy.accounting import Phase

POPULATION = "population"
VERSION = 1


@dataclass(frozen=True)
class Charge:
    """`steps` noised sums over the data of `who` (a client's name, or "population" for all), for the purpose `what`.

    `first_round` and `last_round` say when; a charge outside rounds keeps 0.
    """

    who: str
    what: str
    sampling_prob: float
    noise_multiplier: float
    steps: int
    first_round: int = 0
    last_round: int = 0

    def __post_init__(self) -> None:
        _ = self.phase  # checks the numbers

    @property
    def phase(self) -> Phase:
        """What this charge is to the accountant."""
        return Phase(self.sampling_prob, self.noise_multiplier, self.steps)

    def joins(self, later: Charge) -> bool:
        """Says whether `later` continues this charge."""
        return _mechanism(self) == _mechanism(later)


@dataclass(frozen=True)
class Ledger:
    """Charges in the order in which they were made; to add one gives a new ledger.

    >>> book = Ledger("sample")
    >>> for round in (1, 2, 3):
    ...     book = book.add(Charge("c0", "federate", 0.1, 2.0, 10, round, round))
    >>> book.charges
    (Charge(who='c0', what='federate', sampling_prob=0.1, noise_multiplier=2.0, steps=30, first_round=1, last_round=3),)
    >>> book.would_pass(Charge("c0", "federate", 0.1, 2.0, 1000), epsilon=2.0, delta=1e-5)
    True
    """

    unit: Literal["sample", "client"]
    charges: tuple[Charge, ...] = ()

    def __post_init__(self) -> None:
        if self.unit not in ("sample", "client"):
            raise RecipeError(f"ledger.unit: got {self.unit!r}, expected 'sample' or 'client'")

    def add(self, *charges: Charge) -> Ledger:
        """Returns the ledger with `charges` at its end; a charge that continues its client's last one is joined."""
        book = list(self.charges)
        for charge in charges:
            last = next((i for i in range(len(book) - 1, -1, -1) if book[i].who == charge.who), None)
            if last is not None and book[last].joins(charge):
                rounds = max(book[last].last_round, charge.last_round)
                book[last] = replace(book[last], steps=book[last].steps + charge.steps, last_round=rounds)
            else:
                book.append(charge)
        return replace(self, charges=tuple(book))

    def phases(self) -> Iterator[tuple[Phase, ...]]:
        """Yields what each party was charged, merged; parties charged alike appear once."""
        everybody = [c.phase for c in self.charges if c.who == POPULATION]
        parties: dict[str, list[Phase]] = {POPULATION: []}
        for charge in self.charges:
            if charge.who != POPULATION:
                parties.setdefault(charge.who, []).append(charge.phase)
        yield from {accounting.merge([*everybody, *own]) for own in parties.values()}

    def epsilon(self, *, delta: float) -> float:
        """Returns the epsilon spent so far by the party that was charged most, at `delta`."""
        return max(accounting.epsilon(phases, delta=delta) for phases in _undominated(set(self.phases())))

    def would_pass(self, *charges: Charge, epsilon: float, delta: float) -> bool:
        """Says whether `charges` together would carry anybody beyond `epsilon`: ask before the data is touched."""
        return self.add(*charges).epsilon(delta=delta) > epsilon

    def spend(self, *charges: Charge, epsilon: float, delta: float) -> Ledger:
        """Returns the ledger with `charges` added.

        Raises:
            PrivacyError: if that would pass the budget `epsilon` at `delta`; nothing is charged then.
        """
        after = self.add(*charges)
        spent = after.epsilon(delta=delta)
        if spent > epsilon:
            what = charges[0].what if charges else "nothing"
            raise PrivacyError(
                f"ledger: {what} would bring epsilon to {spent:.4g}, beyond the budget {epsilon:g} at delta {delta:g}; "
                "stop here, or plan fewer steps or more noise from the start"
            )
        return after

    def to_json(self) -> str:
        """Returns the ledger as JSON text with all that is needed to recompute epsilon."""
        head = {
            "version": VERSION,
            "unit": self.unit,
            "neighbours": "add or remove one",
            "mechanism": "Gaussian noise on the sum of a Poisson sample, sensitivity = clip norm",
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
            if page["version"] != VERSION:
                raise PrivacyError(
                    f"ledger: got version {page['version']}, expected {VERSION}; use the fedpress of then"
                )
            return cls(page["unit"], tuple(Charge(**c) for c in page["charges"]))
        except (ValueError, KeyError, TypeError, RecipeError) as error:
            raise PrivacyError(f"ledger: not a ledger ({error!r}); restore ledger.json, or start a new run") from error


def _mechanism(charge: Charge) -> tuple[str, str, float, float]:
    return charge.who, charge.what, charge.sampling_prob, charge.noise_multiplier


def _undominated(parties: set[tuple[Phase, ...]]) -> list[tuple[Phase, ...]]:
    """Drops parties that spend no more than another by every number, so that 100 unequal clients cost one answer."""
    return [p for p in parties if not any(p != other and _covers(other, p) for other in parties)]


def _covers(more: tuple[Phase, ...], less: tuple[Phase, ...]) -> bool:
    if len(less) > len(more):
        return False
    return all(
        a.sampling_prob >= b.sampling_prob and a.noise_multiplier <= b.noise_multiplier and a.steps >= b.steps
        for a, b in zip(more, less, strict=False)
    )
