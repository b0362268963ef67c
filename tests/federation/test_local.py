import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from fedpress.codecs import Key
from fedpress.core import parameters
from fedpress.core.examples import Arrays
from fedpress.core.random_source import public_stream
from fedpress.errors import DivergedError, RecipeError, TrainingError
from fedpress.federation.local import LocalPlan, LocalSettings, LocalWork, shuffled_batches
from fedpress.federation.private import private_steps, rehearse_private
from fedpress.federation.sources import GRADIENT_SOURCES
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import quantize_layers_
from fedpress.privacy.plan import PrivacyPlan
from tests.federation.federation import (
    GOAL,
    SAMPLE_PLAN,
    examples,
    joint_gradient,
    key,
    mlp,
    train,
    train_privately,
    untouched,
    with_source,
)

FULL = PrivacyPlan("sample", 1.0, 1.0, 1.0)
"""One step in which every example takes part."""


def task(arrays=None, *, plan=None, round=1, prepare=untouched, **settings):
    how = LocalPlan(LocalSettings(**settings), prepare, GOAL, plan)
    return LocalWork(arrays or examples(10), key(round=round), how)


def test_sgd_equals_torch_sgd_over_the_same_batches():
    model, work = mlp(), task(epochs=2, batch_size=4, lr=0.1, momentum=0.9, weight_decay=0.01)
    twin = copy.deepcopy(model)
    measured = train(model, work)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, 0.9, weight_decay=0.01)
    shuffle, losses = key().client_stream("shuffle"), []
    for _ in range(2):
        order = shuffle.permutation(10)
        for index in (order[:4], order[4:8], order[8:]):
            optimizer.zero_grad()
            loss = F.cross_entropy(twin(work.arrays.x[index]), work.arrays.y[index])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert torch.equal(parameters.flatten(model), parameters.flatten(twin))
    assert measured == {"loss": pytest.approx(sum(losses) / 6), "steps": 6}


@pytest.mark.parametrize(
    ("name", "make"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)]
)
def test_local_adam_equals_torch_over_the_same_batches(name, make):
    given = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    model, work = mlp(), task(epochs=2, batch_size=5, optimizer=name, **given)
    twin = copy.deepcopy(model)
    train(model, work)
    optimizer = make(twin.parameters(), **given)
    shuffle = key().client_stream("shuffle")
    for _ in range(2):
        for index in shuffle.permutation(10).split(5):
            optimizer.zero_grad()
            F.cross_entropy(twin(work.arrays.x[index]), work.arrays.y[index]).backward()
            optimizer.step()
    assert torch.equal(parameters.flatten(model), parameters.flatten(twin))


def test_local_adam_has_the_usual_rate_and_no_decay():
    assert LocalSettings(optimizer="adamw").lr == 1e-3
    assert LocalSettings(optimizer="adamw").weight_decay == 0
    assert LocalSettings().lr == 0.05
    with pytest.raises(ValidationError, match="momentum: optimizer 'adamw' has no momentum"):
        LocalSettings(optimizer="adamw", momentum=0.9)


