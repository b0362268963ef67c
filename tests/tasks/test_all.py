"""What holds for every task: one table of cases goes through all of them."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli, kl_divergence

from fedpress import tasks
from fedpress.core.outputs import spreads
from fedpress.errors import DataError, ModelError
from fedpress.tasks import Task, merged
from fedpress.tasks.base import IGNORED
from fedpress.tasks.classification import Classification


def flags(n, k, chance):
    return torch.randint(0, 2, (n, k), generator=chance).float()


def classes(n, k, chance):
    return torch.randint(0, k, (n,), generator=chance)


def numbers(n, k, chance):
    return 7 + 3 * torch.randn(n, k, generator=chance)


def counts(n, k, chance):
    return torch.poisson(torch.full((n, k), 3.0), generator=chance)


def tokens(n, k, chance):
    found = torch.randint(0, k, (n, 5), generator=chance)
    found[::2, 3:] = IGNORED  # every other sequence is shorter
    return found


def masks(n, k, chance):
    return torch.randint(0, k, (n, 3, 2), generator=chance)


def times(n, k, chance):
    months = 20 * torch.rand(n, generator=chance)
    died = torch.arange(n) % 3 < 2  # so that two public rows have two event times
    return torch.stack([months, died.float()], 1)


TARGETS = {"flags": flags, "classes": classes, "numbers": numbers, "poisson": counts}
TARGETS |= {"language": tokens, "segmentation": masks, "survival": times}
"""Makes targets of each kind; a task that takes only some of its kind has a row of its own."""

NAMES = {
    "classification": ("cat", "dog", "cow"),
    "binary": ("no", "yes"),
    "regression": ("price", "weight"),
    "forecast": ("now", "t+1", "t+2"),
    "survival": ("months", "died"),
}
"""Names that fit each task; three for one that is not here."""


def made(kind: str, n: int, seed: int = 0) -> tuple[Task, torch.Tensor, torch.Tensor]:
    """Returns a task, and outputs and targets of `n` examples."""
    names = NAMES.get(kind, ("a", "b", "c"))
    chance = torch.Generator().manual_seed(seed)
    row = tasks.TASKS[kind]
    targets = TARGETS.get(kind, TARGETS[row.targets])(n, len(names), chance)
    task = row.fit(names, targets[: n // 2])
    # Tasks with a class at each position have as many outputs at each of them.
    positions = targets.shape[1:] if row.targets == "classes" else ()
    return task, torch.randn(n, task.outputs, *positions, generator=chance), targets


def close(found, expected):
    """Compares two summaries; sums of floats may differ by rounding."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        floats = isinstance(value, list) and all(isinstance(one, float) for one in value)
        if isinstance(value, float) or floats:
            assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
        else:
            assert found[key] == value, key


every = pytest.mark.parametrize("kind", tasks.TASKS)


@every
def test_the_loss_of_a_batch_is_the_mean_of_its_examples_alone(kind):
    task, outputs, targets = made(kind, 7)
    each = task.loss(outputs, targets, reduction="none")
    assert each.shape == (7,)
    alone = [task.loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(7)]
    torch.testing.assert_close(each, torch.stack(alone))
    torch.testing.assert_close(task.loss(outputs, targets), each.mean())
    torch.testing.assert_close(task.loss(outputs, targets, reduction="sum"), each.sum())


@every
def test_the_loss_has_a_gradient_that_lowers_it(kind):
    task, outputs, targets = made(kind, 9)
    outputs.requires_grad_()
    before = task.loss(outputs, targets)
    before.backward()
    assert outputs.grad.isfinite().all()
    assert task.loss(outputs.detach() - 0.1 * outputs.grad, targets) < before


@pytest.mark.recipe
@every
@given(cuts=st.lists(st.integers(0, 40), max_size=4), seed=st.integers(0, 5))
def test_merged_sums_of_parts_give_the_metrics_of_the_whole(kind, cuts, seed):
    task, outputs, targets = made(kind, 40, seed)
    edges = [0, *sorted(cuts), 40]
    parts = [task.metrics(outputs[a:b], targets[a:b]) for a, b in itertools.pairwise(edges)]
    close(task.summary(merged(*parts)), task.summary(task.metrics(outputs, targets)))
    quick = [task.score_sums(outputs[a:b], targets[a:b]) for a, b in itertools.pairwise(edges)]
    assert task.score(merged(*quick)) == pytest.approx(
        task.score(task.score_sums(outputs, targets))
    )


