"""Clients that are trained in one program end where `plain_steps` brings each of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedpress.codecs import Key
from fedpress.core import parameters
from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.inputs import NamedInputs
from fedpress.errors import DivergedError
from fedpress.federation import LocalSettings
from fedpress.federation.local import LocalPlan, LocalWork, plain_steps, training_mode
from fedpress.federation.private import private_steps
from fedpress.federation.stacked import CannotStackError, Training, computed, train_together
from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import quantize_layers_
from fedpress.stages.federate.contract import Prepare
from fedpress.tasks import Classification
from fedpress.training.augment import Augment
from tests.federation.federation import SAMPLE_PLAN

GOAL = Classification(("a", "b", "c"))
SIZES = (7, 16, 5, 16, 1)
"""Numbers of examples: unequal, two equal ones, and a client with a single batch of one."""


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.ReLU(), nn.Linear(9, 3))


def group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 2, groups=2),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )


class Unused(nn.Module):
    """Has a parameter that the loss does not depend on, and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 5)
        self.spare = nn.Linear(4, 4)
        self.last = nn.Linear(5, 3)
        self.first.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x.flatten(1))))


class Branches(nn.Module):
    """Its way depends on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(48, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.only(x if x.mean() > 0 else -x)


NETWORKS = {"mlp": mlp, "group": group_norm, "batch": batch_norm, "unused": Unused}


def examples(n: int, seed: int) -> Arrays:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=chance)
    return Arrays(x, torch.randint(0, 3, (n,), generator=chance))


def trainings(make, sizes=SIZES, *, norm="frozen", how=None, arrays=None, **settings):
    """Returns trainings of clients with so many examples, and their model."""
    torch.manual_seed(3)
    model = make()
    model(torch.zeros(2, 3, 4, 4))
    settings = {"batch_size": 4, "lr": 0.05, "epochs": 2} | settings
    prepare = Prepare(Preprocess((0.5,), (0.25,)), how or Augment())
    plan = LocalPlan(LocalSettings(**settings), prepare, GOAL)
    data = arrays or [examples(n, seed) for seed, n in enumerate(sizes)]
    start = parameters.flatten(model)
    works = []
    for index, own in enumerate(data):
        works.append(LocalWork(own, Key(1, 2, f"c{index}"), plan, start))
    return [Training(model, work, norm, False) for work in works], model


def alone(training: Training):
    """Trains one client as the other engines do; returns its update and measures."""
    model, work = training.model, training.work
    parameters.assign_(model, work.start)
    with training_mode(model, norm=training.norm, seed=0):
        run = work.begin(model).finish()
        found = run.update(), run.measures
    parameters.assign_(model, work.start)
    return found


def assert_same(given, *, rtol=1e-3, atol=1e-6, loss=1e-4):
    expected = [alone(training) for training in given]
    for (update, measures), found in zip(expected, train_together(given), strict=True):
        assert update.abs().max() > 1e-3
        torch.testing.assert_close(found.update, update, rtol=rtol, atol=atol)
        assert found.measures["steps"] == measures["steps"]
        assert found.measures["loss"] == pytest.approx(measures["loss"], rel=loss)


OPTIMIZERS = {
    "sgd": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "adam": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_stack_ends_where_each_client_ends_alone(network, optimizer):
    given, model = trainings(NETWORKS[network], **OPTIMIZERS[optimizer])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Adam divides by the size of a gradient: where that is small, rounding is not.
    atol = 1e-4 if optimizer.startswith("adam") else 1e-6
    assert_same(given, atol=atol)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_batch_statistics_stay_in_the_client():
    given, model = trainings(batch_norm, (8, 6, 8), norm="batch")
    before = [buffer.clone() for buffer in model.buffers()]
    assert_same(given)
    for buffer, was in zip(model.buffers(), before, strict=True):
        assert torch.equal(buffer, was)


def test_each_clients_augmentation_follows_its_own_stream():
    how = Augment(crop=0.25, flip="random", cutout=0.25)
    given, _ = trainings(mlp, how=how)
    plain, _ = trainings(mlp)
    assert_same(given)
    assert not torch.allclose(train_together(given)[0].update, train_together(plain)[0].update)


def test_several_inputs_are_stacked_by_name():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 3), nn.Linear(2, 3)

        def forward(self, a=None, b=None):
            return self.one(a) + self.two(b)

    data = []
    for n in (3, 8):
        x = NamedInputs({"a": torch.randn(n, 5), "b": torch.randn(n, 2)})
        data.append(Arrays(x, torch.arange(n) % 3))
    given, _ = trainings(lambda: _Ignoring(Sum()), arrays=data)
    prepare = Prepare(Preprocess(), Augment())
    given = [with_plan(training, prepare=prepare) for training in given]
    assert_same(given)


class _Ignoring(nn.Module):
    """Takes the tensor of `trainings`' first call, too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x=None, a=None, b=None):
        return x if a is None else self.inner(a, b)


def with_plan(training: Training, **changes) -> Training:
    work = training.work
    return replace(training, work=replace(work, plan=replace(work.plan, **changes)))


