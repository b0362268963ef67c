import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.nn.utils import prune

from fedpress.errors import ModelError
from fedpress.nn.folded import apply_folds_
from fedpress.nn.quant_scheme import (
    InputQuantization,
    QuantizationScheme,
    WeightQuantization,
    calculate_qparams,
)
from fedpress.nn.quantized import materialize_, quantize_layers_, quantized_layers
from fedpress.nn.quantized.layers import QuantConv2d


class Same(nn.Conv2d):
    """Pads as TensorFlow does, before the convolution."""

    def forward(self, x):
        return nn.functional.conv2d(
            nn.functional.pad(x, (0, 1, 0, 1)),
            self.weight,
            self.bias,
            self.stride,
            0,
            self.dilation,
            self.groups,
        )


GRIDS = [
    WeightQuantization(),
    WeightQuantization(bits=4),
    WeightQuantization(bits=2),
    WeightQuantization(bits=4, group=4),
    WeightQuantization(bits=3, group=1000),
    WeightQuantization(kind="ternary"),
    WeightQuantization(kind="ternary", group=5),
    WeightQuantization(kind="binary"),
    WeightQuantization(kind="binary", group=7),
    WeightQuantization(kind="codebook", bits=1),
    WeightQuantization(kind="codebook"),
    WeightQuantization(kind="codebook", bits=8),
    WeightQuantization(kind="codebook", bits=3, centroid_bits=8),
]
INPUTS = [
    None,
    InputQuantization(),
    InputQuantization(bits=4),
    InputQuantization(bits=1),
    InputQuantization(dynamic=True),
    InputQuantization(bits=1, dynamic=True),
]
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear-3d": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding="valid"), (2, 3, 5, 5)),
    "grouped": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"),
        (2, 4, 5, 5),
    ),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "one": (lambda: nn.Linear(1, 1), (1, 1)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        (2, 4, 5, 5),
    ),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), (2, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "subclass": (lambda: Same(3, 4, 3, stride=2), (2, 3, 5, 5)),
}
RECURRENT = {
    "lstm": (
        lambda: nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True),
        (3, 6, 5),
        8,
    ),
    "projected": (lambda: nn.LSTM(5, 4, proj_size=2), (6, 3, 5), 3),
    "gru": (lambda: nn.GRU(5, 4, bias=False), (6, 3, 5), 2),
    "rnn": (lambda: nn.RNN(5, 4, nonlinearity="relu"), (6, 3, 5), 2),
    "lstm-cell": (lambda: nn.LSTMCell(5, 4), (3, 5), 2),
    "gru-cell": (lambda: nn.GRUCell(5, 4), (3, 5), 2),
    "rnn-cell": (lambda: nn.RNNCell(5, 4), (3, 5), 2),
}


def name_of(grid):
    return (
        "float"
        if grid is None
        else "-".join(str(v) for v in grid.model_dump(exclude_defaults=True).values()) or "int8"
    )


def on_grid(layer, weights=None, inputs=None):
    model = nn.Sequential(layer)
    quantize_layers_(model, {"0": QuantizationScheme(weights=weights, inputs=inputs)})
    return model


@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
@pytest.mark.parametrize("kind", LAYERS)
def test_settled_weights_lie_on_the_grid_and_compute_the_same_to_the_bit(kind, grid):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = on_grid(make(), grid).eval()
    x = torch.randn(shape)
    before = model(x)
    materialize_(model)
    layer = model[0]
    plain = make()
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(plain.eval()(x), before)
    assert layer.quantize().dtype == torch.int8
    assert layer.quantize().shape == layer.weight.shape
    assert torch.equal(layer.dequantize(layer.quantize()), layer.weight)
    assert torch.equal(model(x), before)
    assert torch.equal(model.train()(x), before)


