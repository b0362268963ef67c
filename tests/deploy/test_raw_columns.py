"""ONNX files that take raw columns prepare them as `fedpress.data.prepare` does."""

import csv
import json
import random

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import fedpress
from fedpress import deploy
from fedpress.data import Preparation, prepare
from fedpress.data.preparation import InputColumn
from fedpress.deploy import RawColumns
from fedpress.deploy.artifact import Job
from fedpress.errors import ExportError, FedpressError
from tests.harness import finish

JOBS = ("cook", "nurse", "smith")
RECIPE = """
name = "visits"
[data]
source = "csv"
path = "{path}"
client_column = "site"
label_column = "ill"
public_clients = ["s0"]
test_clients = ["s3"]
missing = "mean"
[model]
architecture = "mlp"
arguments = {{ hidden = [8] }}
[[stage]]
kind = "train"
epochs = 3
[[stage]]
kind = "export"
name = "float"
preparation = "inside"
[[stage]]
kind = "export"
name = "int8"
preparation = "inside"
int8 = true
"""


def about(unknown="zeros", *, fill=True):
    """A preparation with every kind of column; one has the name of an input and one of an output."""
    words = (*JOBS, "other") if unknown == "other" else JOBS
    filled = (0.5, 0.25, 0.25, 0.0)[: len(words)] if fill else ()
    columns = (
        InputColumn("input", "number", fill=(40.0,) if fill else ()),
        InputColumn("logits", "words", words, unknown, fill=filled),
        InputColumn("is old", "truth", fill=(0.25,) if fill else ()),
        InputColumn("none", "words", (), "zeros"),
        InputColumn("pay", "number"),
    )
    width = sum(column.width for column in columns)
    mean = tuple(0.1 * at for at in range(width))
    std = tuple(1 + 0.3 * at for at in range(width))
    return Preparation(columns, ("", "NA"), mean=mean, std=std)


class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(width, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.layers(x)


def exported(path, prepared):
    net = Net(prepared.width).eval()
    job = Job(input_shape=(prepared.width,), columns=RawColumns.of(prepared.to_json()))
    deploy.export(net, path, "onnx", job)
    return net


def rows(chance, unknown, *, gaps=True):
    found = []
    for _ in range(50):
        row = {
            "input": chance.uniform(20, 80),
            "logits": chance.choice(JOBS),
            "is old": chance.random() < 0.5,
            "none": None,
            "pay": chance.gauss(0, 3),
        }
        if unknown != "refused" and chance.random() < 0.2:
            row["logits"] = "diver"
        if gaps and chance.random() < 0.5:
            row[chance.choice(["input", "logits", "is old"])] = None
        found.append(row)
    return found


def columns_of(rows):
    """The twin of what a device does: floats with NaN, and words with the empty text."""
    floats = {
        name: np.array([[np.nan if row[name] is None else float(row[name])] for row in rows], "f4")
        for name in ("input", "is old", "pay")
    }
    return floats | {"logits": np.array([[row["logits"] or ""] for row in rows], dtype=object)}


@pytest.mark.recipe
@pytest.mark.parametrize("unknown", ["zeros", "other", "refused"])
def test_raw_columns_give_the_outputs_of_prepared_rows(tmp_path, unknown):
    prepared = about(unknown)
    net = exported(tmp_path / "m.onnx", prepared)
    given = rows(random.Random(1), unknown)
    plain = [{**row, "none": "x"} for row in given]
    with torch.no_grad():
        wanted = net(prepare(plain, prepared))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [one.name for one in session.get_inputs()] == ["input", "logits", "is old", "pay"]
    assert [one.name for one in session.get_outputs()] == ["logits_1"]
    (found,) = session.run(None, columns_of(given))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"))
    # A text that means a gap is one in the file, too.
    columns = columns_of(given)
    columns["logits"][columns["logits"] == ""] = "NA"
    np.testing.assert_array_equal(session.run(None, columns)[0], found)


@pytest.mark.recipe
def test_a_gap_or_word_that_training_refused_gives_no_number(tmp_path):
    exported(tmp_path / "m.onnx", about("refused", fill=False))
    session = deploy.open_file(tmp_path / "m.onnx")
    columns = columns_of(rows(random.Random(1), "refused", gaps=False))
    assert np.isfinite(session(**columns)).all()
    for name, wrong in (("logits", "diver"), ("logits", ""), ("input", np.nan), ("pay", np.nan)):
        bad = {**columns, name: columns[name].copy()}
        bad[name][3] = wrong
        assert np.isnan(session(**bad)).any(1).nonzero()[0].tolist() == [3]


@pytest.mark.recipe
def test_prepared_inputs_are_turned_back_into_columns(tmp_path):
    prepared = about()
    net = exported(tmp_path / "m.onnx", prepared)
    plain = [{**row, "none": "x"} for row in rows(random.Random(2), "zeros")]
    x = prepare(plain, prepared)
    assert deploy.parity(net, tmp_path / "m.onnx", x).max_abs_error < 1e-5
    assert deploy.latency(tmp_path / "m.onnx", (prepared.width,), seconds=0.01).median_ms > 0
    assert deploy.peak_memory(tmp_path / "m.onnx", (prepared.width,)) >= 0
    with pytest.raises(ExportError, match=r"\[1, 2\]; give the columns input, logits, is old, pay"):
        deploy.open_file(tmp_path / "m.onnx")(np.zeros((1, 2), "f4"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda page: {}, "the data do not say how raw rows become inputs of the model"),
        (lambda page: page | {"audio": {}}, "the model takes recordings, and only rows of a table"),
        (lambda page: page | {"series": {}}, "takes windows over a series, and only rows"),
        (
            lambda page: page | {"columns": [{"name": "day", "kind": "date", "fill": None}]},
            "column 'day' is of the kind date, which cannot be .*; name it in drop_columns, or give",
        ),
        (
            lambda page: page | {"columns": [{"name": "", "kind": "number", "fill": None}]},
            "a column without a name",
        ),
    ],
)
def test_what_cannot_be_inside_is_refused_with_the_reason(change, said):
    with pytest.raises(ExportError, match=f"preparation: .*{said}"):
        RawColumns.of(change(about().to_json()))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("inside")
    chance = random.Random(0)
    lines = []
    for at in range(160):
        age = chance.uniform(20, 80)
        row = [age if at % 7 else "", chance.choice(JOBS) if at % 5 else "NA"]
        lines.append([*row, chance.choice(["true", "false"]), f"s{at % 4}", age > 50])
    with (place / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["age", "job", "insured", "site", "ill"], *lines])
    finish(RECIPE.format(path=(place / "t.csv").as_posix()), place / "run")
    return place / "run", place / "t.csv"


