from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpress.compress.quantize.rounding import (
    best_scale,
    patches,
    round_second_order_,
    second_moment,
)
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization, in_groups
from fedpress.nn.quantized import quantize_layers_


def on_grid(layer, grid):
    quantize_layers_(model := nn.Sequential(layer), {"0": QuantizationScheme(weights=grid)})
    return model[0]


@pytest.mark.recipe
@pytest.mark.parametrize(
    "grid",
    [WeightQuantization(bits=2), WeightQuantization(bits=4), WeightQuantization(bits=3, group=10)],
)
def test_no_scale_of_a_fine_search_is_much_better(grid):
    weight = torch.randn(3, 30, generator=torch.Generator().manual_seed(0)).pow(3)
    scale = best_scale(weight, grid).reshape(3, -1, 1)
    rows = in_groups(weight, grid.group)

    def error(s):
        return ((rows / s).round().clamp(grid.lowest, grid.highest) * s - rows).square().sum(-1)

    least = torch.stack(
        [
            error(rows.abs().amax(-1, keepdim=True) / grid.highest * t)
            for t in torch.linspace(0.1, 1.2, 3000)
        ]
    )
    assert (error(scale) <= 1.1 * least.amin(0) + 1e-9).all()


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(1, 2)), (2, 4, 6, 7)),
    (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 5, 5)),
    (nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda v: str(v)[:6])
def test_patches_times_weights_are_the_outputs(layer, shape):
    x = torch.randn(shape)
    rows = patches(layer, x)
    out = torch.cat(
        [
            r @ w.reshape(len(w), -1).T
            for r, w in zip(rows, layer.weight.chunk(layer.groups), strict=True)
        ],
        1,
    )
    wanted = layer(x).movedim(1, -1).reshape(-1, layer.out_channels) - layer.bias
    torch.testing.assert_close(out, wanted)


def test_the_second_moment_is_that_of_the_patches():
    layer, x = nn.Linear(3, 2), torch.randn(5, 4, 3)
    second, rows = second_moment(layer, x, most=1000)
    assert rows == 20
    torch.testing.assert_close(second, (x.reshape(-1, 3).T @ x.reshape(-1, 3))[None])
    fewer = second_moment(layer, x, most=7)
    assert fewer[1] in range(7, 15)


GRIDS = [
    WeightQuantization(bits=3),
    WeightQuantization(bits=3, group=4),
    WeightQuantization(kind="ternary"),
    WeightQuantization(kind="binary"),
    WeightQuantization(kind="codebook", bits=2),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.kind}-{g.group}")
def test_second_order_rounding_hurts_the_outputs_less_and_lies_on_the_grid(grid):
    torch.manual_seed(0)
    layer = on_grid(nn.Linear(24, 16), grid)
    x = torch.randn(400, 24) @ torch.randn(24, 24)  # correlated inputs
    before = layer.weight.detach().clone()
    nearest = layer.dequantize(layer.quantize())
    round_second_order_(layer, (x.T @ x)[None] / 400)
    assert torch.equal(layer.dequantize(layer.quantize()), layer.weight)

    def harm(weight):
        return F.linear(x, weight - before).square().mean(0)

    ours, theirs = harm(layer.weight.detach()), harm(nearest)
    assert (ours <= theirs * 1.0001).all()
    assert float(ours.mean()) < (0.7 if grid.bits > 2 else 0.95) * float(theirs.mean())


def test_the_rounding_comes_close_to_the_best_of_all_roundings():
    """All 2^8 ways to round 8 weights up or down, tried out."""
    torch.manual_seed(1)
    layer = on_grid(nn.Linear(8, 4, bias=False), WeightQuantization(bits=3))
    x = torch.randn(100, 8) @ torch.randn(8, 8)
    before, scale = layer.weight.detach().clone(), layer.weight_scale.detach()[:, None]
    low = (before / scale).floor()
    ways = torch.tensor([*product((0.0, 1.0), repeat=8)])
    tried = ((low[:, None] + ways).clamp(-3, 3) * scale[:, None] - before[:, None]) @ x.T
    best = tried.square().mean(-1).amin(1)
    nearest = F.linear(x, layer.dequantize(layer.quantize()) - before).square().mean(0)
    round_second_order_(layer, (x.T @ x)[None], damping=1e-6)
    ours = F.linear(x, layer.weight.detach() - before).square().mean(0)
    assert float((ours / best).log().mean()) < 0.5 * float((nearest / best).log().mean())


def test_independent_inputs_leave_the_nearest_point():
    torch.manual_seed(2)
    layer = on_grid(nn.Linear(6, 5), WeightQuantization(bits=4))
    nearest = layer.dequantize(layer.quantize())
    round_second_order_(layer, torch.eye(6)[None])
    assert torch.equal(layer.weight, nearest)


@pytest.mark.parametrize(
    "grid", [g for g in GRIDS if g.has_zero], ids=lambda g: f"{g.kind}-{g.group}"
)
def test_pruned_weights_stay_pruned(grid):
    torch.manual_seed(3)
    plain = nn.Conv2d(4, 6, 3, groups=2)
    zero = torch.rand_like(plain.weight) < 0.5
    plain.weight.data[zero] = 0
    layer = on_grid(plain, grid)
    second, rows = second_moment(layer, torch.randn(8, 4, 6, 6), most=10_000)
    round_second_order_(layer, second / rows)
    assert not layer.weight[zero].any()
    assert layer.weight[~zero].any()


def test_inputs_that_are_always_zero_are_no_division_by_zero():
    layer = on_grid(nn.Linear(4, 3), WeightQuantization(bits=4))
    nearest = layer.dequantize(layer.quantize())
    round_second_order_(layer, torch.zeros(1, 4, 4))
    assert torch.equal(layer.weight, nearest)
