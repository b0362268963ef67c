"""Drawing public examples, and refusing those that would mislead."""

from dataclasses import replace

import pytest
import torch

from fedpress.core.examples import Arrays, Preprocess
from fedpress.data import FederatedData
from fedpress.errors import DataError
from fedpress.models import ModelSpec
from fedpress.stages.public import draw_calibration, restore_norms_
from fedpress.workspace.state import State


def state(x, y):
    some = Arrays(torch.zeros(2, 3), torch.tensor([0, 1]))
    data = FederatedData(
        "tiny", {"a": some}, Arrays(x, y), some, some, 2, ("cat", "dog"), Preprocess()
    )
    spec = ModelSpec(architecture="mlp", arguments={"in_features": 3}, input_shape=(3,))
    return State(spec, torch.nn.Linear(3, 2), data, 0, 8)


def test_draws_without_repetition_and_by_the_seed():
    here = state(torch.arange(60.0).view(20, 3), torch.arange(20) % 2)
    one, same, other = (draw_calibration(here, 12, seed) for seed in (1, 1, 2))
    assert len(one) == 12
    assert len(one.x[:, 0].unique()) == 12
    assert torch.equal(one.x, same.x)
    assert not torch.equal(one.x, other.x)
    assert torch.equal(one.y, (one.x[:, 0] / 3).long() % 2)
    assert len(draw_calibration(here, 500, 1)) == 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_public_examples_that_are_not_finite_are_refused_when_the_data_is_made(bad):
    x = torch.zeros(20, 3)
    x[3, 1] = bad
    with pytest.raises(DataError, match="public part: some features are NaN or infinite"):
        state(x, torch.arange(20) % 2)


def test_one_class_is_refused_by_its_name_unless_there_is_only_one():
    here = state(torch.zeros(20, 3), torch.ones(20, dtype=torch.int64))
    with pytest.raises(DataError, match="all 20 drawn public examples have the class 'dog'"):
        draw_calibration(here, 64, 0)
    one = Arrays(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    data = FederatedData("tiny", {"a": one}, one, one, one, 1, ("dog",), Preprocess())
    assert len(draw_calibration(replace(here, data=data), 64, 0)) == 4


def test_an_empty_public_part_is_refused_with_the_cure():
    with pytest.raises(
        DataError,
        match=r"public part of the data is empty; give public examples by .*data\.public_share",
    ):
        draw_calibration(state(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)), 64, 0)


def test_norms_are_restored_to_the_mean_and_variance_of_the_examples():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 2 + 5
    here = state(x, torch.arange(64) % 2)
    norm = torch.nn.BatchNorm1d(3)
    assert restore_norms_(torch.nn.Sequential(norm), here, here.data.public, batch=64) == 64
    assert torch.allclose(norm.running_mean, x.mean(0))
    assert torch.allclose(norm.running_var, x.var(0))


@pytest.mark.parametrize("empty", [True, False])
def test_norms_stay_where_there_is_nothing_to_restore_them_from(empty):
    here = state(torch.randn(8, 3), torch.arange(8) % 2)
    norm = torch.nn.BatchNorm1d(3)
    public = here.data.public.take(torch.arange(0)) if empty else None
    assert restore_norms_(torch.nn.Sequential(norm), here, public, batch=4) == 0
    assert restore_norms_(torch.nn.Linear(3, 2), here, here.data.public, batch=4) == 0
    assert torch.equal(norm.running_mean, torch.zeros(3))


def test_no_example_is_no_evidence():
    here = state(torch.zeros(20, 3), torch.arange(20) % 2)
    with pytest.raises(DataError, match=r"calibration: got 0, .* give calibration=256"):
        draw_calibration(here, 0, 0)