@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
@pytest.mark.parametrize("kind", RECURRENT)
def test_every_weight_of_a_recurrent_layer_lies_on_the_grid_and_the_plain_layer_computes_the_same(
    kind, grid
):
    torch.manual_seed(0)
    make, shape, weights = RECURRENT[kind]
    layer = materialize_(on_grid(make(), grid))[0]
    x = torch.randn(shape)
    assert len(layer.keys) == weights
    for key in layer.keys:
        assert torch.equal(layer.dequantize(layer.quantize(key), key), getattr(layer, key))
        if grid.group is None:
            assert all(len(row.unique()) <= 2**grid.bits for row in getattr(layer, key))
    plain = make()
    plain.load_state_dict(layer.state_dict(), strict=False)
    given, wanted = layer(x), plain(x)
    if not isinstance(given, tuple):
        given, wanted = (given,), (wanted,)
    assert torch.equal(given[0], wanted[0])
    given[0].sum().backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if p.requires_grad)


def test_the_latent_weights_of_a_recurrent_layer_learn_on_the_grid():
    torch.manual_seed(0)
    layer = on_grid(nn.GRU(3, 8, batch_first=True), WeightQuantization(bits=4))[0]
    x, wanted = torch.randn(32, 5, 3), torch.randn(32, 8)
    optimizer, losses = torch.optim.Adam(layer.parameters(), 0.02), []
    for _ in range(60):
        loss = (layer(x)[0][:, -1] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_attention_reads_its_four_projections_from_the_grid():
    torch.manual_seed(0)
    for more in ({}, {"kdim": 4, "vdim": 6}):
        plain = nn.MultiheadAttention(8, 2, batch_first=True, **more).eval()
        model = nn.ModuleList([copy.deepcopy(plain)])
        quantize_layers_(
            model,
            dict.fromkeys(
                ["0", "0.out_proj"], QuantizationScheme(weights=WeightQuantization(bits=3))
            ),
        )
        x = (
            torch.randn(2, 5, 8),
            torch.randn(2, 5, more.get("kdim", 8)),
            torch.randn(2, 5, more.get("vdim", 8)),
        )
        before = model[0](*x)[0]
        assert not torch.allclose(before, plain(*x)[0], atol=1e-3)
        materialize_(model)
        plain.load_state_dict(model[0].state_dict(), strict=False)
        for own in (model[0], model[0].train()):
            torch.testing.assert_close(own(*x)[0], before)
        torch.testing.assert_close(plain(*x)[0], before)


def test_an_embedding_looks_its_rows_up_on_the_grid():
    model = on_grid(nn.Embedding(6, 4, padding_idx=0), WeightQuantization(bits=4))
    ids = torch.tensor([[0, 5, 2]])
    before = model(ids)
    materialize_(model)
    assert torch.equal(model(ids), model[0].weight[ids])
    assert torch.equal(model(ids), before)
    assert not model[0].weight[0].any()


@pytest.mark.parametrize("inputs", INPUTS[1:], ids=name_of)
@pytest.mark.parametrize("kind", LAYERS)
def test_inputs_lie_on_their_grid_before_the_layer_sees_them(kind, inputs):
    torch.manual_seed(1)
    make, shape = LAYERS[kind]
    model = on_grid(make(), inputs=inputs)
    layer, x = model[0], 2 * torch.randn(shape)
    if not inputs.dynamic:
        layer.input_scale.data.fill_(0.03 if inputs.bits == 8 else 0.5)
        layer.input_zero_point.fill_(0 if inputs.bits == 1 else inputs.highest // 3)
    seen = layer.quantized_input(x)
    assert len(seen.unique()) <= 2**inputs.bits
    same = copy.deepcopy(layer)
    same.scheme = QuantizationScheme()
    assert torch.equal(model(x), same(seen))
    if inputs.bits == 1:
        assert torch.equal(seen.sign(), torch.where(x >= 0, 1.0, -1.0))


@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
def test_each_weight_takes_the_nearest_point_of_its_grid(grid):
    """The slow twin: every point of the grid is tried."""
    torch.manual_seed(2)
    layer = on_grid(nn.Linear(9, 4), grid)[0]
    points = range(grid.lowest, grid.highest + 1)
    if grid.kind == "binary":
        points = (-1, 1)
    values = torch.stack(
        [layer.dequantize(torch.full((4, 9), c, dtype=torch.int8)) for c in points]
    )
    chosen = layer.dequantize(layer.quantize())
    distances = (values - layer.weight).abs()
    assert torch.equal((chosen - layer.weight).abs(), distances.min(0).values)
    if grid.has_zero:
        assert any(bool((v == 0).all()) for v in values) or (
            grid.kind == "codebook" and 0 in values
        )


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.has_zero], ids=name_of)
def test_zeros_stay_zeros(grid):
    torch.manual_seed(3)
    model = on_grid(nn.Conv2d(3, 8, 3), grid)
    zero = torch.rand_like(model[0].weight) < 0.5
    model[0].weight.data[zero] = 0
    quantize_layers_(model, {"0": QuantizationScheme(weights=grid)})
    materialize_(model)
    assert not model[0].weight[zero].any()


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    st.sampled_from([g for g in GRIDS if g.group is None]),
)
def test_any_finite_weights_settle_and_stay_settled(values, grid):
    layer = nn.Linear(1, len(values), bias=False)
    layer.weight.data = torch.tensor(values)[:, None]
    model = materialize_(on_grid(layer, grid))
    once, codes = layer.weight.clone(), layer.quantize()
    assert once.isfinite().all()
    assert torch.equal(layer.dequantize(codes), once)
    materialize_(model)
    assert torch.equal(layer.weight, once)
    assert torch.equal(layer.quantize(), codes)


