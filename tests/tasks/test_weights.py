"""Class weights: the loss of rare classes counts for more, by public numbers alone."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from fedpress import tasks
from fedpress.api.stages import train
from fedpress.core.canonical import canonical
from fedpress.core.examples import Arrays, Preprocess
from fedpress.data import DataSettings, load
from fedpress.errors import DataError, FedpressError, RecipeError
from fedpress.pipeline import recipe as recipes
from fedpress.privacy.per_example.gradients import clipped_gradient_sum
from fedpress.tasks import Binary, Classification, Multilabel, Poisson, Regression
from fedpress.training.evaluate import evaluate
from tests.harness import finish
from tests.tasks.test_all import made
from tests.tasks.test_privacy import CLIP, network_of, plainly

WEIGHTS = {
    "classification": (1.0, 3.0, 0.5),
    "binary": (0.5, 4.0),
    "multilabel": (3.0, 1.0, 0.2),
    "segmentation": (1.0, 3.0, 0.5),
}
SEEDS = (0, 1, 2)


def weighted(kind, n):
    task, outputs, targets = made(kind, n)
    return task.weighted(WEIGHTS[kind], targets), outputs, targets


def test_balanced_weights_are_those_of_scikit_learn():
    y = torch.randint(0, 3, (200,), generator=torch.Generator().manual_seed(0)).clamp_max(2)
    y[:120] = 0
    found = Classification(("a", "b", "c")).weighted("balanced", y).class_weights
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=y.numpy())
    np.testing.assert_allclose(found, wanted)
    assert sum(found[c] for c in y.tolist()) / len(y) == pytest.approx(1)


def test_the_loss_of_an_example_is_that_of_torch():
    task, outputs, targets = weighted("classification", 20)
    weight = torch.tensor(WEIGHTS["classification"])
    each = F.cross_entropy(outputs, targets, weight, reduction="none")
    torch.testing.assert_close(task.loss(outputs, targets, reduction="none"), each)
    smooth = F.cross_entropy(outputs, targets, weight, reduction="none", label_smoothing=0.1)
    found = task.smoothed(0.1).loss(outputs, targets, reduction="none")
    torch.testing.assert_close(found, smooth)

    task, outputs, targets = weighted("multilabel", 20)
    there = torch.tensor(WEIGHTS["multilabel"])
    each = F.binary_cross_entropy_with_logits(
        outputs, targets, pos_weight=there, reduction="none"
    ).mean(1)
    torch.testing.assert_close(task.loss(outputs, targets, reduction="none"), each)

    task, outputs, targets = weighted("binary", 20)
    each = F.binary_cross_entropy_with_logits(
        outputs[:, 0], targets.float(), pos_weight=torch.tensor(4.0 / 0.5), reduction="none"
    )
    torch.testing.assert_close(task.loss(outputs, targets, reduction="none"), 0.5 * each)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_an_example_weighs_the_same_whatever_stands_beside_it(kind):
    task, outputs, targets = weighted(kind, 7)
    each = task.loss(outputs, targets, reduction="none")
    alone = [task.loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(7)]
    torch.testing.assert_close(each, torch.stack(alone))
    torch.testing.assert_close(task.loss(outputs, targets), each.mean())
    torch.testing.assert_close(task.loss(outputs, targets, reduction="sum"), each.sum())


@pytest.mark.parametrize("method", ["loop", "vmap", "ghost"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weighted_gradients_are_clipped_one_by_one(kind, method):
    task, _, y = weighted(kind, 9)
    x = 3 * torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    model = network_of(task, y)
    found, _ = clipped_gradient_sum(model, task.loss, x, y, clip_norm=CLIP, method=method)
    torch.testing.assert_close(
        found, plainly(network_of(task, y), task, x, y), rtol=1e-4, atol=1e-5
    )


def test_positions_that_count_for_nothing_are_not_counted():
    task = Classification(("a", "b"))
    y = torch.tensor([[0, 0, -100], [0, 1, -100]])
    assert task.weighted("balanced", y).class_weights == pytest.approx((4 / 6, 2.0))
    loss = task.weighted((1.0, 2.0), y).loss(torch.zeros(2, 2, 3), y, reduction="none")
    torch.testing.assert_close(loss, math.log(2) * torch.tensor([1.0, 1.5]))


def test_balanced_labels_weigh_as_much_there_as_not_there():
    y = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    task = Multilabel(("a", "b")).weighted("balanced", y)
    assert task.class_weights == (3.0, 1.0)


@pytest.mark.parametrize("task", [Regression(("price",)), Poisson(("visits",))])
@pytest.mark.parametrize("given", ["balanced", (1.0,)])
def test_a_task_without_classes_says_why_it_has_no_weights(task, given):
    with pytest.raises(RecipeError, match="has no classes to weigh; leave it out"):
        task.weighted(given, torch.zeros(3, 1))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            (1.0,),
            r"1 weights for 2 classes \(no, yes\); give one for each, class_weights=\(1.0, 1.0",
        ),
        ((1.0, 0.0), "expected finite numbers above 0"),
        ((1.0, math.nan), "expected finite numbers above 0"),
        ("balancd", "class_weights: got 'balancd'; give class_weights=\"balanced\" or"),
        ("balanced", "no public example of class 'yes' to balance by; give a list"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_a_cure(given, said):
    for row in (Classification, Binary):
        with pytest.raises(FedpressError, match=said):
            row(("no", "yes")).weighted(given, torch.zeros(5, dtype=torch.int64))


def test_the_weights_are_part_of_what_sides_agree_on_and_of_the_name_of_the_noise():
    task = Classification(("a", "b"))
    assert canonical(task) != canonical(task.weighted((1.0, 2.0), torch.zeros(0)))


def test_results_tell_the_plain_loss():
    task, outputs, targets = weighted("classification", 12)
    arrays = Arrays(outputs, targets)
    plain = evaluate(nn.Identity(), arrays, Preprocess(), made("classification", 12)[0])
    assert evaluate(nn.Identity(), arrays, Preprocess(), task).loss == plain.loss


# Rows of a recipe: 10% of class 1 in the public part, half of the private ones.
def rows(path):
    chance = np.random.default_rng(0)
    y = {"public": chance.random(600) < 0.1}
    y |= {f"c{i}": chance.random(60) < 0.5 for i in range(3)}
    lines = ["a,b,who,label"]
    for who, labels in y.items():
        for label in labels:
            a, b = chance.normal(1.5 * label, 1.0, 2)
            lines.append(f"{a:.4f},{b:.4f},{who},{'yes' if label else 'no'}")
    path.write_text("\n".join(lines))
    return path, y["public"]


def settings_of(path, **more):
    return DataSettings(
        source="csv",
        path=path,
        client_column="who",
        public_clients=("public",),
        test_share=0.0,
        test_clients=("c2",),
        validation=0,
        **more,
    )


def test_private_rows_are_never_counted(tmp_path):
    path, public = rows(tmp_path / "rows.csv")
    found = load(settings_of(path, class_weights="balanced"), 0).task
    share = float(public.mean())
    assert found.class_weights == pytest.approx((0.5 / (1 - share), 0.5 / share))
    assert load(settings_of(path), 0).task.class_weights == ()
    given = load(settings_of(path, class_weights=(1.0, 7.0)), 0).task
    assert given.class_weights == (1.0, 7.0)


def test_a_recipe_names_its_key_where_weights_do_not_fit(shell, tiny_file):
    said = shell("check", tiny_file, "data.class_weights=[1.0,2.0]")
    assert said.code == 2
    assert "recipe.data.class_weights: 2 weights for 10 classes" in said.err
    said = shell("check", tiny_file, "data.class_weights=balanced", "data.task=regression")
    assert said.code == 2
    assert "recipe.data.class_weights: the task is regression, which has no classes" in said.err
    assert shell("check", tiny_file, "data.class_weights=balanced").code == 0


def test_a_recipe_without_weights_is_called_as_before(tiny):
    from fedpress.pipeline.keys import settings_of

    assert "class_weights" not in settings_of(recipes.load(tiny))["data"]
    with_weights = recipes.load(tiny, ["data.class_weights=balanced"])
    assert settings_of(with_weights)["data"]["class_weights"] == "balanced"


def imbalanced(seed, n=1500):
    """Two overlapping classes of which the second has 5% of the rows."""
    chance = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, generator=chance) < 0.05).long()
    x = torch.randn(n, 4, generator=chance) + 1.0 * y[:, None]
    return x, y


def recall(facts):
    [_, (missed, found)] = facts["confusion"]
    return found / (found + missed)


@pytest.mark.recipe
@pytest.mark.parametrize("seed", SEEDS)
def test_a_rare_class_is_found_more_often_with_weights(seed):
    torch.manual_seed(seed)
    model, data = nn.Linear(4, 2), imbalanced(seed)
    plain = train(model, data=data, epochs=5, batch_size=32)
    weighed = train(model, data=data, epochs=5, batch_size=32, class_weights="balanced")
    assert recall(weighed.after) > recall(plain.after) + 0.3
    assert weighed.after["balanced_accuracy"] > plain.after["balanced_accuracy"]


@pytest.mark.recipe
@pytest.mark.parametrize("seed", SEEDS)
def test_weights_reach_local_training_and_a_noised_one(seed, tmp_path):
    lines = ["a,b,who,label"]
    x, y = imbalanced(seed)
    for at, (row, label) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        lines.append(f"{row[0]:.4f},{row[1]:.4f},{at % 4},{'yes' if label else 'no'}")
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    text = f"""
name = "rare"
seed = {seed}
[data]
source = "csv"
path = "{tmp_path / "rows.csv"}"
client_column = "who"
public_clients = ["0"]
test_share = 0.3
[model]
architecture = "mlp"
arguments = {{ in_features = 2, hidden = [], num_classes = 2 }}
[[stage]]
kind = "federate"
num_rounds = 4
epochs = 3
lr = 0.3
"""
    found = {}
    for name, more in {
        "plain": "",
        "weighed": "",
        "private": 'privacy = { unit = "sample", noise_multiplier = 0.5, clip_norm = 10.0 }\n',
    }.items():
        weights = "" if name == "plain" else 'class_weights = "balanced"\n'
        whole = text.replace("[model]", f"{weights}[model]") + more
        found[name] = finish(whole, tmp_path / name)["final"]
    assert recall(found["weighed"]) > recall(found["plain"]) + 0.3
    assert recall(found["private"]) > recall(found["plain"]) + 0.3


def test_weights_of_data_in_memory_are_refused_for_a_regression():
    with pytest.raises(RecipeError, match=r"^class_weights: the task is regression, which has no"):
        train(nn.Linear(4, 1), data=(torch.randn(50, 4), torch.randn(50, 1)), epochs=1,
              class_weights="balanced")  # fmt: skip


def test_a_class_without_a_public_example_cannot_be_balanced():
    x, y = torch.randn(60, 4), torch.arange(60) % 2
    with pytest.raises(DataError, match="no public example of class '2' to balance by"):
        train(nn.Linear(4, 3), data=(x, y), epochs=1, class_weights="balanced")


def test_every_task_says_whether_it_weighs_classes():
    assert {kind for kind, row in tasks.TASKS.items() if row.weighs_classes} == WEIGHTS.keys()


@pytest.mark.recipe
def test_a_saved_model_of_two_classes_is_trained_on_with_weights(shell, tmp_path):
    x, y = imbalanced(0, 600)
    lines = [f"{a:.3f},{b:.3f},{label}" for (a, b, *_), label in zip(x, y.tolist(), strict=True)]
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,label", *lines]))
    data = ["--data", "csv", "--path", "rows.csv", "data.task=binary"]
    network = ["model.arguments={in_features=2, hidden=[], num_classes=1}", "epochs=2"]
    assert shell("train", "mlp", *data, *network, "--out", "first").code == 0
    again = ["train", "first", "epochs=5", "batch_size=32", "--json"]
    plain = shell(*again, "--out", "plain")
    weighed = shell(*again, "data.class_weights=balanced", "--out", "weighed")
    one, other = (json.loads(said.out)["after"] for said in (plain, weighed))
    assert recall(other) > recall(one) + 0.3
