"""The metrics that torchmetrics or scikit-learn know are what they say."""

import warnings
from dataclasses import replace

import pytest
import torch
import torchmetrics.classification as theirs
from sklearn import metrics as sk
from torchmetrics import CalibrationError, SpearmanCorrCoef
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from fedpress.errors import RecipeError
from fedpress.tasks import Binary, Multilabel, Regression, make, of_model, ranking
from fedpress.tasks.classification import Classification
from fedpress.tasks.library import library_sums
from tests.tasks.test_all import made


def measured(task, outputs, targets):
    return task.summary(task.metrics(outputs, targets))


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_those_of_a_classification(classes):
    chance = torch.Generator().manual_seed(classes)
    labels = (torch.rand(500, generator=chance) ** 2 * classes).long()
    logits = torch.randn(500, classes, generator=chance) * 2
    logits[torch.arange(500), labels] += 1
    found = measured(Classification(tuple("abcdefg"[:classes])), logits, labels)
    f1 = theirs.MulticlassF1Score(classes, average="macro")(logits, labels)
    assert found["macro_f1"] == pytest.approx(float(f1), abs=1e-6)
    error = CalibrationError(task="multiclass", num_classes=classes, n_bins=15)(logits, labels)
    assert found["calibration_error"] == pytest.approx(float(error), abs=1e-6)
    said = sk.confusion_matrix(labels.numpy(), logits.argmax(1).numpy())
    assert found["confusion"] == said.tolist()


def test_those_of_a_binary_task_at_its_threshold():
    chance = torch.Generator().manual_seed(3)
    labels = (torch.rand(800, generator=chance) < 0.22).long()
    logits = torch.randn(800, 1, generator=chance) + labels[:, None] - 1
    for threshold in (0.5, 0.3):
        found = measured(Binary(("no", "yes"), threshold), logits, labels)
        p = logits[:, 0].sigmoid()
        answers = (p >= threshold).long().numpy()
        y = labels.numpy()
        assert found["auc"] == pytest.approx(sk.roc_auc_score(y, p.numpy()), abs=2e-4)
        assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, answers))
        assert found["f1"] == pytest.approx(sk.f1_score(y, answers))
        assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, answers))
        loss = Binary(("no", "yes")).loss(logits, labels)
        assert float(loss) == pytest.approx(sk.log_loss(y, p.numpy()), rel=1e-5)


def test_the_mean_cost_counts_false_alarms_and_misses():
    chance = torch.Generator().manual_seed(8)
    labels = (torch.rand(900, generator=chance) < 0.3).long()
    logits = torch.randn(900, 1, generator=chance) + labels[:, None] - 1
    task = Binary(("no", "yes"), 0.3, costs=(2.0, 7.0))
    answers = (logits[:, 0].sigmoid() >= 0.3).long().numpy()
    (_, alarms), (misses, _) = sk.confusion_matrix(labels.numpy(), answers)
    found = measured(task, logits, labels)
    assert found["mean_cost"] == pytest.approx((2 * alarms + 7 * misses) / 900)
    assert measured(Binary(("no", "yes")), logits, labels)["mean_cost"] is None


def test_costs_set_the_cheapest_threshold():
    """Of right probabilities: no threshold of a fine grid costs less, beyond chance."""
    chance = torch.Generator().manual_seed(9)
    p = torch.rand(200_000, generator=chance)
    labels = (torch.rand(200_000, generator=chance) < p).long()
    logits = p.logit()[:, None]
    made = make({"kind": "binary", "costs": [1, 4]}, ("no", "yes"), labels)
    assert made.threshold == 0.2
    costs = {
        t: measured(replace(made, threshold=t), logits, labels)["mean_cost"]
        for t in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
    }
    assert min(costs, key=costs.get) == 0.2
    # Who gives a threshold means it.
    own = make({"kind": "binary", "costs": [1, 4], "threshold": 0.5}, ("no", "yes"), labels)
    assert own.threshold == 0.5
    assert of_model(own.to_json(), ()) == own


@pytest.mark.parametrize("wrong", [[1], [1, 0], [1, -2], [1, 2, 3], [1, float("inf")]])
def test_costs_are_two_positive_numbers(wrong):
    with pytest.raises(RecipeError, match=r"give two positive numbers"):
        make({"kind": "binary", "costs": wrong}, ("no", "yes"), torch.zeros(3).long())


@pytest.mark.parametrize("wrong", ["five", 5, ["a", "b"]])
def test_costs_of_another_type_are_refused(wrong):
    with pytest.raises(RecipeError, match="costs"):
        make({"kind": "binary", "costs": wrong}, ("no", "yes"), torch.zeros(3).long())