@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
def test_a_layer_of_zeros_stays_usable(grid):
    layer = nn.Linear(4, 3)
    layer.weight.data.zero_()
    model = materialize_(on_grid(layer, grid))
    assert float(layer.weight.detach().abs().max()) <= torch.finfo(torch.float32).tiny
    assert torch.isfinite(model(torch.ones(1, 4))).all()


def test_one_channel_of_zeros_takes_a_scale_of_its_layer():
    layer = nn.Linear(2, 3)
    layer.weight.data = torch.tensor([[0.0, 0.0], [1.0, -2.0], [4.0, 0.5]])
    on_grid(layer, WeightQuantization(bits=4))
    torch.testing.assert_close(layer.weight_scale.data, torch.tensor([4.0, 2.0, 4.0]) / 7)


def test_the_ternary_scale_is_the_best_of_all_that_there_are():
    torch.manual_seed(4)
    weight = torch.randn(1, 200)
    layer = nn.Linear(200, 1)
    layer.weight.data = weight
    on_grid(layer, WeightQuantization(kind="ternary"))

    def error(scale):
        return float(((weight / scale).round().clamp(-1, 1) * scale - weight).square().sum())

    best = min(error(s) for s in torch.linspace(0.1, 4, 4000).tolist())
    assert error(float(layer.weight_scale.detach())) <= best * 1.001


def test_the_gradient_of_a_step_size_is_that_of_the_paper():
    """Esser et al. 2020, equation 3: round(v) - v inside, the clip outside; scaled by 1 / sqrt(N Q)."""
    layer = nn.Linear(5, 1, bias=False)
    layer.weight.data = torch.tensor([[0.3, -0.9, 2.4, 9.0, -9.0]])
    on_grid(layer, WeightQuantization(bits=3))
    layer.weight_scale.data.fill_(1.0)
    layer(torch.eye(5)).sum().backward()
    each = torch.tensor([0 - 0.3, -1 + 0.9, 2 - 2.4, 3.0, -3.0])
    torch.testing.assert_close(layer.weight_scale.grad, each.sum()[None] / math.sqrt(5 * 3))
    assert layer.weight.grad.tolist() == [[1, 1, 1, 0, 0]]


def test_the_gradient_of_an_input_step_is_that_of_the_paper():
    layer = on_grid(nn.Linear(4, 1, bias=False), inputs=InputQuantization(bits=2))[0]
    layer.weight.data.fill_(1.0)
    layer.input_zero_point.fill_(1.0)
    x = torch.tensor([[-5.0, -0.4, 0.7, 5.0]], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 0]]
    expected = (-1 + 0.4 + (1 - 0.7) + 2) / math.sqrt(4 * 3)
    assert float(layer.input_scale.grad) == pytest.approx(expected)


