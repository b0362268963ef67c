"""Default of credit-card clients (UCI), as customers of six banks or of sixty branches."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

LABEL = "default.payment.next.month"
MONEY = (
    "LIMIT_BAL",
    *(f"{kind}{month}" for kind in ("BILL_AMT", "PAY_AMT") for month in range(1, 7)),
)
DELAYS = ("PAY_0", "PAY_2", "PAY_3", "PAY_4", "PAY_5", "PAY_6")
SCHOOLS = ("graduate", "university", "school")
"""What EDUCATION 1, 2 and 3 stand for; all other codes count as school."""
BRANCHES = 10
"""Branches of a bank; they share its customers as cards are dealt."""
OLD = 35
"""Banks also differ in the age of their customers: below, or from here on."""


def banks(path: Path | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns bank -> (inputs [n, 22], "default" or "paid" [n]).

    A bank's customers have one level of education and are young or old, so banks differ.

    Args:
        path: the folder with `UCI_Credit_Card.csv`.
    """
    folder = Path("credit_default") if path is None else path
    with open(folder / "UCI_Credit_Card.csv", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, tuple[list[list[float]], list[str]]] = {}
    for row in rows:
        school = SCHOOLS[min(max(int(row["EDUCATION"]), 1), 3) - 1]
        age = "old" if int(row["AGE"]) >= OLD else "young"
        inputs, labels = found.setdefault(f"{school} {age}", ([], []))
        inputs.append(_inputs(row))
        labels.append("default" if row[LABEL] == "1" else "paid")
    return {bank: (np.array(x, np.float32), np.array(y)) for bank, (x, y) in sorted(found.items())}


def branches(path: Path | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns branch -> (inputs [n, 22], "default" or "paid" [n]): each bank has ten branches.

    Args:
        path: the folder with `UCI_Credit_Card.csv`.
    """
    return {
        f"{bank} {branch}": (x[branch - 1 :: BRANCHES], y[branch - 1 :: BRANCHES])
        for bank, (x, y) in banks(path).items()
        for branch in range(1, BRANCHES + 1)
    }


def _inputs(row: dict[str, str]) -> list[float]:
    """Returns the inputs of a customer, scaled by what everybody knows of such numbers."""
    # The logarithm, since amounts span five orders of magnitude; they may be negative.
    money = [np.sign(v) * np.log10(1 + abs(v)) / 4 for v in (float(row[name]) for name in MONEY)]
    delays = [float(row[name]) / 2 for name in DELAYS]
    person = [
        float(row["SEX"]) - 1.5,
        float(row["MARRIAGE"] == "1") - 0.5,
        float(row["AGE"]) / 20 - 2,
    ]
    return [*money, *delays, *person]
