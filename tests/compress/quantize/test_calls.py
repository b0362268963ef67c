"""Layers are quantized however forward calls them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpress.compress.quantize import quantizable, quantize_
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization


class Scales(nn.Module):
    """One convolution on two sizes of the same image, as in a feature pyramid."""

    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2)

    def forward(self, x):
        return torch.cat([self.look(x).flatten(2), self.look(F.avg_pool2d(x, 2)).flatten(2)], 2)


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, x):
        return self.inner(input=x).mT


CALLS = {
    "two sizes": (Scales, [torch.rand(5, 4, 9, 9), torch.rand(3, 4, 9, 9)]),
    "by name": (ByName, [torch.rand(5, 7, 4), torch.rand(2, 7, 4)]),
    "one image": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)), [*torch.rand(6, 4, 5, 5)]),
    "one row": (lambda: nn.Sequential(nn.Linear(4, 6)), [*torch.rand(6, 4)]),
}


@pytest.mark.parametrize("rounding", ["nearest", "second-order"])
@pytest.mark.parametrize("name", CALLS)
def test_mean_outputs_stay_where_they_were(name, rounding):
    torch.manual_seed(0)
    make, batches = CALLS[name]
    model = make()
    plain = copy.deepcopy(model)
    table, left = quantizable(model, QuantizationScheme(weights=WeightQuantization(bits=2)))
    assert (len(table), left) == (1, {})
    assert quantize_(model, table, batches, rounding=rounding) == {}
    errors = [(model(x) - plain(x)).detach() for x in batches]
    channels = torch.cat([e.movedim(e.shape.index(6), -1).reshape(-1, 6) for e in errors])
    assert float(channels.abs().mean()) > 1e-3
    torch.testing.assert_close(channels.mean(0), torch.zeros(6), atol=1e-6, rtol=0)
