"""A table of hospitals for tests of private statistics, and the recipe that reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

FIRST = """
[[stage]]
kind = "statistics"
bounds = { age = [0, 110], income = [0, 200000] }
words = { job = 2 }
privacy = { unit = "sample", epsilon = 2.0, delta = 1e-3 }
"""
TRAINING = """
[[stage]]
kind = "federate"
num_rounds = 2
batch_size = 40
privacy = { unit = "sample", epsilon = 6.0, delta = 1e-3 }
"""


def lines_of(clients: int = 3, n: int = 120, seed: int = 0) -> dict[str, list[str]]:
    """Returns the lines of a CSV file for each client; every 20th age is missing."""
    chance = np.random.default_rng(seed)
    found = {}
    for at in range(clients):
        age = chance.normal(45 + 5 * at, 10, n).clip(18, 99)
        income = chance.normal(45_000, 9_000, n).clip(0)
        job = chance.choice(["cook", "nurse", "clerk"], n, p=[0.6, 0.3, 0.1])
        ill = (age - 50) / 10 + (income - 45_000) / 9_000 + chance.normal(size=n) > 0
        lines = ["age,income,job,outcome"]
        for i in range(n):
            years = "" if i % 20 == 0 else f"{age[i]:.1f}"
            lines.append(f"{years},{income[i]:.0f},{job[i]},{'ill' if ill[i] else 'healthy'}")
        found[f"c{at}"] = lines
    return found


def written(folder: Path, **how: int) -> str:
    """Writes the files, and returns the tables [data] and [model] of a recipe for them."""
    folder.mkdir()
    for name, lines in lines_of(**how).items():
        (folder / f"{name}.csv").write_text("\n".join(lines))
    return f"""
name = "hospitals"
[data]
source = "csv"
path = "{folder}/*.csv"
client_column = "file"
label_column = "outcome"
classes = ["healthy", "ill"]
words = {{ job = ["astronaut", "cook", "nurse", "clerk"] }}
missing = "mean"
statistics = "private"
[model]
architecture = "mlp"
arguments = {{ hidden = [8] }}
"""
