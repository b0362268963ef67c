"""`predict` on raw rows: for a run, a saved model and an exported file, as the training prepared."""

import csv
import json
import random
import shutil

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

import fedpress
from fedpress import deploy, storage
from fedpress.data import Preparation
from fedpress.errors import FedpressError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import load_data
from tests.harness import finish

JOBS = ["cook", "nurse", "smith"]
RECIPE = """
name = "visits"
[data]
source = "csv"
path = "{path}"
client_column = "site"
label_column = "{label}"
public_clients = ["s0"]
test_clients = ["s3"]
missing = "mean"
{more}
[model]
architecture = "mlp"
arguments = {{ hidden = [8] }}
[[stage]]
kind = "train"
epochs = 3
lr = 0.05
[[stage]]
kind = "export"
[[stage]]
kind = "pack"
"""


def write(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)


def made(place, label, more=""):
    """Runs a recipe on 160 rows with gaps, and returns the rows of site s3, as text."""
    chance = random.Random(0)
    rows = []
    for at in range(160):
        age = chance.uniform(20, 80)
        row = {
            "age": "" if at % 7 == 0 else f"{age:.2f}",
            "job": chance.choice(JOBS),
            "insured": chance.choice(["true", "false"]),
            "site": f"s{at % 4}",
            "ill": "ill" if age > 50 else "well",
            "cost": f"{3 * age + chance.gauss(0, 1):.3f}",
        }
        rows.append(row)
    write(place / "t.csv", rows)
    text = RECIPE.format(path=(place / "t.csv").as_posix(), label=label, more=more)
    finish(text, place / "run")
    return place / "run", [row for row in rows if row["site"] == "s3"]


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    return made(tmp_path_factory.mktemp("sick"), "ill", 'drop_columns = ["cost"]')


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    return made(
        tmp_path_factory.mktemp("costs"), "cost", 'drop_columns = ["ill"]\ntask = "regression"'
    )


def outputs_of_training(run):
    """The oracle: the outputs for the test rows as the training prepared them."""
    data = load_data(recipes.load((run / "recipe.toml").read_text()))
    _, model = storage.load(run)
    with torch.no_grad():
        return data, model.eval()(data.preprocess(data.test.x))


pytestmark = pytest.mark.recipe
MODELS = [".", "stages/0-train", "artifacts/model.onnx", "artifacts/model.packed.safetensors"]


@pytest.mark.parametrize("which", ["sick", "costs"])
@pytest.mark.parametrize("model", MODELS)
def test_raw_rows_give_the_outputs_of_the_arrays_that_training_prepared(
    which, model, request, tmp_path
):
    run, rows = request.getfixturevalue(which)
    data, wanted = outputs_of_training(run)
    # Columns in another order, without the label, with one that the model does not know.
    label = {"sick": "ill", "costs": "cost"}[which]
    turned = [{"note": "x", **dict(reversed(row.items()))} for row in rows]
    for row in turned:
        del row[label]
    write(tmp_path / "new.csv", turned)
    found = fedpress.predict(run / model, tmp_path / "new.csv")
    np.testing.assert_allclose(found.outputs, wanted, atol=1e-5)
    if not model.endswith(".onnx"):
        assert torch.equal(found.outputs, wanted)
    assert torch.equal(found.answers, data.task.answers(found.outputs))
    assert set(found.ignored) == {"note", "site", {"sick": "cost", "costs": "ill"}[which]}
    if which == "sick":
        assert set(found.labels) <= {"ill", "well"}
        assert torch.allclose(found.probabilities.sum(1), torch.ones(len(rows)))
    else:
        # In the units of the table, and not of the standardised targets.
        assert found.answers.mean() > 60


