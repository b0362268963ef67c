import pytest
import torch
from torch import nn

from fedpress.layers import replace_, tensor


def cut(model, *names, keep, axis=0):
    """Keeps the first `keep` entries along `axis` of the named tensors."""
    new = {}
    for name in names:
        old = tensor(model, name)
        part = old.detach().narrow(axis, 0, keep).clone()
        new[name] = nn.Parameter(part) if isinstance(old, nn.Parameter) else part
    replace_(model, new)
    return model


LAYERS = [
    (nn.Conv2d(6, 8, 3), ("weight", "bias"), 0, 5, nn.Conv2d(6, 5, 3), (2, 6, 4, 4)),
    (nn.Conv2d(6, 8, 3), ("weight",), 1, 4, nn.Conv2d(4, 8, 3), (2, 4, 4, 4)),
    (nn.Conv2d(6, 8, 3, groups=2), ("weight",), 1, 2, nn.Conv2d(4, 8, 3, groups=2), (2, 4, 4, 4)),
    (nn.Conv2d(6, 8, 3, groups=2), ("weight", "bias"), 0, 4, nn.Conv2d(6, 4, 3, groups=2), (2, 6, 4, 4)),
    (nn.Conv2d(8, 8, 3, groups=8), ("weight", "bias"), 0, 5, nn.Conv2d(5, 5, 3, groups=5), (2, 5, 4, 4)),
    (nn.Conv2d(8, 16, 3, groups=8), ("weight", "bias"), 0, 6, nn.Conv2d(3, 6, 3, groups=3), (2, 3, 4, 4)),
    (nn.Conv1d(6, 8, 3), ("weight", "bias"), 0, 5, nn.Conv1d(6, 5, 3), (2, 6, 4)),
    (nn.ConvTranspose2d(6, 8, 3), ("weight",), 0, 4, nn.ConvTranspose2d(4, 8, 3), (2, 4, 4, 4)),
    (nn.Linear(6, 8), ("weight", "bias"), 0, 5, nn.Linear(6, 5), (2, 6)),
    (nn.Linear(6, 8), ("weight",), 1, 5, nn.Linear(5, 8), (2, 5)),
    (nn.BatchNorm2d(8), ("weight", "bias", "running_mean", "running_var"), 0, 5, nn.BatchNorm2d(5), (2, 5, 3, 3)),
    (
        nn.BatchNorm2d(8, affine=False),
        ("running_mean", "running_var"),
        0,
        5,
        nn.BatchNorm2d(5, affine=False),
        (2, 5, 3, 3),
    ),
    (nn.GroupNorm(4, 8), ("weight", "bias"), 0, 6, nn.GroupNorm(3, 6), (2, 6, 3, 3)),
    (nn.PReLU(8), ("weight",), 0, 5, nn.PReLU(5), (2, 5, 3)),
]


@pytest.mark.parametrize(("layer", "names", "axis", "keep", "expected", "shape"), LAYERS, ids=lambda v: str(v)[:40])
def test_a_smaller_layer_is_the_one_that_would_have_been_made(layer, names, axis, keep, expected, shape):
    small = cut(layer, *names, keep=keep, axis=axis)
    assert repr(small) == repr(expected)
    expected.load_state_dict(small.state_dict())
    x = torch.randn(shape)
    assert torch.equal(small.eval()(x), expected.eval()(x))


def test_a_shared_tensor_stays_shared_wherever_it_is_named_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    cut(model, "0.weight", keep=3)
    assert model[0].weight is model[2].weight
    assert [model[0].out_features, model[2].out_features] == [3, 3]


def test_layers_that_are_not_named_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    kept = model[1].weight
    cut(model, "0.weight", "0.bias", keep=2)
    assert model[1].weight is kept
    assert model[1].out_features == 4


@pytest.mark.parametrize("name", ["", "weight", "0", "0.weigth", "1.weight", "0.in_features", "0.bias"])
def test_only_tensors_have_names(name):
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with pytest.raises(AttributeError):
        tensor(model, name)
    with pytest.raises(AttributeError):
        replace_(model, {name: torch.zeros(1)})
