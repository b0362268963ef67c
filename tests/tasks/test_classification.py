"""The metrics of a classification are what scikit-learn says, and a model that guesses is called one."""

import warnings

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from fedpress.tasks import Classification

NAMES = [f"class {n}" for n in range(10)]


def judged(logits, labels, names):
    task = Classification(tuple(names[: logits.shape[1]]))
    return task.summary(task.metrics(logits, labels))


def auc(logits, labels):
    return judged(logits, labels, NAMES)["auc"]


def random_case(classes: int, n: int = 300, *, ties: bool = False):
    chance = torch.Generator().manual_seed(classes)
    labels = (torch.rand(n, generator=chance) ** 2 * classes).long()
    logits = torch.randn(n, classes, generator=chance)
    logits[torch.arange(n), labels] += 0.7
    return (logits.round() if ties else logits), labels


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_numbers_are_those_of_scikit_learn(classes, ties):
    logits, labels = random_case(classes, ties=ties)
    found = judged(logits, labels, NAMES)
    p = logits.double().softmax(1).numpy()
    kind = (
        {"y_score": p[:, 1]}
        if classes == 2
        else {"y_score": p, "multi_class": "ovr", "average": "macro"}
    )
    assert found["auc"] == pytest.approx(roc_auc_score(labels.numpy(), **kind), abs=1e-3)
    expected = balanced_accuracy_score(labels.numpy(), logits.argmax(1).numpy())
    assert found["balanced_accuracy"] == pytest.approx(expected, abs=1e-12)
    assert found["majority_share"] == labels.bincount().max() / len(labels)


def test_classes_that_the_test_set_lacks_do_not_count():
    logits, labels = random_case(5)
    kept = labels != 3
    found = judged(logits[kept], labels[kept], NAMES)
    p, y = logits[kept].double().softmax(1).numpy(), labels[kept].numpy()
    assert found["auc"] == pytest.approx(
        sum(roc_auc_score(y == c, p[:, c]) for c in (0, 1, 2, 4)) / 4, abs=1e-3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = balanced_accuracy_score(y, p.argmax(1))
    recalls = [(p.argmax(1)[y == c] == c).mean() for c in (0, 1, 2, 4)]
    assert found["balanced_accuracy"] == pytest.approx(expected) == pytest.approx(sum(recalls) / 4)


def test_very_sure_logits_of_two_classes_are_still_ranked():
    logits = torch.tensor([[0.0, 100.0], [0.0, 200.0], [0.0, 300.0], [0.0, 400.0]])
    assert auc(logits, torch.tensor([0, 0, 1, 1])) == 1.0
    assert auc(-logits, torch.tensor([0, 0, 1, 1])) == 0.0


@pytest.mark.parametrize("answered", ["pneumonia", "normal"])
def test_a_model_with_one_answer_is_called_one(answered):
    labels = torch.tensor([1] * 91 + [0] * 9)
    logits = torch.zeros(100, 2)
    logits[:, ["normal", "pneumonia"].index(answered)] = 1
    found = judged(logits, labels, ["normal", "pneumonia"])
    assert found["accuracy_warning"] == (
        f"the model answers '{answered}' to all 100 test examples: it is no better than always answering 'pneumonia' "
        "(91.0% of the test examples)"
    )
    assert (found["majority_share"], found["balanced_accuracy"], found["auc"]) == (0.91, 0.5, 0.5)


@pytest.mark.parametrize(
    ("right", "warned"), [(905, True), (910, True), (915, True), (917, True), (920, False)]
)
def test_a_model_must_be_better_than_the_largest_class_by_more_than_its_standard_error(
    right, warned
):
    labels = torch.tensor([1] * 910 + [0] * 90)
    said = labels.clone()
    said[: 1000 - right - 1] = 0
    said[-1] = 1  # so that both kinds of mistakes occur
    warning = judged(torch.eye(2)[said], labels, ["normal", "pneumonia"])["accuracy_warning"]
    assert (warning is not None) == warned
    if warned:
        assert "no better than always answering 'pneumonia' (91.0% of the test examples)" in warning


def test_a_perfect_model_of_few_examples_is_not_called_a_guesser():
    assert judged(torch.eye(3), torch.arange(3), NAMES)["accuracy_warning"] is None


def test_a_test_set_of_one_class_has_no_auc_and_says_so():
    for classes in (1, 2, 4):
        found = judged(torch.randn(6, classes), torch.zeros(6, dtype=torch.long), NAMES)
        assert found["auc"] is None
        assert found["majority_share"] == 1.0
        assert "all 6 test examples are 'class 0'" in found["accuracy_warning"]


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_outputs_that_are_no_numbers_do_not_stop_anything(classes, value):
    logits, labels = random_case(classes)
    logits[5] = value
    found = judged(logits, labels, NAMES)
    assert found["auc"] is None
    assert 0 <= found["balanced_accuracy"] <= 1
    if value != value:
        assert (
            found["accuracy_warning"]
            == "the model's outputs are not numbers (NaN) on 1 of 300 test examples"
        )


def test_half_precision_outputs_are_taken():
    logits, labels = random_case(3)
    assert judged(logits.bfloat16(), labels, NAMES)["auc"] == pytest.approx(
        auc(logits, labels), abs=0.02
    )
