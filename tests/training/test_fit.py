import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import nn

from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.random_source import public_stream
from fedpress.errors import DivergedError, TrainingError
from fedpress.models import freeze_batch_norm_
from fedpress.models.plain import CNN, MLP
from fedpress.models.resnet import resnet_small
from fedpress.tasks import Classification
from fedpress.training.augment import Augment
from fedpress.training.device import memory_format, place_, takes_channels_last, uses_bf16
from fedpress.training.evaluate import evaluate, outputs
from fedpress.training.fit import Fit, Step
from fedpress.training.optimizers import Muon
from fedpress.training.schedule import one_cycle
from fedpress.training.settings import TrainSettings
from tests.chance import generator

PREPROCESS = Preprocess((0.5,), (0.25,))
CHANGES = Augment(crop=0.25, flip="alternate", cutout=0.3)
TASK = Classification(tuple("0123456789"))
NONE = Arrays(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))


def images(n=24, *, seed=0, classes=10):
    chance = generator(seed, "images")
    x = torch.randint(0, 256, (n, 3, 8, 8), generator=chance, dtype=torch.uint8)
    return Arrays(x, torch.randint(0, classes, (n,), generator=chance))


def fitting(model, settings, **more):
    return Fit(model, settings, **({"task": TASK} | more))


def network(kind="resnet", seed=0):
    torch.manual_seed(seed)
    makers = {
        "resnet": lambda: resnet_small(width=4),
        "cnn": lambda: CNN(image_size=8),
        "dropout": lambda: CNN(image_size=8, dropout=(0.3, 0.3)),
        "mlp": lambda: MLP(in_features=192, hidden=(16, 12)),
    }
    return makers[kind]()


def settings(**changes):
    return TrainSettings(
        **{"epochs": 3, "batch_size": 8, "lr": 0.05, "precision": "float32", **changes}
    )


