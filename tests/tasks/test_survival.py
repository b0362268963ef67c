"""Survival: loss and metrics as plain twins, wrong targets, and a table that goes every way."""

import csv

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedpress
from fedpress import tasks
from fedpress.errors import DataError, FedpressError, RecipeError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import load_data
from fedpress.tasks import Survival
from fedpress.tasks.censored import Grid
from tests.harness import stages
from tests.tasks.test_recipes import PRIVATE

NAMES = ("months", "died")
EDGES = (3.0, 8.0, 20.0)


def examples(n: int, seed: int = 0, *, whole: bool = True):
    """Returns outputs of a network and targets: those with a higher first output die earlier."""
    chance = np.random.default_rng(seed)
    outputs = chance.normal(size=(n, len(EDGES)))
    months = chance.exponential(15 * np.exp(-outputs[:, 0]))
    months = np.ceil(months) if whole else months
    died = chance.random(n) < 0.6
    targets = torch.from_numpy(np.stack([months, died], 1).astype(np.float32))
    return torch.from_numpy(outputs.astype(np.float32)), targets


def measured(outputs, targets, task=None):
    task = task or Survival(NAMES, edges=EDGES)
    return task.summary(task.metrics(outputs, targets))


def curve_of(outputs) -> np.ndarray:
    """Returns 1 and the survival at each edge, one example and one interval after the other."""
    rows = []
    for logits in outputs.double().tolist():
        row = [1.0]
        for logit in logits:
            row.append(row[-1] * (1 - 1 / (1 + np.exp(-logit))))
        rows.append(row)
    return np.array(rows)


def mean_times(outputs) -> np.ndarray:
    """Returns the area under each survival curve up to the last edge."""
    return np.trapezoid(curve_of(outputs), (0, *EDGES), axis=1)


def slow_loss(logits, time, event) -> float:
    """Returns the loss of one example as in nnet-survival (`make_surv_array`, `surv_likelihood`)."""
    loss, start = 0.0, 0.0
    for logit, end in zip(logits, EDGES, strict=True):
        survives = 1 / (1 + np.exp(logit))
        if event:
            survived, failed = time > end, start < time <= end
        else:
            survived, failed = time >= (start + end) / 2, False
        loss -= np.log(1 + survived * (survives - 1)) + np.log(1 - failed * survives)
        start = end
    return loss


def slow_concordance(times, events, lived) -> float:
    """Returns Harrell's index by all pairs."""
    right = pairs = 0.0
    for i in range(len(times)):
        for j in range(len(times)):
            later = times[j] > times[i] or (times[j] == times[i] and not events[j])
            if i != j and events[i] and later:
                pairs += 1
                right += 0.5 if lived[i] == lived[j] else float(lived[i] < lived[j])
    return right / pairs


def slow_brier(times, events, curve) -> list[float]:
    """Returns the score of Graf et al. 1999 at each edge, from the definition."""

    def uncensored(until: float, *, and_then: bool) -> float:
        share = 1.0
        for t in sorted(set(times)):
            if t > until or (t == until and not and_then):
                break
            at_risk = sum(times >= t) - sum(events[times == t])
            if at_risk:
                share *= 1 - sum(~events[times == t]) / at_risk
        return share

    scores = []
    for k, edge in enumerate(EDGES):
        total = 0.0
        for time, event, lives in zip(times, events, curve[:, k + 1], strict=True):
            if time > edge:
                total += (1 - lives) ** 2 / uncensored(edge, and_then=True)
            elif event:
                total += lives**2 / uncensored(time, and_then=False)
        scores.append(total / len(times))
    return scores


@pytest.mark.recipe
@given(seed=st.integers(0, 50), whole=st.booleans())
def test_the_loss_is_that_of_nnet_survival(seed, whole):
    outputs, targets = examples(12, seed, whole=whole)
    each = Survival(NAMES, edges=EDGES).loss(outputs, targets, reduction="none")
    rows = zip(outputs.double().tolist(), targets.tolist(), strict=True)
    expected = [slow_loss(logits, time, event) for logits, (time, event) in rows]
    np.testing.assert_allclose(each, expected, rtol=1e-5)


