"""The bound on one sample holds for the rounded numbers themselves, in float32 and in 16 bits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_weight

from fedpress.models.norms import freeze_batch_norm_
from fedpress.models.resnet import resnet_small
from fedpress.privacy.per_example import ghost
from fedpress.privacy.per_example.gradients import METHODS, clipped_gradient_sum
from fedpress.privacy.per_example.persample import BLOCK, MARGIN, clip_factors, row_norms

LAYERS = {
    "patches": (nn.Conv2d(6, 8, 3, padding=1, bias=False), 16),
    "gram": (nn.Conv2d(64, 96, 3, padding=1, bias=False), 4),
    "pixels": (nn.Conv2d(6, 8, 1, stride=2, bias=False), 16),
    "groups": (nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), 8),
}


def values(kind, n):
    chance = torch.Generator().manual_seed(n)
    if kind == "equal":  # every square is rounded down
        return torch.full((1, n), 1 + 2.0**-12)
    if kind == "falling":  # each new square is lost beside the sum
        return torch.cat([torch.ones(1), torch.full((n - 1,), 2.0**-12.6)])[None]
    scale = {"normal": 1.0, "tiny": 1e-15, "huge": 1e15}[kind]
    return scale * torch.randn(1, n, generator=chance)


def true_norm(x):
    return math.sqrt(math.fsum(x.flatten().double().square().tolist()))


@pytest.mark.parametrize("kind", ["normal", "equal", "falling", "tiny", "huge"])
@pytest.mark.parametrize("n", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 1000, 70_000])
@pytest.mark.parametrize("share", [0.999, 0.5, 1e-4])
def test_a_rounded_clipped_row_is_never_longer_than_the_bound(kind, n, share):
    row = values(kind, n)
    norm = row_norms(row)
    assert float(norm) == pytest.approx(true_norm(row), rel=MARGIN / 2)
    clip_norm = share * true_norm(row)
    clipped = clip_factors(norm, clip_norm).float()[:, None] * row
    assert true_norm(clipped) <= clip_norm
    # What the margin costs: the clipped gradient is shorter by a few millionths at most.
    assert true_norm(clipped) >= clip_norm * (1 - 2 * MARGIN)


# torch cannot run a batch norm under autocast within vmap.
@pytest.mark.parametrize(
    ("method", "autocast"),
    [*((method, None) for method in METHODS), ("ghost", torch.bfloat16), ("loop", torch.bfloat16)],
)
def test_the_sum_of_one_sample_is_never_longer_than_the_bound(method, autocast):
    torch.manual_seed(0)
    model = freeze_batch_norm_(resnet_small(width=8))
    x, y = 3 * torch.randn(6, 3, 16, 16), torch.randint(10, (6,))
    for row in range(6):
        one = slice(row, row + 1)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            total, raw = clipped_gradient_sum(
                model, F.cross_entropy, x[one], y[one], clip_norm=1e-2, method=method
            )
        assert raw.agreed
        assert raw.share_clipped == 1
        assert 0.999 * 1e-2 <= true_norm(total) <= 1e-2


def layer_terms(name, dtype, n=5):
    layer, side = LAYERS[name]
    chance = torch.Generator().manual_seed(0)
    a = torch.randn(n, layer.in_channels, side, side, generator=chance).to(dtype)
    with torch.no_grad():
        shape = layer(a.float()).shape
    b = torch.randn(shape, generator=chance).to(dtype)
    return layer, a, b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_one_more_sample_moves_the_sum_of_a_layer_by_at_most_the_bound(name, dtype):
    layer, a, b = layer_terms(name, dtype)
    sums = []
    for n in (4, 5):
        ((_, term),) = ghost.terms_of(layer, a[:n], b[:n])
        norms = ghost.norms_of([term], n, a.device)
        sums.append(term.total(clip_factors(norms, 1.0).float()).double())
    # Sums of five float32 numbers of norm 1 or less: four roundings.
    assert true_norm(sums[1] - sums[0]) <= 1 + 4 * 5 * 2.0**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_the_sum_of_a_layer_is_that_of_its_gradients(name, dtype):
    layer, a, b = layer_terms(name, dtype)
    factors = torch.linspace(0.1, 1.0, len(a))
    ((_, term),) = ghost.terms_of(layer, a, b)
    expected = conv2d_weight(
        a.double(),
        layer.weight.shape,
        b.double() * factors.double()[:, None, None, None],
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )
    error = true_norm(term.total(factors) - expected) / true_norm(expected)
    assert error < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        (1, 2, 0, 1),
        (3, 1, 2, 2),
        ((1, 3), (2, 1), (0, 2), (1, 2)),
        (2, 3, 0, 1),
    ],
)
def test_gradients_by_patches_are_those_of_the_convolution(kernel, stride, padding, dilation):
    layer = nn.Conv2d(3, 4, kernel, stride, padding, dilation).double()
    a = torch.randn(11, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = torch.randn_like(layer(a))
    got = ghost.patch_gradients(layer, a, b)
    for i in range(len(a)):
        shape = layer.weight.shape
        one = conv2d_weight(a[i : i + 1], shape, b[i : i + 1], stride, padding, dilation)
        assert torch.allclose(got[i], one.permute(0, 2, 3, 1).flatten(1), rtol=1e-12, atol=1e-12)