def test_rows_in_memory_and_in_every_kind_of_file_give_the_same(sick, tmp_path):
    run, rows = sick
    write(tmp_path / "new.csv", rows)
    write(tmp_path / "semicolons.csv", rows, delimiter=";")
    table = pyarrow.csv.read_csv(tmp_path / "new.csv")
    pyarrow.parquet.write_table(table, tmp_path / "new.parquet")
    wanted = fedpress.predict(run, tmp_path / "new.csv").outputs
    for given in (
        rows,
        tmp_path / "semicolons.csv",
        tmp_path / "new.parquet",
        table,
    ):
        assert torch.equal(fedpress.predict(run, given).outputs, wanted)
    # A module that was loaded by itself takes raw rows, too.
    assert torch.equal(fedpress.predict(fedpress.load(run), rows).outputs, wanted)
    saved = fedpress.save(run, tmp_path / "saved")
    shutil.copytree(saved, tmp_path / "elsewhere")
    assert torch.equal(fedpress.predict(tmp_path / "elsewhere", rows).outputs, wanted)


def test_a_data_frame_gives_the_same_as_its_file(sick, tmp_path):
    pandas = pytest.importorskip("pandas")
    run, rows = sick
    write(tmp_path / "new.csv", rows)
    wanted = fedpress.predict(run, tmp_path / "new.csv").outputs
    frame = pandas.read_csv(tmp_path / "new.csv")
    for given in (frame, frame.astype({"job": "category"}), frame.convert_dtypes()):
        assert torch.equal(fedpress.predict(run, given).outputs, wanted)


def test_the_command_prints_class_and_probabilities(sick, tmp_path, shell):
    run, rows = sick
    write(tmp_path / "new.csv", rows[:3])
    said = shell("predict", run / "artifacts" / "model.onnx", tmp_path / "new.csv")
    table = list(csv.DictReader(said.out.splitlines()))
    assert list(table[0]) == ["class", "probability of ill", "probability of well"]
    found = fedpress.predict(run, rows[:3])
    assert [row["class"] for row in table] == found.labels
    assert said.err == "note: these columns are not used: site, cost\n"


def test_one_preparation_lies_beside_each_model_and_in_the_exported_file(sick):
    run, _ = sick
    page = json.loads((run / "preparation.json").read_text())
    assert page == json.loads((run / "artifacts" / "preparation.json").read_text())
    spec = json.loads((run / "stages" / "0-train" / "spec.json").read_text())
    assert spec["preparation"] == page
    metadata = deploy.file_metadata(run / "artifacts" / "model.onnx")
    assert json.loads(metadata["preparation"]) == page
    about = Preparation.read(run / "preparation.json")
    assert about.labels == ("ill",)
    assert [column.name for column in about.columns] == ["age", "job", "insured"]
    assert page["version"] == 1


def line(rows, at, **cells):
    """The rows with other cells in one of them."""
    return [row | cells if number == at else row for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"job": "nurze"}, "line 4 of .*: column 'job' has the unknown word 'nurze' .*'nurse'"),
        ({"age": "old"}, "line 4 of .*: column 'age' has the text 'old', expected a number; write"),
        ({"insured": "perhaps"}, "line 4 of .*'perhaps', expected true or false"),
        ({"age": "inf"}, "line 4 of .*: column 'age' is infinite"),
    ],
)
def test_a_cell_that_is_wrong_is_named_by_its_line_and_column(sick, tmp_path, cells, said, shell):
    run, rows = sick
    write(tmp_path / "new.csv", line(rows[:5], 2, **cells))
    with pytest.raises(FedpressError, match=said):
        fedpress.predict(run, tmp_path / "new.csv")
    answer = shell("predict", run, tmp_path / "new.csv")
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    with pytest.raises(FedpressError, match=r"rows\[2\]: column"):
        fedpress.predict(run, line(rows[:5], 2, **cells))


