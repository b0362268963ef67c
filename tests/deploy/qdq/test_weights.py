"""Channels of zero, constant and tiny weights keep their values in every grid and every format."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fedpress import deploy
from fedpress.compress.quantize import quantizable, quantize_
from fedpress.deploy import FORMATS, IntegerFormat, Job, quantized_program
from fedpress.deploy.qdq.graph import LayerQuantization
from fedpress.deploy.qdq.weights import with_int32_biases
from fedpress.models import ModelSpec
from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import quantized_layers
from fedpress.storage.packed import from_bytes, to_bytes

SHAPE = (3, 8, 8)
GRIDS = {
    "int8": WeightQuantization(),
    "int4": WeightQuantization(bits=4),
    "int2": WeightQuantization(bits=2),
    "groups": WeightQuantization(bits=4, group=9),
    "ternary": WeightQuantization(kind="ternary"),
    "binary": WeightQuantization(kind="binary"),
    "codebook": WeightQuantization(kind="codebook", bits=3),
    "whole codebook": WeightQuantization(kind="codebook", bits=3, centroid_bits=8),
}
KINDS = ("zero", "constant", "1e-5", "1e-12", "1e-30", "1e-40", "one weight", "plain")


def files(grids, quick):
    """Returns (format, grid): `quick` grids in ONNX first, the rest later."""
    later = {"onnx": pytest.mark.recipe}
    found = []
    for format in FORMATS:
        for grid in grids:
            now = format == "onnx" and grid in quick
            marks = () if now else later.get(format, pytest.mark.deploy)
            found.append(pytest.param(format, grid, marks=marks))
    return found


@torch.no_grad()
def spoil_(weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Gives the first output channels weights of every kind; each has a bias that counts."""
    for channel, kind in enumerate(KINDS):
        own = weight[channel]
        if kind == "zero":
            own.zero_()
        elif kind == "constant":
            own.fill_(0.03)
        elif kind == "one weight":
            kept = own.flatten()[3].clone()
            own.zero_()
            own.view(-1)[3] = kept
        elif kind != "plain":
            own.mul_(float(kind))
    bias.copy_(torch.linspace(-0.7, 0.9, len(bias)))


def network(*, dead_layer: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    width = len(KINDS)
    layers = [
        nn.Conv2d(3, width, 3),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
    ]
    model = nn.Sequential(*layers, nn.Linear(4 * width, width)).eval()
    for at in (0, 2, 5):
        spoil_(model[at].weight, model[at].bias)
    if dead_layer:
        nn.init.zeros_(model[2].weight)
    return model


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1))


def on_grids(
    model: nn.Module,
    weights: WeightQuantization | None,
    inputs: InputQuantization | None,
    x: torch.Tensor,
) -> nn.Module:
    """Returns a copy on grids; without any, the model itself: the export rounds it."""
    if weights is None:
        return model
    made = copy.deepcopy(model)
    table, _ = quantizable(made, QuantizationScheme(weights=weights, inputs=inputs))
    quantize_(made, table, [x], correct_bias=False)
    return made


def farthest(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.recipe
@pytest.mark.parametrize("dead_layer", [False, True], ids=["channels", "a whole layer"])
@pytest.mark.parametrize("grid", [None, *GRIDS], ids=str)
def test_the_rounded_graph_computes_what_the_network_does(grid, dead_layer, x):
    model = on_grids(network(dead_layer=dead_layer), grid and GRIDS[grid], InputQuantization(), x)
    wanted = deploy.logits(model, x)
    assert wanted.isfinite().all()
    made = quantized_program(model, SHAPE, [x], format=IntegerFormat(float_output=True))
    for name, scales in made.program.state_dict.items():
        if name.endswith("_scales"):
            normal = torch.finfo(torch.float32).tiny
            assert ((scales >= normal) & scales.isfinite()).all(), name
    assert farthest(deploy.logits(made.program, x), wanted) < 0.03


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("format", "grid"),
    files([None, *GRIDS], quick=(None, "int4", "groups", "whole codebook")),
    ids=str,
)
def test_an_integer_file_computes_what_the_network_does(format, grid, x, tmp_path):
    if FORMATS[format].missing():
        pytest.skip(f"{format} is not installed")
    model = on_grids(network(), grid and GRIDS[grid], InputQuantization(), x)
    made = deploy.export(
        model, tmp_path / f"m{FORMATS[format].suffix}", format, Job(SHAPE, batches=(x,))
    )
    # A channel without weights gives its bias and nothing else, whatever the others do.
    assert farthest(deploy.file_logits(made.path, x), deploy.logits(model, x)) < 0.03


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("format", "grid"), files(["int4", "binary", "whole codebook"], quick=("binary",))
)
def test_a_file_of_a_whole_layer_of_zeros_gives_the_biases(format, grid, x, tmp_path):
    if FORMATS[format].missing():
        pytest.skip(f"{format} is not installed")
    model = on_grids(network(dead_layer=True), GRIDS[grid], InputQuantization(), x)
    made = deploy.export(
        model, tmp_path / f"m{FORMATS[format].suffix}", format, Job(SHAPE, batches=(x,))
    )
    assert farthest(deploy.file_logits(made.path, x), deploy.logits(model, x)) < 0.03


