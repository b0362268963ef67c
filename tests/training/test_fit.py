"""The training loop: against plain loops, stopped and taken up, and what it refuses on its way."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn

from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.random_source import public_stream
from fedpress.errors import DivergedError, TrainingError
from fedpress.training.evaluate import evaluate
from fedpress.training.fit import Step
from fedpress.training.settings import TrainSettings
from tests.chance import generator
from tests.training.trainings import (
    CHANGES,
    NONE,
    PREPROCESS,
    TASK,
    assert_close,
    assert_same,
    batches,
    fit_all,
    fitting,
    images,
    network,
    rates,
    settings,
)


def smoothed(logits, labels, smoothing):
    log = logits.log_softmax(1)
    right = log[torch.arange(len(labels)), labels]
    return -((1 - smoothing) * right + smoothing * log.mean(1)).mean()


def plain_training(model, data, s, seed):
    """Nesterov's SGD as slowly and plainly as it can be written."""
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    losses = []
    for index, rate in zip(batches(s, len(data), seed), rates(s, len(data)), strict=True):
        loss = smoothed(model(PREPROCESS(data.x[index])), data.y[index], s.label_smoothing)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(loss.item())
        with torch.no_grad():
            for (name, p), g in zip(model.named_parameters(), grads, strict=True):
                g = g + s.weight_decay * p if p.dim() > 1 else g
                velocity[name] = s.momentum * velocity[name] + g
                p -= s.lr * rate * (g + s.momentum * velocity[name])
    return losses


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mlp", {"momentum": 0.0, "warmup": 0.0, "weight_decay": 0.0}),
        ("mlp", {"label_smoothing": 0.2, "weight_decay": 0.1}),
        ("cnn", {"weight_decay": 0.01, "warmup": 0.5}),
        ("resnet", {"lr": 0.01, "label_smoothing": 0.1}),
        ("mlp", {"batch_size": 100}),  # more than there are: one step of all
        ("mlp", {"batch_size": 7}),  # the rest of 3 examples is left for another epoch
    ],
)
def test_training_equals_a_plain_loop(kind, changes):
    s, data, model = settings(**changes), images(), network(kind)
    twin = copy.deepcopy(model).train()
    records = fit_all(fitting(model, s, seed=4), data)
    losses = plain_training(twin, data, s, seed=4)
    assert_close(model, twin)
    means = np.reshape(losses, (s.epochs, -1)).mean(1)
    assert [r.loss for r in records] == pytest.approx(list(means), abs=1e-5)
    assert [(r.epoch, r.epochs, r.score, r.image_size) for r in records] == [
        (e, 3, None, 8) for e in (1, 2, 3)
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "adamw"])
def test_frozen_parameters_stay(optimizer):
    model = network("resnet")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("stages.1"))
    before = copy.deepcopy(model.state_dict())
    fit_all(fitting(model, settings(optimizer=optimizer, epochs=1), seed=0), images())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is not name.startswith("stages.1"), name


def test_averaged_weights_are_what_their_definition_says():
    model, s = network("resnet"), settings(ema=0.7)
    fit, expected = fitting(model, s, seed=0), None
    for event in fit.epochs(images(), NONE, PREPROCESS):
        if isinstance(event, Step):
            now = {k: v.double() for k, v in model.state_dict().items() if v.is_floating_point()}
            expected = expected or now
            expected = {k: 0.7 * expected[k] + 0.3 * now[k] for k in now}
    last = copy.deepcopy(model.state_dict())
    result = fit.result_()
    assert result is model
    for name, value in expected.items():
        torch.testing.assert_close(result.state_dict()[name].double(), value, atol=1e-6, rtol=1e-5)
    assert not torch.equal(last["head.weight"], model.head.weight)


def test_validation_measures_the_averaged_weights():
    fit, validation = (
        fitting(network("mlp"), settings(ema=0.9, epochs=2), seed=0),
        images(50, seed=1),
    )
    accuracies = []
    for event in fit.epochs(images(), validation, PREPROCESS):
        if not isinstance(event, Step):
            accuracies.append(
                (event.score, evaluate(fit.average.module, validation, PREPROCESS, TASK).score)
            )
    assert all(recorded == measured for recorded, measured in accuracies)


