"""The learning rate over a training."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpress.training.fit import Step
from fedpress.training.schedule import one_cycle
from tests.training.trainings import NONE, PREPROCESS, fitting, images, network, rates, settings


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
