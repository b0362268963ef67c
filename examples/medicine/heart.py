"""Heart disease in four hospitals (UCI), as clients of a federation."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
NUMBERS = ("age", "trestbps", "chol", "thalach", "oldpeak", "ca")
"""Columns that are numbers. Cholesterol and blood pressure of 0 stand for "not measured"."""
WORDS = {"sex": "01", "cp": "1234", "fbs": "01", "restecg": "012", "exang": "01", "slope": "123"}
"""Columns of categories -> their codes; a missing value is none of them."""
TYPICAL = (54.0, 130.0, 245.0, 140.0, 0.8, 0.0)
"""What stands for a missing number, a typical value from the textbook: it depends on no patient."""
SPREAD = (9.0, 18.0, 55.0, 25.0, 1.1, 0.9)
"""By how much the numbers vary, for the same reason from the textbook."""


def hospitals(path: Path | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns hospital -> (inputs [n, 27], "ill" or "healthy" [n]).

    Args:
        path: the folder with the four files `processed.HOSPITAL.data`.
    """
    folder = Path("heart_disease") if path is None else path
    clients = {}
    for hospital in HOSPITALS:
        with open(folder / f"processed.{hospital}.data", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        x = np.array([_inputs(row) for row in rows], np.float32)
        y = np.where([row["target"] != "0" for row in rows], "ill", "healthy")
        clients[hospital] = (x, y)
    return clients


def _inputs(row: dict[str, str]) -> list[float]:
    """Returns the inputs of a patient: each number and whether it is missing, each category."""
    values: list[float] = []
    for name, typical, spread in zip(NUMBERS, TYPICAL, SPREAD, strict=True):
        missing = row[name] == "?" or (name in ("trestbps", "chol") and float(row[name]) == 0)
        values.append(0.0 if missing else (float(row[name]) - typical) / spread)
        values.append(float(missing))
    for name, codes in WORDS.items():
        code = row[name].removesuffix(".0")
        values += [float(code == each) for each in codes]
    return values