def test_same_seed_same_bits_whatever_the_global_generator_does():
    results = []
    for seed, noise in ((5, 1), (5, 2), (6, 1)):
        model = network("dropout")
        torch.manual_seed(noise)
        fit_all(fitting(model, settings(augment=CHANGES), seed=seed), images())
        results.append(model.state_dict())
    assert_same(results[0], results[1])
    assert not torch.equal(results[0]["head.weight"], results[2]["head.weight"])


def test_training_learns():
    data = images(60, classes=2)
    data = Arrays((data.x // 2 + 120 * data.y.view(-1, 1, 1, 1)).to(torch.uint8), data.y)
    for optimizer, lr in (("sgd", 0.02), ("muon", 0.02), ("adamw", 0.003), ("adam", 0.003)):
        model = network("cnn")
        records = fit_all(fitting(model, settings(optimizer=optimizer, lr=lr), seed=0), data, data)
        assert records[-1].score == evaluate(model, data, PREPROCESS, TASK).score > 0.9
        assert records[-1].loss < records[0].loss


RESUMED = {
    "sgd": ("resnet", {}),
    "no momentum": ("mlp", {"momentum": 0.0}),
    "muon": ("resnet", {"optimizer": "muon", "lr": 0.02, "weight_decay": 0.1}),
    "adamw": ("resnet", {"optimizer": "adamw", "lr": 1e-3, "lr_schedule": "cosine"}),
    "adam": ("cnn", {"optimizer": "adam", "lr": 1e-3, "lr_schedule": "onecycle"}),
    "averaged": ("resnet", {"ema": 0.8}),
    "muon averaged": ("cnn", {"optimizer": "muon", "lr": 0.02, "ema": 0.8}),
    "patience": ("cnn", {"patience": 2, "epochs": 4}),
    "patience averaged": ("cnn", {"patience": 3, "ema": 0.5}),
    "sizes": ("resnet", {"image_sizes": ((4, 1), (6, 1)), "patience": 3}),
    "dropout": ("dropout", {}),
    "augmented": ("resnet", {"augment": CHANGES}),
    "bf16": ("resnet", {"precision": "bf16"}),
}


def on_disk(tensors):
    """What a file gives back: plain memory, no shared tensors."""
    return load(save({k: v.detach().contiguous().clone() for k, v in tensors.items()}))


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("case", RESUMED)
def test_a_stopped_training_goes_on_to_the_same_bits(case, stop):
    kind, changes = RESUMED[case]
    s, data, validation = settings(**changes), images(), images(12, seed=1)
    whole = fitting(network(kind), s, seed=3)
    records = fit_all(whole, data, validation)
    first, saved, seen = fitting(network(kind), s, seed=3), {}, []
    for event in first.epochs(data, validation, PREPROCESS):
        if len(seen) == stop:
            break  # killed after a step of the next epoch
        if not isinstance(event, Step):
            seen.append(event)
            saved = on_disk(first.state())
    second = fitting(network(kind, seed=9), s, seed=3)
    second.load_(saved)
    assert seen + fit_all(second, data, validation) == records
    assert_same(on_disk(second.state()), on_disk(whole.state()))
    assert_same(second.result_().state_dict(), whole.result_().state_dict())


def test_what_was_on_disk_lies_in_memory_as_before():
    fit = fitting(network("resnet"), settings(epochs=1), seed=0)
    fit_all(fit, images())
    again = fitting(network("resnet"), settings(epochs=1), seed=0)
    again.load_(on_disk(fit.state()))
    old, new = (f.optimizers.each[0].state_dict()["state"] for f in (fit, again))
    assert old.keys() == new.keys()
    assert [old[k]["momentum_buffer"].stride() for k in old] == [
        new[k]["momentum_buffer"].stride() for k in old
    ]


def test_a_finished_training_stays_finished_when_it_is_taken_up():
    s = settings(epochs=1, ema=0.5)
    done = fitting(network("mlp"), s, seed=0)
    fit_all(done, images())
    again = fitting(network("mlp", seed=1), s, seed=0)
    again.load_(on_disk(done.state()))
    assert again.finished
    assert fit_all(again, images()) == []
    assert_same(again.result_().state_dict(), done.result_().state_dict())


def test_patience_stops_and_gives_back_the_best_weights():
    fit, weights = fitting(network("mlp"), settings(epochs=60, patience=2), seed=0), []
    records = []
    for event in fit.epochs(images(), images(40, seed=1), PREPROCESS):
        if not isinstance(event, Step):
            records.append(event.score)
            weights.append(copy.deepcopy(fit.model.state_dict()))
    best = records.index(max(records))
    assert len(records) == best + 3 < 60
    assert not torch.equal(weights[best]["layers.0.weight"], weights[-1]["layers.0.weight"])
    assert_same(fit.result_().state_dict(), weights[best])


def test_patience_compares_accuracies_at_full_size_only():
    s = settings(epochs=40, patience=1, image_sizes=((4, 6),))
    fit = fitting(network("resnet"), s, seed=0)
    records = fit_all(fit, images(), images(40, seed=1))
    full = [r.score for r in records[6:]]
    assert [r.image_size for r in records] == [4] * 6 + [8] * len(full)
    assert 2 <= len(full) < 34
    assert fit.best == (max(full), 6 + full.index(max(full)))


def test_without_patience_the_last_weights_are_the_result():
    model = network("mlp")
    fit = fitting(model, settings(), seed=0)
    fit_all(fit, images(), images(12, seed=1))
    last = copy.deepcopy(model.state_dict())
    assert_same(fit.result_().state_dict(), last)


def test_no_epochs_change_nothing():
    for changes in ({}, {"ema": 0.5}, {"patience": 1}):
        model = network("mlp")
        before = copy.deepcopy(model.state_dict())
        fit = fitting(model, settings(epochs=0, **changes), seed=0)
        assert fit.finished
        assert fit_all(fit, NONE) == []
        assert_same(fit.result_().state_dict(), before)


def test_a_loss_that_is_no_number_says_where_it_happened():
    with pytest.raises(
        TrainingError,
        match=r"the loss is (nan|inf) at epoch \d+, step \d+; lower lr \(now 1e\+3",
    ):
        fit_all(fitting(network("mlp"), settings(lr=1e30, warmup=0.0), seed=0), images())
    data = Arrays(torch.full((24, 192), 0.1), images().y)
    data.x[public_stream(2, "epoch", 1).permutation(24)[10]] = float("nan")
    bad, events = fitting(network("mlp"), settings(), seed=2), []
    with pytest.raises(TrainingError, match=r"the loss is nan at epoch \d, step \d"):
        events.extend(bad.epochs(data, NONE, PREPROCESS))


class Explodes(nn.Module):
    """Its loss is finite, its gradient is not: only the weights show what the last step did."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 10)

    def forward(self, x):
        return self.head(x.flatten(1)) + 0 * self.head.bias.sum().sub(self.head.bias.sum()).sqrt()


def test_weights_that_are_not_finite_after_the_last_step_stop_the_training():
    model = Explodes()
    with pytest.raises(
        DivergedError,
        match=r"'head\.bias' is not finite after epoch 1; lower lr \(now 0\.05\)",
    ):
        fit_all(fitting(model, settings(epochs=1, batch_size=24), seed=0), images())


def test_muon_names_both_of_its_rates_when_it_diverges():
    with pytest.raises(DivergedError, match=r"lower lr \(now 1e\+38\) or head_lr \(now 0\.05\)"):
        fit_all(
            fitting(network("mlp"), settings(lr=1e38, optimizer="muon", warmup=0.0), seed=0),
            images(),
        )


def test_the_place_of_a_bad_loss_is_counted_from_one():
    chosen = public_stream(2, "epoch", 0).permutation(24)[17]  # in the third batch of eight
    data = Arrays(torch.full((24, 192), 0.1), images().y)
    data.x[chosen] = float("inf")
    with pytest.raises(TrainingError, match="the loss is nan at epoch 1, step 3; "):
        fit_all(fitting(network("mlp"), settings(), seed=2), data)


def test_one_example_is_enough():
    records = fit_all(fitting(network("mlp"), settings(epochs=2), seed=0), images(1), images(1))
    assert [r.epoch for r in records] == [1, 2]


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "adamw"])
def test_zeros_of_sparse_weights_stay_zero_and_the_others_train(optimizer):
    model = network()
    names = ("stem.weight", "stages.1.0.conv1.weight")
    weights = dict(model.named_parameters())
    for name in names:
        weights[name].data[torch.rand(weights[name].shape, generator=generator(0, name)) < 0.7] = 0
    before = {n: w.detach().clone() for n, w in weights.items()}
    fit_all(fitting(model, settings(optimizer=optimizer, ema=0.9), seed=0, sparse=names), images())
    for name in names:
        assert ((weights[name] == 0) == (before[name] == 0)).all()
        assert not torch.equal(weights[name], before[name])


def test_an_objective_takes_the_place_of_the_cross_entropy():
    def squared(model, x, logits, y):
        assert torch.equal(model(x).detach(), logits.detach())
        return (logits - F.one_hot(y, 10)).square().mean()

    seen, plain = (
        [
            r.loss
            for r in fit_all(fitting(network("cnn"), settings(), seed=0, objective=o), images())
        ]
        for o in (squared, None)
    )
    assert seen[-1] < seen[0] < 1 < plain[0]


def test_the_penalty_on_scales_equals_a_plain_loop_with_its_subgradient():
    s, data, model = (
        settings(bn_penalty=0.02, lr=0.01, precision="float32"),
        images(),
        network("resnet"),
    )
    scales = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    twin = copy.deepcopy(model).train()
    fit_all(fitting(model, s, seed=4), data)
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for index, rate in zip(batches(s, len(data), 4), rates(s, len(data)), strict=True):
        twin.zero_grad()
        F.cross_entropy(twin(PREPROCESS(data.x[index])), data.y[index]).backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                g = p.grad + s.weight_decay * p if p.dim() > 1 else p.grad
                if name.removesuffix(".weight") in scales:
                    g = g + 0.02 * p.sign()
                velocity[name] = s.momentum * velocity[name] + g
                p -= s.lr * rate * (g + s.momentum * velocity[name])
    assert_close(model, twin)


def test_the_penalty_on_scales_shrinks_them_and_nothing_else_is_needed():
    def total(penalty):
        model = network("resnet")
        fit_all(fitting(model, settings(bn_penalty=penalty, epochs=6), seed=1), images())
        return sum(
            m.weight.abs().sum().item() for m in model.modules() if isinstance(m, nn.BatchNorm2d)
        )

    free, weak, strong = total(0.0), total(0.01), total(0.1)
    assert strong < weak < free
    assert strong < 0.8 * free


def test_a_network_that_fails_on_one_example_trains_in_batches_of_one():
    class InPairs(nn.Linear):
        def forward(self, x):
            if len(x) == 1:
                raise RuntimeError("one is too few")
            return super().forward(x)

    arrays, plain = (
        Arrays(torch.randn(3, 6), torch.tensor([0, 1, 2])),
        Preprocess((0.0,) * 6, (1.0,) * 6),
    )
    models = []
    for kind in (InPairs, nn.Linear):
        torch.manual_seed(0)
        models.append(kind(6, 3))
        fit = fitting(models[-1], TrainSettings(epochs=2, batch_size=1, lr=0.05), seed=0)
        for _ in fit.epochs(arrays, arrays.take(torch.tensor([], dtype=torch.int64)), plain):
            pass
    torch.testing.assert_close(models[0].weight, models[1].weight)
