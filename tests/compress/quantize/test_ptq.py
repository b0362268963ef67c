import copy
import functools
import math

import pytest
import torch
from torch import nn

from fedpress import compress
from fedpress.compress.quantize import find_folds, fold_, quantizable, quantize_
from fedpress.errors import DataError, ModelError
from fedpress.models import ModelSpec, load_model, save_model
from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import quantized_layers

INT4, BYTES = (
    QuantizationScheme(weights=WeightQuantization(bits=4)),
    QuantizationScheme(weights=WeightQuantization(), inputs=InputQuantization()),
)
SPEC = ModelSpec(architecture="resnet-small", arguments={"width": 8}, input_shape=(3, 8, 8))


@functools.cache
def made():
    torch.manual_seed(0)
    model = SPEC.build()
    batches = [*torch.randn(48, 3, 8, 8).split(16)]
    for x in batches:
        model.train()(x)
    folds, _ = find_folds(model.eval(), batches[0])
    fold_(model, folds)
    return model, batches, SPEC.model_copy(update={"folded": folds})


def net():
    """A folded network with statistics of its own, batches of inputs, and the spec."""
    return copy.deepcopy(made()[0]), *made()[1:]


DYNAMIC = QuantizationScheme(weights=WeightQuantization(), inputs=InputQuantization(dynamic=True))
GROUPS = QuantizationScheme(weights=WeightQuantization(bits=4, group=16))
TERNARY = QuantizationScheme(weights=WeightQuantization(kind="ternary"))
ONE_BIT = QuantizationScheme(
    weights=WeightQuantization(kind="binary"), inputs=InputQuantization(bits=1)
)
CODEBOOK = QuantizationScheme(weights=WeightQuantization(kind="codebook", bits=3))
INPUTS = QuantizationScheme(inputs=InputQuantization(bits=4))


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("grids", "rounding"),
    [
        (BYTES, "nearest"),
        (INT4, "second-order"),
        (DYNAMIC, "nearest"),
        (GROUPS, "second-order"),
        (TERNARY, "second-order"),
        (ONE_BIT, "nearest"),
        (CODEBOOK, "second-order"),
        (INPUTS, "nearest"),
    ],
    ids=str,
)
def test_a_quantized_network_comes_back_from_its_folder_to_the_same_bits(grids, rounding, tmp_path):
    model, batches, spec = net()
    table, left = quantizable(model, grids)
    assert (len(table), left) == (10, {})
    assert quantize_(model, table, batches, rounding=rounding) == {}
    save_model(tmp_path, spec.model_copy(update={"quantized": table}), model)
    again_spec, again = load_model(tmp_path)
    assert again_spec.quantized == table
    assert torch.equal(again.eval()(batches[0]), model(batches[0]))
    for name, layer in quantized_layers(again):
        assert layer.scheme == table[name]
        if grids.weights is not None:
            assert torch.equal(layer.weight, layer.dequantize(layer.quantize()))


@pytest.mark.recipe
def test_more_bits_and_more_care_come_nearer_to_the_float_network():
    model, batches, _ = net()
    wanted = model(batches[0]).detach()

    def error(grids, **how):
        small = copy.deepcopy(model)
        quantize_(small, quantizable(small, grids)[0], batches, **how)
        off = small(batches[0]).detach() - wanted
        return float(off.square().mean() / wanted.square().mean())

    eight, four = error(BYTES), error(INT4)
    assert eight < four / 10
    assert four < 0.1
    assert error(INT4, rounding="second-order") < four
    assert error(QuantizationScheme(weights=WeightQuantization(bits=4, group=8))) < four
    assert error(QuantizationScheme(weights=WeightQuantization(bits=3))) > four


@pytest.mark.parametrize("inner", ["conv", "linear"])
def test_biases_make_good_for_the_mean_error_of_rounding(inner):
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 5, 3, padding=1, stride=2) if inner == "conv" else nn.Linear(6, 5)
    model = nn.Sequential(copy.deepcopy(layer))
    x = torch.rand(40, 3, 7, 7) if inner == "conv" else torch.rand(40, 4, 6)
    quantize_(
        model,
        quantizable(model, QuantizationScheme(weights=WeightQuantization(bits=2)))[0],
        [x[:23], x[23:]],
    )
    error = (model(x) - layer(x)).detach()
    mean = error.mean((0, 2, 3)) if inner == "conv" else error.mean((0, 1))
    assert float(error.abs().mean()) > 0.01
    torch.testing.assert_close(mean, torch.zeros(5), atol=1e-6, rtol=0)


