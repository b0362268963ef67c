"""`predict` on raw data from files of ExecuTorch, LiteRT and OpenVINO: the metadata say how."""

import csv
import math
import random

import pytest
import torch

import fedpress
from fedpress import deploy
from fedpress.deploy import FORMATS
from tests.harness import finish

pytestmark = pytest.mark.recipe

FORMAT = [
    pytest.param(
        name, marks=pytest.mark.skipif(row.missing() is not None, reason=f"no {row.runtime}")
    )
    for name, row in FORMATS.items()
]
ROWS = """
name = "rows"
[data]
source = "csv"
path = "{path}"
client_column = "site"
label_column = "ill"
public_clients = ["s0"]
test_clients = ["s2"]
missing = "mean"
[model]
architecture = "mlp"
arguments = {{ hidden = [8] }}
[[stage]]
kind = "train"
epochs = 2
"""
WINDOWS = """
name = "windows"
[data]
source = "csv"
path = "{path}"
client_column = "site"
label_column = "load"
public_clients = ["s0"]
test_clients = ["s2"]
validation = 0
[data.series]
window = 4
order_column = "t"
horizon = [1, 3]
lags = [2]
[model]
architecture = "mlp"
arguments = {{ hidden = [8] }}
[[stage]]
kind = "train"
epochs = 2
"""


def write(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A run on rows with gaps and words."""
    place, chance = tmp_path_factory.mktemp("rows"), random.Random(0)
    found = []
    for at in range(90):
        age = chance.uniform(20, 80)
        row = {"age": f"{age:.2f}" if at % 7 else "", "job": chance.choice(["cook", "nurse"])}
        found.append({**row, "site": f"s{at % 3}", "ill": age > 50})
    write(place / "t.csv", found)
    finish(ROWS.format(path=(place / "t.csv").as_posix()), place / "run")
    return place / "run", place / "t.csv"


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """A run on a forecast."""
    place = tmp_path_factory.mktemp("windows")
    found = []
    for site in ("s0", "s1", "s2"):
        found += [{"site": site, "t": t, "load": f"{math.sin(t / 3):.4f}"} for t in range(60)]
    write(place / "t.csv", found)
    finish(WINDOWS.format(path=(place / "t.csv").as_posix()), place / "run")
    return place / "run", place / "t.csv"


@pytest.mark.parametrize("which", ["rows", "windows"])
@pytest.mark.parametrize("format", FORMAT)
def test_raw_rows_are_predicted_as_by_the_network(which, format, request, tmp_path):
    run, table = request.getfixturevalue(which)
    fedpress.export(run, format=format, out=tmp_path / "out")
    # Nothing lies beside it: the file itself says how raw rows become its inputs.
    alone = tmp_path / "alone"
    alone.mkdir()
    suffix = FORMATS[format].suffix
    for one in (tmp_path / "out" / "artifacts").iterdir():
        if one.suffix in (suffix, ".bin"):
            (alone / one.name).write_bytes(one.read_bytes())
    file = alone / f"model{suffix}"
    assert "preparation" in deploy.file_metadata(file)
    found = fedpress.predict(file, table)
    wanted = fedpress.predict(run, table)
    torch.testing.assert_close(found.outputs, wanted.outputs, atol=1e-4, rtol=0)
    assert found.table()[0] == wanted.table()[0]
    assert len(found.table()[1]) == len(wanted.table()[1])
