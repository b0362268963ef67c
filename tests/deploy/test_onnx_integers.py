"""The integer ONNX file: onnxruntime has kernels for all of it, the numbers are the graph's, the file is small."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpress.deploy import ROUNDING, Job, export_onnx, file_logits, logits, parity
from fedpress.deploy.onnx import MAX_IR_VERSION, WIDE
from fedpress.deploy.onnx_integers import pack_bits
from fedpress.models.resnet import ResNet
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import quantize_layers_

onnx = pytest.importorskip("onnx")
SHAPE = (3, 8, 8)
INTEGER = {
    "Pad",
    "QLinearConv",
    "QLinearAdd",
    "QLinearGlobalAveragePool",
    "QGemm",
    "QuantizeLinear",
    "Transpose",
    "Flatten",
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = ResNet(widths=(16, 24), blocks=1, num_classes=5)
    net.train()(torch.randn(64, *SHAPE) * 2 + 0.3)
    return net.eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(model, x, tmp_path_factory):
    return export_onnx(
        model, tmp_path_factory.mktemp("integers") / "model.onnx", Job(SHAPE, batches=(x,))
    )


def test_onnxruntime_runs_a_residual_network_on_integers_alone(exported, tmp_path):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(exported.path), options, providers=["CPUExecutionProvider"])
    found = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert set(found) <= INTEGER
    assert found["QLinearConv"] == 6
    assert found["QLinearAdd"] == 2
    assert found["QLinearGlobalAveragePool"] == found["QGemm"] == 1


@pytest.mark.parametrize("n", [1, 7, 64])
def test_the_file_gives_the_numbers_of_the_rounded_graph(exported, x, n):
    # Also where products of bytes are added in 16 bits: the file says that it needs onnxruntime's exact mode there.
    assert exported.metadata[WIDE] == "true"
    found = parity(exported.program, exported.path, x[:n], tolerance=ROUNDING)
    assert found.max_abs_error < 0.03
    assert (file_logits(exported.path, x) - logits(exported.program, x)).abs().median() < 1e-5


def test_codes_stand_in_the_file_once_as_bytes(exported, model):
    proto = onnx.load(exported.path)
    onnx.checker.check_model(proto, full_check=True)
    kinds = Counter(t.data_type for t in proto.graph.initializer if len(t.dims) > 1)
    assert set(kinds) == {onnx.TensorProto.INT8}
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert exported.file_bytes < 1.2 * weights + 12_000


@pytest.mark.recipe
def test_seven_bits_need_no_exact_mode(model, x, tmp_path):
    made = export_onnx(model, tmp_path / "m.onnx", Job(SHAPE, batches=(x,), weight_bits=7))
    assert WIDE not in made.metadata
    assert parity(made.program, made.path, x, tolerance=ROUNDING).same_argmax_share > 0.95


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("grid", "bits"),
    [
        (WeightQuantization(kind="int", bits=4), 4),
        (WeightQuantization(kind="int", bits=4, group=16), 4),
        (WeightQuantization(kind="ternary"), 2),
        (WeightQuantization(kind="binary"), 2),
    ],
    ids=["int4", "groups", "ternary", "binary"],
)
def test_weights_of_few_bits_make_the_file_small_and_compute_the_same(grid, bits, x, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 24), nn.ReLU()
    )
    quantize_layers_(
        model, {"0": QuantizationScheme(weights=grid), "3": QuantizationScheme(weights=grid)}
    )
    made = export_onnx(model, tmp_path / "float.onnx", Job(SHAPE))
    weights = 32 * 27 + 1152 * 24
    scales = 4 * weights / grid.group if grid.group else 4 * 56
    assert made.file_bytes < weights * bits / 8 + scales + 3_000
    assert onnx.load(made.path).ir_version <= MAX_IR_VERSION
    parity(model, made.path, x)


@pytest.mark.recipe
def test_four_bit_weights_run_on_integer_kernels(x, tmp_path):
    import onnxruntime as ort

    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 24)
    )
    grid = QuantizationScheme(weights=WeightQuantization(kind="int", bits=4))
    quantize_layers_(model, {"0": grid, "3": grid})
    made = export_onnx(model, tmp_path / "m.onnx", Job(SHAPE, batches=(x,)))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(made.path), options, providers=["CPUExecutionProvider"])
    found = {n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert {"QLinearConv", "QGemm"} <= found
    assert not found & {"Conv", "Gemm", "DequantizeLinear", "Cast"}
    assert made.file_bytes < (32 * 27 + 1152 * 24) / 2 + 3_000
    parity(made.program, made.path, x, tolerance=ROUNDING)


@pytest.mark.recipe
def test_images_are_filled_up_to_four_channels(model, x, tmp_path):
    made = export_onnx(model, tmp_path / "m.onnx", Job(SHAPE, batches=(x,)))
    kinds = [n.op_type for n in onnx.load(made.path).graph.node]
    assert kinds.count("Pad") == 1
    shapes = {tuple(t.dims) for t in onnx.load(made.path).graph.initializer}
    assert (16, 4, 3, 3) in shapes
    assert (16, 3, 3, 3) not in shapes


@given(st.lists(st.integers(-8, 7), max_size=9))
def test_packed_codes_read_back(values):
    codes = np.array(values, np.int8)
    tensor = onnx.TensorProto(
        dims=codes.shape, data_type=onnx.TensorProto.INT4, raw_data=pack_bits(codes, 4)
    )
    assert onnx.numpy_helper.to_array(tensor).astype(np.int8).tolist() == values


@pytest.mark.recipe
def test_linear_layers_over_sequences_multiply_integers(tmp_path):
    import onnxruntime as ort

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(8, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.inner(x)).mean(1))

    x = torch.randn(32, 6, 8)
    made = export_onnx(Sequence(), tmp_path / "m.onnx", Job((6, 8), batches=(x,)))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(made.path), options, providers=["CPUExecutionProvider"])
    found = {n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert {"MatMulIntegerToFloat", "QGemm"} <= found
    assert "MatMul" not in found
    parity(made.program, made.path, x, tolerance=ROUNDING)
