from copy import deepcopy

import pytest
import torch
from torch import nn

from fedpress.compress import restore_batch_norm_
from fedpress.errors import DataError


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 3)
    )


def test_statistics_are_the_plain_mean_over_batches_and_nothing_else_changes():
    model = network().train()
    model[1].momentum = 0.3
    model[1].num_batches_tracked.fill_(17)
    model[4].eval()
    before, draw = deepcopy(model), torch.Generator().manual_seed(0)
    batches = [torch.randn(6, 3, 8, 8, generator=draw) for _ in range(4)]
    assert restore_batch_norm_(model, iter(batches)) == 4
    seen = [before[0](x).detach() for x in batches]
    torch.testing.assert_close(
        model[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    )
    torch.testing.assert_close(
        model[1].running_var, torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0)
    )
    assert model[1].momentum == 0.3
    assert model[1].num_batches_tracked == 17
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)
    )


def test_no_batches_are_refused_and_change_nothing():
    model = network()
    model[1].running_mean.fill_(3)
    with pytest.raises(DataError, match="no batches"):
        restore_batch_norm_(model, [])
    assert model[1].running_mean.eq(3).all()


def test_a_failing_batch_leaves_modes_and_momentum_as_they_were():
    model = network().eval()
    model[1].running_mean.fill_(3)
    with pytest.raises(RuntimeError):
        restore_batch_norm_(model, [torch.randn(2, 5, 8, 8)])
    assert not any(m.training for m in model.modules())
    assert model[1].momentum == 0.1
    assert model[1].running_mean.eq(3).all()


def test_a_batch_norm_that_never_runs_keeps_its_statistics():
    model = network()
    model.spare = nn.BatchNorm2d(5)
    model.spare.running_mean.fill_(3)
    model.forward = lambda x: model[:5](x)
    restore_batch_norm_(model, [torch.randn(2, 3, 8, 8)])
    assert model.spare.running_mean.eq(3).all()


def test_a_batch_of_one_example_is_refused_and_changes_nothing():
    model = nn.Sequential(
        nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = "a batch of one example; give batches of two or more examples"
    with pytest.raises(DataError, match=message):
        restore_batch_norm_(model, [torch.randn(5, 2, 4), torch.randn(1, 2, 4)])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