@pytest.mark.parametrize("specificity", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_the_sensitivity_is_that_of_the_roc_curve(specificity):
    chance = torch.Generator().manual_seed(4)
    labels = (torch.rand(3000, generator=chance) < 0.3).long()
    logits = torch.randn(3000, 1, generator=chance) + 1.5 * labels[:, None] - 1
    found = measured(Binary(("no", "yes"), specificity=specificity), logits, labels)
    fpr, tpr, _ = sk.roc_curve(labels.numpy(), logits[:, 0].numpy(), drop_intermediate=False)
    # Scores in one bin are not told apart, which moves a point of the curve by a few examples.
    expected = tpr[fpr <= 1 - specificity + 1e-12].max()
    assert found["sensitivity"] == pytest.approx(expected, abs=4e-3)


def test_there_is_no_sensitivity_without_both_classes():
    for labels in (torch.zeros(5).long(), torch.ones(5).long()):
        assert measured(Binary(("no", "yes")), torch.randn(5, 1), labels)["sensitivity"] is None


def test_a_specificity_is_a_share():
    with pytest.raises(RecipeError, match=r"specificity is 90.*a share from 0 to 1"):
        Binary(("no", "yes"), specificity=90)


def test_those_of_a_multilabel_task():
    task, logits, flags = made("multilabel", 300)
    found = measured(task, logits, flags)
    y, answers = flags.numpy(), (logits > 0).numpy()
    assert found["macro_f1"] == pytest.approx(sk.f1_score(y, answers, average="macro"))
    assert found["micro_f1"] == pytest.approx(sk.f1_score(y, answers, average="micro"))
    assert found["exact_match"] == pytest.approx(sk.accuracy_score(y, answers))
    assert found["auc"] == pytest.approx(sk.roc_auc_score(y, logits.numpy()), abs=2e-4)
    assert found["f1_by_label"] == pytest.approx(list(sk.f1_score(y, answers, average=None)))
    areas = sk.roc_auc_score(y, logits.numpy(), average=None)
    assert found["auc_by_label"] == pytest.approx(list(areas), abs=5e-4)
    assert Multilabel(("a", "b", "c")).targets == "flags"


def test_a_label_that_no_example_has_has_no_auc_and_no_f1():
    logits = torch.tensor([[3.0, -1.0], [-2.0, -1.0], [1.0, -2.0]])
    flags = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    found = measured(Multilabel(("a", "b")), logits, flags)
    assert (found["auc"], found["auc_by_label"]) == (1.0, [1.0, None])
    assert found["f1_by_label"] == [1.0, None]
    logits[0, 1] = torch.nan
    assert measured(Multilabel(("a", "b")), logits, flags)["auc_by_label"] == [None, None]


@pytest.mark.parametrize("width", [1, 3])
def test_those_of_a_regression_in_the_units_of_its_targets(width):
    chance = torch.Generator().manual_seed(width)
    y = 80 + 25 * torch.randn(200, width, generator=chance)
    task = Regression.fit(("a", "b", "c")[:width], y[:100])
    outputs = (y - 80) / 25 + 0.3 * torch.randn(200, width, generator=chance)
    found = measured(task, outputs, y)
    said = task.to_targets(outputs.double())
    expected = {
        "mae": MeanAbsoluteError(),
        "r2": R2Score(),
        "rmse": MeanSquaredError(squared=False),
    }
    for key, metric in expected.items():
        metric.set_dtype(torch.float64)
        assert found[key] == pytest.approx(float(metric(said, y.double())), rel=1e-9), key
    assert found["r2"] == pytest.approx(sk.r2_score(y.numpy(), said.numpy()), rel=1e-6)
    assert found["mae_warning"] is None


def test_a_regression_that_answers_the_mean_is_told_so():
    y = torch.tensor([1.0, 2.0, 3.0, 4.0])
    task = Regression.fit(("x",), y)
    found = measured(task, torch.zeros(4, 1), y)
    assert found["mae"] == found["mae_of_mean"] == 1.0
    assert "no better than always answering the mean of the public part (1)" in found["mae_warning"]


def test_a_regression_without_public_targets_learns_in_their_own_units():
    task = Regression.fit(("x",), torch.zeros(0))
    assert float(task.loss(torch.tensor([[3.0]]), torch.tensor([5.0]))) == 4.0
    assert measured(task, torch.tensor([[3.0]]), torch.tensor([5.0]))["mae_of_mean"] is None


def test_targets_that_are_all_equal_are_no_division_by_zero():
    task = Regression.fit(("x",), torch.full((5,), 2.0))
    assert (task.mean, task.std) == ((2.0,), (1.0,))


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_the_area_in_bins_is_the_exact_one_but_for_ties(scale):
    chance = torch.Generator().manual_seed(0)
    positive = torch.rand(1000, 2, generator=chance) < 0.3
    scores = (torch.randn(1000, 2, generator=chance) + positive) * scale
    found = ranking.aucs(ranking.score_counts(scores, positive))
    for k in range(2):
        exact = sk.roc_auc_score(positive[:, k].numpy(), scores[:, k].numpy())
        assert float(found[k]) == pytest.approx(exact, abs=3e-4)


def test_a_metric_whose_states_are_no_sums_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it keeps all examples
        with pytest.raises(TypeError, match="is no sum"):
            library_sums(lambda: {"rank": SpearmanCorrCoef()}, torch.ones(2), torch.ones(2))


@pytest.mark.parametrize(("positives", "negatives"), [(140, 130), (40, 200)])
def test_the_error_of_a_sensitivity_is_the_spread_between_test_sets(positives, negatives):
    """Each test set is drawn anew, so its threshold varies too: twice the binomial error here."""
    chance = torch.Generator().manual_seed(0)
    positive = (torch.arange(positives + negatives) < positives)[:, None]
    found, errors = [], []
    for _ in range(300):
        scores = torch.randn(positive.shape, generator=chance) + 1.2 * positive
        counts = ranking.score_counts(scores, positive)
        found.append(float(ranking.sensitivity(counts, 0.9)[0]))
        errors.append(ranking.sensitivity_standard_error(counts, 0.9))
    assert torch.tensor(errors).mean() == pytest.approx(torch.tensor(found).std().item(), rel=0.15)


def test_a_sensitivity_without_negatives_has_no_error():
    counts = ranking.score_counts(torch.randn(9, 1), torch.ones(9, 1, dtype=torch.bool))
    assert ranking.sensitivity_standard_error(counts, 0.9) is None
