"""The rounded graph: which values are on a grid, that codes go in unchanged, and what stays float."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress.compress.quantize import quantizable, quantize_
from fedpress.deploy import IntegerFormat, logits, quantized_program
from fedpress.errors import ExportError
from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import materialize_, quantize_layers_

SHAPE = (3, 8, 8)
OPS = torch.ops.quantized_decomposed


class Residual(nn.Module):
    """A strided convolution, a block with a shortcut, max pooling, a mean and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        return self.head(F.relu(self.norm1(self.conv(x)) + x).mean((2, 3)))


def trained(model: nn.Module) -> nn.Module:
    """Gives the batch norms statistics and signs of their own, so that folding them wrongly shows."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    model.train()(torch.randn(64, *SHAPE) * 2 + 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))


def calls(program: torch.export.ExportedProgram, target: object) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if n.target is target]


@pytest.mark.recipe
@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_every_operand_of_integer_arithmetic_is_rounded_and_the_logits_stay_near(x, activations):
    model = trained(Residual())
    made = quantized_program(model, SHAPE, [x], format=IntegerFormat(activations))
    assert made.left_float == {}
    graph = made.program.graph
    back = {OPS.dequantize_per_tensor.default, OPS.dequantize_per_channel.default}
    for target in (
        torch.ops.aten.conv2d.default,
        torch.ops.aten.linear.default,
        torch.ops.aten.add.Tensor,
    ):
        found = calls(made.program, target)
        assert found
        for node in found:
            assert all(a.target in back for a in node.args[:2])
    assert not calls(made.program, torch.ops.aten.batch_norm.default)
    kinds = {n.args[-1] for n in graph.nodes if n.target is OPS.quantize_per_tensor.default}
    assert kinds == {getattr(torch, activations)}
    expected, got = logits(model, x), logits(made.program, x)
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.recipe
def test_uint8_and_int8_activations_are_the_same_numbers(x):
    model = trained(Residual())
    a, b = (
        quantized_program(model, SHAPE, [x], format=IntegerFormat(kind)).program
        for kind in ("uint8", "int8")
    )
    assert torch.equal(logits(a, x), logits(b, x))


def test_nothing_is_rounded_between_a_layer_and_its_relu(x):
    made = quantized_program(trained(Residual()), SHAPE, [x])
    for node in calls(made.program, torch.ops.aten.relu.default):
        assert node.args[0].target in (torch.ops.aten.conv2d.default, torch.ops.aten.add.Tensor)


@pytest.mark.recipe
def test_max_pooling_keeps_the_grid_of_its_input(x):
    made = quantized_program(trained(Residual()), SHAPE, [x])
    (pool,) = calls(made.program, torch.ops.aten.max_pool2d.default)
    (after,) = pool.users
    assert pool.args[0].args[1:] == after.args[1:]


def test_codes_scales_and_input_grids_of_a_quantized_model_go_in_unchanged(x):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    four = QuantizationScheme(
        weights=WeightQuantization(kind="int", bits=4), inputs=InputQuantization(bits=8)
    )
    quantize_layers_(model, {"0": four, "3": four})
    model[0].input_scale.data.fill_(0.03)
    model[0].input_zero_point.fill_(120)
    model[3].input_scale.data.fill_(0.02)
    materialize_(model)
    made = quantized_program(model, SHAPE, [x], format=IntegerFormat(float_output=True))
    for name in ("0", "3"):
        layer = model.get_submodule(name)
        assert torch.equal(made.program.state_dict[f"{name}.weight_codes"], layer.quantize())
        assert torch.equal(
            made.program.state_dict[f"{name}.weight_scales"], layer.weight_scale.detach()
        )
        assert f"{name}.weight" not in made.program.state_dict
    first, second = calls(made.program, OPS.quantize_per_tensor.default)[:2]
    assert first.args[1:3] == (pytest.approx(0.03), 120)
    assert second.args[1:3] == (pytest.approx(0.02), 0)
    assert (logits(made.program, x) - logits(model, x)).abs().max() < 1e-5


@pytest.mark.parametrize("group", [None, 9, 10])
def test_without_batches_small_weights_stay_small_and_nothing_else_is_rounded(x, group):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    quantize_layers_(
        model,
        {"0": QuantizationScheme(weights=WeightQuantization(kind="int", bits=4, group=group))},
    )
    made = quantized_program(model, SHAPE)
    assert made.program.state_dict["0.weight_codes"].dtype is torch.int8
    assert not calls(made.program, OPS.quantize_per_tensor.default)
    assert (logits(made.program, x) - logits(model, x)).abs().max() < 1e-5


def test_a_batch_norm_after_quantized_weights_moves_into_their_scales(x):
    model = trained(Residual())
    quantize_layers_(
        model, {"stem": QuantizationScheme(weights=WeightQuantization(kind="ternary"))}
    )
    made = quantized_program(model, SHAPE)
    assert made.program.state_dict["stem.weight_codes"].unique().tolist() == [-1, 0, 1]
    assert (logits(made.program, x) - logits(model, x)).abs().max() < 1e-4


def test_two_readers_with_different_grids_each_get_their_own(x):
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) + self.b(x)).mean((2, 3))

    model = Fork()
    quantize_layers_(
        model,
        {
            n: QuantizationScheme(weights=WeightQuantization(), inputs=InputQuantization())
            for n in "ab"
        },
    )
    for layer, scale in ((model.a, 0.03), (model.b, 0.05)):
        layer.input_scale.data.fill_(scale)
        layer.input_zero_point.fill_(100)
    made = quantized_program(model, SHAPE, [x])
    scales = [n.args[0].args[1] for n in calls(made.program, torch.ops.aten.conv2d.default)]
    assert scales == [pytest.approx(0.03), pytest.approx(0.05)]


def test_what_stays_float_is_listed_with_the_reason(x):
    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.inner(x.mean((1, 2)))))

    model = Soft()
    quantize_layers_(
        model, {"inner": QuantizationScheme(weights=WeightQuantization(kind="codebook"))}
    )
    made = quantized_program(model, SHAPE, [x])
    assert "codebook" in made.left_float["inner"]
    assert "layer_norm" in made.left_float["norm"]
    assert made.left_float["mean"] == "mean stays float between float operations"
    assert set(made.left_float) == {"inner", "norm", "mean"}


@pytest.mark.recipe
def test_bad_calibration_and_bad_weights_are_clear_errors(x):
    model = trained(Residual())
    with pytest.raises(ExportError, match="NaN or infinite"):
        quantized_program(model, SHAPE, [torch.full((2, *SHAPE), torch.nan)])
    with pytest.raises(ExportError, match=r"batch is float32 \[2, 5, 8, 8\], expected"):
        quantized_program(model, SHAPE, [torch.zeros(2, 5, 8, 8)])
    model.head.weight.data[0, 0] = torch.inf
    with pytest.raises(ExportError, match=r"'head\.weight' has NaN or infinite values"):
        quantized_program(model, SHAPE, [x])


def test_the_model_is_left_as_it_was(x):
    model = trained(Residual())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    quantized_program(model, SHAPE, [x])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert type(model.stem) is nn.Conv2d


@pytest.mark.recipe
def test_seven_bits_are_at_most_63(x):
    made = quantized_program(trained(Residual()), SHAPE, [x], format=IntegerFormat(weight_bits=7))
    codes = made.program.state_dict["conv.weight_codes"]
    assert codes.abs().max() == 63


@pytest.mark.recipe
@pytest.mark.parametrize("observer", ["percentile", "mse", "entropy"])
def test_observers_cut_off_what_is_rare(x, observer):
    far = x.repeat(8, 1, 1, 1)
    far[0, 0, 0, 0] = 500.0
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    wide, cut = (
        quantized_program(model, SHAPE, [far], observer=o).program for o in ("minmax", observer)
    )
    scales = [calls(program, OPS.quantize_per_tensor.default)[0].args[1] for program in (wide, cut)]
    assert scales[0] == pytest.approx((500 - float(far.min())) / 255, rel=1e-4)
    assert scales[1] < scales[0]


class Block(nn.Module):
    """A transformer block as it is usually written: attention and two linear layers beside a residual stream."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (
            self.qkv(self.norms[0](x)).view(n, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        )
        weights = torch.softmax(q @ k.transpose(-2, -1) * (width // 4) ** -0.5, -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.place = (
            nn.Conv2d(3, 32, 2, 2),
            nn.Parameter(torch.randn(1, 17, 32) * 0.1),
        )
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.blocks, self.norm, self.head = (
            nn.Sequential(Block(), Block(), Block()),
            nn.LayerNorm(32),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


@pytest.mark.recipe
def test_the_file_of_a_transformer_is_as_near_as_its_simulation(x):
    torch.manual_seed(0)
    model = Vision().eval()
    model.place.data[:, :, 3] += (
        12.0  # a channel far out, as the residual streams of transformers have
    )
    exact = logits(model, x)
    table, _ = quantizable(
        model, QuantizationScheme(weights=WeightQuantization(), inputs=InputQuantization())
    )
    quantize_(model, table, [x])
    simulated = logits(model, x)
    made = quantized_program(model, SHAPE, [x], format=IntegerFormat(float_output=True))
    got = logits(made.program, x)
    error, own = ((a - exact).norm() / exact.norm() for a in (got, simulated))
    assert error < 1.5 * own + 0.002, (error, own)
    assert "add stays float between float operations" in made.left_float["blocks.0"]
    assert not calls(made.program, torch.ops.aten.layer_norm.default)[0].users.keys() - set(
        calls(made.program, OPS.quantize_per_tensor.default)
    ), "what a layer reads is rounded once, as in the simulation"


def test_a_residual_stream_that_convolutions_read_stays_on_integers(x):
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.a(torch.relu(x))
            x = x + self.b(torch.relu(x))
            return self.head(x.mean((2, 3)))

    assert quantized_program(Stream().eval(), SHAPE, [x]).left_float == {}


@pytest.mark.recipe
def test_only_what_rounds_values_counts_as_rounded(x):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).eval()
    assert quantized_program(model, SHAPE, [x]).rounds
    quantize_layers_(model, {"2": QuantizationScheme(weights=WeightQuantization(bits=4))})
    assert not quantized_program(model, SHAPE).rounds
    quantize_layers_(
        model,
        {
            "2": QuantizationScheme(
                weights=WeightQuantization(bits=4), inputs=InputQuantization(dynamic=True)
            )
        },
    )
    assert quantized_program(model, SHAPE).rounds
