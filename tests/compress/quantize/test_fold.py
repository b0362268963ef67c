import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpress.compress.quantize import find_folds, fold_
from fedpress.errors import ModelError
from fedpress.models import ModelSpec
from fedpress.nn.folded import apply_folds_
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import materialize_, quantize_layers_, quantized_layers


def seasoned(model):
    """Gives every batch norm statistics, scales (some negative, some 0) and shifts of its own."""
    chance = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            n = module.num_features
            if module.track_running_stats:
                module.running_mean.copy_(torch.randn(n, generator=chance))
                module.running_var.copy_(torch.rand(n, generator=chance) + 0.1)
            if module.affine:
                module.weight.data.copy_(torch.randn(n, generator=chance))
                module.bias.data.copy_(torch.randn(n, generator=chance))
    return model.eval()


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = (
            nn.Conv1d(3, 4, 3, groups=1, bias=True),
            nn.BatchNorm1d(4, affine=False),
        )
        self.deep, self.norm2 = nn.Conv1d(4, 8, 3, groups=4, bias=False), nn.BatchNorm1d(8)
        self.head, self.norm3 = nn.Linear(8, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.norm2(self.deep(F.relu(self.norm(self.conv(x)))))
        return self.norm3(self.head(x.mean(2)))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, 3, 2, padding="same"), nn.BatchNorm3d(3), nn.ReLU()
        )

    def forward(self, x):
        return self.layers(x).flatten(1)


FOLDED = [
    (
        ModelSpec(architecture="resnet-small", arguments={"width": 8}, input_shape=(3, 8, 8)).build,
        (2, 3, 8, 8),
        9,
    ),
    (Sequence, (2, 3, 9), 3),
    (Volume, (2, 1, 3, 3, 3), 1),
]


@pytest.mark.parametrize(("make", "shape", "count"), FOLDED)
def test_a_folded_network_computes_the_same_with_one_operation_less(make, shape, count):
    torch.manual_seed(0)
    model = seasoned(make())
    folded = copy.deepcopy(model)
    folds, left = find_folds(folded, torch.zeros(shape))
    assert (len(folds), left) == (count, {})
    fold_(folded, folds)
    x = torch.randn(5, *shape[1:])
    wanted = model(x)
    torch.testing.assert_close(
        folded(x), wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max())
    )
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    rebuilt = make()
    apply_folds_(rebuilt, folds)
    rebuilt.load_state_dict(folded.state_dict())
    assert torch.equal(rebuilt.eval()(x), folded(x))


GRIDS = [
    WeightQuantization(bits=4),
    WeightQuantization(bits=4, group=5),
    WeightQuantization(kind="ternary"),
    WeightQuantization(kind="binary"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.kind}-{g.group}")
def test_a_layer_on_a_grid_stays_there_when_it_takes_in_its_norm(grid):
    torch.manual_seed(0)
    model = seasoned(FOLDED[0][0]())
    folds, _ = find_folds(model, torch.zeros(2, 3, 8, 8))
    quantize_layers_(model, {into: QuantizationScheme(weights=grid) for into in folds.values()})
    materialize_(model)
    codes = {n: m.quantize().abs() for n, m in quantized_layers(model)}
    folded = copy.deepcopy(model)
    fold_(folded, folds)
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    for name, layer in quantized_layers(folded):
        assert torch.equal(layer.quantize().abs(), codes[name])
        assert torch.equal(layer.dequantize(layer.quantize()), layer.weight)


def test_zeros_stay_zeros():
    model = seasoned(Sequence())
    model.deep.weight.data[:, :, 1] = 0
    fold_(model, find_folds(model, torch.zeros(2, 3, 9))[0])
    assert not model.deep.weight[:, :, 1].any()


class Odd(nn.Module):
    """Batch norms that cannot be folded, each for another reason."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(2)
        self.read, self.read_norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.twice, self.twice_norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.own, self.own_norm = (
            nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)),
            nn.BatchNorm2d(2),
        )
        self.unused, self.fresh = nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False)
        self.rows, self.row_norm = nn.Linear(3, 3), nn.BatchNorm1d(2)

    def forward(self, x):
        x = self.first(x)
        y = self.read(x)
        x = self.read_norm(y) + y
        x = self.twice_norm(self.twice(x)) + self.twice(x)
        x = self.fresh(self.own_norm(self.own(x)))
        return self.row_norm(self.rows(x.flatten(2)[:, :, :3]))


def test_what_cannot_be_folded_is_listed_with_the_reason():
    model = seasoned(Odd())
    folds, left = find_folds(model, torch.zeros(2, 2, 3, 3))
    assert folds == {}
    says = {
        "first": "not a convolution or linear layer",
        "read_norm": "something else uses the output of the same layer",
        "twice_norm": "is used more than once",
        "own_norm": "the layer before it computes its weight from other tensors",
        "unused": "forward does not use it",
        "fresh": "no running statistics",
        "row_norm": "another axis",
    }
    assert left.keys() == says.keys()
    for name, reason in says.items():
        assert reason in left[name], (name, left[name])


def test_a_network_without_batch_norms_has_nothing_to_fold():
    assert find_folds(nn.Linear(2, 2), torch.zeros(2, 2)) == ({}, {})


def test_a_norm_that_is_not_finite_is_named():
    model = seasoned(Volume())
    model.layers[1].running_var[0] = float("nan")
    with pytest.raises(ModelError, match=r"model: 'layers.1' has NaN"):
        fold_(model, {"layers.1": "layers.0"})


def test_shared_weights_are_folded_first():
    model = seasoned(Volume())
    quantize_layers_(
        model, {"layers.0": QuantizationScheme(weights=WeightQuantization(kind="codebook"))}
    )
    with pytest.raises(
        ModelError, match=r"channels of .layers.0. share a codebook.*fold the batch norm before"
    ):
        fold_(model, {"layers.1": "layers.0"})
    assert isinstance(model.layers[1], nn.BatchNorm3d)


class Rectified(nn.BatchNorm2d):
    """A batch norm that does more."""

    def forward(self, x):
        return super().forward(x).relu()


class Leaned(nn.Module):
    """A convolution and a batch norm, with something that makes one more than its plain operation."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.kind = kind
        if kind == "subclass":
            self.norm = Rectified(4)
        if kind == "hook":
            self.norm.register_forward_hook(lambda module, given, out: out * 0.5)
        if kind == "shared bias":
            self.other.bias = self.conv.bias
        if kind == "no module":
            self.conv = nn.Conv2d(3, 4, 3, bias=False)

    def forward(self, x):
        x = F.conv2d(x, self.conv.weight) if self.kind == "no module" else self.conv(x)
        if self.kind == "functional":
            n = self.norm
            x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias)
        else:
            x = self.norm(x)
        return self.other(x + self.norm.bias[:, None, None] if self.kind == "shift read" else x)


@pytest.mark.parametrize(
    "kind", ["subclass", "hook", "shared bias", "shift read", "functional", "no module"]
)
def test_a_norm_that_something_else_leans_on_stays_and_says_why(kind):
    torch.manual_seed(0)
    model, x = seasoned(Leaned(kind)), torch.randn(2, 3, 6, 6)
    folds, left = find_folds(model, x)
    assert not folds
    assert list(left) == ["norm"]


def test_the_same_norm_without_any_of_it_is_folded():
    folds, left = find_folds(seasoned(Leaned("plain")), torch.randn(2, 3, 6, 6))
    assert (folds, left) == ({"norm": "conv"}, {})