@pytest.mark.recipe
def test_predict_feeds_the_inputs_of_the_file_with_raw_rows(run, shell):
    folder, table = run
    wanted = fedpress.predict(folder, table)
    found = fedpress.predict(folder / "artifacts" / "float.onnx", table)
    torch.testing.assert_close(found.outputs, wanted.outputs, atol=1e-5, rtol=0)
    assert found.labels == wanted.labels
    told = json.loads(deploy.file_metadata(folder / "artifacts" / "float.onnx")["preparation"])
    assert told["standardised_by_the_file"] is True
    rounded = fedpress.predict(folder / "artifacts" / "int8.onnx", table)
    assert (rounded.answers == wanted.answers).double().mean() > 0.9
    said = shell("predict", folder / "artifacts" / "float.onnx", table)
    assert said.code == 0
    with pytest.raises(FedpressError, match="mean: the file standardises its inputs itself"):
        fedpress.predict(folder / "artifacts" / "float.onnx", table, mean=[0.0], std=[1.0])


@pytest.mark.recipe
def test_the_stage_compares_and_measures_the_file_as_any_other(run):
    folder, _ = run
    stages = fedpress.Run(folder).result["stages"]
    assert stages[1]["parity"]["max_abs_error"] < 1e-4
    assert stages[1]["accuracy"] == stages[0]["accuracy"]
    assert stages[1]["latency_ms"] > 0
    found = fedpress.measure(
        [folder / "artifacts" / "float.onnx"], seconds=0.01, batches=[1], threads=[1]
    )
    assert found["records"][0]["timings"][0]["median_ms"] > 0


@pytest.mark.recipe
def test_other_formats_and_other_data_are_refused(run, tmp_path, shell):
    folder, _ = run
    text = (folder / "recipe.toml").read_text()
    (tmp_path / "r.toml").write_text(text.replace('name = "float"', 'format = "openvino"'))
    said = shell("check", tmp_path / "r.toml")
    assert said.code == 2
    assert "files of openvino take no words, so they cannot prepare raw columns" in said.err