def test_private_adam_steps_along_the_noised_gradients_alone():
    work = task(plan=SAMPLE_PLAN, optimizer="adamw", lr=0.01)
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(twin.parameters(), 0.01, weight_decay=0)
    run = with_source(work, GRADIENT_SOURCES["private"]).begin(model)
    for step in run:
        for p, gradient in zip(twin.parameters(), step.gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    assert run.measures == {"steps": 4}
    torch.testing.assert_close(parameters.flatten(model), parameters.flatten(twin), rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_the_learning_rate_decays_by_round():
    assert task(lr=0.1, lr_decay=0.5, round=1).lr == 0.1
    assert task(lr=0.1, lr_decay=0.5, round=3).lr == pytest.approx(0.025)


def test_frozen_parameters_stay():
    model = mlp()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    train(model, task())
    assert torch.equal(model[0].weight, before)


def test_a_parameter_that_gets_no_gradient_stays():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(6, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    model = Spare()
    before = model.spare.weight.clone()
    train(model, task())
    assert torch.equal(model.spare.weight, before)


def test_a_loss_that_is_not_finite_is_an_error_with_the_cure():
    bad = Arrays(torch.full((4, 6), float("nan")), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TrainingError, match=r"not finite in round 1; lower lr"):
        train(mlp(), task(bad))


def test_prepare_sees_every_batch_and_its_own_stream():
    seen = []

    def noisy(x, chance):
        seen.append(len(x))
        return x + chance.uniform(1, dtype=torch.float32)

    one, two, plain = mlp(), mlp(), mlp()
    train(one, task(batch_size=4, prepare=noisy))
    assert seen == [4, 4, 2]
    train(two, task(batch_size=4, prepare=noisy))
    train(plain, task(batch_size=4))
    assert torch.equal(parameters.flatten(one), parameters.flatten(two))
    assert not torch.equal(parameters.flatten(one), parameters.flatten(plain))


def test_private_steps_measure_only_their_planned_number():
    model, work = mlp(), task(plan=SAMPLE_PLAN)
    before = parameters.flatten(model)
    assert train_privately(model, work) == {"steps": 4}
    assert not torch.equal(parameters.flatten(model), before)


def test_private_steps_go_on_over_examples_that_break_plain_training():
    bad = Arrays(torch.full((4, 6), float("nan")), torch.zeros(4, dtype=torch.int64))
    model = mlp()
    measured = train_privately(model, task(bad, plan=SAMPLE_PLAN))
    assert measured.pop("not_finite") > 0
    assert measured == {"steps": 4}
    assert torch.isfinite(parameters.flatten(model)).all()


def test_private_steps_carry_noise_of_the_planned_size():
    model = Silent(200_000)
    train_privately(model, task(examples(10), plan=SAMPLE_PLAN, lr=0.1))
    expected = (
        0.1 * 1.0 * 1.0 / (0.2 * 10) * 4**0.5
    )  # lr x noise x clip / expected batch x sqrt(steps)
    assert model.w.std().item() == pytest.approx(expected, rel=0.01)


def test_settings_that_private_steps_do_not_know_are_refused():
    with pytest.raises(RecipeError, match="weight_decay"):
        train_privately(mlp(), task(plan=SAMPLE_PLAN, weight_decay=0.1))


def test_private_steps_without_a_sample_plan_are_refused():
    with pytest.raises(RecipeError, match="unit 'sample'"):
        train_privately(mlp(), task())


@pytest.mark.parametrize(
    "bad", [{"lr": 0}, {"epochs": 0}, {"batch_size": 0}, {"lr_decay": 1.1}, {"leraning": 1}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValidationError):
        LocalSettings(**bad)


def test_what_came_out_is_asked_after_the_last_step():
    run = task().begin(mlp())
    with pytest.raises(TrainingError, match="loop over all steps"):
        run.update()
    next(iter(run))
    with pytest.raises(TrainingError, match="call finish"):
        _ = run.measures


@pytest.mark.parametrize("kind", ["plain", "private"])
def test_what_is_added_to_a_gradient_is_part_of_the_step(kind):
    plan = replace(SAMPLE_PLAN, steps_per_round=1) if kind == "private" else None
    work = with_source(task(plan=plan, lr=0.1, batch_size=10), GRADIENT_SOURCES[kind])
    drift = torch.linspace(-1, 1, parameters.Layout.of(mlp()).size)
    moved = []
    for factor in (0.0, 1.0):
        run = work.begin(mlp())
        for step in run:
            for gradient, part in zip(step.gradients, step.split(drift), strict=True):
                gradient.add_(part, alpha=factor)
        moved.append(run.update())
    torch.testing.assert_close(moved[1] - moved[0], -0.1 * drift, rtol=0, atol=1e-6)


def test_the_loss_of_the_examples_is_their_mean_loss_and_kept_from_sample_privacy():
    model, work = mlp(), task(examples(10), batch_size=4)
    expected = F.cross_entropy(model(work.arrays.x), work.arrays.y)
    assert work.loss(model) == pytest.approx(float(expected.detach()), rel=1e-6)
    with pytest.raises(RecipeError, match="gets no noise under"):
        task(plan=SAMPLE_PLAN).loss(model)


def unchanged(x, generator):
    return x


class Silent(nn.Module):
    """Has no gradient, so that only noise moves it."""

    def __init__(self, size, start=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.full((size,), start))

    def forward(self, x):
        return x[:, :3] + 0 * self.w.sum()


def test_private_noise_is_new_for_everything_asked_and_the_same_on_repeat():
    def noise(start=0.0, arrays=None, plan=SAMPLE_PLAN, round=1, prepare=untouched, **changes):
        model, settings = Silent(20_000, start), {n: changes.pop(n) for n in {"lr"} & {*changes}}
        work = task(arrays, plan=plan, round=round, prepare=prepare, **settings)
        train_privately(model, replace(work, plan=replace(work.plan, **changes)))
        return model.w.detach() - start

    base = noise()
    assert torch.equal(base, noise())
    others = {
        "plan": noise(plan=replace(SAMPLE_PLAN, noise_multiplier=2.0)),
        "params": noise(start=0.5),
        "settings": noise(lr=0.06),
        "examples": noise(arrays=examples(10, seed=1)),
        "prepare": noise(prepare=unchanged),
        "round": noise(round=2),
        "task": noise(task=GOAL.smoothed(0.1)),
        "pulls": noise(penalties={"proximal_mu": 0.1}),
    }
    for what, other in others.items():
        assert not alike(base, other), what


def alike(one, other):
    return abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) > 0.03


class Scaled(nn.Module):
    """Its factor is told neither by its parameters nor by what Python says of it."""

    def __init__(self, factor):
        super().__init__()
        self.w, self.factor = nn.Parameter(torch.zeros(20_000, 3)), factor

    def forward(self, x):
        return self.factor * x.mean(1, keepdim=True) * self.w.sum(0)


def test_private_noise_is_new_for_every_sum_whatever_the_sum_hangs_on():
    def noise(factor):
        model, silent = Scaled(factor), Scaled(factor)
        arrays = examples(10)
        train_privately(model, task(arrays, plan=FULL))
        train_privately(silent, task(arrays, plan=replace(FULL, noise_multiplier=0.0)))
        return model.w.detach() - silent.w.detach()

    assert torch.equal(noise(1e-3), noise(1e-3))
    assert not alike(noise(1e-3), noise(2e-3))


class Told(Silent):
    """What Python says of it tells where an object lies in memory."""

    def __init__(self, size):
        super().__init__(size)
        self.activation = object()

    def extra_repr(self):
        return f"activation={self.activation}"


def test_the_same_question_in_another_process_gets_the_same_answer():
    kept = [Told(100) for _ in range(3)]
    assert len({str(model) for model in kept}) == 3
    for model in kept:
        train_privately(model, task(plan=SAMPLE_PLAN))
    assert all(torch.equal(kept[0].w, model.w) for model in kept)


def test_private_steps_that_hide_the_same_sum_have_noise_of_their_own():
    model = Silent(20_000)
    work = with_source(task(plan=SAMPLE_PLAN), private_steps)
    noises = [step.gradients[0].clone() for step in work.begin(model)]
    assert len(noises) == 4
    for number, noise in enumerate(noises):
        assert not any(alike(noise, other) for other in noises[:number])


class Dropping(nn.Module):
    """Its gradient tells which inputs were dropped."""

    def __init__(self):
        super().__init__()
        self.w, self.dropout = nn.Parameter(torch.zeros(3, 6)), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(torch.ones_like(x)) @ self.w.T


@pytest.mark.parametrize("work_of", [train_privately, joint_gradient])
def test_what_dropout_drops_under_sample_privacy_hangs_on_all_of_the_secret(work_of):
    def dropped(secret, seed=7):
        model, plan = Dropping().train(), replace(FULL, noise_multiplier=0.0)
        named = Key(seed, 1, "c0", secret)
        found = work_of(model, replace(task(examples(40), plan=plan), key=named))
        return found[0] if work_of is joint_gradient else model.w.detach()

    assert torch.equal(dropped(5), dropped(5))
    for other in (dropped(6), dropped(5 + 2**200), dropped(None)):
        assert not torch.equal(dropped(5), other)


def test_the_precision_setting_reaches_private_steps(monkeypatch):
    monkeypatch.setattr(
        "fedpress.federation.private.uses_bf16", lambda model, precision: precision == "bf16"
    )
    seen, model = set(), mlp()
    model[0].register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    for precision, expected in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        seen.clear()
        train_privately(model, task(plan=SAMPLE_PLAN, precision=precision))
        assert expected in seen
        assert (torch.bfloat16 in seen) is (precision == "bf16")


def test_a_joint_gradient_is_minus_the_sum_of_clipped_gradients_of_its_poisson_batch():
    model, arrays = mlp(), examples(40)
    plan = PrivacyPlan("sample", 0.3, 1.0, 1.0)
    work = task(arrays, plan=plan)
    total, measured = joint_gradient(model, work)
    expected = torch.zeros_like(total)
    for x, y in zip(arrays.x, arrays.y, strict=True):
        loss = torch.nn.functional.cross_entropy(model(x[None]), y[None])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        flat = torch.cat([g.reshape(-1) for g in grads])
        expected -= flat * min(1.0, 0.3 / float(flat.norm()))
    assert torch.allclose(total, expected, atol=1e-5)
    assert measured == {"steps": 1}


@pytest.mark.recipe
def test_one_example_moves_a_joint_gradient_by_at_most_the_clip_norm():
    model, plan = mlp(), PrivacyPlan("sample", 0.3, 1.0, 1.0)
    for seed in range(30):
        arrays = examples(12, seed=seed)
        fewer = Arrays(arrays.x[1:], arrays.y[1:])
        a, b = (
            joint_gradient(model, task(part, plan=plan))[0].double() for part in (arrays, fewer)
        )
        assert float((a - b).norm()) <= 0.3 * (1 + 1e-5)


def test_a_joint_batch_has_the_expected_size_and_another_one_each_round():
    model, arrays = mlp(), examples(200)
    plan = PrivacyPlan("sample", 1e6, 0.25, 1.0)
    sums = [
        joint_gradient(model, replace(task(arrays, plan=plan), key=key(round=r)))[0]
        for r in range(1, 6)
    ]
    assert len({tuple(s.tolist()) for s in sums}) == 5


def sizes(model, n, size):
    return [len(index) for index in shuffled_batches(model, n, size, public_stream(0))]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_a_last_batch_of_one_joins_the_batch_before_under_batch_norm(norm):
    model = nn.Sequential(nn.Linear(6, 3), norm(3))
    assert sizes(model, 33, 8) == [8, 8, 8, 9]
    assert sizes(model, 9, 8) == [9]
    assert sizes(model, 34, 8) == [8, 8, 8, 8, 2]
    assert sizes(model, 3, 1) == [1, 1, 1]
    assert sizes(model, 1, 8) == [1]
    assert sizes(model.eval(), 33, 8) == [8, 8, 8, 8, 1]
    assert sizes(nn.Linear(6, 3), 33, 8) == [8, 8, 8, 8, 1]
    assert sizes(nn.Sequential(norm(3, track_running_stats=False)).eval(), 33, 8) == [8, 8, 8, 9]


def test_the_order_of_examples_is_that_of_the_stream():
    index = shuffled_batches(mlp(), 20, 8, public_stream(4))
    assert torch.equal(torch.cat(index), public_stream(4).permutation(20))


def test_a_lone_example_under_batch_norm_is_an_error_with_the_cure():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    with pytest.raises(
        TrainingError,
        match=r"cannot average over a batch of one example; leave this client out, or set",
    ):
        train(model, task(examples(1)))
    with pytest.raises(TrainingError, match=r"take batch_size = 2 or more"):
        train(model, task(examples(4), batch_size=1))
    train(model.eval(), task(examples(1)))
    with pytest.raises(ValueError, match="mine"):
        train(nn.Sequential(Raises(), nn.BatchNorm1d(6)), task(examples(1)))


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x):
        if self.training:
            raise ValueError("mine")
        return x * self.w


@pytest.mark.parametrize(
    ("model", "arrays", "words"),
    [
        (
            nn.Sequential(Raises()),
            examples(3),
            "3 of 3 examples failed in a batch of one: ValueError: mine",
        ),
        (
            mlp(),
            Arrays(torch.full((2, 6), float("nan")), torch.zeros(2).long()),
            "of 2 of 2 examples is NaN",
        ),
    ],
)
def test_a_rehearsal_says_what_fails(model, arrays, words):
    with pytest.raises(TrainingError, match=words):
        rehearse_private(model, task(arrays, plan=SAMPLE_PLAN))


def test_examples_that_are_not_finite_are_told_from_a_rate_that_is_too_large():
    arrays = examples(6)
    arrays.x[3, 1] = float("inf")
    with pytest.raises(
        DivergedError, match=r"not finite in round 1; .* correct the examples, which have NaN"
    ):
        train(mlp(), task(arrays))
    with pytest.raises(
        DivergedError, match=r"after \d steps the loss is not finite in round 1; .*\(now 1e\+30\)$"
    ):
        train(mlp(), task(epochs=9, lr=1e30))


def test_a_rehearsal_sees_a_network_that_only_noise_would_move():
    with pytest.raises(TrainingError, match="no trained parameter has a gradient"):
        rehearse_private(Silent(5), task(plan=SAMPLE_PLAN))
    hidden = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 3))
    for p in hidden.parameters():
        nn.init.zeros_(p)
    hidden[2].requires_grad_(False)
    with pytest.raises(TrainingError, match="no trained parameter has a gradient"):
        rehearse_private(hidden, task(plan=SAMPLE_PLAN))


def test_step_sizes_of_quantized_layers_get_no_weight_decay():
    model = mlp()
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    quantize_layers_(model, {name: QuantizationScheme(weights=WeightQuantization(bits=4, group=2))})
    twin = copy.deepcopy(model)
    work = task(epochs=1, batch_size=10, lr=0.1, weight_decay=0.5)
    train(model, work)
    index = key().client_stream("shuffle").permutation(10)
    loss = F.cross_entropy(twin(work.arrays.x[index]), work.arrays.y[index])
    loss.backward()
    for n, p in twin.named_parameters():
        pull = 0.0 if n.endswith("weight_scale") else 0.5
        p.data -= 0.1 * (p.grad + pull * p.data)
        torch.testing.assert_close(dict(model.named_parameters())[n].data, p.data)
