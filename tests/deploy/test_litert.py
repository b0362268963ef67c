"""LiteRT files run here by LiteRT: the numbers of torch, integers alone, weights of four bits in four."""

import copy

import pytest
import torch
from torch import nn

from fedpress.deploy import ROUNDING, Job, export, open_file, parity
from fedpress.errors import ExportError
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import quantize_layers_
from tests.deploy.qdq.test_program import SHAPE, Residual, trained

pytest.importorskip("litert_torch")
pytest.importorskip("ai_edge_litert.interpreter")

from fedpress.deploy.litert import read_metadata

pytestmark = pytest.mark.deploy


class MatrixExponential(nn.Module):
    def forward(self, x):
        return torch.linalg.matrix_exp(x).flatten(1)


@pytest.fixture(scope="module")
def x():
    return torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))


def operations(path) -> list[str]:
    from ai_edge_litert import interpreter

    return [op["op_name"] for op in interpreter.Interpreter(str(path))._get_ops_details()]


def test_a_float_file_gives_the_logits_of_torch(tmp_path, x, capfd):
    model = trained(Residual())
    made = export(
        model, tmp_path / "m.tflite", "litert", Job(SHAPE, metadata={"class_names": '["ä"]'})
    )
    assert made.left_float == {}
    assert parity(model, made.path, x).max_abs_error < 1e-4
    assert made.metadata.items() <= read_metadata(made.path).items()
    assert capfd.readouterr() == ("", "")


def test_an_integer_file_gives_the_logits_of_the_rounded_graph_without_a_float_in_between(
    tmp_path, x
):
    model = trained(Residual(32))
    whole = export(model, tmp_path / "f.tflite", "litert", Job(SHAPE))
    made = export(model, tmp_path / "q.tflite", "litert", Job(SHAPE, batches=(x,)))
    assert made.left_float == {}
    assert not {"QUANTIZE", "DEQUANTIZE"} & set(operations(made.path))
    assert parity(made.program, made.path, x, tolerance=ROUNDING).same_argmax_share > 0.9
    assert made.file_bytes < 0.5 * whole.file_bytes


@pytest.mark.parametrize("integer", [True, False], ids=["integers", "float"])
def test_weights_of_four_bits_take_four_and_keep_their_values(tmp_path, x, integer):
    model, sizes = trained(Residual(64)), []
    for bits in (8, 4):
        quantize_layers_(
            model,
            {
                n: QuantizationScheme(weights=WeightQuantization(kind="int", bits=bits))
                for n in ("stem", "conv", "head")
            },
        )
        made = export(
            model,
            tmp_path / f"{bits}.tflite",
            "litert",
            Job(SHAPE, batches=(x,) if integer else ()),
        )
        parity(made.program, made.path, x, tolerance=ROUNDING if integer else 1e-4)
        sizes.append(made.file_bytes)
    weights = sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1
    )
    assert sizes[0] - sizes[1] == pytest.approx(weights / 2, abs=400)


def test_an_odd_number_of_weights_of_four_bits_is_kept(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    quantize_layers_(
        model, {"1": QuantizationScheme(weights=WeightQuantization(kind="ternary", bits=2))}
    )
    made = export(model, tmp_path / "m.tflite", "litert", Job((1, 3, 3)))
    assert parity(model, made.path, torch.randn(8, 1, 3, 3)).max_abs_error < 1e-5


def test_groups_of_scales_are_told(tmp_path, x):
    model = trained(Residual())
    quantize_layers_(
        model, {"head": QuantizationScheme(weights=WeightQuantization(kind="int", bits=4, group=4))}
    )
    made = export(model, tmp_path / "m.tflite", "litert", Job(SHAPE, batches=(x,)))
    # The head computes in float, so what only it reads does too: told by the graph, then by the operations of the file.
    assert set(made.left_float) == {"head", "add", "mean", "ADD", "MEAN", "FULLY_CONNECTED"}
    assert made.left_float["add"] == "add stays float between float operations"
    parity(made.program, made.path, x, tolerance=ROUNDING)


def test_operations_of_an_integer_file_on_floats_are_told(tmp_path, x):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 5)
    )
    made = export(model, tmp_path / "m.tflite", "litert", Job(SHAPE, batches=(x,)))
    assert made.left_float == {
        "ADD": "LiteRT computes it in float",
        "MUL": "LiteRT computes it in float",
    }


def test_nan_has_no_place_on_a_grid(tmp_path, x):
    made = export(trained(Residual()), tmp_path / "m.tflite", "litert", Job(SHAPE, batches=(x,)))
    with pytest.raises(ExportError, match="no NaN; leave that example out"):
        open_file(made.path)(x[:1].numpy() * float("nan"))


def test_equal_weights_and_a_layer_used_twice_keep_their_values(tmp_path, x):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(
        conv, nn.ReLU(), conv, nn.ReLU(), copy.deepcopy(conv), nn.Flatten(), nn.Linear(192, 5)
    )
    made = export(model, tmp_path / "q.tflite", "litert", Job(SHAPE, batches=(x,)))
    parity(made.program, made.path, x, tolerance=ROUNDING)
    for name in ("0", "4"):
        quantize_layers_(
            model, {name: QuantizationScheme(weights=WeightQuantization(kind="int", bits=4))}
        )
    model[2] = model[0]
    for batches in ((), (x,)):
        made = export(model, tmp_path / "m.tflite", "litert", Job(SHAPE, batches=batches))
        parity(made.program, made.path, x, tolerance=ROUNDING if batches else 1e-4)


def test_an_operation_without_a_counterpart_is_named(tmp_path, capfd):
    with pytest.raises(ExportError, match=r"linalg_matrix_exp.*export as onnx"):
        export(MatrixExponential(), tmp_path / "m.tflite", "litert", Job((3, 3)))
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("cut", [0, 100, 600])
def test_a_damaged_file_and_other_shapes_are_refused(tmp_path, cut, capfd):
    path = export(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), tmp_path / "m.tflite", "litert", Job(SHAPE)
    ).path
    with pytest.raises(ExportError, match=r"takes float32 \[1, 3, 8, 8\], got \[2, 3, 8, 8\]"):
        open_file(path)(torch.zeros(2, *SHAPE).numpy())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ExportError, match="cannot load"):
        open_file(path)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_name_is_told_as_a_damaged_file(tmp_path):
    path = export(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), tmp_path / "m.tflite", "litert", Job(SHAPE)
    ).path
    data, name = path.read_bytes(), b"serving_default_args_0"
    assert name in data
    path.write_bytes(data.replace(name, b"\xff" * len(name)))
    with pytest.raises(ExportError, match="cannot load"):
        open_file(path)
