"""The learning rate over a training."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from fedpress.training.fit import Step
from fedpress.training.schedule import SCHEDULES, factor
from fedpress.training.settings import TrainSettings
from tests.training.trainings import NONE, PREPROCESS, fitting, images, network, rates, settings

PEAK, STEPS = 0.3, 200


def of(name, warmup=0.0, **more):
    return TrainSettings(epochs=1, lr_schedule=name, warmup=warmup, **more)


def ours(s, steps=STEPS):
    return [PEAK * factor(step / steps, s) for step in range(steps)]


def theirs(make, steps=STEPS):
    """The rates of the steps that torch's scheduler gives."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], PEAK)
    scheduler, seen = make(optimizer), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


TWINS = {
    "linear": lambda o, n: lr_scheduler.LinearLR(o, 1.0, 0.0, n),
    "cosine": lambda o, n: lr_scheduler.CosineAnnealingLR(o, n),
    "constant": lambda o, n: lr_scheduler.ConstantLR(o, 1.0, n),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_schedule_gives_the_rates_of_its_twin_in_torch(name):
    np.testing.assert_allclose(ours(of(name)), theirs(lambda o: TWINS[name](o, STEPS)), atol=1e-9)


def test_steps_down_are_those_of_torch():
    s = of("step", lr_milestones=(0.25, 0.6, 0.9), lr_gamma=0.3)
    twin = theirs(lambda o: lr_scheduler.MultiStepLR(o, [50, 120, 180], 0.3))
    np.testing.assert_allclose(ours(s), twin)


@pytest.mark.parametrize("name", TWINS)
def test_behind_a_warmup_the_same_curve_follows(name):
    behind = ours(of(name, warmup=0.2))[40:]
    np.testing.assert_allclose(behind, theirs(lambda o: TWINS[name](o, 160), 160), atol=1e-9)


def test_milestones_count_from_the_beginning_of_the_training():
    rates = ours(of("step", warmup=0.2))
    assert rates[99] == pytest.approx(PEAK)
    assert rates[100] == pytest.approx(PEAK / 10)
    assert rates[150] == pytest.approx(PEAK / 100)


def test_one_cycle_is_that_of_torch():
    # Torch's curve is at its peak one step earlier, and at its end with the last step.
    peak = 0.3 * STEPS - 1
    twin = theirs(lambda o: lr_scheduler.OneCycleLR(o, PEAK, STEPS, pct_start=0.3))
    s = of("onecycle", warmup=0.3)
    for step, rate in enumerate(twin):
        if step <= peak:
            done = 0.3 * step / peak
        else:
            done = 0.3 + 0.7 * (step - peak) / (STEPS - 1 - peak)
        assert PEAK * factor(done, s) == pytest.approx(rate, rel=1e-6)


@given(st.floats(0, 1), st.floats(0, 0.999), st.sampled_from(sorted(SCHEDULES)))
def test_no_rate_is_above_that_of_the_settings(done, warmup, name):
    assert 0 <= factor(done, of(name, warmup)) <= 1


@given(st.floats(0, 1), st.floats(0, 0.999))
def test_without_a_word_the_rate_rises_over_the_warmup_and_falls_to_zero(done, warmup):
    s = TrainSettings(epochs=1, warmup=warmup)
    if done < warmup:
        assert factor(done, s) == max(0.02, done / warmup)
    else:
        assert factor(done, s) == pytest.approx((1 - done) / (1 - warmup))
    assert factor(1.0, s) == 0


def test_every_word_of_the_setting_has_a_row():
    words = TrainSettings.model_json_schema()["properties"]["lr_schedule"]["enum"]
    assert list(SCHEDULES) == words


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
