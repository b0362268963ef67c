import pytest
import torch
from torch import nn
from torch.nn.grad import conv2d_weight

from fedpress.privacy.per_example import ghost
from fedpress.privacy.per_example.persample import Query


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
def test_ghost_norms_of_a_convolution_are_those_of_its_gradients(kernel, stride, padding, dilation):
    layer = nn.Conv2d(3, 4, kernel, stride, padding, dilation)
    a = torch.randn(5, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = torch.randn_like(layer.double()(a))
    each = [
        conv2d_weight(a[i : i + 1], layer.weight.shape, b[i : i + 1], stride, padding, dilation)
        for i in range(5)
    ]
    expected = torch.stack(each).flatten(1).square().sum(1)
    assert torch.allclose(ghost.convolution_squares(layer, a, b), expected, rtol=1e-12)


def test_a_norm_that_cancels_is_still_bounded():
    layer = nn.Conv2d(
        1, 1, 1, bias=False
    )  # on 4 x 4 pixels its gradient is one sum of sixteen products
    a = torch.ones(1, 1, 4, 4)
    b = torch.tensor([1.0, -1.0] * 8).view(1, 1, 4, 4) * 1e6
    b[..., -1, -1] += 1
    terms = [term for _, term in ghost.terms_of(layer, a, b)]
    norm = float(ghost.norms_of(terms, 1, a.device)[0])
    true = float((a.double() * b.double()).sum().abs())
    assert norm >= true
    assert float(terms[0].total(torch.ones(1)).norm()) <= norm


def test_layers_without_a_rule_are_not_supported():
    assert ghost.supports(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    )
    assert not ghost.supports(nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2)))
    assert not ghost.supports(nn.Conv2d(3, 4, 3, padding="same"))
    assert not ghost.supports(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    assert not ghost.supports(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    frozen = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    frozen[0].weight.requires_grad_(False)
    assert ghost.supports(frozen)


def test_a_layer_that_runs_twice_is_refused_while_running():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    views = [torch.zeros_like(p) for p in model.parameters()]
    x, y = torch.randn(2, 3), torch.tensor([0, 1])
    query = Query(model, nn.functional.cross_entropy, x, y, clip_norm=1.0)
    with pytest.raises(NotImplementedError, match="more than once"):
        ghost.add_ghost_(views, query)
    assert not layer._forward_hooks
