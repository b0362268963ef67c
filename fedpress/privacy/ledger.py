"""The privacy ledger of a run: the mechanisms that ran on each client's data, and their epsilon.

An entry has a mechanism and its number of steps, but no epsilon. The accountant computes epsilon
from all entries together, which is tighter than adding the epsilons of rounds and stages. A resumed
run continues the same ledger.

A party is a client, or "population" for all clients together. Clients have disjoint data, so the
epsilon of the run is the largest epsilon of any party (parallel composition). Entries for
"population" count for every client.
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
"""The party of entries that count for every client."""

VERSION = 2
"""Version of the format that `Ledger.to_json` writes."""
READABLE_VERSIONS = (1, 2)
"""Versions that `Ledger.from_json` reads; version 1 is version 2 without Skellam entries."""

FEW_PARTIES = 8
"""Up to this many parties, epsilon is computed for each; with more, a quick upper bound first
excludes parties that cannot have the largest epsilon."""


@dataclass(frozen=True)
class LedgerEntry:
    """`steps` noised sums over the data of one party (a client, or the population).

    Make an entry with `LedgerEntry.of`, which fills in the fields for Gaussian or Skellam noise.

    Attributes:
        who: a client's name, or "population" for all clients.
        what: the stage or purpose, for instance "federate".
        sampling_prob: probability with which each unit takes part in a step.
        noise_multiplier: standard deviation of the noise / sensitivity. For Skellam noise this is
            for display only; the accountant uses the last four fields.
        steps: number of noised sums.
        first_round: first round of the entry, from 1; 0 if the mechanism does not run in rounds.
        last_round: last round of the entry; 0 if the mechanism does not run in rounds.
        l2: L2 sensitivity of the sum with Skellam noise, in grid units (see `SkellamEvent`); 0 for
            Gaussian noise.
        l1: L1 sensitivity of that sum, in grid units; 0 for Gaussian noise.
        variance: variance of the Skellam noise, in grid units squared; 0 for Gaussian noise.
        failure: probability with which one unit moves the sum by more than `l2` in one step; 0 for
            Gaussian noise.

    Raises:
        RecipeError: if a number is out of range, or if `noise_multiplier` contradicts the fields of
            the Skellam noise.
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
        # Making the event checks the numbers.
        event = self.event
        if isinstance(event, GaussianEvent):
            if any((self.l2, self.l1, self.failure)):
                raise RecipeError(
                    "got 0, but l2, l1 or failure is given, expected the variance of Skellam noise",
                    place="entry.variance",
                )
        # Reports show `noise_multiplier`, so it must not contradict the charged Skellam noise.
        elif not math.isclose(event.noise_multiplier, self.noise_multiplier, rel_tol=1e-6):
            raise RecipeError(
                (
                    f"got {self.noise_multiplier}, expected {event.noise_multiplier}, which "
                    "follows from the fields of the Skellam noise"
                ),
                place="entry.noise_multiplier",
                cure="make the entry with LedgerEntry.of",
            )

    @classmethod
    def of(
        cls, who: str, what: str, event: MechanismEvent, first_round: int = 0, last_round: int = 0
    ) -> LedgerEntry:
        """Returns the entry of a mechanism event; for the other arguments see the attributes.

        >>> event = SkellamEvent(l2=10.0, l1=80.0, variance=400.0, steps=1)
        >>> LedgerEntry.of("population", "federate", event, 3, 3).noise_multiplier
        2.0
        """
        skellam_fields = {}
        if isinstance(event, SkellamEvent):
            skellam_fields = {
                "l2": event.l2,
                "l1": event.l1,
                "variance": event.variance,
                "failure": event.failure,
            }
        return cls(
            who,
            what,
            event.sampling_prob,
            event.noise_multiplier,
            event.steps,
            first_round,
            last_round,
            **skellam_fields,
        )

    @property
    def event(self) -> MechanismEvent:
        """The mechanism and steps of this entry, as the accountant's functions take them."""
        if self.variance:
            return SkellamEvent(
                self.l2, self.l1, self.variance, self.steps, self.sampling_prob, self.failure
            )
        return GaussianEvent(self.sampling_prob, self.noise_multiplier, self.steps)

    def same_mechanism(self, other: LedgerEntry) -> bool:
        """Returns whether `other` is equal to this entry except for steps and rounds."""
        return _without_steps(self) == _without_steps(other)