def fit_all(fit, train, validation=NONE):
    """Trains to the end; returns the records of the epochs."""
    return [e for e in fit.epochs(train, validation, PREPROCESS) if not isinstance(e, Step)]


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def assert_close(model, twin, atol=1e-6):
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def rates(s, n):
    """The learning-rate factor of every step, from the corners of its line."""
    steps = max(1, n // s.batch_size)
    at = np.arange(s.epochs * steps) / (s.epochs * steps)
    return np.maximum(
        np.interp(at, [0, s.warmup, 1], [0 if s.warmup else 1, 1, 0]),
        np.where(at < s.warmup, 0.02, 0),
    )


def batches(s, n, seed):
    for epoch in range(s.epochs):
        order = public_stream(seed, "epoch", epoch).permutation(n)
        yield from (
            order[at : at + s.batch_size]
            for at in range(0, max(1, n - s.batch_size + 1), s.batch_size)
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


# --- the loop ---------------------------------------------------------------------------------------------------------


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


def test_muon_equals_muon_on_copies_of_the_matrices():
    s = settings(optimizer="muon", lr=0.02, head_lr=0.03, momentum=0.8, weight_decay=0.1)
    data, model = images(), network("cnn")
    twin = place_(copy.deepcopy(model)).train()
    hidden = {"conv2": twin.conv2.weight, "hidden": twin.hidden.weight}
    matrices = {  # a filter's values in the order height, width, channel
        "conv2": nn.Parameter(
            twin.conv2.weight.detach().permute(0, 2, 3, 1).reshape(64, -1).clone()
        ),
        "hidden": nn.Parameter(twin.hidden.weight.detach().clone()),
    }
    muon = Muon(matrices.values(), s.lr, momentum=0.8, weight_decay=0.1)
    decayed = [twin.conv1.weight, twin.head.weight]
    plain = [p for p in twin.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}]
    sgd = torch.optim.SGD(groups, s.head_lr, 0.9, nesterov=True)
    for index, rate in zip(batches(s, len(data), 1), rates(s, len(data)), strict=True):
        x = PREPROCESS(data.x[index]).contiguous(memory_format=torch.channels_last)
        F.cross_entropy(twin(x), data.y[index]).backward()
        matrices["conv2"].grad = twin.conv2.weight.grad.permute(0, 2, 3, 1).reshape(64, -1).clone()
        matrices["hidden"].grad = twin.hidden.weight.grad.clone()
        for optimizer, lr in ((muon, s.lr), (sgd, s.head_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            optimizer.step()
        twin.zero_grad()
        with torch.no_grad():
            hidden["conv2"].copy_(matrices["conv2"].view(64, 3, 3, 32).permute(0, 3, 1, 2))
            hidden["hidden"].copy_(matrices["hidden"])
    fit_all(fitting(model, s, seed=1), data)
    assert_close(model, twin)


def test_muon_sees_hidden_weights_through_views_that_share_their_memory():
    model = resnet_small(width=8)
    fit = fitting(model, settings(optimizer="muon"), seed=0)
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [id(p) for p, _ in fit.optimizers.views] == [id(w) for w in weights[1:-1]]
    for weight, view in fit.optimizers.views:
        with torch.no_grad():
            view.copy_(torch.randn_like(view))
        assert torch.equal(weight.permute(0, 2, 3, 1).flatten(1), view)
    taken = [p for o in fit.optimizers.each for group in o.param_groups for p in group["params"]]
    assert sum(p.numel() for p in taken) == sum(p.numel() for p in model.parameters())


def test_muon_takes_a_shared_weight_once_and_leaves_computed_ones_to_sgd():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    model[2].weight = model[1].weight
    model[4].weight = model[5].weight  # the last layer's
    nn.utils.parametrizations.weight_norm(model[3])
    fit = fitting(model, settings(optimizer="muon"), seed=0)
    assert [id(p) for p, _ in fit.optimizers.views] == [id(model[1].weight)]
    data = Arrays(torch.randn(16, 4), torch.arange(16) % 4)
    before = model[3].weight.detach().clone()
    records = [e for e in fit.epochs(data, NONE, Preprocess()) if not isinstance(e, Step)]
    assert len(records) == 3
    assert not torch.equal(model[3].weight, before)


def test_a_network_without_hidden_weights_trains_at_the_head_rate_of_muon():
    fit = fitting(nn.Linear(4, 2), settings(optimizer="muon", lr=9.0, head_lr=0.25), seed=0)
    assert [group["lr"] for o in fit.optimizers.each for group in o.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_decay_acts_on_weights_and_never_on_biases_and_norms(optimizer):
    model = network("resnet")
    fit = fitting(model, settings(optimizer=optimizer, weight_decay=0.3), seed=0)
    decay = {
        id(p): g["weight_decay"]
        for o in fit.optimizers.each
        for g in o.param_groups
        for p in g["params"]
    }
    decay |= {id(p): decay[id(view)] for p, view in fit.optimizers.views}
    for name, p in model.named_parameters():
        if "norm" in name or "bias" in name or "shortcut.1" in name:
            assert decay[id(p)] == 0, name
        elif optimizer == "sgd":
            assert decay[id(p)] == 0.3, name
        else:
            assert decay[id(p)] == (5e-4 if name in ("stem.weight", "head.weight") else 0.3), name


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_frozen_parameters_stay(optimizer):
    model = network("resnet")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("stages.1"))
    before = copy.deepcopy(model.state_dict())
    fit_all(fitting(model, settings(optimizer=optimizer, epochs=1), seed=0), images())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is not name.startswith("stages.1"), name


@given(st.floats(0, 1), st.floats(0, 0.999))
def test_the_rate_rises_over_the_warmup_and_falls_to_zero(done, warmup):
    if done < warmup:
        assert one_cycle(done, warmup) == max(0.02, done / warmup)
    else:
        assert one_cycle(done, warmup) == pytest.approx((1 - done) / (1 - warmup))
    assert 0 <= one_cycle(done, warmup) <= 1
    assert one_cycle(1.0, warmup) == 0


def test_every_step_takes_the_rate_of_its_place():
    s, seen = settings(warmup=0.4, lr=2e-3, head_lr=1e-3, optimizer="muon"), []
    fit = fitting(network("cnn"), s, seed=0)
    for event in fit.epochs(images(), NONE, PREPROCESS):
        if isinstance(event, Step):
            seen.append(
                (event.done, event.total, *(o.param_groups[0]["lr"] for o in fit.optimizers.each))
            )
    assert [row[:2] for row in seen] == [(at, 9) for at in range(1, 10)]
    np.testing.assert_allclose([row[2] for row in seen], 1e-3 * rates(s, 24))
    np.testing.assert_allclose([row[3] for row in seen], 2e-3 * rates(s, 24))


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
    for optimizer in ("sgd", "muon"):
        model = network("cnn")
        records = fit_all(
            fitting(model, settings(optimizer=optimizer, lr=0.02), seed=0), data, data
        )
        assert records[-1].score == evaluate(model, data, PREPROCESS, TASK).score > 0.9
        assert records[-1].loss < records[0].loss


# --- stopping and going on --------------------------------------------------------------------------------------------

RESUMED = {
    "sgd": ("resnet", {}),
    "no momentum": ("mlp", {"momentum": 0.0}),
    "muon": ("resnet", {"optimizer": "muon", "lr": 0.02, "weight_decay": 0.1}),
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


# --- what cannot be trained -------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_says_where_it_happened():
    with pytest.raises(
        TrainingError,
        match=r"the loss is (nan|inf) at epoch \d+, step \d+; lower stage.lr \(now 1e\+3",
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
        match=r"'head\.bias' is not finite after epoch 1; lower stage\.lr \(now 0\.05\)",
    ):
        fit_all(fitting(model, settings(epochs=1, batch_size=24), seed=0), images())


def test_muon_names_both_of_its_rates_when_it_diverges():
    with pytest.raises(
        DivergedError, match=r"lower stage\.lr \(now 1e\+38\) or stage\.head_lr \(now 0\.05\)"
    ):
        fit_all(
            fitting(network("mlp"), settings(lr=1e38, optimizer="muon", warmup=0.0), seed=0),
            images(),
        )


def test_one_public_example_under_batch_norm_is_refused_only_where_nothing_can_be_averaged():
    vectors = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    for n, size, cure in ((1, 8, "raise data.public_share"), (4, 1, "take 2 or more")):
        with pytest.raises(TrainingError, match=rf"leaves a batch norm nothing to average; {cure}"):
            fit_all(fitting(vectors, settings(batch_size=size), seed=0), images(n))
    assert fit_all(fitting(vectors, settings(epochs=1), seed=0), images(9))
    assert fit_all(
        fitting(network("resnet"), settings(epochs=1), seed=0), images(1)
    )  # 8 x 8 pixels have statistics


def test_the_place_of_a_bad_loss_is_counted_from_one():
    chosen = public_stream(2, "epoch", 0).permutation(24)[17]  # in the third batch of eight
    data = Arrays(torch.full((24, 192), 0.1), images().y)
    data.x[chosen] = float("inf")
    with pytest.raises(TrainingError, match="the loss is nan at epoch 1, step 3; "):
        fit_all(fitting(network("mlp"), settings(), seed=2), data)


@pytest.mark.parametrize(
    ("changes", "train", "validation", "message"),
    [
        ({}, NONE, NONE, "the public part has no examples"),
        ({"patience": 1}, images(), NONE, "patience needs a validation set"),
        (
            {"image_sizes": ((9, 1),)},
            images(),
            NONE,
            r"images of 9 pixels, but examples are \(3, 8, 8\)",
        ),
        (
            {"image_sizes": ((4, 1),)},
            Arrays(torch.zeros(9, 192), torch.zeros(9)),
            NONE,
            r"examples are \(192,\)",
        ),
        (
            {"image_sizes": ((6, 1),)},
            images(),
            NONE,
            r"cannot take images of 6 pixels \(mat1 and mat2",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(
    changes, train, validation, message
):
    model = network("cnn")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match=message):
        fit_all(fitting(model, settings(**changes), seed=0), train, validation)
    assert_same(model.state_dict(), before)


def test_a_network_that_trains_nothing_is_refused():
    with pytest.raises(TrainingError, match="no parameter of the model has requires_grad"):
        fitting(network("mlp").requires_grad_(False), settings(), seed=0)


def test_one_example_is_enough():
    records = fit_all(fitting(network("mlp"), settings(epochs=2), seed=0), images(1), images(1))
    assert [r.epoch for r in records] == [1, 2]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_image_sizes_follow_their_schedule():
    s = settings(epochs=5, image_sizes=((4, 2), (6, 1)))
    assert [s.side(e) for e in range(6)] == [4, 4, 6, None, None, None]
    records = fit_all(fitting(network("resnet"), s, seed=0), images(), images(4, seed=1))
    assert [r.image_size for r in records] == [4, 4, 6, 8, 8]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_sizes": ((4, 2), (6, 2))}, "image_sizes take more than the 3 epochs"),
        ({"image_sizes": ((3, 1),)}, "side >= 4"),
        ({"image_sizes": ((4, 0),)}, "epochs >= 1"),
        ({"image_sizes": (4, 2)}, "tuple"),
        ({"epochs": -1}, "greater than or equal to 0"),
        ({"lr": 0}, "greater than 0"),
        ({"momentum": 1.0}, "less than 1"),
        ({"warmup": 1.0}, "less than 1"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"optimizer": "adam"}, "'sgd' or 'muon'"),
        ({"learning_rate": 1}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        settings(**wrong)


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_evaluation_equals_a_plain_loop(batch_size):
    model, data = network("resnet"), images(20)
    twin = copy.deepcopy(model).eval()
    right, loss = 0, 0.0
    for x, y in zip(data.x, data.y, strict=True):
        probability = twin(PREPROCESS(x[None])).softmax(1)[0]
        right += int(probability.argmax() == y)
        loss -= float(probability[y].detach().log())
    measured = evaluate(model, data, PREPROCESS, TASK, batch_size=batch_size)
    assert (measured.score, measured.examples) == (right / 20, 20)
    assert measured.loss == pytest.approx(loss / 20, rel=1e-5)
    assert measured.metrics == {}
    whole = evaluate(model, data, PREPROCESS, TASK, batch_size=batch_size, all_metrics=True)
    assert (whole.score, whole.loss) == (measured.score, measured.loss)
    logits = twin(PREPROCESS(data.x)).detach()
    expected = TASK.summary(TASK.metrics(logits, data.y))
    assert whole.metrics.keys() == expected.keys()
    assert whole.metrics["auc"] == pytest.approx(expected["auc"], abs=1e-4)
    assert whole.metrics["confusion"] == expected["confusion"]


def test_evaluation_leaves_every_mode_and_number_as_it_was():
    model = freeze_batch_norm_(network("resnet").train())
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    evaluate(model, images(), PREPROCESS, TASK)
    assert [m.training for m in model.modules()] == modes
    assert True in modes
    assert False in modes  # the frozen norms
    assert_same(model.state_dict(), before)
    with pytest.raises(RuntimeError):
        evaluate(model, Arrays(torch.zeros(2, 5, 8, 8), torch.zeros(2)), Preprocess(), TASK)
    assert [m.training for m in model.modules()] == modes


def test_evaluation_of_nothing_is_refused_and_of_broken_weights_says_nan():
    with pytest.raises(TrainingError, match="no examples to measure on"):
        evaluate(network("mlp"), NONE, PREPROCESS, TASK)
    model = network("mlp")
    nn.init.constant_(model.layers[0].weight, float("nan"))
    assert np.isnan(evaluate(model, images(), PREPROCESS, TASK).loss)


# --- precision and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_used_where_it_is_asked_for_or_faster(monkeypatch, fast):
    monkeypatch.setattr("fedpress.training.device.device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    large, small = nn.Conv2d(500, 1000, 1), nn.Conv2d(499, 1000, 1, bias=False)
    assert uses_bf16(large, "auto") is fast
    assert not uses_bf16(small, "auto")
    assert not uses_bf16(nn.Linear(500, 1000), "auto")  # no convolution
    assert uses_bf16(small, "bf16")
    assert not uses_bf16(large, "float32")


def test_bf16_computes_in_bf16_and_keeps_weights_in_float32():
    model, seen = network("resnet"), set()
    model.head.register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    records = fit_all(
        fitting(model, settings(precision="bf16", epochs=1), seed=0), images(), images(4)
    )
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    reference = network("resnet")
    plain = fit_all(fitting(reference, settings(epochs=1), seed=0), images())
    assert records[0].loss == pytest.approx(plain[0].loss, rel=0.02)


def test_images_and_filters_lie_channels_last():
    model, seen = network("cnn"), []
    fit = fitting(model, settings(epochs=1), seed=0)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    fit_all(fit, images(), images(4))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    assert memory_format(torch.zeros(2, 1, 4, 4)) is torch.contiguous_format
    assert memory_format(torch.zeros(2, 5)) is torch.contiguous_format


@pytest.mark.parametrize(
    ("width", "capability", "fast"), [(4, "AVX2", False), (8, "AVX2", True), (4, "AVX512", True)]
)
def test_a_format_in_which_torch_writes_beyond_its_memory_is_not_used(
    width, capability, fast, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("fedpress.training.device.device", lambda: torch.device("cpu"))
    model = place_(resnet_small(width=width))
    assert takes_channels_last(model) is fast
    wanted = torch.channels_last if fast else torch.contiguous_format
    assert memory_format(torch.zeros(2, 3, 8, 8), model) is wanted
    assert model.stem.weight.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
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


# --- the penalty on batch-norm scales ---------------------------------------------------------------------------------


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


def test_a_penalty_on_scales_that_nobody_trains_is_refused():
    frozen = network("resnet")
    for parameter in frozen.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    for model in (network("mlp"), frozen):
        with pytest.raises(
            TrainingError, match="bn_penalty pulls at batch-norm scales, but the model trains none"
        ):
            fit_all(fitting(model, settings(bn_penalty=0.1), seed=0), images())


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_step_sizes_get_no_weight_decay_also_where_weights_have_them_in_groups(optimizer):
    from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization
    from fedpress.nn.quantized import quantize_layers_

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.GRU(8, 4))
    grids = {
        "0": QuantizationScheme(
            weights=WeightQuantization(bits=4, group=4), inputs=InputQuantization()
        ),
        "1": QuantizationScheme(
            weights=WeightQuantization(kind="codebook"), inputs=InputQuantization(bits=1)
        ),
        "2": QuantizationScheme(weights=WeightQuantization(kind="ternary", group=2)),
        "4": QuantizationScheme(weights=WeightQuantization(bits=4, group=2)),
    }
    quantize_layers_(model, grids)
    fit = fitting(model, TrainSettings(epochs=1, optimizer=optimizer, weight_decay=0.1), seed=0)
    decayed = {
        id(p)
        for o in fit.optimizers.each
        for g in o.param_groups
        if g["weight_decay"]
        for p in g["params"]
    }
    decayed |= {id(p) for p, _ in fit.optimizers.views}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {
        n for n, _ in model.named_parameters() if n.rpartition(".")[2].startswith("weight")
    } - {n for n, _ in model.named_parameters() if n.endswith("_scale")}


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x[..., None].squeeze())


def test_a_batch_of_one_gives_what_it_gives_in_company_also_where_code_drops_its_dimension():
    model, x = Squeezed(), torch.randn(3, 6)
    torch.testing.assert_close(outputs(model, x[:1]), model(x)[:1])
    assert torch.equal(outputs(model.head, x[:1]), model.head(x[:1]))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        outputs(nn.BatchNorm1d(6), x[:1])
    arrays = Arrays(x, torch.tensor([0, 1, 2]))
    plain = Preprocess((0.0,) * 6, (1.0,) * 6)
    one_by_one = evaluate(model, arrays, plain, TASK, batch_size=1)
    assert one_by_one.loss == pytest.approx(evaluate(model, arrays, plain, TASK).loss, rel=1e-5)


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