def test_bfloat16_is_used_where_the_settings_ask_for_it():
    given, _ = trainings(group_norm, precision="bf16")
    wide, _ = trainings(group_norm)
    for training, other, found in zip(given, wide, train_together(given), strict=True):
        narrow, precise = alone(training)[0], alone(other)[0]
        # As far from float32 as the client alone, and not further from it than both.
        assert 0.3 < (found.update - precise).norm() / (narrow - precise).norm() < 3
        assert (found.update - narrow).norm() < 2 * (narrow - precise).norm()


def test_clients_may_start_from_different_models():
    given, _ = trainings(mlp, (8, 8))
    moved = replace(given[1].work, start=given[1].work.start + 0.1)
    assert_same([given[0], replace(given[1], work=moved)])


def test_each_client_has_its_own_dropout_masks_and_the_same_ones_again():
    def dropped() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 3))

    one = examples(4, 0)
    given, _ = trainings(dropped, arrays=[one, one], epochs=1)
    # The same client twice, so that only the masks can differ.
    given[1] = replace(given[1], work=given[0].work)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first, second = train_together(given)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.allclose(first.update, second.update)
    again = train_together(given)
    assert torch.equal(first.update, again[0].update)


def test_a_diverged_client_fails_as_alone_and_the_others_go_on():
    given, _ = trainings(mlp, (8, 8, 8))
    broken = examples(8, 1).x.float()
    broken[5] = float("nan")
    arrays = Arrays(broken, given[1].work.arrays.y)
    whole = Arrays(examples(8, 0).x.float(), given[0].work.arrays.y)
    given[0] = replace(given[0], work=replace(given[0].work, arrays=whole))
    given[1] = replace(given[1], work=replace(given[1].work, arrays=arrays))
    given[2] = replace(given[2], work=replace(given[2].work, arrays=whole))
    expected = alone(given[0])[0]
    with pytest.raises(DivergedError) as alone_error:
        alone(given[1])
    found = train_together(given)
    torch.testing.assert_close(found[0].update, expected, rtol=1e-3, atol=1e-6)
    assert str(found[1]) == str(alone_error.value)
    assert "correct the examples" in str(found[1])


def test_a_computed_outcome_takes_no_steps():
    (training, *_), model = trainings(mlp)
    outcome = train_together([training])[0]
    work = replace(training.work, plan=replace(training.work.plan, source=computed(outcome)))
    run = work.begin(model)
    assert list(run) == []
    assert torch.equal(run.update(), outcome.update)
    assert run.measures == outcome.measures
    with pytest.raises(DivergedError, match="too far"):
        list(computed(DivergedError("too far"))(model, work))


def test_a_network_whose_way_depends_on_values_cannot_be_stacked():
    given, model = trainings(Branches)
    before = parameters.flatten(model)
    with pytest.raises(CannotStackError, match=r"torch says: .*data-dependent control flow"):
        train_together(given)
    assert torch.equal(parameters.flatten(model), before)


def test_a_network_that_changes_a_buffer_with_its_input_cannot_be_stacked():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(48, 3)
            self.register_buffer("mean", torch.zeros(48))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            return self.only(x - self.mean)

    given, model = trainings(Counting)
    before = model.mean.clone()
    with pytest.raises(CannotStackError, match="torch says"):
        train_together(given)
    assert torch.equal(model.mean, before)


def test_a_batch_of_one_example_is_no_batch_for_a_batch_norm():
    def one_value() -> nn.Module:
        layers = nn.Conv2d(3, 6, 4), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 3)
        return nn.Sequential(*layers)

    given, _ = trainings(one_value, (8, 1), norm="batch")
    with pytest.raises(CannotStackError, match="more than 1 value per channel"):
        train_together(given)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"privacy": SAMPLE_PLAN}, "unit 'sample'"),
        ({"source": private_steps}, "another function than plain_steps"),
    ],
)
def test_other_gradients_cannot_be_stacked(changes, reason):
    (training, *_), _ = trainings(mlp)
    training.check()
    with_plan(training, source=plain_steps).check()
    with pytest.raises(CannotStackError, match=reason):
        with_plan(training, **changes).check()
    with pytest.raises(CannotStackError, match="corrects the gradients"):
        replace(training, corrects_gradients=True).check()


LEVELS = {
    "integers": QuantizationScheme(weights=WeightQuantization(bits=4), inputs=InputQuantization()),
    "groups": QuantizationScheme(weights=WeightQuantization(bits=3, group=4)),
    "ternary": QuantizationScheme(weights=WeightQuantization(kind="ternary")),
    "codebook": QuantizationScheme(weights=WeightQuantization(kind="codebook", bits=2)),
}


@pytest.mark.parametrize("levels", LEVELS)
def test_quantized_layers_are_stacked(levels):
    def quantized() -> nn.Module:
        model = mlp()
        quantize_layers_(model, {"1": LEVELS[levels]})
        return model

    given, _ = trainings(quantized, weight_decay=0.1)
    assert_same(given)
