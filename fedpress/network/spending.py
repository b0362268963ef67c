"""Total epsilon of all answers about one owner's data, over runs that protect different units.

The unit of a run is what its differential privacy protects: one row or one client's whole data.
"""

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
    """Privacy cost of some answers: one ledger entry, and the unit that the run protects.

    Attributes:
        unit: "sample" (one row) or "client" (all rows of this client). For a run without privacy
            the unit does not matter: its noise is 0, so its epsilon is infinite.
        entry: the noise mechanism, its number of steps and its sampling probability.
    """

    unit: Unit
    entry: LedgerEntry


def spent(charges: Sequence[Charge], *, unit: Unit, delta: float) -> float:
    """Returns an upper bound on the epsilon of all `charges` together.

    A run with unit "client" also protects single rows, but with a larger epsilon. Its own epsilon
    compares a client's data with no data at all. To exchange one row takes two such steps: from the
    client's data to no data, and from no data to the data with the other row. So one exchanged row
    moves a clipped update by up to twice the clip norm. This gives two bounds for rows, and the
    function returns the smaller one:

    - Count the run with half its noise multiplier and without amplification by client sampling,
      and compose it with the runs of unit "sample".
    - Group privacy: (e, d) for clients gives (2 e, (1 + exp e) d) for rows (Dwork & Roth 2014,
      2.3).

    A run with unit "sample" gives no finite epsilon for a whole client.

    Args:
        charges: charges of all runs on the same data.
        unit: how neighbouring data sets differ: in one row ("sample"), or in all data of one client
            ("client").
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
    # A run without noise has no finite epsilon, whatever its unit is.
    if any(one.entry.event.noise_multiplier == 0 for one in charges):
        return math.inf
    if unit == "client":
        return math.inf if own else _epsilon(of_clients, delta)
    if not of_clients:
        return _epsilon(own, delta)
    joint = _epsilon([*own, *(_for_rows(entry) for entry in of_clients)], delta)
    # Without client sampling no amplification is lost in `joint`, so group privacy is not tried.
    if all(entry.sampling_prob == 1 for entry in of_clients):
        return joint
    if not own:
        return min(joint, _as_group(of_clients, delta))
    # Basic composition: epsilons and deltas add up, so each part gets half of delta.
    apart = _epsilon(own, delta / 2) + _as_group(of_clients, delta / 2)
    return min(joint, apart)


def _epsilon(entries: Sequence[LedgerEntry], delta: float) -> float:
    # The unit given to `Ledger` makes no difference: both units compose in the same way.
    named = [replace(entry, who=OWNER) for entry in entries]
    return Ledger("sample").add(*named).epsilon(delta=delta) if named else 0.0


def _for_rows(entry: LedgerEntry) -> LedgerEntry:
    """Returns the entry of a run with unit "client", converted to neighbours that differ in a row.

    The sensitivity doubles, and amplification by client sampling is not used.
    """
    event = entry.event
    changed: MechanismEvent
    if isinstance(event, GaussianEvent):
        # Twice the sensitivity with the same noise is half the noise multiplier.
        changed = GaussianEvent(1.0, event.noise_multiplier / 2, event.steps)
    else:
        # Two vectors are compared, one for each data set, and each may exceed its norm bound with
        # probability `failure`. An event requires failure < 1.
        failure = min(2 * event.failure, 1 - 1e-9)
        changed = replace(
            event, l2=2 * event.l2, l1=2 * event.l1, sampling_prob=1.0, failure=failure
        )
    return LedgerEntry.of(entry.who, entry.what, changed, entry.first_round, entry.last_round)


def _as_group(entries: Sequence[LedgerEntry], delta: float) -> float:
    """Returns the epsilon for rows at `delta` by group privacy; inf if none is found.

    It is 2 e for an e such that (e, delta / (1 + exp e)) holds for clients.
    """
    # A larger e needs a smaller delta, which needs a larger e again: a fixed point is searched.
    guess = _epsilon(entries, delta)
    for _ in range(20):
        # Such an epsilon protects nothing, and exp(710) would overflow.
        if guess > 300:
            break
        needed = _epsilon(entries, delta / (1 + math.exp(guess)))
        if needed <= guess:
            return 2 * guess
        # A little more than needed, so that the search ends instead of coming ever closer.
        guess = 1.01 * needed
    return math.inf
