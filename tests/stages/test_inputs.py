"""What an export or a pack of tabular data leaves says how to feed the file."""

import csv
import json
import random

import numpy as np
import pytest
import torch

from fedpress import deploy, storage
from fedpress.data import Preparation, prepare
from fedpress.errors import RunError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import load_data
from tests.harness import finish

RECIPE = """
name = "tabular"
[data]
source = "csv"
path = "{path}"
client_column = "site"
label_column = "y"
public_clients = ["s0"]
test_clients = ["s3"]
missing = "mean"
unknown = "other"
validation = 0
[model]
architecture = "mlp"
arguments = {{ in_features = 5, hidden = [8], num_classes = 3 }}
[[stage]]
kind = "train"
epochs = 1
lr = 0.1
[[stage]]
kind = "export"
[[stage]]
kind = "pack"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("tabular")
    chance = random.Random(0)
    with open(place / "t.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["age", "job", "site", "y"])
        for i in range(120):
            age = "" if i % 7 == 0 else round(chance.uniform(20, 80), 2)
            job = (
                "diver" if i % 4 == 3 and i % 3 == 0 else chance.choice(["cook", "nurse", "smith"])
            )
            lines.writerow([age, job, f"s{i % 4}", chance.choice(["ill", "well"])])
    text = RECIPE.format(path=(place / "t.csv").as_posix())
    finish(text, place / "run")
    return place, text, place / "run"


def test_raw_rows_give_the_outputs_of_the_run_in_its_files(made):
    place, text, run = made
    with open(place / "t.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["site"] == "s3"]
    x = prepare(rows, Preparation.read(run / "artifacts" / "preparation.json"))
    data = load_data(recipes.load(text))
    _, model = storage.load(run)
    with torch.no_grad():
        wanted = model.eval()(data.preprocess(data.test.x))
    np.testing.assert_allclose(
        deploy.open_file(run / "artifacts" / "model.onnx")(x), wanted, atol=1e-5
    )
    _, packed = storage.load(run / "artifacts" / "model.packed.safetensors")
    with torch.no_grad():
        assert torch.equal(packed.eval()(x), wanted)


def test_another_run_takes_it_over_and_damage_is_noticed(made, tmp_path):
    _, text, run = made
    other = tmp_path / "other"
    finish(text, other, reuse=run)
    path = other / "artifacts" / "preparation.json"
    assert path.read_bytes() == (run / "artifacts" / "preparation.json").read_bytes()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mean": [0.0] * 5}))
    with pytest.raises(
        RunError, match=r"preparation\.json.*delete the result\.json of the stage that wrote it"
    ):
        finish(text, other, resume=True)