def test_binary_weights_pass_the_gradient_straight_through():
    layer = on_grid(nn.Linear(3, 1, bias=False), WeightQuantization(kind="binary"))[0]
    layer.weight.data = torch.tensor([[0.5, -3.0, 0.0]])
    layer.weight_scale.data.fill_(2.0)
    x = torch.tensor([[1.0, 10.0, 100.0]])
    out = layer(x)
    assert float(out.detach()) == 2 * (1 - 10 + 100)
    out.backward()
    assert torch.equal(layer.weight.grad, x)
    torch.testing.assert_close(layer.weight_scale.grad, torch.tensor([91.0]) / math.sqrt(3))


def test_the_sign_of_inputs_passes_the_gradient_of_hard_tanh():
    """Hubara et al. 2016, eq. 4, for a sign without a middle: the gradient of what lies beyond 1 is cancelled."""
    layer = on_grid(nn.Linear(3, 1, bias=False), inputs=InputQuantization(bits=1, middle=False))[0]
    layer.weight.data.fill_(1.0)
    x = torch.tensor([[0.5, -3.0, 0.0]], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.tolist() == [[1, 0, 1]]


def test_one_bit_is_the_side_of_the_middle_and_its_gradient_that_of_the_definition():
    """The slow twin: middle + size * htanh(distance / (1.25 size)) in the place of the side."""
    torch.manual_seed(0)
    layer = on_grid(nn.Conv2d(2, 1, 1, bias=False), inputs=InputQuantization(bits=1))[0]
    layer.input_middle.data = torch.tensor([1.0, -2.0])
    layer.input_scale.data.fill_(0.5)
    x = (torch.randn(3, 2, 4, 4) + torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)).requires_grad_()
    seen = layer.quantized_input(x)
    above = x >= layer.input_middle.view(1, 2, 1, 1)
    assert torch.equal(seen, layer.input_middle.view(1, 2, 1, 1) + torch.where(above, 0.5, -0.5))
    pull = torch.randn_like(seen)
    (seen * pull).sum().backward()
    twin, middle = (
        x.detach().clone().requires_grad_(),
        layer.input_middle.detach().clone().requires_grad_(),
    )
    away = (twin - middle.view(1, 2, 1, 1)) / (1.25 * 0.5)
    ((middle.view(1, 2, 1, 1) + 0.5 * away.clamp(-1, 1)) * pull).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.input_middle.grad, middle.grad)
    sides = torch.where(above, 1.0, -1.0)
    torch.testing.assert_close(layer.input_scale.grad, (sides * pull).sum() / math.sqrt(2 * 4 * 4))


def test_centroids_learn_but_zero_stays():
    torch.manual_seed(5)
    layer = on_grid(nn.Linear(64, 8, bias=False), WeightQuantization(kind="codebook", bits=3))[0]
    assert 0 in layer.codebook
    layer(torch.randn(16, 64)).square().sum().backward()
    zero = layer.codebook.data == 0
    assert layer.codebook.grad[~zero].all()
    assert not layer.codebook.grad[zero].any()


def test_training_reaches_what_the_grid_can_say():
    torch.manual_seed(6)
    x = torch.randn(256, 6)
    wanted = x @ torch.tensor([1.0, -1.0, 0.0, 1.0, 0.0, -1.0])
    for grid in (WeightQuantization(kind="ternary"), WeightQuantization(bits=3)):
        model = on_grid(nn.Linear(6, 1, bias=False), grid)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (model(x)[:, 0] - wanted).square().mean()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.02
        materialize_(model)
        assert (model(x)[:, 0] - wanted).square().mean().item() == pytest.approx(
            loss.item(), abs=0.02
        )


