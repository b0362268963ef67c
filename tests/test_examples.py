"""The examples of fields run in a quick form, on made files in the layout of the real ones."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMAND = [sys.executable, "-m", "fedpress"]


def write_table(path: Path, columns: dict[str, list[object]]) -> None:
    """Writes a CSV file with a byte order mark, as the real files have it."""
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(zip(*columns.values(), strict=True))


def hospitals(folder: Path) -> None:
    """Writes four hospitals whose ill patients have more pain, with missing values."""
    chance = np.random.default_rng(0)
    for hospital in ("cleveland", "hungarian", "switzerland", "va"):
        n = 80
        ill = chance.integers(0, 5, n)
        columns = {
            "age": (50 + 3 * ill + chance.integers(-9, 9, n)).tolist(),
            "sex": chance.integers(0, 2, n).tolist(),
            "cp": np.where(ill > 0, 4, chance.integers(1, 4, n)).tolist(),
            "trestbps": chance.integers(110, 160, n).tolist(),
            "chol": chance.integers(0, 300, n).tolist(),
            "fbs": chance.integers(0, 2, n).tolist(),
            "restecg": chance.integers(0, 3, n).tolist(),
            "thalach": chance.integers(90, 190, n).tolist(),
            "exang": chance.integers(0, 2, n).tolist(),
            "oldpeak": chance.random(n).round(1).tolist(),
            "slope": ["?"] * n,
            "ca": ["?" if at % 3 else 0 for at in range(n)],
            "thal": ["?"] * n,
            "target": ill.tolist(),
        }
        write_table(folder / f"processed.{hospital}.data", columns)


def banks(folder: Path, n: int = 900) -> None:
    """Writes customers of whom those with delays default."""
    chance = np.random.default_rng(1)
    delay = chance.integers(-2, 4, n)
    columns: dict[str, list[object]] = {
        "ID": list(range(n)),
        "LIMIT_BAL": (10_000 * chance.integers(1, 50, n)).tolist(),
        "SEX": chance.integers(1, 3, n).tolist(),
        "EDUCATION": chance.integers(0, 7, n).tolist(),
        "MARRIAGE": chance.integers(0, 4, n).tolist(),
        "AGE": chance.integers(21, 70, n).tolist(),
    }
    for month in (0, 2, 3, 4, 5, 6):
        columns[f"PAY_{month}"] = delay.tolist()
    for kind in ("BILL_AMT", "PAY_AMT"):
        for month in range(1, 7):
            columns[f"{kind}{month}"] = chance.integers(-100, 90_000, n).tolist()
    columns["default.payment.next.month"] = (
        ((delay > 1) | (chance.random(n) < 0.1)).astype(int).tolist()
    )
    write_table(folder / "UCI_Credit_Card.csv", columns)


def branches(folder: Path) -> None:
    """Writes enough customers for sixty branches."""
    banks(folder, 4000)


def people(folder: Path) -> None:
    """Writes recordings in which each activity shakes at a speed of its own."""
    chance = np.random.default_rng(2)
    labels = ("SEATED", "SITTING_DOWN", "STANDING_UP", "TURNING", "WALKING")
    names = ("x_acc", "y_acc", "z_acc", "x_gyro", "y_gyro", "z_gyro")
    parts = []
    for number in range(1, 21):
        for execution in range(10):
            n, at = 320, execution % 5
            wave = np.sin(np.arange(n) * (at + 1) / 8)[:, None] * np.ones(6)
            signal = 5 * wave + chance.normal(size=(n, 6))
            columns = {name: signal[:, i].astype(np.float32) for i, name in enumerate(names)}
            about = {"subject": f"s{number:02}", "device": "smartphone", "label": labels[at]}
            columns |= {
                name: pa.array([text] * n).dictionary_encode() for name, text in about.items()
            }
            # 20 seconds between two recordings; two samples arrive at once.
            times = 20_000 * execution + 20 * (np.arange(n) // 2)
            parts.append(pa.table({**columns, "timestamp": times}))
    parquet.write_table(pa.concat_tables(parts).unify_dictionaries(), folder / "har.parquet")


def stations(folder: Path) -> None:
    """Writes ten months of dust at twelve stations: a daily wave and a slow drift, with gaps."""
    chance = np.random.default_rng(3)
    parts = []
    for number in range(12):
        n = 24 * 300
        hour = np.arange(n)
        dust = 60 + 30 * np.sin(hour * 2 * np.pi / 24 + number) + chance.normal(size=n).cumsum()
        days = hour // 24
        parts.append(
            pa.table(
                {
                    "year": np.full(n, 2013),
                    "month": 1 + days // 28,
                    "day": 1 + days % 28,
                    "hour": hour % 24,
                    "PM2.5": np.where(chance.random(n) < 0.02, np.nan, dust),
                    **{name: chance.normal(size=n) for name in ("TEMP", "PRES", "DEWP", "WSPM")},
                    "station": [f"station {number}"] * n,
                }
            )
        )
    parquet.write_table(pa.concat_tables(parts), folder / "beijing.parquet")


def xrays(folder: Path) -> None:
    """Writes X-rays on which pneumonia is a bright spot; the parts are smaller than the real ones."""
    chance = np.random.default_rng(4)
    arrays = {}
    for part, n in (("train", 300), ("val", 320), ("test", 60)):
        label = chance.integers(0, 2, (n, 1))
        images = chance.integers(0, 120, (n, 28, 28))
        images[:, 8:18, 8:18] += 100 * label[:, :, None]
        arrays[f"{part}_images"] = images.astype(np.uint8)
        arrays[f"{part}_labels"] = label.astype(np.uint8)
    np.savez(folder / "pneumoniamnist.npz", **arrays)


def roles(folder: Path) -> None:
    """Writes a play of the public roles and twelve others, who also say what the public never do."""
    chance = np.random.default_rng(5)
    recipe = tomllib.loads((EXAMPLES / "keyboard" / "roles.toml").read_text("utf-8"))
    public = recipe["data"]["public_clients"]
    words = ["the", "king", "sleeps", "and", "a", "fool", "sings"]
    speeches = []
    for role in [*public, *(f"ROLE {letter}" for letter in "ABCDEFGHIJKL")]:
        said = " ".join(chance.choice(words, 60).tolist())
        speeches.append(f"{role}:\n{said}{'.' if role in public else '!'}\n")
    (folder / "input.txt").write_text("\n".join(speeches), "utf-8")


FIELDS = {
    "medicine/heart": (hospitals, ["stage.federate.num_rounds=2"], 4),
    "medicine/xray": (
        xrays,
        [
            "stage.federate.num_rounds=2",
            "stage.published.epochs=1",
            "stage.repair.epochs=1",
        ],
        5,
    ),
    "finance/credit": (banks, ["stage.federate.num_rounds=2"], 6),
    "finance/new-branches": (
        branches,
        ["stage.federate.num_rounds=2", "stage.federate.batch_size=16", "stage.train.epochs=1"],
        50,
    ),
    "sensors/activity": (people, ["stage.federate.num_rounds=2", "stage.volunteers.epochs=1"], 14),
    "city/air": (stations, ["stage.federate.num_rounds=2"], 12),
    "keyboard/roles": (
        roles,
        [
            "stage.federate.num_rounds=2",
            "stage.federate.cohort=6",
            "stage.public.epochs=1",
            "stage.repair.epochs=1",
            "data.text.length=10",
            "model.arguments.num_classes=18",
        ],
        12,
    ),
}
"""Example -> what makes its data, settings of the quick form, and the number of clients."""
NUMBERS = ("accuracy", "auc", "sensitivity", "mae", "skill", "perplexity")
FILES = {
    "city/air": "beijing.parquet",
    "keyboard/roles": "input.txt",
    "sensors/activity": "har.parquet",
}
"""Example -> the file that `--data` names; the others take a folder."""


@pytest.mark.recipe
@pytest.mark.parametrize("field", FIELDS)
def test_an_example_goes_from_its_files_to_a_file_for_devices(field, tmp_path):
    make, quick, num_clients = FIELDS[field]
    data = tmp_path / "data"
    data.mkdir()
    make(data)
    recipe, out = EXAMPLES / f"{field}.toml", tmp_path / "run"
    ran = subprocess.run(
        [
            *COMMAND,
            "run",
            str(recipe),
            *quick,
            "--data",
            str(data / FILES.get(field, "")),
            "--out",
            str(out),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads((out / "result.json").read_text("utf-8"))
    final = found["final"]
    assert all(np.isfinite(final[key]) for key in NUMBERS if key in final)
    assert (out / "artifacts" / "model.onnx").stat().st_size < 50_000
    federated = next(stage for stage in found["stages"] if stage["kind"] == "federate")
    assert federated["clients"] == num_clients
    assert federated["epsilon"] <= 8.0


def test_every_example_is_tested():
    recipes = {f"{path.parent.name}/{path.stem}" for path in EXAMPLES.glob("*/*.toml")}
    assert recipes == set(FIELDS)
