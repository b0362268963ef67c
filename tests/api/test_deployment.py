"""`fedpress client --check RECIPE`: data that a run would take pass, and others are told."""

import csv
import random

import numpy as np
import pytest
from PIL import Image

from fedpress.api.deployment import check_client
from fedpress.errors import FedpressError
from tests.api.test_predict_series import STEPS, steps, write
from tests.stages.statistics import texts

DIGITS = """
name = "checked"
[data]
source = "digits"
[model]
architecture = "mlp"
arguments = { in_features = 64, hidden = [8] }
[[stage]]
kind = "federate"
num_rounds = 1
"""
TABLE = """
name = "checked"
[data]
source = "csv"
path = "server.csv"
client_column = "hospital"
public_clients = ["open"]
test_clients = ["north"]
label_column = "outcome"
classes = ["healthy", "ill"]
[model]
architecture = "mlp"
arguments = { in_features = 2, num_classes = 2 }
[[stage]]
kind = "federate"
num_rounds = 1
"""
IMAGES = """
name = "checked"
[data]
source = "folders"
path = "scans"
[model]
architecture = "cnn"
arguments = { in_channels = 3, image_size = 8, num_classes = 2 }
[[stage]]
kind = "federate"
num_rounds = 1
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and returns its path as text."""

    def write(text):
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return str(path)

    return write


def arrays(path, shape=(1, 8, 8), labels=range(10)):
    y = np.array([*labels] * 3)
    np.savez(path, x=np.zeros((len(y), *shape), dtype=np.uint8), y=y)
    return path


def table(path, columns=("age", "pressure", "outcome")):
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, columns, extrasaction="ignore")
        rows.writeheader()
        for at in range(40):
            outcome = "ill" if at % 2 else "healthy"
            row = {"hospital": "north", "age": 20.5 + at, "pressure": 100.5 + at}
            rows.writerow(row | {"outcome": outcome})
    return path


def test_arrays_that_fit_pass(recipe, tmp_path):
    said = check_client(recipe(DIGITS), arrays(tmp_path / "own.npz"))
    assert said.startswith("30 examples of shape")
    assert said.endswith("they fit checked")


def test_a_table_that_fits_passes_without_the_servers(recipe, tmp_path):
    said = check_client(recipe(TABLE), table(tmp_path / "own.csv"))
    assert said.startswith("40 examples of shape")
    assert "they fit checked" in said
    # The recipe does not say which columns it needs.
    assert said.endswith("compare these with the server's: age, pressure")


def test_the_column_that_names_clients_is_no_feature_of_a_clients_table(recipe, tmp_path):
    for columns in (("age", "pressure", "outcome"), ("hospital", "age", "pressure", "outcome")):
        said = check_client(recipe(TABLE), table(tmp_path / "own.csv", columns))
        assert said.endswith("compare these with the server's: age, pressure")


@pytest.mark.parametrize("named", [True, False])
def test_windows_over_the_rows_of_a_client_are_counted(recipe, tmp_path, named):
    rows = [row for row in steps(random.Random(0)) if row["person"] == "anna"]
    for row in rows:
        if not named:
            del row["person"]
    write(tmp_path / "own.csv", rows)
    text = STEPS.format(path="server.csv").split("[[stage]]")[0]
    said = check_client(recipe(text + '[[stage]]\nkind = "federate"\n'), tmp_path / "own.csv")
    # 60 readings of each of two devices, in windows of 8 with a stride of 5.
    assert said.startswith("22 examples of shape [3, 8], task classification: they fit")


def test_columns_that_the_recipe_names_are_compared(recipe, tmp_path):
    named = recipe(TABLE.replace("\nclasses", '\nfeature_columns = ["age", "pressure"]\nclasses'))
    said = check_client(named, table(tmp_path / "own.csv", ("outcome", "pressure", "age")))
    assert said.endswith("they fit checked")
    path = table(tmp_path / "own.csv")
    path.write_text(path.read_text().replace("age,pressure", "years,blood_pressure"))
    with pytest.raises(FedpressError, match="no column 'age', 'pressure' in") as caught:
        check_client(named, path)
    assert "'pressure': did you mean 'blood_pressure'?" in str(caught.value)


def test_a_folder_of_images_that_fits_passes(recipe, tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "own" / label).mkdir(parents=True)
        for at in range(12):
            pixels = np.full((8, 8, 3), at, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "own" / label / f"{at}.png")
    # What lies beside the folder is not read.
    (tmp_path / "beside" / "x").mkdir(parents=True)
    (tmp_path / "beside" / "x" / "0.png").write_bytes(b"no image")
    said = check_client(recipe(IMAGES), tmp_path / "own")
    assert said.startswith("24 examples of shape")


def test_other_shapes_and_missing_columns_are_told(recipe, tmp_path):
    with pytest.raises(FedpressError) as caught:
        check_client(recipe(DIGITS), arrays(tmp_path / "own.npz", shape=(3, 9)))
    assert caught.value.cure
    with pytest.raises(FedpressError, match="outcome"):
        check_client(recipe(TABLE), table(tmp_path / "own.csv", ("age", "pressure")))
    with pytest.raises(FedpressError, match=r"the server's columns; they have age$"):
        check_client(recipe(TABLE), table(tmp_path / "own.csv", ("age", "outcome")))


def test_a_label_beyond_the_recipes_classes_is_told(recipe, tmp_path):
    text = DIGITS.replace('"digits"\n', '"digits"\nclasses = ["0", "1", "2"]\n')
    with pytest.raises(FedpressError):
        check_client(recipe(text), arrays(tmp_path / "own.npz"))


def test_a_text_that_fits_passes(recipe, tmp_path):
    text = texts.written(tmp_path / "texts") + texts.ASKING
    said = check_client(recipe(text), tmp_path / "texts" / "c0.txt")
    # 3,029 letters and spaces; each but the first is a target in one of the sequences of 10.
    assert said.startswith("303 examples of shape [10], task language: they fit texts")
    assert check_client(recipe(text), tmp_path / "texts").startswith("909 examples")
    with pytest.raises(FedpressError, match=r"c0.txt': the recipe's data are no text; give"):
        check_client(recipe(DIGITS), tmp_path / "texts" / "c0.txt")
