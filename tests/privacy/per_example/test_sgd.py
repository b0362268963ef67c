import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpress.core.parameters import flatten
from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.per_example.gradients import METHODS
from fedpress.privacy.per_example.sgd import private_steps
from fedpress.privacy.plan import PrivacyPlan


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data(n=200):
    x = torch.randn(n, 6, generator=seeded(1))
    return x, (x[:, 0] + x[:, 1] > 0).long()


def plan(noise=1.0, q=0.2, clip_norm=0.5):
    return PrivacyPlan("sample", clip_norm=clip_norm, sampling_prob=q, noise_multiplier=noise)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def run(model, x, y, **changed):
    settings = {"plan": plan(), "steps": 5, "lr": 0.5, "generator": seeded(2), **changed}
    return list(private_steps(model, F.cross_entropy, x, y, **settings))


def test_private_training_learns():
    model, (x, y) = net(), data()
    private = plan().calibrate(epsilon=8, num_rounds=60)
    records = run(model, x, y, plan=private, steps=60, momentum=0.5)
    assert [r.step for r in records] == list(range(1, 61))
    assert float((model(x).argmax(1) == y).float().mean()) > 0.85


def test_without_noise_or_clipping_a_full_step_is_plain_gradient_descent():
    model, (x, y) = net(), data()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
    run(model, x, y, plan=plan(noise=0.0, q=1.0, clip_norm=1e6), steps=4, lr=0.3, momentum=0.9)
    assert torch.allclose(flatten(model), flatten(twin), atol=1e-5)


def test_the_noise_of_a_step_has_the_planned_size():
    model = nn.Linear(500, 400)
    x, y = torch.randn(50, 500, generator=seeded(3)), torch.randint(400, (50,), generator=seeded(4))
    start = flatten(model)
    quiet = copy.deepcopy(model)
    run(quiet, x, y, plan=plan(noise=0.0), steps=1, lr=1.0)
    run(model, x, y, plan=plan(noise=3.0), steps=1, lr=1.0)
    noise = (
        (flatten(model) - flatten(quiet)) * 0.2 * 50 / 0.5
    )  # back to the sum, in units of the clip norm
    assert float(noise.std()) == pytest.approx(3.0, rel=0.01)
    assert float((flatten(quiet) - start).norm()) * 0.2 * 50 <= 50 * 0.5


def test_empty_batches_are_noisy_steps():
    model, (x, y) = net(), data(3)
    before = flatten(model)
    records = run(model, x, y, plan=plan(q=1e-9), steps=3, lr=1e-9)
    assert [r.raw.examples for r in records] == [0, 0, 0]
    assert not torch.equal(flatten(model), before)


def test_the_step_divides_by_the_expected_batch_and_not_by_the_drawn_one():
    x, y = data(40)
    weights = []
    for rows in (x, torch.full_like(x, float("nan"))):  # refused samples leave the divisor alone
        model = net()
        list(
            private_steps(
                model,
                F.cross_entropy,
                rows,
                y,
                plan=plan(clip_norm=1e-6),
                steps=1,
                lr=1.0,
                generator=seeded(),
            )
        )
        weights.append(flatten(model))
    assert torch.allclose(*weights, atol=1e-5)
    assert torch.isfinite(weights[1]).all()


def test_one_seed_gives_the_same_bits_and_another_does_not():
    x, y = data()
    ends = []
    for seed in (1, 1, 2):
        model = net()
        run(model, x, y, generator=seeded(seed))
        ends.append(flatten(model))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_prepare_is_applied_to_the_raw_batch():
    model, (x, y) = net(), data()
    twin = copy.deepcopy(model)
    run(model, (x * 64).round().to(torch.int16), y, prepare=lambda raw: raw.float() / 64)
    run(twin, (x * 64).round() / 64, y)
    assert torch.equal(flatten(model), flatten(twin))


def test_a_client_plan_and_a_client_without_examples_are_refused():
    x, y = data()
    with pytest.raises(RecipeError, match="unit"):
        run(net(), x, y, plan=PrivacyPlan("client", clip_norm=1.0, sampling_prob=1.0))
    with pytest.raises(PrivacyError, match="leave this client out"):
        run(net(), x[:0], y[:0])


def test_batch_norm_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(RecipeError, match=r"model\.1: batch normalisation"):
        run(model, *data())


@pytest.mark.parametrize("method", METHODS)
def test_autocast_reaches_the_passes_of_a_private_step(method):
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(x.dtype)
            return x

    for autocast, expected in ((torch.bfloat16, torch.bfloat16), (None, torch.float32)):
        model = nn.Sequential(nn.Linear(6, 8), Watch(), nn.Linear(8, 2))
        run(model, *data(20), steps=1, method=method, autocast=autocast, plan=plan(q=1.0))
        assert set(seen) == {expected}
        assert torch.isfinite(flatten(model)).all()
        seen.clear()