def test_a_line_is_counted_as_an_editor_counts(sick, tmp_path):
    run, _ = sick
    header, *lines = ["age,job,insured,note", '50,cook,true,"two\nlines"', "", "51,cook,true,x"]
    (tmp_path / "new.csv").write_text("\n".join([header, *lines, "old,cook,true,x"]) + "\n")
    with pytest.raises(FedpressError, match="line 6 of"):
        fedpress.predict(run, tmp_path / "new.csv")


def test_an_unknown_word_becomes_zeros_if_asked_and_then_the_flag_of_the_cure_works(
    sick, tmp_path, shell
):
    run, rows = sick
    write(tmp_path / "new.csv", line(rows[:5], 2, job="diver"))
    refused = shell("predict", run, tmp_path / "new.csv")
    assert "give --unknown zeros" in refused.err
    assert shell("predict", run, tmp_path / "new.csv", "--unknown", "zeros").out
    found = fedpress.predict(run, tmp_path / "new.csv", unknown="zeros")
    # The oracle: the linear layers on inputs that are zero for all words, before standardisation.
    about = Preparation.read(run / "preparation.json")
    x = torch.zeros(1, about.width)
    x[0, 0] = float(rows[2]["age"] or about.columns[0].fill[0])
    x[0, -1] = rows[2]["insured"] == "true"
    x = (x - torch.tensor(about.mean)) / torch.tensor(about.std)
    with torch.no_grad():
        wanted = storage.load(run)[1].eval()(x)
    torch.testing.assert_close(found.outputs[2:3], wanted)
    with pytest.raises(FedpressError, match="unknown: got 'none'; give error or zeros"):
        fedpress.predict(run, rows, unknown="none")


def test_a_missing_column_an_empty_table_and_arrays_of_a_table_are_told(sick, tmp_path):
    run, rows = sick
    less = [{name: row[name] for name in ("age", "insured")} | {"jobs": "cook"} for row in rows]
    write(tmp_path / "new.csv", less)
    with pytest.raises(FedpressError, match=r"lacks the column 'job' .*did you mean 'jobs'"):
        fedpress.predict(run, tmp_path / "new.csv")
    (tmp_path / "empty.csv").write_text("age,job,insured\n")
    with pytest.raises(FedpressError, match="there are no rows"):
        fedpress.predict(run, tmp_path / "empty.csv")
    with pytest.raises(FedpressError, match=r"rows\[1\]: there is no column 'age'"):
        fedpress.predict(run, [rows[0], {"job": "cook", "insured": "true"}])
    with pytest.raises(FedpressError, match="Linear does not say how raw data"):
        fedpress.predict(torch.nn.Linear(3, 2), rows)


def test_a_model_of_an_older_run_finds_the_preparation_beside_it(sick, tmp_path):
    run, rows = sick
    wanted = fedpress.predict(run, rows).outputs
    old = tmp_path / "old"
    shutil.copytree(run, old)
    (old / "preparation.json").unlink()
    page = json.loads((old / "artifacts" / "preparation.json").read_text())
    for key in ("version", "delimiter", "encoding", "labels", "task"):
        del page[key]
    (old / "artifacts" / "preparation.json").unlink()
    (old / "artifacts" / "inputs.json").write_text(json.dumps(page))
    for path in (old / "stages").glob("*/spec.json"):
        spec = json.loads(path.read_text())
        del spec["preparation"]
        path.write_text(json.dumps(spec))
    (old / "checksums").unlink()
    assert torch.equal(fedpress.predict(old, rows).outputs, wanted)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 3}, "version 3 of the preparation, this fedpress reads up to 2; install"),
        ({"windows": {"length": 3}}, "a step 'windows' that this fedpress does not know"),
    ],
)
def test_a_preparation_of_a_newer_version_is_refused(sick, tmp_path, change, said):
    run, _ = sick
    page = json.loads((run / "preparation.json").read_text())
    (tmp_path / "new.json").write_text(json.dumps(page | change))
    with pytest.raises(FedpressError, match=said):
        Preparation.read(tmp_path / "new.json")
