import pytest
import torch
from torch import nn

from fedpress.nn.batch_norm import ONE_VALUE, has_batch_norm, uses_batch_statistics


@pytest.mark.parametrize(
    ("norm", "keeps", "averages_in_evaluation"),
    [
        (nn.BatchNorm1d(3), True, False),
        (nn.BatchNorm2d(3, affine=False), True, False),
        (nn.BatchNorm1d(3, track_running_stats=False), False, True),
        (nn.GroupNorm(1, 3), False, False),
        (nn.InstanceNorm1d(3), False, False),
    ],
)
def test_only_batch_norms_average_over_batches(norm, keeps, averages_in_evaluation):
    model = nn.Sequential(nn.Linear(3, 3), norm)
    assert has_batch_norm(model) is keeps
    assert uses_batch_statistics(model.eval()) is averages_in_evaluation
    assert uses_batch_statistics(model.train()) is isinstance(norm, nn.modules.batchnorm._BatchNorm)


def test_torch_still_says_so_of_a_single_value():
    with pytest.raises(ValueError, match=ONE_VALUE):
        nn.BatchNorm1d(3)(torch.zeros(1, 3))
