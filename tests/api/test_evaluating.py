"""`fedpress.evaluate`, `predict`, `load` and `save`, and their commands."""

import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedpress
from fedpress.data.new_rows import prepare
from fedpress.data.preparation import Preparation
from fedpress.errors import FedpressError, ModelError

X = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


def net(outputs=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on digits of one epoch."""
    place = tmp_path_factory.mktemp("evaluated") / "run"
    stages = [{"kind": "train", "epochs": 1}]
    data = {"source": "digits", "num_clients": 2, "examples_per_client": 100}
    model = {"architecture": "mlp", "arguments": {"in_features": 64, "hidden": [16]}}
    return fedpress.run({"data": data, "model": model, "stage": stages}, out=place)


@pytest.mark.parametrize(
    "data", [(X, Y), (X.numpy(), Y.numpy()), TensorDataset(X, Y), DataLoader(TensorDataset(X, Y))]
)
def test_all_given_examples_are_measured_on(data):
    model = net()
    expected = (model(X).argmax(1) == Y).float().mean().item()
    found = fedpress.evaluate(model, data)
    assert found["accuracy"] == pytest.approx(expected)
    assert found["examples"] == 120


def test_the_metrics_of_other_tasks_are_those_of_a_plain_twin():
    model = net(1)
    numbers = X[:, 0]
    with torch.no_grad():
        error = (model(X)[:, 0] - numbers).abs().mean().item()
    assert fedpress.evaluate(model, (X, numbers))["mae"] == pytest.approx(error, rel=1e-5)
    flags = (X[:, 0] > 0).long()
    with torch.no_grad():
        right = ((model(X)[:, 0] > 0).long() == flags).float().mean().item()
    assert fedpress.evaluate(model, (X, flags))["accuracy"] == pytest.approx(right)


def test_a_run_is_measured_on_the_test_part_that_it_had(run, shell):
    said = shell("eval", run.path, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["accuracy"] == run.result["final"]["accuracy"]
    assert fedpress.evaluate(run.path)["accuracy"] == found["accuracy"]
    assert "accuracy" in shell("eval", run.path).out


def test_a_saved_model_standardises_raw_inputs_as_it_was_trained(run):
    raw = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    found = fedpress.predict(run.path, raw)
    # The same numbers by hand: bytes to 0..1, then mean and std.
    result = json.loads((run.path / "stages" / "0-train" / "spec.json").read_text())
    mean, std = torch.tensor(result["mean"]), torch.tensor(result["std"])
    prepared = (raw.float() / 255 - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    expected = run.model.eval()(prepared)
    assert torch.allclose(found.outputs, expected, atol=1e-5)
    assert found.labels == [str(n) for n in expected.argmax(1).tolist()]
    assert torch.allclose(found.probabilities.sum(1), torch.ones(7))


def test_the_command_predicts_from_a_file_as_python_does(run, shell, tmp_path):
    raw = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "x.npy", raw)
    said = shell("predict", run.path, "x.npy")
    assert said.code == 0, said.err
    rows = list(csv.DictReader(io.StringIO(said.out)))
    found = fedpress.predict(run.path, raw)
    assert [row["class"] for row in rows] == found.labels
    assert [float(row["probability of 3"]) for row in rows] == pytest.approx(
        found.probabilities[:, 3].tolist()
    )
    assert shell("predict", run.path, "x.npy", "--out", "y.npy").code == 0
    assert np.allclose(np.load(tmp_path / "y.npy"), found.outputs.numpy())
    assert shell("predict", run.path, "x.npy", "--out", "y.csv").code == 0
    assert (tmp_path / "y.csv").read_text().splitlines() == said.out.splitlines()


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("none.npy", "inputs: no such path 'none.npy'"),
        ("text.npy", "inputs: cannot read 'text.npy'"),
        ("pickle.npy", "inputs: cannot read 'pickle.npy'"),
        ("shape.npy", "inputs: it does not take examples of"),
        ("flat.npy", "inputs: "),
        ("rows.csv", "does not say how raw data"),
    ],
)
def test_a_file_that_is_no_input_is_refused_and_nothing_is_unpickled(
    run, shell, file, said, tmp_path
):
    (tmp_path / "text.npy").write_text("hello")
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "shape.npy", np.zeros((3, 5), dtype=np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(3, dtype=np.float32))
    found = shell("predict", run.path, file)
    assert found.code == 2
    assert said in found.err
    assert found.err.count("\n") == 1


def test_a_multilabel_model_and_one_of_numbers_give_columns_of_their_names():
    found = fedpress.predict(net(2), X[:4])
    assert found.table()[0] == ["class", "probability of 0", "probability of 1"]
    numbers = fedpress.predict(net(1), X[:4])
    assert numbers.task == "unknown"
    assert numbers.table()[0] == ["output 0"]
    with pytest.raises(FedpressError, match="does not give one class"):
        _ = numbers.labels


@pytest.mark.parametrize("path", ["folder", "packed.safetensors"])
def test_what_is_saved_is_loaded_with_the_same_numbers(tmp_path, path):
    model = net().eval()
    fedpress.save(model, tmp_path / path, input_shape=(6,))
    again = fedpress.load(tmp_path / path)
    assert torch.equal(again(X), model(X))
    assert not again.training
    with pytest.raises(ModelError, match="exists already"):
        fedpress.save(model, tmp_path / path, input_shape=(6,))


def test_a_pruned_result_is_saved_in_its_new_shape(tmp_path):
    small = fedpress.prune(net(), data=(X, Y), keep_params=0.5, round_to=1)
    for number, given in enumerate((small, small.model)):
        fedpress.save(given, tmp_path / str(number), input_shape=(6,))
        again = fedpress.load(tmp_path / str(number))
        assert torch.equal(again(X), small.model.eval()(X))


def test_a_module_that_nothing_builds_again_is_not_saved(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x):
            return self.inner(x)

    with pytest.raises(
        ModelError,
        match=r"^model: .*it is not known how to build this Own: its class is defined in a",
    ):
        fedpress.save(Own(), tmp_path / "own", input_shape=(6,))
    with pytest.raises(ModelError, match=r"^input_shape: .*not known; give it"):
        fedpress.save(net(), tmp_path / "own")


def test_the_command_saves_a_function_with_its_weights(shell, tmp_path, monkeypatch):
    (tmp_path / "nets_to_save.py").write_text(
        "from torch import nn\ndef small():\n    return nn.Sequential(nn.Linear(6, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    weights = nn.Sequential(nn.Linear(6, 3))
    torch.save(weights.state_dict(), tmp_path / "w.pt")
    words = ["save", "nets_to_save:small", "net", "--checkpoint", "w.pt", "--input", "6"]
    said = shell(*words)
    assert said.code == 0, said.err
    again = fedpress.load(tmp_path / "net", allow_code="nets_to_save:small")
    assert torch.equal(again[0].weight, weights[0].weight)
    assert shell(*words).code == 2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            None,
            r"^data: there are no labelled examples to measure on; give data=\(INPUTS, LABELS\)",
        ),
        (X, "^data: it has no labels"),
        ((X, Y.float()), "^data: the label of one .* torch.float32"),
    ],
)
def test_what_cannot_be_measured_on_is_told(data, said):
    with pytest.raises(FedpressError, match=said):
        fedpress.evaluate(net(), data)


@pytest.mark.parametrize("call", [fedpress.evaluate, fedpress.predict])
def test_images_with_channels_last_are_told_as_such(call):
    images = torch.rand(40, 8, 8, 3)
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    given = (images, Y[:40] % 2) if call is fedpress.evaluate else images
    with pytest.raises(
        FedpressError,
        match=r"give torch.as_tensor\(x\).permute\(0, 3, 1, 2\), examples of shape \[3, 8",
    ):
        call(small, given)


def test_labels_to_measure_on_are_named_as_the_argument():
    with pytest.raises(FedpressError, match=r"^data: some labels are no class number; give class"):
        fedpress.evaluate(net(), (X, Y + 9))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it asks for a device that is missing")
def test_a_device_that_is_missing_is_named_as_the_argument():
    with pytest.raises(FedpressError, match=r"^device: there is no 'cuda' .*; give device="):
        fedpress.evaluate(net(), (X, Y), device="cuda")


def visits(path, count, seed, shift=0.0, ward="ab"):
    """Writes a table whose class follows from its two numbers, and returns its rows."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        age, pressure = draw.normal(50, 10), draw.normal(120, 15)
        ill = "yes" if (age - 50) / 10 + (pressure - 120) / 15 > 0 else "no"
        where = ward[draw.integers(len(ward))]
        rows.append({"age": age + shift, "pressure": pressure, "ward": where, "ill": ill})
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return rows


@pytest.fixture(scope="module")
def table_run(tmp_path_factory):
    """A run on a table of visits, which exports its network and the preparation of its rows."""
    place = tmp_path_factory.mktemp("visits")
    visits(place / "train.csv", 400, seed=0)
    data = {
        "source": "csv",
        "path": str(place / "train.csv"),
        "label_column": "ill",
        "num_clients": 2,
        "public_share": 0.5,
    }
    model = {
        "architecture": "mlp",
        "arguments": {"in_features": 4, "hidden": [8], "num_classes": 2},
    }
    stages = [{"kind": "train", "epochs": 40, "lr": 0.1}, {"kind": "export"}]
    return fedpress.run({"data": data, "model": model, "stage": stages}, out=place / "run")


def test_all_rows_of_another_table_are_measured_as_the_run_prepares_them(
    table_run, tmp_path, shell
):
    rows = visits(tmp_path / "new.csv", 150, seed=1)
    found = fedpress.evaluate(table_run.path, path=tmp_path / "new.csv")
    # The oracle: the file that lies beside an exported network.
    about = Preparation.read(table_run.path / "artifacts" / "preparation.json")
    inputs = [{name: row[name] for name in ("age", "pressure", "ward")} for row in rows]
    answers = fedpress.predict(table_run.path, prepare(inputs, about), mean="none").labels
    right = [answer == row["ill"] for answer, row in zip(answers, rows, strict=True)]
    assert found["examples"] == 150
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert found["accuracy"] > 0.9
    # Means of the new table would hide that all its patients are older.
    visits(tmp_path / "old.csv", 150, seed=1, shift=60.0)
    older = fedpress.evaluate(table_run.path, path=tmp_path / "old.csv")
    assert older["accuracy"] < 0.7
    said = shell("eval", table_run.path, "--path", tmp_path / "new.csv", "--json")
    assert json.loads(said.out) == found


def test_rows_that_the_run_does_not_know_are_left_out_and_told(table_run, tmp_path):
    rows = visits(tmp_path / "new.csv", 20, seed=2)
    rows[3]["ill"], rows[4]["ill"] = "perhaps", ""
    with (tmp_path / "new.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    with pytest.warns(UserWarning, match="2 rows of .*new.csv' are left out"):
        found = fedpress.evaluate(table_run.path, path=tmp_path / "new.csv")
    assert found["examples"] == 18


def test_another_table_needs_the_columns_of_the_run(table_run, run, tmp_path):
    visits(tmp_path / "new.csv", 10, seed=3)
    text = (tmp_path / "new.csv").read_text()
    (tmp_path / "new.csv").write_text(text.replace("pressure", "bp"))
    with pytest.raises(FedpressError, match="lacks the columns pressure"):
        fedpress.evaluate(table_run.path, path=tmp_path / "new.csv")
    with pytest.raises(FedpressError, match=r"not trained on \.csv data"):
        fedpress.evaluate(run.path, path=tmp_path / "new.csv")


@pytest.mark.parametrize("as_objects", [False, True])
def test_labels_that_are_words_are_refused_with_a_cure_that_works(as_objects):
    names = np.array(["cold", "flu", "well"])[Y.numpy()]
    labels = names.astype(object) if as_objects else names
    with pytest.raises(FedpressError, match="expected numbers") as raised:
        fedpress.evaluate(net(), (X, labels))
    assert "names, y = numpy.unique(y, return_inverse=True)" in str(raised.value)
    _, y = np.unique(names, return_inverse=True)
    assert fedpress.evaluate(net(), (X, y))["examples"] == 120
    with pytest.raises(FedpressError, match="expected numbers"):
        fedpress.federate(net(), clients={"a": (X, labels), "b": (X, labels)}, num_rounds=1)
    with pytest.raises(FedpressError, match="expected numbers"):
        fedpress.train(net(), data=(X, labels), epochs=1)


def test_the_cure_for_another_order_of_axes_works_on_arrays_too():
    module = nn.Sequential(nn.Conv1d(3, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    x = np.zeros((8, 16, 3), dtype=np.float32)
    with pytest.raises(FedpressError) as raised:
        fedpress.predict(module, x)
    cure = re.search(r"give (torch\.as_tensor\(x\).*?), examples", str(raised.value))[1]
    assert len(fedpress.predict(module, eval(cure, {"torch": torch, "x": x}))) == 8


class Asserting(nn.Module):
    """A network that checks its input as many do: without a message."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        assert x.shape[1] == 3
        return self.layer(x)


def test_an_assertion_without_a_message_becomes_an_error_with_a_cure():
    with pytest.raises(ModelError, match=r"\(AssertionError: .*takes examples of shape \[3\]"):
        fedpress.predict(Asserting(), torch.zeros(4, 5))