@pytest.mark.parametrize("grid", [None, *GRIDS], ids=name_of)
def test_gradients_of_single_samples_come_out_of_torch_func(grid):
    torch.manual_seed(7)
    model = on_grid(nn.Conv2d(2, 3, 2), grid, InputQuantization(bits=4))
    x = torch.randn(4, 2, 3, 3)
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss_of(params, one):
        return torch.func.functional_call(model, params, (one[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0))(named, x)
    for i in range(4):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(each[name][i], p.grad)


@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
def test_whole_numbers_times_scales_are_the_weights(grid):
    torch.manual_seed(8)
    layer = materialize_(on_grid(nn.Conv2d(3, 4, 3), grid))[0]
    if grid.kind == "codebook" and grid.centroid_bits is None:
        assert layer.integers() is None
        return
    whole, scale = layer.integers()
    assert whole.dtype == torch.int8
    if grid.group is None:
        assert scale.shape == (4,)
        assert torch.equal(whole * scale.view(4, 1, 1, 1), layer.weight)


@given(
    st.floats(-1e6, 1e6),
    st.floats(0, 1e6),
    st.sampled_from([InputQuantization(), InputQuantization(bits=4), InputQuantization(bits=2)]),
)
def test_an_input_range_holds_zero_and_both_its_ends(low, width, grid):
    scale, zero = calculate_qparams(torch.tensor(low), torch.tensor(low + width), grid)
    assert float(scale) > 0
    assert float(zero) == int(zero)
    assert 0 <= zero <= grid.highest
    assert -zero * scale <= min(low, 0) + 0.51 * scale
    assert (grid.highest - zero) * scale >= max(low + width, 0) - 0.51 * scale


def test_a_dynamic_range_of_nothing_is_no_division_by_zero():
    model = on_grid(nn.Linear(3, 2), inputs=InputQuantization(dynamic=True))
    assert torch.equal(model(torch.zeros(2, 3)), model[0].bias.expand(2, 2))


@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_have_no_codes(grid, value):
    model = on_grid(nn.Linear(3, 2), grid)
    model[0].weight.data[1, 1] = value
    with pytest.raises(ModelError, match="'0': weight: a weight is NaN or infinite"):
        materialize_(model)
    if math.isnan(value):
        assert model(torch.ones(1, 3)).isnan().any(), "training must see it"


@pytest.mark.parametrize(
    ("grid", "code"),
    [
        (WeightQuantization(), -128),
        (WeightQuantization(bits=4), 8),
        (WeightQuantization(kind="ternary"), 2),
    ],
)
def test_codes_of_another_grid_are_refused(grid, code):
    layer = on_grid(nn.Linear(2, 2), grid)[0]
    with pytest.raises(ModelError, match=f"codes are in .*{code}.*they belong to another model"):
        layer.dequantize(torch.full((2, 2), code, dtype=torch.int8))


def test_a_layer_of_float_weights_has_no_codes():
    layer = on_grid(nn.Linear(2, 2), inputs=InputQuantization())[0]
    for ask in (layer.quantize, lambda: layer.dequantize(torch.zeros(2, 2))):
        with pytest.raises(ModelError, match="float and have no codes"):
            ask()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"bits": 1}, "1 bits do not fit 'int'"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"kind": "ternary", "bits": 3}, "do not fit 'ternary'"),
        ({"kind": "binary", "bits": 2}, "do not fit 'binary'"),
        ({"kind": "codebook", "group": 4}, "leave group out"),
        ({"centroid_bits": 8}, "centroid_bits: only a codebook has it"),
        ({"group": 0}, "greater than or equal to 1"),
        ({"kind": "float"}, "'int', 'ternary', 'binary' or 'codebook'"),
    ],
)
def test_a_grid_that_there_is_not_is_refused(given, says):
    with pytest.raises(ValidationError, match=says):
        WeightQuantization(**given)


class Own(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2, self.bias)


def patched(layer):
    layer.forward = lambda x: 2 * x
    return layer


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Own(2, 2), "Own computes in its own way: it reads its weight by 'mul'"),
        (lambda: patched(nn.Linear(2, 2)), "its forward was replaced"),
        (lambda: nn.Embedding(2, 2, max_norm=1.0), "max_norm"),
        (lambda: nn.ReLU(), "ReLU computes in its own way"),
        (lambda: nn.Bilinear(2, 2, 2), "Bilinear computes in its own way"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "make it plain first"),
        (lambda: pruned(nn.Linear(2, 2)), "computed from other parameters; make it plain first"),
    ],
)
def test_a_layer_that_cannot_be_quantized_is_named_with_the_reason(make, says):
    model = nn.Sequential(nn.Linear(2, 2), make())
    with pytest.raises(ModelError, match=rf"spec.quantized: '1' cannot be quantized: .*{says}"):
        quantize_layers_(model, {"1": QuantizationScheme(weights=WeightQuantization())})
    with pytest.raises(ModelError, match="no layer '7'"):
        quantize_layers_(model, {"7": QuantizationScheme()})