@dataclass(frozen=True)
class Ledger:
    """An immutable list of entries; adding one returns a new ledger.

    Attributes:
        unit: what is protected: "sample" (one example) or "client" (all examples of a client).
        entries: all charges so far, in the order of adding.

    >>> ledger = Ledger("sample")
    >>> for round in (1, 2, 3):
    ...     ledger = ledger.add(LedgerEntry("c0", "federate", 0.1, 2.0, 10, round, round))
    >>> [(e.who, e.steps, e.first_round, e.last_round) for e in ledger.entries]
    [('c0', 30, 1, 3)]
    >>> more = LedgerEntry("c0", "federate", 0.1, 2.0, 1000)
    >>> ledger.would_exceed(more, epsilon=2.0, delta=1e-5)
    True
    """

    unit: Literal["sample", "client"]
    entries: tuple[LedgerEntry, ...] = ()

    def __post_init__(self) -> None:
        if self.unit not in ("sample", "client"):
            raise RecipeError(
                f"got {self.unit!r}, expected 'sample' or 'client'", place="ledger.unit"
            )

    def add(self, *entries: LedgerEntry) -> Ledger:
        """Returns the ledger with `entries` at its end.

        A new entry is merged into the last entry of the same party if both have the same mechanism
        and the same `what`. So a run of a thousand equal rounds has one entry per party.
        """
        listed = list(self.entries)
        newest = {entry.who: at for at, entry in enumerate(listed)}
        for entry in entries:
            at = newest.get(entry.who)
            if at is not None and listed[at].same_mechanism(entry):
                listed[at] = replace(
                    listed[at],
                    steps=listed[at].steps + entry.steps,
                    last_round=max(listed[at].last_round, entry.last_round),
                )
            else:
                newest[entry.who] = len(listed)
                listed.append(entry)
        return replace(self, entries=tuple(listed))

    def events(self) -> Iterator[tuple[MechanismEvent, ...]]:
        """Yields the merged events of each party; for parties with equal events only once."""
        for_everyone = [entry.event for entry in self.entries if entry.who == POPULATION]
        # The population is a party too, because a ledger may have entries only for it.
        parties: dict[str, list[MechanismEvent]] = {POPULATION: []}
        for entry in self.entries:
            if entry.who != POPULATION:
                parties.setdefault(entry.who, []).append(entry.event)
        yield from {accountant.merge([*for_everyone, *own]) for own in parties.values()}

    def epsilon(self, *, delta: float) -> float:
        """Returns the largest epsilon that any party has spent so far at `delta`."""
        return self.spent(delta=delta).epsilon

    def spent(self, *, delta: float) -> accountant.Spent:
        """Returns `epsilon`, and whether it is only an upper bound."""
        parties = _undominated(set(self.events()))
        # With many parties, each gets a coarser grid to save time; that can only raise epsilon.
        points = max(1 << 14, 4 * losses.POINTS // max(4, len(parties)))
        if len(parties) <= FEW_PARTIES:
            found = [accountant.spent(events, delta=delta, points=points) for events in parties]
            return max(found, key=lambda party: party.epsilon)

        # Only the largest epsilon matters. Parties are sorted by a quick Renyi bound; once a bound
        # is below the largest epsilon so far, no further party can exceed it.
        bounds = {events: accountant.renyi_bound(events, delta=delta) for events in parties}
        largest = accountant.Spent(0.0)
        for events in sorted(bounds, key=lambda party: -bounds[party]):
            if bounds[events] <= largest.epsilon:
                break
            one = accountant.spent(events, delta=delta, points=points)
            largest = max(largest, one, key=lambda party: party.epsilon)
        return largest

    def would_exceed(self, *entries: LedgerEntry, epsilon: float, delta: float) -> bool:
        """Returns whether `entries` would bring a party above `epsilon`; adds nothing.

        Call this before the data are used.
        """
        return self.add(*entries).epsilon(delta=delta) > epsilon

    def spend(self, *entries: LedgerEntry, epsilon: float, delta: float) -> Ledger:
        """Returns the ledger with `entries` added.

        Raises:
            PrivacyError: if a party would exceed the budget `epsilon` at `delta`. Nothing is added.
        """
        after = self.add(*entries)
        spent = after.epsilon(delta=delta)
        if spent > epsilon:
            what = entries[0].what if entries else "nothing"
            raise PrivacyError(
                (
                    f"{what} would bring epsilon to {spent:.4g}, beyond the budget {epsilon:g} at "
                    f"delta {delta:g}"
                ),
                place="ledger",
                cure="stop here, or start with fewer steps or more noise",
            )
        return after

    def to_json(self) -> str:
        """Returns the ledger as JSON text, from which epsilon can be recomputed."""
        content = {
            "version": VERSION,
            "unit": self.unit,
            "neighbours": "add or remove one",
            "mechanism": (
                "noise on the sum of a Poisson sample: Gaussian, or Skellam where variance is "
                "above 0"
            ),
            # "charges" is the key of the entries in version 1. It is kept, so that one reader works
            # for both versions.
            "charges": [asdict(entry) for entry in self.entries],
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Reads a ledger from the JSON text that `to_json` returns.

        Raises:
            PrivacyError: if the text is not a ledger, or is one of an unknown version. A run must
                not continue without its ledger, because the spent privacy would be lost.
        """
        try:
            content = json.loads(text)
            if content["version"] not in READABLE_VERSIONS:
                raise PrivacyError(
                    f"got version {content['version']}, expected one of {READABLE_VERSIONS}",
                    place="ledger",
                    cure="read it with the fedpress version that wrote it",
                )
            entries = tuple(LedgerEntry(**fields) for fields in content["charges"])
            return cls(content["unit"], entries)
        except (ValueError, KeyError, TypeError, RecursionError, RecipeError) as error:
            raise PrivacyError(
                f"not a ledger ({error!r})",
                place="ledger",
                cure="restore ledger.json, or start a new run",
            ) from error


def _without_steps(entry: LedgerEntry) -> LedgerEntry:
    return replace(entry, steps=0, first_round=0, last_round=0)


def _undominated(parties: set[tuple[MechanismEvent, ...]]) -> list[tuple[MechanismEvent, ...]]:
    """Drops each party that spends at most as much as another party.

    Often a single party remains, so only one epsilon must be computed.
    """
    kept = []
    for party in parties:
        if not any(other != party and _covers(other, party) for other in parties):
            kept.append(party)
    return kept


def _covers(more: tuple[MechanismEvent, ...], less: tuple[MechanismEvent, ...]) -> bool:
    """Returns whether each event of `less` has a partner in `more` that spends at least as much.

    No two events of `less` share a partner.
    """
    more_gaussian = gaussians(more)
    less_gaussian = gaussians(less)
    more_skellam = skellams(more)
    less_skellam = skellams(less)
    if len(less_gaussian) > len(more_gaussian) or len(less_skellam) > len(more_skellam):
        return False
    # Merged events are sorted, so equal positions are compared. Other pairings are not tried: if
    # another pairing would fit, the only cost is that one more epsilon is computed.
    return all(a.covers(b) for a, b in zip(more_gaussian, less_gaussian, strict=False)) and all(
        a.covers(b) for a, b in zip(more_skellam, less_skellam, strict=False)
    )