def test_a_layer_without_a_bias_is_named():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    notes = quantize_(model, {"0": INT4}, [torch.randn(4, 3)])
    assert notes == {"0": "it has no bias that could compensate its rounding"}


class Zoo(nn.Module):
    """Layers that can be quantized, and others."""

    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight
        self.position = nn.Parameter(torch.zeros(2, 4))
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.attention, self.memory = nn.MultiheadAttention(4, 2), nn.LSTM(4, 4)
        self.normed, self.up = (
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            nn.ConvTranspose1d(4, 4, 2),
        )
        self.norm, self.plain = nn.LayerNorm(4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)


def test_what_stays_float_is_listed_with_the_reason():
    table, left = quantizable(Zoo(), BYTES, keep=["last"])
    weights = BYTES.model_copy(update={"inputs": None})
    assert table == {
        "attention": weights,
        "attention.out_proj": weights,
        "memory": weights,
        "up": BYTES,
        "plain": BYTES,
    }
    says = {
        "Zoo": "computes in its own way",
        "words": "shared with 'out'",
        "out": "shared with 'words'",
        "one": "shared with 'two'",
        "two": "shared with 'one'",
        "normed": "make it plain first",
        "head": "asked for by `keep`",
    }
    assert left.keys() == says.keys()
    for name, reason in says.items():
        assert reason in left[name], (name, left[name])


def test_first_and_last_can_stay_float_and_sparse_layers_are_not_made_binary():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    binary = QuantizationScheme(weights=WeightQuantization(kind="binary"))
    table, left = quantizable(model, binary, keep=["first", "last"], sparse=["1.weight"])
    assert [*table] == ["2"]
    assert "have no zero; use ternary" in left["1"]
    assert [*quantizable(model, INT4, sparse=["1.weight"])[0]] == ["0", "1", "2", "3"]


def test_a_wrong_name_and_a_network_without_layers_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ModelError, match=r"keep: no layer '00'.*use 'first', 'last', or one of 0"):
        quantizable(model, INT4, keep=["00"])
    with pytest.raises(
        ModelError, match=r"no layer of this model can be quantized .'0': asked for by `keep`"
    ):
        quantizable(model, INT4, keep=["first"])
    with pytest.raises(ModelError, match="it has no layers with weights"):
        quantizable(nn.ReLU(), INT4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_name_the_layer_and_leave_the_model_alone(value):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(DataError, match=r"batches: '0' receives NaN or infinite values"):
        quantize_(model, quantizable(model, BYTES)[0], [torch.full((3, 2), value)])
    model[1].weight.data[0, 0] = value
    with pytest.raises(ModelError, match=r"model: '1' has NaN or infinite weights"):
        quantize_(model, quantizable(model, BYTES)[0], [torch.zeros(3, 2)])
    assert type(model[0]) is nn.Linear


def test_examples_are_asked_for_only_where_they_are_needed():
    model = nn.Sequential(nn.Linear(2, 2))
    for how in ({}, {"rounding": "second-order", "correct_bias": False}):
        with pytest.raises(DataError, match="this method needs public examples"):
            quantize_(model, {"0": INT4}, **how)
    with pytest.raises(DataError, match="this method needs public examples"):
        quantize_(model, {"0": BYTES}, correct_bias=False)
    assert quantize_(model, {"0": INT4}, correct_bias=False) == {}


def test_a_channel_of_zeros_and_a_constant_input_are_no_trouble():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    model[0].weight.data[1] = 0
    quantize_(
        model, quantizable(model, BYTES)[0], [torch.ones(4, 2, 2, 2)], rounding="second-order"
    )
    assert torch.isfinite(model(torch.ones(4, 2, 2, 2))).all()
    assert not model[0].weight[1].any()


def test_int8_weights_are_those_of_torchao():
    """Per channel and symmetric as there; torchao spreads the span over 127.5 steps, we over 127 (no code -128)."""
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 16))
    theirs, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    torchao.quantize_(theirs, torchao.Int8WeightOnlyConfig())
    quantize_(
        ours,
        quantizable(ours, QuantizationScheme(weights=WeightQuantization()))[0],
        scale="minmax",
        correct_bias=False,
    )
    step = ours[0].weight_scale.detach()[:, None]
    assert ((theirs[0].weight.dequantize() - ours[0].weight).abs() <= 1.01 * step).all()
    for model in (theirs, ours):
        error = (model[0].weight.dequantize() if model is theirs else model[0].weight) - plain[
            0
        ].weight
        assert float(error.detach().abs().max()) <= 0.51 * float(step.max())