@pytest.mark.parametrize(
    "grid", [None, pytest.param("ternary", marks=pytest.mark.recipe), "int8"], ids=str
)
def test_a_layer_that_sees_only_zeros_gives_its_bias(grid, x, tmp_path):
    model = network(dead_layer=True)
    nn.init.constant_(model[2].bias, -0.5)  # behind the ReLU all is 0
    model[5].weight.data.mul_(20)
    model = on_grids(model, grid and GRIDS[grid], InputQuantization(), x)
    made = deploy.export(model, tmp_path / "m.onnx", "onnx", Job(SHAPE, batches=(x,)))
    assert farthest(deploy.file_logits(made.path, x), deploy.logits(model, x)) < 0.003


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("format", "grid"),
    files(["int8", "groups", "binary", "codebook"], quick=("groups", "codebook")),
)
def test_a_float_file_computes_what_the_network_does(format, grid, x, tmp_path):
    if FORMATS[format].missing():
        pytest.skip(f"{format} is not installed")
    model = on_grids(network(), GRIDS[grid], None, x)
    made = deploy.export(model, tmp_path / f"m{FORMATS[format].suffix}", format, Job(SHAPE))
    assert farthest(deploy.file_logits(made.path, x), deploy.logits(model, x)) < 1e-4


def layer(codes: list[int], scales: list[float]) -> LayerQuantization:
    return LayerQuantization(
        torch.tensor(codes, dtype=torch.int8)[:, None], torch.tensor(scales, dtype=torch.float32)
    )


def test_codes_of_four_bits_leave_room_for_the_bias_that_kernels_shift():
    small = layer([7, -8, 3, 0], [1e-12, 1e-30, 0.1, 1.0])
    bias = torch.tensor([0.5, -0.7, 0.2, 0.9])
    for shift in (0, 4):
        made = with_int32_biases(small, [(0.01, bias)], shift)
        steps = (bias.double() / (0.01 * made.scales.double())).abs()
        faint = [0, 1, 3]  # each has its bias to the last bit of a float32
        assert steps[faint].min() > 2.0**24 * (1 - 1e-6)
        assert steps[faint].max() < 2.0 ** (30 - shift) * (1 + 1e-6)
        assert (made.codes[2], made.scales[2]) == (3, small.scales[2])


def test_codes_of_eight_bits_that_shrink_into_four_leave_that_room_too():
    bias = torch.tensor([0.5, 0.5])
    wide = with_int32_biases(layer([127, 127], [1e-12, 0.1]), [(0.01, bias)], 4)
    assert torch.equal(wide.scales, torch.tensor([0.5 / (0.01 * 2.0**30), 0.1]))
    shrunk = with_int32_biases(layer([127, 100], [1e-12, 1e-11]), [(0.01, bias)], 4)
    assert (bias / (0.01 * shrunk.scales)).max() <= 2.0**26 * (1 + 1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_layers_that_share_a_dead_channel_both_keep_their_biases(turned):
    biases = [(0.01, torch.tensor([0.9])), (0.02, torch.tensor([1e-9]))]
    made = with_int32_biases(layer([0], [1.0]), biases[::-1] if turned else biases)
    assert 0.9 / (0.01 * made.scales.item()) == pytest.approx(2.0**24, rel=1e-6)


@pytest.mark.recipe
def test_a_bias_of_a_dead_channel_is_kept_to_the_last_bit(x, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, len(KINDS))).eval()
    spoil_(model[1].weight, model[1].bias)
    made = deploy.export(model, tmp_path / "m.onnx", "onnx", Job(SHAPE, batches=(x,)))
    got = deploy.file_logits(made.path, x)
    at = [KINDS.index(kind) for kind in ("zero", "1e-30", "1e-40")]
    assert torch.allclose(got[:, at], model[1].bias.detach()[at].expand(len(x), -1), rtol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_packed_file_gives_back_the_weights_to_the_bit(grid):
    width = len(KINDS)
    spec = ModelSpec(
        architecture="mlp",
        arguments={"in_features": 27, "num_classes": width, "hidden": [width]},
        input_shape=(27,),
    )
    model = spec.build()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for layer in layers:
        spoil_(layer.weight, layer.bias)
    model = on_grids(model, GRIDS[grid], InputQuantization(), torch.randn(64, 27))
    table = {name: layer.scheme for name, layer in quantized_layers(model)}
    data, _ = to_bytes(spec.model_copy(update={"quantized": table}), model)
    _, again = from_bytes(data, "the file")
    for name, value in model.state_dict().items():
        assert np.array_equal(again.state_dict()[name].numpy(), value.numpy()), name
