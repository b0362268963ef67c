"""Poisson regression: metrics as scikit-learn's, targets that are counts, and a table of counts that trains."""

import csv
import re
import sys
import types

import pytest
import torch
from sklearn import metrics as sk

from fedpress.errors import DataError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import load_data
from fedpress.tasks import Poisson, merged, of_model
from tests.harness import stages
from tests.tasks.test_recipes import PRIVATE

RECIPE = """
name = "visits"
seed = 2
[data]
source = "csv"
path = "{path}"
task = "poisson"
label_column = "visits"
partition = "iid"
num_clients = 3
public_share = 0.3
test_share = 0.2
[model]
architecture = "mlp"
arguments = {{ in_features = 2, hidden = [8], num_classes = 1 }}
[[stage]]
kind = "train"
epochs = 5
batch_size = 16
lr = 0.02
[[stage]]
kind = "federate"
num_rounds = 3
batch_size = 16
lr = 0.02
"""


def given(n: int, width: int) -> tuple[Poisson, torch.Tensor, torch.Tensor]:
    """Returns a task, log rates and counts, many of them 0."""
    chance = torch.Generator().manual_seed(width)
    log_rates = torch.randn(n, width, generator=chance)
    counts = torch.poisson(log_rates.exp(), generator=chance)
    task = Poisson.fit(("a", "b", "c")[:width], counts[: n // 2])
    return task, log_rates + 0.3 * torch.randn(n, width, generator=chance), counts


@pytest.mark.parametrize("width", [1, 3])
def test_the_metrics_are_those_of_scikit_learn(width):
    task, outputs, counts = given(300, width)
    found = task.summary(task.metrics(outputs, counts))
    y, rates = counts.double().flatten(), outputs.double().exp().flatten()
    assert (y == 0).any()
    assert found["deviance"] == pytest.approx(sk.mean_poisson_deviance(y, rates), rel=1e-12)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(y, rates), rel=1e-12)
    mean = torch.tensor(task.mean, dtype=torch.float64).expand(300, width).flatten()
    expected = sk.mean_poisson_deviance(y, mean)
    assert found["deviance_of_mean"] == pytest.approx(expected, rel=1e-12)
    assert found["deviance_warning"] is None


def test_merged_sums_are_those_of_the_whole():
    task, outputs, counts = given(100, 2)
    parts = [task.metrics(outputs[a:b], counts[a:b]) for a, b in ((0, 17), (17, 17), (17, 100))]
    whole = task.metrics(outputs, counts)
    for key, value in merged(*parts).items():
        torch.testing.assert_close(value, whole[key])


def test_the_losses_of_the_examples_sum_to_the_sum_and_differ_from_the_likelihood_by_a_constant():
    task, outputs, counts = given(50, 1)
    each = task.loss(outputs, counts, reduction="none")
    torch.testing.assert_close(each.sum(), task.loss(outputs, counts, reduction="sum"))
    likelihood = torch.distributions.Poisson(outputs.exp()).log_prob(counts)[:, 0]
    torch.testing.assert_close(each, -likelihood - torch.lgamma(counts[:, 0] + 1))


@pytest.mark.parametrize("wrong", [-1.0, 0.5])
def test_targets_that_are_no_counts_are_refused_with_a_cure(wrong):
    task = Poisson(("visits",))
    with pytest.raises(
        DataError, match=r"leave out those rows, or take task = \"regression\""
    ) as e:
        task.check_targets(torch.tensor([0.0, 2.0, wrong]))
    assert str(wrong) not in str(e.value), "a target may be private"


def test_a_model_that_answers_the_mean_is_told_so():
    counts = given(40, 1)[2]
    task = Poisson.fit(("visits",), counts)
    outputs = torch.full((40, 1), task.mean[0]).log()
    found = task.summary(task.metrics(outputs, counts))
    assert found["deviance"] == pytest.approx(found["deviance_of_mean"], rel=1e-6)
    worse = task.summary(task.metrics(outputs + 0.5, counts))
    assert "no better than always answering the mean" in worse["deviance_warning"]


def test_a_rate_of_zero_is_right_where_nothing_happened():
    task = Poisson(("visits",))
    found = task.summary(task.metrics(torch.tensor([[-800.0]]), torch.zeros(1, 1)))
    assert found["deviance"] == found["mae"] == 0
    assert found["deviance_of_mean"] is None, "no target was public"


def test_a_saved_model_has_the_task_that_it_was_trained_for():
    task = Poisson(("visits",), (1.5,))
    assert of_model(task.to_json(), ()) == task


def table(path, first_count=None) -> None:
    """Writes 400 made-up counts that follow from two columns."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=chance)
    counts = torch.poisson((0.5 + x @ torch.tensor([0.8, -0.5])).exp(), generator=chance)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["heat", "rain", "visits"])
        for at, (features, count) in enumerate(zip(x.tolist(), counts.tolist(), strict=True)):
            told = first_count if at == 0 and first_count is not None else int(count)
            rows.writerow([*features, told])


@pytest.mark.recipe
@pytest.mark.parametrize("private", [False, True])
def test_a_table_of_counts_trains_and_federates(private, tmp_path):
    table(tmp_path / "visits.csv")
    text = RECIPE.format(path=tmp_path / "visits.csv") + private * PRIVATE
    train, federate = stages(text, tmp_path / "run")
    assert train["task"] == federate["task"] == "poisson"
    assert train["deviance"] < train["deviance_of_mean"]
    if not private:
        assert federate["deviance"] < 0.8 * federate["deviance_of_mean"]
    assert bool(federate["client_deviance"]) is not private


def test_whole_numbers_from_python_are_counts_where_the_recipe_says_so(monkeypatch):
    counts = torch.arange(60) % 4
    module = types.ModuleType("made_up_counts")
    module.visits = lambda: {"a": (torch.ones(60, 2).numpy(), counts.numpy())}
    monkeypatch.setitem(sys.modules, "made_up_counts", module)
    text = RECIPE.format(path="").replace('"csv"', '"made_up_counts:visits"')
    text = re.sub("(path|label_column|partition|num_clients) = .*\n", "", text)
    task = load_data(recipes.load(text, ())).task
    assert task.kind == "poisson"
    assert 0 < task.mean[0] < 3


def test_a_table_with_a_negative_count_is_refused_with_a_cure(tmp_path):
    table(tmp_path / "visits.csv", first_count=-1)
    recipe = recipes.load(RECIPE.format(path=tmp_path / "visits.csv"), ())
    with pytest.raises(DataError, match="needs counts"):
        load_data(recipe)