def test_torchao_leaves_convolutions_float_without_a_word_and_we_do_not():
    torchao = pytest.importorskip("torchao.quantization")
    theirs, ours = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)) for _ in range(2)
    )
    torchao.quantize_(theirs, torchao.Int8WeightOnlyConfig())
    assert type(theirs[0].weight) is nn.Parameter
    quantize_(
        ours,
        quantizable(ours, QuantizationScheme(weights=WeightQuantization()))[0],
        correct_bias=False,
    )
    assert ours[0].quantize().unique().numel() > 20


@pytest.mark.recipe
@pytest.mark.parametrize(
    "grid", [WeightQuantization(bits=4), WeightQuantization(kind="ternary")], ids=lambda g: g.kind
)
def test_channels_on_whole_numbers_go_with_their_scales(grid):
    model, batches, _ = net()
    quantize_(
        model,
        quantizable(model, QuantizationScheme(weights=grid, inputs=InputQuantization()))[0],
        batches,
    )
    graph = compress.trace(model, batches[0][:2])
    plan = compress.plan(
        model, graph, compress.score(model, graph, "l2"), keep_params=0.6, round_to=1
    )
    small = copy.deepcopy(model)
    compress.remove_(small, plan)
    assert compress.check_parity(model, small, plan, batches[0][:2]) < 1e-5
    for _, layer in quantized_layers(small):
        assert layer.weight_scale.shape == (len(layer.weight),)
        assert torch.equal(layer.weight, layer.dequantize(layer.quantize()))


def quantized_to(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    quantize_(
        model, {"0": QuantizationScheme(weights=WeightQuantization(kind=kind))}, correct_bias=False
    )
    return model, torch.randn(2, 2, 2, 2)


def test_channels_of_a_codebook_stay_whole_with_the_reason():
    graph = compress.trace(*quantized_to("codebook"))
    assert not graph.groups
    assert "of '0'" in graph.unprunable["0"]


@pytest.mark.parametrize("kind", ["binary", "ternary", "int"])
def test_channels_on_other_grids_are_cut_with_their_scales(kind):
    model, x = quantized_to(kind)
    graph = compress.trace(model, x)
    plan = compress.plan(
        model, graph, compress.score(model, graph, "l1"), keep_params=0.5, round_to=1, tolerance=0.1
    )
    small = copy.deepcopy(model)
    compress.remove_(small, plan)
    assert small[0].weight_scale.shape == (small[0].out_channels,)
    assert compress.check_parity(model, small, plan, x) < 1e-5
    assert (small(x) - model(x)).abs().max() > 1e-3


def test_a_bias_of_two_layers_makes_good_for_neither_and_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model[2].bias = model[0].bias
    bias = model[0].bias.detach().clone()
    table, _ = quantizable(model, QuantizationScheme(weights=WeightQuantization(bits=3)))
    notes = quantize_(model, table, [torch.randn(64, 8)])
    assert set(notes) == {"0", "2"}
    assert all("its bias is shared" in why for why in notes.values())
    assert torch.equal(model[0].bias, bias)


def test_a_matrix_beside_a_vector_named_weight_is_listed():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.matrix = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 4))

    _, left = quantizable(
        nn.Sequential(nn.Linear(4, 4), Both()), QuantizationScheme(weights=WeightQuantization())
    )
    assert left == {"1": "Both computes in its own way"}


def test_a_module_of_two_names_keeps_its_bias_correction():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
            self.other = self.one

        def forward(self, x):
            return self.head(self.other(x).relu())

    table = {"one": QuantizationScheme(weights=WeightQuantization(bits=3))}
    assert quantize_(Named(), table, [torch.randn(64, 8)]) == {}


def test_a_group_larger_than_a_channel_is_the_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    whole = copy.deepcopy(model)
    for each, group in ((model, 10**9), (whole, None)):
        quantize_(
            each,
            {"0": QuantizationScheme(weights=WeightQuantization(bits=4, group=group))},
            correct_bias=False,
        )
    assert torch.equal(model[0].weight, whole[0].weight)