def test_the_best_constant_hazards_are_deaths_by_those_who_were_there():
    targets = torch.tensor([[1.0, 1], [3, 1], [5, 1], [7, 0], [9, 1], [14, 0], [20, 1], [30, 1]])
    task = Survival(NAMES, edges=EDGES)
    # In (3, 8] one of 6 dies, and the one censored at 7 was seen for more than half of it.
    hazards = torch.tensor([2 / 8, 1 / 6, 2 / 4])
    outputs = hazards.logit().expand(8, -1).clone().requires_grad_()
    task.loss(outputs, targets).backward()
    torch.testing.assert_close(outputs.grad.sum(0), torch.zeros(3), atol=1e-7, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_concordance_is_harrells(seed):
    outputs, targets = examples(80, seed)
    time, died = targets.numpy().T
    # Nothing is predicted after the last edge.
    seen, until = (died == 1) & (time <= EDGES[-1]), np.minimum(time, EDGES[-1] + 1)
    expected = slow_concordance(until, seen, mean_times(outputs))
    assert measured(outputs, targets)["concordance"] == pytest.approx(expected, abs=3e-3)
    # With risks that lie in different bins or are equal, it is exact.
    outputs = outputs[:, :1].round().expand(-1, 3)
    expected = slow_concordance(until, seen, mean_times(outputs).round(9))
    assert measured(outputs, targets)["concordance"] == pytest.approx(expected, abs=1e-12)


def test_pairs_of_equal_predictions_count_half():
    targets = examples(50)[1]
    assert measured(torch.zeros(50, 3), targets)["concordance"] == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_the_brier_scores_are_those_of_graf(seed):
    outputs, targets = examples(60, seed)
    time, died = targets.numpy().T
    found = measured(outputs, targets)
    expected = slow_brier(time, died == 1, curve_of(outputs))
    np.testing.assert_allclose(found["brier_by_edge"], expected, rtol=1e-6)
    area = np.trapezoid([0, *expected], (0, *EDGES)) / EDGES[-1]
    assert found["brier"] == pytest.approx(area, rel=1e-6)


def test_the_score_of_one_curve_is_that_of_a_model_with_this_curve():
    outputs, targets = examples(200)
    task = Survival.made(NAMES, targets[:100], {"edges": EDGES})
    curve = torch.tensor(task.curve, dtype=torch.float64)
    hazards = 1 - curve / torch.cat([torch.ones(1), curve[:-1]])
    of_curve = measured(hazards.logit().expand(100, 3), targets[100:], task)
    assert of_curve["brier"] == pytest.approx(of_curve["brier_of_everyone"])
    np.testing.assert_allclose(of_curve["survival_by_edge"], task.curve)
    of_model = measured(outputs[100:], targets[100:], task)
    assert of_model["brier_of_everyone"] == pytest.approx(of_curve["brier"])


def test_concordance_and_brier_score_are_those_of_scikit_survival():
    metrics = pytest.importorskip("sksurv.metrics")
    nonparametric = pytest.importorskip("sksurv.nonparametric")
    outputs, targets = examples(400, whole=False)
    # One time in a bin, of at most 25, and no two equal ones.
    grid = Grid(EDGES)
    bins = np.unique(grid.bins(targets[:, 0]), return_index=True)[1]
    outputs, targets = outputs[bins], targets[bins]
    time, died = targets.double().numpy().T
    seen = died == 1
    y = np.array(list(zip(seen, time, strict=True)), dtype=[("died", bool), ("months", float)])
    found = measured(outputs, targets)
    within = seen & (time <= EDGES[-1])
    index = metrics.concordance_index_censored(within, time, -mean_times(outputs))[0]
    assert found["concordance"] == pytest.approx(index, abs=3e-3)
    _, scores = metrics.brier_score(y, y, curve_of(outputs)[:, 1:], EDGES)
    np.testing.assert_allclose(found["brier_by_edge"], scores, rtol=1e-6)
    at, lives = nonparametric.kaplan_meier_estimator(seen, time)
    expected = [lives[at <= edge][-1] for edge in EDGES]
    np.testing.assert_allclose(found["kaplan_meier_by_edge"], expected)


def test_median_and_mean_are_those_of_the_curve_drawn_as_a_line():
    task = Survival(NAMES, edges=(2.0, 4.0))
    hazards = torch.tensor([[0.25, 2 / 3], [0.1, 0.1], [1.0, 0.5]])
    found = task.answers(hazards.logit())
    # From 0.75 at 2 to 0.25 at 4, so one half at 3.
    torch.testing.assert_close(found[0], torch.tensor([3.0, 1.75 + 1.0]))
    assert found[1, 0] == torch.inf  # most live longer than 4 months
    torch.testing.assert_close(found[2], torch.tensor([1.0, 1.0]))
    assert task.answer_names == ("median months", "mean months until 4")


def test_the_edges_are_quantiles_of_public_event_times():
    times = torch.arange(1.0, 41)
    targets = torch.stack([times, (times % 2 == 0).float()], 1)
    assert Survival.made(NAMES, targets, {"intervals": 4}).edges == (10.0, 20.0, 30.0, 40.0)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([-1.0, 1.0], "times are negative ('months')"),
        ([2.0, 2.0], "events are not 0 or 1 ('died')"),
        ([2.0, 0.5], "events are not 0 or 1 ('died')"),
        ([float("nan"), 1.0], "NaN"),
    ],
)
def test_wrong_targets_are_refused_without_their_value(row, problem):
    with pytest.raises(DataError) as told:
        Survival(NAMES, edges=EDGES).check_targets(torch.tensor([[1.0, 1.0], row]))
    assert problem in str(told.value)
    assert "0.5" not in str(told.value), "a target may be private"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"intervals": 1}, "one interval has no survival curve"),
        ({"edges": [5]}, "one interval has no survival curve"),
        ({"edges": [0, 5, 9]}, "not ascending numbers above 0"),
        ({"edges": [5, 5]}, "not ascending numbers above 0"),
        ({"edges": [5, 9], "intervals": 3}, "leave it out"),
        ({"edges": 5}, "survival does not take"),
        ({"intervals": "many"}, "survival does not take"),
        ({"intervals": 2.5}, "no whole number"),
        ({"interval": 3}, "did you mean 'intervals'"),
    ],
)
def test_wrong_options_are_refused(options, problem):
    with pytest.raises(RecipeError) as told:
        tasks.make({"kind": "survival", **options}, NAMES, torch.ones(4, 2))
    assert problem in str(told.value)


