"""Other tasks than classification go through recipe and command line, federated, with and without sample privacy."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedpress.core.examples import Arrays
from fedpress.data import FederatedData
from fedpress.data.functions import own_modules
from fedpress.errors import RecipeError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.start import first_state, load_data
from fedpress.tasks.base import IGNORED
from tests.harness import stages

COMMAND = [sys.executable, "-c", "from fedpress.cli import main; main()"]
PRIVATE = 'privacy = { unit = "sample", epsilon = 8.0, delta = 1e-3, clip_norm = 1.0 }\n'
REAL = PRIVATE.replace("epsilon = 8.0, delta = 1e-3", "epsilon = 4.0, delta = 1e-5")
AIR = """
name = "air"
seed = 1
[data]
source = "parquet"
task = "regression"
label_column = "PM2.5"
client_column = "station"
drop_columns = ["No", "year", "day", "PM10", "SO2", "NO2", "CO", "O3"]
missing = "drop"
public_share = 0.02
test_share = 0.05
examples_per_client = 1500
[model]
architecture = "mlp"
arguments = { in_features = 23, hidden = [32, 32], num_classes = 1 }
[[stage]]
kind = "federate"
num_rounds = 12
lr = 0.05
batch_size = 32
"""
CREDIT = """
name = "credit"
seed = 1
[data]
source = "csv"
task = "binary"
label_column = "default.payment.next.month"
drop_columns = ["ID"]
partition = "iid"
num_clients = 8
examples_per_client = 1500
[model]
architecture = "mlp"
arguments = { in_features = 23, hidden = [32], num_classes = 1 }
[[stage]]
kind = "federate"
num_rounds = 10
lr = 0.3
batch_size = 32
"""


def real_data() -> Path:
    given = os.environ.get("FEDPRESS_DATA")
    return Path(given) if given else Path(__file__).parents[3] / "shared" / "data"


def ran(text: str, data: Path, place: Path) -> tuple[dict, str]:
    """Runs a recipe by the command line; returns the last line of the result, and the report."""
    (place / "recipe.toml").write_text(text)
    command = [*COMMAND, "run", str(place / "recipe.toml"), "--data", str(data)]
    done = subprocess.run(
        [*command, "--out", str(place / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((place / "run" / "result.json").read_text())
    return result["final"], (place / "run" / "report.html").read_text()


@pytest.mark.recipe
@pytest.mark.skipif(not (real_data() / "air_quality").is_dir(), reason="needs FEDPRESS_DATA")
@pytest.mark.parametrize("private", [False, True])
def test_twelve_stations_learn_their_air_and_beat_the_mean(private, tmp_path):
    text = (
        AIR.replace("lr = 0.05\nbatch_size = 32", "lr = 0.3\nbatch_size = 100") if private else AIR
    )
    final, report = ran(
        text + private * REAL, real_data() / "air_quality" / "beijing.parquet", tmp_path
    )
    assert final["task"] == "regression"
    assert final["clients"] == 12
    assert final["mae"] < (0.95 if private else 0.85) * final["mae_of_mean"]
    assert final["r2"] > (0.05 if private else 0.2)
    assert final["mae_warning"] is None
    assert "accuracy" not in final
    assert "MAE" in report
    told = report.partition("<script")[0].replace("target_accuracy", "")
    assert "ccuracy" not in told
    # What the model is worth on a client's own rows is a private number.
    assert bool(final["client_mae"]) is not private


@pytest.mark.recipe
@pytest.mark.skipif(not (real_data() / "credit_default").is_dir(), reason="needs FEDPRESS_DATA")
@pytest.mark.parametrize("private", [False, True])
def test_eight_banks_learn_who_will_not_pay(private, tmp_path):
    text = (
        CREDIT.replace("lr = 0.3\nbatch_size = 32", "lr = 0.5\nbatch_size = 100")
        if private
        else CREDIT
    )
    data = real_data() / "credit_default" / "UCI_Credit_Card.csv"
    final, report = ran(text + private * REAL, data, tmp_path)
    assert final["task"] == "binary"
    assert final["auc"] > (0.68 if private else 0.73)
    assert 0.7 < final["majority_share"] < 0.85
    assert "AUC" in report
    assert bool(final["client_auc"]) is not private


SMALL = """
name = "small"
seed = 3
[data]
source = "made_up_task_data:{kind}"
public_share = 0.3
test_share = 0.2
validation = 20
[model]
architecture = "mlp"
arguments = {{ in_features = 4, hidden = [16], num_classes = {outputs} }}
[[stage]]
kind = "train"
epochs = 4
batch_size = 16
lr = 0.05
patience = 3
[[stage]]
kind = "federate"
num_rounds = 3
batch_size = 16
lr = {lr}
"""
LINEAR = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.0, 1.0, 1.0, -2.0], [1.0, 1.0, -1.0, 0.0]])


def made_up(kind: str) -> dict:
    """Three clients of 120 examples whose targets follow from the inputs."""
    clients = {}
    for at in range(3):
        x = torch.randn(120, 4, generator=torch.Generator().manual_seed(at))
        found = x @ LINEAR.T
        y = {
            "regression": 50 + 10 * found[:, 0],
            "several": 50 + 10 * found,
            "multilabel": found > 0,
            "binary": (found[:, 0] > 0).long(),
        }[kind]
        clients[f"c{at}"] = (x.numpy(), y.numpy())
    return clients


@pytest.fixture
def source(monkeypatch):
    """A module whose functions give the data of each kind."""
    import types

    module = types.ModuleType("made_up_task_data")
    for kind in ("regression", "several", "multilabel", "binary"):
        setattr(module, kind, lambda kind=kind: made_up(kind))
    monkeypatch.setitem(sys.modules, "made_up_task_data", module)
    assert own_modules  # data functions are found by import


CASES = {
    "regression": (1, "mae", "", ""),
    "several": (3, "mae", "", ""),
    "multilabel": (3, "macro_f1", "", ""),
    "binary": (1, "auc", 'task = "binary"\nclasses = [0, 1]', ""),
}


@pytest.mark.recipe
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_every_task_trains_federates_and_keeps_sample_privacy(kind, private, source, tmp_path):
    outputs, metric, of_data, _ = CASES[kind]
    text = SMALL.format(kind=kind, outputs=outputs, lr=0.3 if private else 0.05)
    text = text.replace("validation = 20", f"validation = 20\n{of_data}") + private * PRIVATE
    train, federate = stages(text, tmp_path / "run")
    for line in (train, federate):
        assert line["task"] == ("regression" if kind == "several" else kind)
        assert "accuracy" not in line or kind == "binary"
    higher = metric != "mae"
    guess = 0.5 if higher else train["mae_of_mean"]
    assert (train[metric] > guess) if higher else (train[metric] < guess)
    if not private:
        assert (federate[metric] > guess) if higher else (federate[metric] < guess)
    assert bool(federate[f"client_{metric}"]) is not private
    records = [
        json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    ]
    assert all(metric in record for record in records)


class Tagger(torch.nn.Module):
    """Says for each token of a sequence which of three classes it is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(12, 8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps ids [n, length] to logits [n, 3, length]."""
        return self.head(self.embed(ids)).movedim(-1, 1)


def sequences() -> FederatedData:
    """Sequences of 6 ids; the class of a token is its number modulo 3, and the last two may be padding."""
    ids = torch.randint(0, 12, (300, 6), generator=torch.Generator().manual_seed(0))
    y = ids % 3
    y[::2, 4:] = IGNORED
    every = Arrays(ids, y)
    parts = [every.take(torch.arange(at, 300, 4)) for at in range(4)]
    clients = {"a": parts[0], "b": parts[1]}
    none = parts[2].take(torch.arange(10))
    return FederatedData("tokens", clients, parts[2], none, parts[3], 3, ("0", "1", "2"))


@pytest.mark.parametrize("private", [False, True])
def test_targets_may_be_sequences_with_padding(private, source, tmp_path):
    module = sys.modules["made_up_task_data"]
    module.sequences, module.Tagger = sequences, Tagger
    text = SMALL.format(kind="sequences", outputs=3, lr=2.0 if private else 0.5)
    text = text.replace('"mlp"', '"made_up_task_data:Tagger"')
    text = re.sub("arguments = .*", "", text).replace("lr = 0.05", "lr = 0.5")
    text = re.sub("public_share.*\n|test_share.*\n|validation.*\n", "", text)
    train, federate = stages(text + private * PRIVATE, tmp_path / "run")
    assert train["accuracy"] > 0.9
    assert federate["accuracy"] > 0.9
    assert sum(map(sum, train["confusion"])) == sum(
        int((y != IGNORED).sum()) for y in [sequences().test.y]
    )


def test_patience_and_a_target_go_by_the_task_s_metric_and_direction(source, tmp_path):
    text = SMALL.format(kind="regression", outputs=1, lr=0.05)
    text = text.replace("num_rounds = 3", "num_rounds = 30\ntarget_metric = 100.0")
    _, federate = stages(text, tmp_path / "run")
    assert federate["rounds"] == 1, "an error of less than 100 is reached at once"


def test_a_target_accuracy_is_refused_where_the_task_goes_by_something_else(source, tmp_path):
    text = SMALL.format(kind="regression", outputs=1, lr=0.05)
    text = text.replace("num_rounds = 3", "num_rounds = 3\ntarget_accuracy = 0.9")
    recipe = recipes.load(text, ())
    with pytest.raises(
        RecipeError, match=r"primary metric of regression is MAE; take target_metric"
    ):
        check_recipe(recipe, load_data(recipe))


def test_a_network_of_the_wrong_width_is_told_how_many_numbers_to_give(source):
    recipe = recipes.load(SMALL.format(kind="several", outputs=2, lr=0.1), ())
    with pytest.raises(RecipeError, match=r"expected \[3\].*num_classes = 3"):
        first_state(recipe, load_data(recipe))


def test_arrays_of_other_targets_are_a_data_set(source):
    part = Arrays(torch.zeros(3, 2), torch.tensor([0.5, 1.5, 2.5]))
    data = FederatedData("mine", {"a": part}, part, part, part)
    assert data.task.kind == "regression"
    assert data.describe()["clients"] == {"a": {"examples": 3}}


CLINIC = """
name = "clinic"
[data]
source = "csv"
client_column = "hospital"
label_column = "ill"
classes = ["no", "yes"]
public_share = 0.3
task = "binary"
[model]
architecture = "mlp"
[[stage]]
kind = "train"
epochs = 1
[[stage]]
kind = "federate"
num_rounds = 2
"""


def clinics(place: Path) -> Path:
    """Writes three hospitals; in the clinic everybody is ill."""
    chance = torch.Generator().manual_seed(0)
    lines = ["hospital,age,ill"]
    for hospital in ("north", "south", "clinic"):
        for age in torch.randint(20, 90, (60,), generator=chance).tolist():
            lines.append(f"{hospital},{age},{'yes' if hospital == 'clinic' or age > 50 else 'no'}")
    (place / "visits.csv").write_text("\n".join(lines))
    return place / "visits.csv"


@pytest.mark.recipe
@pytest.mark.parametrize("private", [False, True])
def test_a_hospital_of_one_class_takes_part_and_has_no_auc_of_its_own(private, tmp_path):
    final, report = ran(CLINIC + private * PRIVATE, clinics(tmp_path), tmp_path)
    assert 0 <= final["auc"] <= 1
    assert "NaN" not in report
    if not private:
        own = final["client_auc"]
        assert own["clinic"] is None
        assert 0 <= own["north"] <= 1


@pytest.mark.recipe
def test_a_test_set_of_one_class_has_no_auc_and_the_report_says_why(tmp_path):
    text = CLINIC.replace('task = "binary"', 'task = "binary"\ntest_clients = ["clinic"]')
    final, report = ran(text, clinics(tmp_path), tmp_path)
    assert (final["auc"], final["auc_error"], final["sensitivity"]) == (None, None, None)
    assert "all 60 test examples are 'yes', so there is no AUC" in html.unescape(report)
