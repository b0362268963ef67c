import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from fedpress.errors import ModelError
from fedpress.quantized import (
    InputGrid,
    LayerGrids,
    QuantConv2d,
    WeightGrid,
    affine,
    fold_layers_,
    quantize_layers_,
    quantized_layers,
    settle_,
)

GRIDS = [
    WeightGrid(),
    WeightGrid(bits=4),
    WeightGrid(bits=2),
    WeightGrid(bits=4, group=4),
    WeightGrid(bits=3, group=1000),
    WeightGrid(kind="ternary"),
    WeightGrid(kind="ternary", group=5),
    WeightGrid(kind="binary"),
    WeightGrid(kind="binary", group=7),
    WeightGrid(kind="codebook", bits=1),
    WeightGrid(kind="codebook"),
    WeightGrid(kind="codebook", bits=8),
    WeightGrid(kind="codebook", bits=3, centroid_bits=8),
]
INPUTS = [
    None,
    InputGrid(),
    InputGrid(bits=4),
    InputGrid(bits=1),
    InputGrid(dynamic=True),
    InputGrid(bits=1, dynamic=True),
]
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear-3d": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding="valid"), (2, 3, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "one": (lambda: nn.Linear(1, 1), (1, 1)),
}


def name_of(grid):
    return (
        "float" if grid is None else "-".join(str(v) for v in grid.model_dump(exclude_defaults=True).values()) or "int8"
    )


def on_grid(layer, weights=None, inputs=None):
    model = nn.Sequential(layer)
    quantize_layers_(model, {"0": LayerGrids(weights=weights, inputs=inputs)})
    return model


@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
@pytest.mark.parametrize("kind", LAYERS)
def test_settled_weights_lie_on_the_grid_and_compute_the_same_to_the_bit(kind, grid):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = on_grid(make(), grid).eval()
    x = torch.randn(shape)
    before = model(x)
    settle_(model)
    layer = model[0]
    assert layer.codes().dtype == torch.int8
    assert layer.codes().shape == layer.weight.shape
    assert torch.equal(layer.dequantize(layer.codes()), layer.weight)
    assert torch.equal(model(x), before)
    assert torch.equal(model.train()(x), before)
