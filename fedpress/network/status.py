"""The owner's status table: what servers asked about the owner's data, and the epsilon spent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedpress.network.ledger import CHECK, OwnerLedger
from fedpress.network.policy import Policy, PrivacyRules
from fedpress.network.spending import spent


@dataclass(frozen=True)
class Refused:
    """All refusals by one rule of the policy.

    Attributes:
        rule: key of the policy, such as `privacy.max_epsilon`.
        reason: the reason of the latest refusal.
        times: how often it was refused. The ledger stores the same refusal in one session once,
            however often the server asks.
        last: date and time of the latest refusal, such as "2026-11-30 21:04 UTC".
    """

    rule: str
    reason: str
    times: int
    last: str

    def __str__(self) -> str:
        often = f"{self.times} times, last " if self.times > 1 else ""
        return f"{self.rule}: {self.reason} ({often}{self.last})"


@dataclass(frozen=True)
class StatusRow:
    """A row of the owner's status table: what one server asked with one recipe about some data.

    The last row of each data set contains the totals.

    Attributes:
        data: path of the data; the latest path if they were moved.
        recipe: fingerprint of the recipe's terms; "total" in the row of totals; empty for an offer
            that was refused before it was read.
        stage: name of the stage.
        server: first 12 digits of the fingerprint of the server's certificate; empty without TLS.
        approved: whether the owner has approved the recipe.
        asked: number of sessions in which the server offered the stage.
        answered: number of answered rounds.
        refused: the refusals, one entry for each rule; the rule that refused last comes last.
        epsilon: epsilon that this recipe has spent on these data, through all servers together.
    """

    data: str
    recipe: str
    stage: str
    server: str
    approved: bool
    asked: int
    answered: int
    refused: tuple[Refused, ...]
    epsilon: float


HEADINGS = ("data", "recipe", "stage", "server", "approved", "asked", "answered", "epsilon")
"""Headings of the status table. Refusals are no column: they are listed below the table."""
TOTAL = "total"
"""Value of `StatusRow.recipe` in a row of totals."""


def status(ledger: OwnerLedger, policy: Policy) -> list[StatusRow]:
    """Returns the rows of the status table for all data of a ledger.

    Args:
        ledger: the owner's ledger.
        policy: its unit and delta are used to compute epsilon. If it has no rules of privacy, the
            defaults are used: one row, at delta 1e-5.
    """
    found: list[StatusRow] = []
    seen: set[int] = set()
    for row in ledger.rows("data"):
        # Copies and changed files share one budget, so they are one data set here.
        if row["id"] not in seen:
            seen |= ledger.same_data(row["id"])
            found += _status_of_data(ledger, policy.privacy or PrivacyRules(), row["id"])
    return found


def _status_of_data(ledger: OwnerLedger, rules: PrivacyRules, data: int) -> list[StatusRow]:
    """Returns the rows of one data set, and its row of totals."""
    same = ledger.same_data(data)
    place = [row["path"] for row in ledger.rows("data") if row["id"] in same][-1]
    decisions = [row for row in ledger.rows("decisions") if row["data"] in same]
    rounds = [row for row in ledger.rows("rounds") if row["data"] in same]
    # By recipe and server: the same recipe may come from two servers.
    found: dict[tuple[str, str], StatusRow] = {}
    sessions: dict[tuple[str, str], set[str]] = {}
    for row in [*decisions, *rounds]:
        recipe = row["recipe"]
        key = (recipe, row["server"])
        if key not in found:
            charges = ledger.charges(data, recipe=recipe)
            found[key] = StatusRow(
                place,
                recipe,
                row["stage"],
                row["server"][:12],
                ledger.approved(recipe),
                asked=0,
                answered=0,
                refused=(),
                epsilon=spent(charges, unit=rules.unit, delta=rules.delta),
            )
        one = found[key]
        # A trial is not counted: before a run a server only checks whether it would be accepted.
        if not row.get("kind", "").startswith(CHECK):
            sessions.setdefault(key, set()).add(row["session"])
        # Round 0 stands for evaluations.
        if row.get("round"):
            found[key] = replace(one, answered=one.answered + 1)
        elif row.get("rule"):
            found[key] = replace(one, refused=_with_refusal(one.refused, row))
    rows = [replace(one, asked=len(sessions.get(key, ()))) for key, one in found.items()]
    total = spent(ledger.charges(data), unit=rules.unit, delta=rules.delta)
    answered = sum(row.answered for row in rows)
    asked = sum(row.asked for row in rows)
    return [*rows, StatusRow(place, TOTAL, "", "", False, asked, answered, (), total)]


def _with_refusal(before: tuple[Refused, ...], row: dict[str, Any]) -> tuple[Refused, ...]:
    """Returns the refusals `before` and that of a row of the ledger's table "decisions"."""
    # Counted by rule: the reasons of one rule may differ in a number, such as an epsilon.
    times = 1 + sum(one.times for one in before if one.rule == row["rule"])
    last = datetime.fromtimestamp(row["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    others = [one for one in before if one.rule != row["rule"]]
    return (*others, Refused(row["rule"], row["reason"], times, last))


def table(rows: Iterable[StatusRow]) -> list[str]:
    """Returns the lines of a text table: headings, the rows, and below them the refusals."""
    cells = [list(HEADINGS)]
    refused = []
    for row in rows:
        approved = "" if row.recipe == TOTAL else ("yes" if row.approved else "no")
        recipe = row.recipe or "(not read)"
        name = Path(row.data).name
        numbers = [str(row.asked), str(row.answered), f"{row.epsilon:.3g}"]
        cells.append([name, recipe, row.stage, row.server, approved, *numbers])
        refused += [f"refused {recipe} on {name}: {one}" for one in row.refused]
    widths = [max(len(line[at]) for line in cells) for at in range(len(HEADINGS))]
    lines = []
    for line in cells:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return [*lines, *refused]
