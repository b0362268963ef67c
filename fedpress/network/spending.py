"""What the answers about one owner's data have spent together, whatever unit each run protects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedpress.privacy.accounting.events import GaussianEvent, MechanismEvent
from fedpress.privacy.ledger import Ledger, LedgerEntry

Unit = Literal["sample", "client"]
OWNER = "owner"
"""Party of all entries, in place of the client's name: all of them are about the same data."""


@dataclass(frozen=True)
class Charge:
    """One entry, and the unit that its run protects.

    Attributes:
        unit: "sample" or "client"; a run without privacy has either.
        entry: the mechanism.
    """

    unit: Unit
    entry: LedgerEntry


def spent(charges: Sequence[Charge], *, unit: Unit, delta: float) -> float:
    """Returns an upper bound on the epsilon of all `charges` together, for neighbours by `unit`.

    Runs that protect whole clients also protect single rows, but less than their epsilon seems to
    say. A run's epsilon compares a client's data with no data. To another row in them, there are
    two such steps: from the data to none, and from none to the other data. So a row moves a clipped
    vector by up to twice the clip norm. Two bounds follow, and the smaller one holds:

    - Half the noise multiplier, without a gain from drawing clients by chance, composed with the
      runs that protect rows.
    - Group privacy: (e, d) for clients is (2 e, (1 + exp e) d) for rows (Dwork & Roth 2014, 2.3).

    A run that protects rows promises nothing finite about a whole client.

    Args:
        charges: of all runs on the same data.
        unit: what neighbours differ in: one row ("sample") or one client's data ("client").
        delta: probability with which the guarantee may fail.

    >>> entry = LedgerEntry("owner", "federate", 1.0, 4.0, 10)
    >>> round(spent([Charge("sample", entry)], unit="sample", delta=1e-5), 2)
    3.34
    >>> round(spent([Charge("client", entry)], unit="sample", delta=1e-5), 2)
    7.51
    >>> spent([Charge("sample", entry)], unit="client", delta=1e-5)
    inf
    """
    own = [one.entry for one in charges if one.unit == "sample"]
    of_clients = [one.entry for one in charges if one.unit == "client"]
    if any(one.entry.event.noise_multiplier == 0 for one in charges):
        return math.inf
    if unit == "client":
        return math.inf if own else _epsilon(of_clients, delta)
    if not of_clients:
        return _epsilon(own, delta)
    joint = _epsilon([*own, *(_for_rows(entry) for entry in of_clients)], delta)
    if all(entry.sampling_prob == 1 for entry in of_clients):
        return joint
    if not own:
        return min(joint, _as_group(of_clients, delta))
    # The two parts are composed by adding up: each gets half of delta.
    apart = _epsilon(own, delta / 2) + _as_group(of_clients, delta / 2)
    return min(joint, apart)


def _epsilon(entries: Sequence[LedgerEntry], delta: float) -> float:
    # Either unit would do here: a ledger composes its entries in the same way for both.
    named = [replace(entry, who=OWNER) for entry in entries]
    return Ledger("sample").add(*named).epsilon(delta=delta) if named else 0.0


def _for_rows(entry: LedgerEntry) -> LedgerEntry:
    """Returns the entry of a client-unit mechanism for neighbours that differ in one row."""
    event = entry.event
    changed: MechanismEvent
    if isinstance(event, GaussianEvent):
        changed = GaussianEvent(1.0, event.noise_multiplier / 2, event.steps)
    else:
        # If a row differs, so do the client's vectors; either may be longer than its bound.
        failure = min(2 * event.failure, 1 - 1e-9)
        changed = replace(
            event, l2=2 * event.l2, l1=2 * event.l1, sampling_prob=1.0, failure=failure
        )
    return LedgerEntry.of(entry.who, entry.what, changed, entry.first_round, entry.last_round)


def _as_group(entries: Sequence[LedgerEntry], delta: float) -> float:
    """Returns 2 e such that (e, delta / (1 + exp e)) holds for clients; inf if none is found."""
    guess = _epsilon(entries, delta)
    for _ in range(20):
        if guess > 300:
            break
        needed = _epsilon(entries, delta / (1 + math.exp(guess)))
        if needed <= guess:
            return 2 * guess
        guess = 1.01 * needed
    return math.inf
