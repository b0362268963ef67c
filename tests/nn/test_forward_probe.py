import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpress.compress.quantize import quantizable, quantize_
from fedpress.nn.forward_probe import why_not_plain
from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import materialize_


class PadsBefore(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(
            F.pad(x, (1, 2, 0, 1)),
            self.weight,
            self.bias,
            self.stride,
            0,
            self.dilation,
            self.groups,
        )


class Causal(nn.Conv1d):
    def __init__(self, i, o, k, **more):
        super().__init__(i, o, k, padding=(k - 1), **more)

    def forward(self, x):
        return super().forward(x)[..., : x.shape[-1]]


class Mirrors(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(
            F.pad(x, (1, 1, 1, 1), mode="reflect"), self.weight.to(x.dtype), self.bias
        )


class Activates(nn.Linear):
    def forward(self, input):
        return F.linear(input, weight=self.weight, bias=self.bias).relu()


class Nothing(nn.Linear):
    pass


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Masked(nn.Conv2d):
    def forward(self, x):
        self.weight.data *= (self.weight.abs() > 0.01).float()
        return super().forward(x)


class Turned(nn.Linear):
    def forward(self, x):
        return x @ self.weight.t() + self.bias


class Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + super().forward(2 * x)


class Scales(nn.Linear):
    def forward(self, x):
        return super().forward(x / x.norm())


class Adapted(nn.Linear):
    def __init__(self, i, o):
        super().__init__(i, o)
        self.down, self.up = nn.Linear(i, 2), nn.Linear(2, o)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class BiasApart(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight) + 2 * self.bias


class DoublesBias(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias * 2)


class Shifts(nn.Linear):
    def forward(self, x):
        return super().forward(x + 1)


class Turns(nn.Linear):
    def forward(self, x):
        return super().forward(-x)


class Limits(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.clamp(-1, 1))


class DropsSmall(nn.Linear):
    def forward(self, x):
        return super().forward(x * (x.abs() > 0.3))


class OnGridTwice(nn.Linear):
    """Applies the weight a second time to an input that is rounded to quarters."""

    def forward(self, x):
        on_grid = torch.equal(x, (x * 4).round() / 4)
        return super().forward(super().forward(x) if on_grid else x)


class Rectifies(nn.Linear):
    def forward(self, x):
        return super().forward(x.relu())


class Wants(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x * mask)


GOOD = {
    "padded": (PadsBefore(3, 4, 3, stride=2), (2, 3, 7, 7)),
    "causal": (Causal(3, 4, 3), (2, 3, 7)),
    "mirrored": (Mirrors(3, 4, 3, groups=1), (2, 3, 7, 7)),
    "activated": (Activates(5, 4), (2, 5)),
    "nothing": (Nothing(5, 4, bias=False), (2, 3, 5)),
    "rectified": (Rectifies(5, 4), (2, 5)),
}
BAD = {
    "standardised": (Standardised(3, 4, 3), "reads its weight by"),
    "masked": (Masked(3, 4, 3), "reads its weight by"),
    "turned": (Turned(3, 4), "reads its weight by 't'"),
    "twice": (Twice(3, 4, 3), "uses its weight 2 times"),
    "scaled": (Scales(3, 4), "changes the values of its input"),
    "adapted": (Adapted(3, 4), "weights beside its own"),
    "bias apart": (BiasApart(3, 4), "adds its bias in its own way"),
    "bias doubled": (DoublesBias(3, 4), "adds its bias in its own way"),
    "shifted": (Shifts(3, 4), "changes the values of its input"),
    "negated": (Turns(3, 4), "changes the values of its input"),
    "clamped": (Limits(3, 4, 3), "changes the values of its input"),
    "small ones dropped": (DropsSmall(64, 4), "changes the values of its input"),
    "twice on the grid": (OnGridTwice(4, 4), "uses its weight 2 times"),
    "more inputs": (Wants(3, 4), "does not run on an ordinary input"),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("rounding", ["nearest", "second-order"])
def test_a_subclass_that_only_prepares_its_input_goes_on_the_grid(name, rounding):
    torch.manual_seed(0)
    layer, shape = GOOD[name]
    assert why_not_plain(layer) is None
    model, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(shape)
    kind = type(model[0])
    table, left = quantizable(
        model, QuantizationScheme(weights=WeightQuantization(bits=4), inputs=InputQuantization())
    )
    assert [*table] == ["0"]
    assert not left
    quantize_(model, table, [x], rounding=rounding)
    assert isinstance(model[0], kind)
    # The oracle: the layer of the user itself, with the grid points as weights, on rounded inputs.
    twin = copy.deepcopy(layer)
    twin.load_state_dict(model.state_dict() | {}, strict=False)
    twin.weight.data, rounded = model[0].weight.data, model[0].quantized_input(x)
    if twin.bias is not None:
        twin.bias.data = model[0].bias.data
    assert torch.equal(model(x), twin(rounded))
    wanted = layer(x).detach()
    assert 0 < float((model(x).detach() - wanted).square().mean() / wanted.square().mean()) < 0.05
    assert torch.equal(materialize_(model)(x), model(x))


def test_a_bias_makes_good_for_rounding_behind_the_padding_that_the_subclass_makes():
    torch.manual_seed(0)
    layer = PadsBefore(3, 6, 3)
    model, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(64, 3, 6, 6) + 2
    wanted = layer(x).mean((0, 2, 3))
    table, _ = quantizable(model, QuantizationScheme(weights=WeightQuantization(bits=3)))
    quantize_(model, table, [x], rounding="nearest")
    torch.testing.assert_close(model(x).mean((0, 2, 3)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BAD)
def test_a_subclass_that_uses_its_weight_in_another_way_stays_float_and_says_why(name):
    layer, says = BAD[name]
    before = {n: p.clone() for n, p in layer.state_dict().items()}
    assert says in (why_not_plain(layer) or "")
    assert all(
        torch.equal(p, before[n]) for n, p in layer.state_dict().items()
    )  # the look changed nothing
    table, left = quantizable(
        nn.Sequential(nn.Linear(2, 2), layer), QuantizationScheme(weights=WeightQuantization())
    )
    assert "1" not in table
    assert says in left["1"]


class Up(nn.ConvTranspose2d):
    def __init__(self, i, o):
        super().__init__(i, o, 2, stride=2)


class Remembers(nn.GRU):
    """Adds a function that its forward does not call."""

    def state(self, n):
        return torch.zeros(1, n, self.hidden_size)


class Words(nn.Embedding):
    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)


class Crops(nn.ConvTranspose2d):
    def forward(self, x, output_size=None):
        return super().forward(x)[..., 1:, 1:]


class Steps(nn.GRU):
    def check_forward_args(self, *args):
        self.weight_ih_l0.data.mul_(2)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (Up(3, 4), torch.randn(2, 3, 4, 4)),
        (Remembers(3, 4), torch.randn(2, 5, 3)),
        (Words(7, 3), torch.arange(7)),
    ],
)
def test_a_subclass_that_is_only_made_in_another_way_goes_on_the_grid_like_its_base(layer, x):
    model = nn.Sequential(copy.deepcopy(layer))
    table, left = quantizable(model, QuantizationScheme(weights=WeightQuantization(bits=4)))
    assert [*table] == ["0"]
    assert not left
    quantize_(model, table, [x])
    assert isinstance(model[0], type(layer))
    twin = copy.deepcopy(layer)
    twin.load_state_dict(model[0].state_dict(), strict=False)
    with torch.no_grad():
        outputs = (model(x), twin(x), layer(x))
    first = [out[0] if isinstance(out, tuple) else out for out in outputs]
    torch.testing.assert_close(first[0], first[1])
    assert 0 < float((first[0] - first[2]).norm() / first[2].norm()) < 0.2


@pytest.mark.parametrize("layer", [Crops(3, 4, 2), Steps(3, 4)])
def test_a_subclass_that_replaces_a_part_of_its_base_stays_float(layer):
    _, left = quantizable(
        nn.Sequential(nn.Linear(2, 2), layer), QuantizationScheme(weights=WeightQuantization())
    )
    assert "computes in its own way" in left["1"]


def test_looking_into_a_forward_leaves_chance_alone():
    class Drops(nn.Linear):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5, self.training))

    torch.manual_seed(3)
    wanted = torch.rand(2)
    layer = Drops(4, 4).train()
    torch.manual_seed(3)
    assert why_not_plain(layer) is None  # it drops nothing in evaluation mode
    assert layer.training
    assert torch.equal(torch.rand(2), wanted)
