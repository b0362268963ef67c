"""Losses that are read late stop a training where losses that are read at once do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedpress.errors import DivergedError
from fedpress.training.watch import Watch, steps_late
from tests.training.trainings import NONE, PREPROCESS, fitting, images, network, settings

STEPS = 6


class Bad(nn.Module):
    """A batch norm and a layer, whose output is not finite in call number `at`."""

    def __init__(self, at):
        super().__init__()
        self.body, self.at, self.calls = network("resnet"), at, 0

    def forward(self, x):
        self.calls += 1
        return self.body(x) * (torch.nan if self.calls == self.at else 1.0)


def run(late, at, **changes):
    """Trains until it ends or diverges; returns the states before every step, the last, the error."""
    torch.manual_seed(0)
    fit = fitting(Bad(at), settings(batch_size=4, epochs=1, **changes), seed=0, late=late)
    before = [copies(fit)]
    try:
        for _ in fit.epochs(images(4 * STEPS), NONE, PREPROCESS):
            before.append(copies(fit))
    except DivergedError as error:
        return before, copies(fit), str(error)
    return before, copies(fit), ""


def copies(fit):
    return {name: value.clone() for name, value in fit.state().items()}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("changes", [{"momentum": 0.9}, {"optimizer": "adam", "ema": 0.9}])
@pytest.mark.parametrize("late", [0, 1, 3, 20])
@pytest.mark.parametrize("at", [1, 2, 4, STEPS])
def test_a_run_that_diverges_stops_in_the_state_before_that_step(at, late, changes):
    good, _, _ = run(0, 0, **changes)
    _, last, error = run(late, at, **changes)
    assert f"at epoch 1, step {at}" in error
    assert_equal(last, good[at - 1])


@pytest.mark.parametrize("late", [1, 3, 20])
def test_a_late_reading_changes_no_bit_of_a_run(late):
    _, expected, _ = run(0, 0, ema=0.9)
    _, last, error = run(late, 0, ema=0.9)
    assert not error
    assert_equal(last, expected)


def test_losses_are_yielded_in_order_and_late():
    watch = Watch(lambda: {"w": torch.zeros(20)}, 2)
    seen = []
    for step in range(5):
        watch.keep_()
        seen.append(list(watch.see(torch.tensor(float(step)))))
    assert seen == [[], [], [(0, 0.0)], [(1, 1.0)], [(2, 2.0)]]
    assert list(watch.rest()) == [(3, 3.0), (4, 4.0)]


def test_a_processor_never_waits_so_it_reads_at_once():
    assert steps_late(torch.device("cpu")) == 0
    assert steps_late(torch.device("cuda")) > 0