@every
def test_the_score_is_the_primary_metric(kind):
    task, outputs, targets = made(kind, 50)
    found = task.summary(task.metrics(outputs, targets))
    assert task.score(task.score_sums(outputs, targets)) == pytest.approx(found[task.primary])
    assert task.shown_metrics[0].key == task.primary
    assert {*found} == {*task.keys}
    assert {w.key for w in task.shown_metrics} <= {*found, "loss"}


@every
def test_nothing_to_measure_on_gives_no_number(kind):
    task, outputs, targets = made(kind, 4)
    found = task.summary(task.metrics(outputs[:0], targets[:0]))
    assert found[task.primary] in (None, 0.0)  # torchmetrics says 0 of the F1 of nothing
    assert not any(isinstance(v, float) and math.isnan(v) for v in found.values())


@every
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_no_numbers_stop_nothing_and_are_told(kind, value):
    task, outputs, targets = made(kind, 30)
    outputs[3] = value
    found = task.summary(task.metrics(outputs, targets))
    assert not any(isinstance(v, float) and not math.isfinite(v) for v in found.values())
    if math.isnan(value):
        warnings = [v for k, v in found.items() if k.endswith("_warning")]
        assert "1 of 30 test examples" in warnings[0]


@every
def test_one_example_is_measured(kind):
    task, outputs, targets = made(kind, 8)
    found = task.summary(task.metrics(outputs[:1], targets[:1]))
    assert {*found} == {*task.keys}


@every
def test_any_number_is_better_than_none_and_the_direction_is_kept(kind):
    task, _, _ = made(kind, 4)
    good, bad = (0.9, 0.1) if task.higher_is_better else (0.1, 0.9)
    assert task.better(good, bad)
    assert not task.better(bad, good)
    assert not task.better(good, good)
    assert task.better(bad, None)
    assert not task.better(math.nan, bad)
    assert task.better(bad, math.nan)


@every
def test_a_network_of_another_width_is_refused_with_the_number_that_fits(kind):
    task, outputs, targets = made(kind, 4)
    task.check(outputs, targets)
    wrong = torch.cat([outputs, outputs], 1)
    with pytest.raises(ModelError, match=rf"^outputs: .*make it return {task.outputs} numbers"):
        task.check(wrong, targets)
    with pytest.raises(ModelError, match=r"^outputs: gives outputs list"):
        task.check([outputs], targets)


@every
def test_targets_of_another_kind_are_refused(kind):
    task, _, targets = made(kind, 4)
    with pytest.raises(DataError, match=r"^targets: .*; "):
        task.check_targets(targets.double())
    with pytest.raises(DataError, match=r"^targets: .*; "):
        task.check_targets(targets.reshape(4, -1, 1, 1).expand(4, -1, 2, 2).to(torch.complex64))


@every
def test_targets_to_try_a_network_with_belong_to_the_task(kind):
    task, _, targets = made(kind, 4)
    found = task.made_up_targets(7, targets)
    assert found.shape == (7, *targets.shape[1:])
    task.check_targets(found)


@every
def test_example_targets_belong_to_outputs(kind):
    task, outputs, targets = made(kind, 4)
    found = task.example_targets(outputs)
    task.check(outputs, found)
    assert found.dtype == targets.dtype
    assert found.reshape(4, -1).shape == targets.reshape(4, -1).shape


@every
def test_a_task_is_made_again_from_what_a_saved_model_says(kind):
    task, outputs, targets = made(kind, 6)
    again = tasks.of_model(json.loads(json.dumps(task.to_json())), task.names)
    assert again == task
    close(
        again.summary(again.metrics(outputs, targets)), task.summary(task.metrics(outputs, targets))
    )


@every
def test_a_student_equal_to_its_teacher_has_the_least_soft_loss(kind):
    task, outputs, _ = made(kind, 6)
    equal = task.soft_loss(outputs, outputs, 2.0)
    assert equal < task.soft_loss(outputs + torch.randn_like(outputs), outputs, 2.0)


@every
def test_the_divergence_is_0_for_equal_outputs_and_grows_with_their_distance(kind):
    task, outputs, _ = made(kind, 40)
    spread = spreads([outputs])
    change = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3))
    at = [float(task.divergence(outputs + size * change, outputs, spread)) for size in (0, 0.1, 1)]
    assert at[0] == 0
    # It is quadratic near 0, so that one of many small changes is not lost among large ones.
    assert 0 < 10 * at[1] < at[2]