def test_a_layer_on_a_grid_is_the_same_object_and_takes_another_grid():
    layer = nn.Conv2d(2, 3, 1)
    model = on_grid(layer, WeightQuantization(kind="codebook"), InputQuantization())
    assert model[0] is layer
    assert isinstance(layer, QuantConv2d)
    assert [n for n, _ in quantized_layers(model)] == ["0"]
    assert {*model.state_dict()} == {
        "0." + n for n in ("weight", "bias", "codebook", "input_scale", "input_zero_point")
    }
    quantize_layers_(model, {"0": QuantizationScheme(weights=WeightQuantization())})
    assert {*model.state_dict()} == {"0.weight", "0.bias", "0.weight_scale"}
    assert "weights=int8" in repr(model)


@pytest.mark.parametrize(("norm", "into"), [("2", "0"), ("1", "3"), ("0", "0"), ("1", "2")])
def test_a_fold_of_another_model_is_refused(norm, into):
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU())
    with pytest.raises(ModelError, match=r"spec.folded: .* load the spec that was saved"):
        apply_folds_(model, {norm: into})


def test_a_batch_of_nothing_comes_out_as_nothing():
    for inputs in INPUTS:
        assert on_grid(nn.Linear(3, 2), WeightQuantization(), inputs)(torch.zeros(0, 3)).shape == (
            0,
            2,
        )


def test_a_layer_takes_its_input_by_name_as_that_of_torch_does():
    x = torch.randn(2, 3)
    for layer in (
        on_grid(nn.Linear(3, 2), WeightQuantization())[0],
        on_grid(nn.Conv1d(2, 2, 1), WeightQuantization())[0],
    ):
        assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_not_float32_are_refused_with_the_way_out(kind):
    with pytest.raises(
        ModelError,
        match=r"'0' cannot be quantized: its weights are torch.*call model.float\(\) first",
    ):
        on_grid(nn.Linear(2, 2).to(kind), WeightQuantization())


@pytest.mark.parametrize("whole", [False, True], ids=["layer", "encoder"])
def test_the_fast_path_of_a_transformer_does_not_go_past_the_grids(whole):
    """In evaluation without gradients torch computes an encoder layer in one kernel that reads float weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = (nn.TransformerEncoder(layer, 1) if whole else layer).eval()
    at = "layers.0." if whole else ""
    grids = QuantizationScheme(
        weights=WeightQuantization(bits=2), inputs=InputQuantization(bits=2, dynamic=True)
    )
    plain = model(x := torch.randn(3, 4, 8)).detach()
    quantize_layers_(model, {f"{at}linear1": grids, f"{at}linear2": grids})
    hidden = torch.tensor([[False] * 4, [False] * 3 + [True], [False] * 4])
    for how in ({}, {"src_key_padding_mask": hidden}):
        wanted = model(x, **how).detach()
        with torch.no_grad():
            torch.testing.assert_close(
                model(x, **how), wanted
            )  # attention has a fast path of its own
    assert float((model(x).detach() - plain).abs().max()) > 0.1


@pytest.mark.parametrize("inputs", [i for i in INPUTS if i], ids=str)
def test_the_batch_stays_open_in_an_export(inputs):
    torch.manual_seed(9)
    model = materialize_(on_grid(nn.Linear(3, 2), WeightQuantization(), inputs)).eval()
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},)
    program = torch.export.export(model, (torch.randn(4, 3),), dynamic_shapes=shapes).module()
    x = torch.randn(7, 3)
    assert torch.equal(program(x), model(x))