@pytest.mark.parametrize(
    ("public", "options", "problem"),
    [
        ([[1.0, 0.0], [2.0, 0.0]], {}, "no public row has an event"),
        ([], {}, "no public row has an event"),
        ([[1.0, 1.0], [1.0, 1.0]], {}, "only 1 different quantiles"),
        ([[1.0, 1.0], [2.0, 1.0]], {"intervals": 3}, "set intervals = 2"),
    ],
)
def test_too_few_public_events_are_told_with_a_cure_that_works(public, options, problem):
    rows = torch.tensor(public).reshape(-1, 2)
    with pytest.raises(DataError) as told:
        tasks.make({"kind": "survival", **options}, NAMES, rows)
    assert problem in str(told.value)
    task = tasks.make({"kind": "survival", "edges": [6, 12, 24]}, NAMES, rows)
    assert task.outputs == 3


def test_one_column_of_targets_is_refused():
    with pytest.raises(DataError, match=r"^label_column: .*name both, time first"):
        Survival(("months",))


def test_useless_models_are_told_so():
    outputs, targets = examples(300)
    task = Survival.made(NAMES, targets, {"edges": EDGES})
    # The hazards by which the times were drawn.
    rates, widths = outputs[:, :1].exp() / 15, torch.tensor([3.0, 5.0, 12.0])
    outputs = (rates * widths).expm1().log()
    assert measured(outputs, targets, task)["concordance_warning"] is None
    assert "no better than chance" in measured(-outputs, targets, task)["concordance_warning"]
    sure = measured(outputs + 3, targets, task)["concordance_warning"]
    assert "the same survival curve for everyone" in sure
    nobody = measured(outputs[:1], targets[:1], task)["concordance_warning"]
    assert "no two test examples can be compared" in nobody


RECIPE = """
name = "trial"
seed = 2
[data]
source = "csv"
path = "{path}"
task = {task}
label_column = ["months", "died"]
partition = "iid"
num_clients = 3
public_share = 0.3
test_share = 0.2
[model]
architecture = "mlp"
arguments = {{ hidden = [8] }}
[[stage]]
kind = "train"
epochs = 12
batch_size = 16
lr = 0.1
[[stage]]
kind = "federate"
num_rounds = 3
batch_size = 16
lr = 0.05
"""


def table(path, first=None) -> None:
    """Writes a trial of 600 people, of whom those of higher age and dose die earlier."""
    chance = np.random.default_rng(0)
    x = chance.normal(size=(600, 2))
    months = np.ceil(chance.exponential(12 * np.exp(-x @ [1.0, 0.7])))
    until = chance.integers(1, 40, 600)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["age", "dose", "months", "died"])
        for at in range(600):
            told = int(min(months[at], until[at])), int(months[at] <= until[at])
            rows.writerow([*x[at], *(first if at == 0 and first else told)])


@pytest.mark.recipe
@pytest.mark.parametrize("private", [False, True])
def test_a_table_of_a_trial_trains_federates_and_predicts(private, tmp_path):
    table(tmp_path / "trial.csv")
    text = RECIPE.format(path=tmp_path / "trial.csv", task='"survival"') + private * PRIVATE
    train, federate = stages(text, tmp_path / "run")
    assert train["task"] == federate["task"] == "survival"
    assert train["concordance"] > 0.65
    assert train["brier"] < train["brier_of_everyone"]
    assert bool(federate["client_concordance"]) is not private
    found = fedpress.predict(tmp_path / "run", [{"age": 2.0, "dose": 1.0}, {"age": -2, "dose": -1}])
    names, rows = found.table()
    assert names[0] == "median months"
    assert names[2].startswith("probability of months > ")
    assert rows[0][0] < rows[1][0]
    assert rows[0][2:] == sorted(rows[0][2:], reverse=True)


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("first", "task", "problem"),
    [
        ((-3, 1), '"survival"', "times are negative"),
        ((3, 2), '"survival"', "events are not 0 or 1"),
        ((3, 1), '{ kind = "survival", intervals = 1 }', "one interval"),
    ],
)
def test_a_wrong_table_is_refused_with_a_cure(first, task, problem, tmp_path):
    table(tmp_path / "trial.csv", first)
    with pytest.raises(FedpressError, match=problem) as told:
        load_data(recipes.load(RECIPE.format(path=tmp_path / "trial.csv", task=task), ()))
    assert "; " in str(told.value)