@pytest.mark.parametrize("kind", ["binary", "multilabel", "survival"])
def test_the_divergence_of_flags_is_that_of_bernoulli_variables(kind):
    task, outputs, _ = made(kind, 20)
    _, others, _ = made(kind, 20, seed=1)
    of_torch = kl_divergence(Bernoulli(logits=outputs), Bernoulli(logits=others)).mean()
    torch.testing.assert_close(task.divergence(others, outputs, [1.0]), of_torch)


@pytest.mark.parametrize("kind", ["regression", "poisson", "forecast"])
def test_the_divergence_of_numbers_is_a_share_of_their_variance(kind):
    task, outputs, _ = made(kind, 200)
    constant = outputs.mean(0).expand_as(outputs)
    # A network that says the mean to everybody has lost all of the variance, in any unit.
    for unit in (1, 1e4):
        found = task.divergence(unit * constant, unit * outputs, spreads([unit * outputs]))
        assert float(found) == pytest.approx(1, rel=1e-5)


def test_the_spread_of_outputs_is_that_of_all_batches_together():
    chance = torch.Generator().manual_seed(0)
    whole = {
        "boxes": 5 + torch.randn(70, 3, 4, generator=chance),
        "kinds": torch.ones(70, 2, dtype=torch.int64),
        "constant": torch.full((70, 2), 0.1),
    }
    parts = [{key: part[rows] for key, part in whole.items()} for rows in
             (slice(0, 1), slice(1, 60), slice(60, 70))]  # fmt: skip
    by_hand = whole["boxes"].double().var(0, correction=0).mean().sqrt()
    assert spreads(parts) == pytest.approx([float(by_hand), 1, 1])


def test_positions_that_are_padding_count_for_nothing():
    task = Classification(("a", "b"))
    chance = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 2, 5, generator=chance)
    targets = torch.randint(0, 2, (3, 5), generator=chance)
    targets[0, 2:] = IGNORED
    other = outputs.clone()
    other[0, :, 2:] += 100
    task.check(outputs, targets)
    torch.testing.assert_close(task.loss(outputs, targets), task.loss(other, targets))
    assert task.summary(task.metrics(outputs, targets)) == task.summary(
        task.metrics(other, targets)
    )
    alone = task.loss(outputs[:1, :, :2], targets[:1, :2])
    torch.testing.assert_close(task.loss(outputs, targets, reduction="none")[0], alone)


def test_a_line_without_a_task_is_of_a_classification():
    assert tasks.task_of({"accuracy": 0.5}) is Classification
    assert tasks.task_of({"task": "regression"}).shown_metrics[0].key == "mae"


@pytest.mark.recipe
@every
def test_a_standard_error_is_the_spread_between_draws_of_the_test_set(kind):
    """By the bootstrap (Efron 1979): the metric on many draws of as many examples, with replacement."""
    task, outputs, targets = made(kind, 300)
    found = task.summary(task.metrics(outputs, targets))
    with_error = [metric.key for metric in task.shown_metrics if f"{metric.key}_error" in found]
    # A task without a simple formula leaves the key out; also the task of the page does.
    assert (task.primary in with_error) == (kind not in ("multilabel", "segmentation", "quantile"))
    chance = torch.Generator().manual_seed(1)
    draws = [torch.randint(0, 300, (300,), generator=chance) for _ in range(300)]
    scores = [task.summary(task.metrics(outputs[drawn], targets[drawn])) for drawn in draws]
    for key in with_error:
        spread = torch.tensor([score[key] for score in scores]).std().item()
        assert found[f"{key}_error"] == pytest.approx(spread, rel=0.2), key


@every
def test_a_standard_error_of_one_example_or_of_broken_outputs_is_no_number(kind):
    task, outputs, targets = made(kind, 6)
    for some in (slice(0, 0), slice(0, 1)):
        error = task.summary(task.metrics(outputs[some], targets[some])).get(
            f"{task.primary}_error"
        )
        assert error is None or error == 0
    broken = torch.full_like(outputs, math.nan)
    error = task.summary(task.metrics(broken, targets)).get(f"{task.primary}_error")
    assert error is None or math.isfinite(error)


def test_answers_for_several_positions_of_one_example_have_no_binomial_error():
    task = Classification(("a", "b"))
    targets = torch.zeros(5, 7, dtype=torch.int64)
    targets[0, 0] = 1
    found = task.summary(task.metrics(torch.randn(5, 2, 7), targets))
    assert found["accuracy"] is not None
    assert found["accuracy_error"] is None
