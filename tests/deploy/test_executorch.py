"""ExecuTorch programs run here by ExecuTorch: the numbers of torch, everything on XNNPACK, errors with a cure."""

import json

import pytest
import torch
from torch import nn

from fedpress.core.examples import Preprocess
from fedpress.deploy import ROUNDING, Job, export, open_file, parity
from fedpress.errors import ExportError
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import quantize_layers_
from tests.deploy.qdq.test_program import SHAPE, Residual, trained

pytest.importorskip("executorch.exir")

from fedpress.deploy.executorch import read_metadata

pytestmark = pytest.mark.deploy


class Volume(nn.Module):
    """A 3-d convolution, of which ExecuTorch has no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3)

    def forward(self, x):
        return self.conv(x).flatten(1)


class Softmax(nn.Module):
    """A transposed convolution and a softmax, which have no integer form, and an arc tangent, which XNNPACK lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 2, stride=2)

    def forward(self, x):
        return torch.atan(torch.softmax(self.up(torch.relu(self.conv(x))).mean((2, 3)), 1))


@pytest.fixture(scope="module")
def x():
    return torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_a_float_program_gives_the_logits_of_torch_and_runs_on_xnnpack_alone(tmp_path, x, capfd):
    model = trained(Residual())
    job = Job(SHAPE, Preprocess((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), {"class_names": '["a"]'})
    made = export(model, tmp_path / "m.pte", "executorch", job)
    assert made.left_float == {}
    assert made.program is None
    assert made.file_bytes == made.path.stat().st_size
    assert parity(model, made.path, x).max_abs_error < 1e-4
    assert read_metadata(made.path) == made.metadata
    assert json.loads(made.metadata["mean"]) == [0.5, 0.4, 0.3]
    assert capfd.readouterr() == ("", "")


def test_an_integer_program_gives_the_logits_of_the_rounded_graph_and_runs_on_xnnpack_alone(
    tmp_path, x
):
    model = trained(Residual(32))
    whole = export(model, tmp_path / "f.pte", "executorch", Job(SHAPE))
    made = export(model, tmp_path / "q.pte", "executorch", Job(SHAPE, batches=(x,)))
    assert made.left_float == {}
    assert parity(made.program, made.path, x, tolerance=ROUNDING).same_argmax_share > 0.9
    assert made.file_bytes < 0.5 * whole.file_bytes


def test_layers_of_fewer_bits_keep_their_values_on_integers_and_say_so_in_float(tmp_path, x):
    model = trained(Residual())
    grids = {
        "conv": QuantizationScheme(weights=WeightQuantization(kind="int", bits=4)),
        "head": QuantizationScheme(weights=WeightQuantization(kind="int", bits=4, group=4)),
    }
    quantize_layers_(model, grids)
    made = export(model, tmp_path / "q.pte", "executorch", Job(SHAPE, batches=(x,)))
    assert made.left_float["head"] == "its weights have several scales per output channel"
    assert not made.left_float.keys() & {"stem", "conv"}, (
        "what feeds the float head alone may stay float too"
    )
    parity(made.program, made.path, x, tolerance=ROUNDING)
    made = export(model, tmp_path / "f.pte", "executorch", Job(SHAPE))
    assert {"conv", "head"} <= made.left_float.keys()
    assert all(name.startswith(("conv", "head")) for name in made.left_float)
    assert parity(model, made.path, x).max_abs_error < 1e-4


def test_what_computes_in_float_or_outside_of_xnnpack_is_told(tmp_path, x):
    model = Softmax()
    made = export(model, tmp_path / "m.pte", "executorch", Job(SHAPE))
    assert any(
        "atan" in name and "portable" in reason for name, reason in made.left_float.items()
    ), made.left_float
    assert parity(model, made.path, x).max_abs_error < 1e-4
    made = export(model, tmp_path / "q.pte", "executorch", Job(SHAPE, batches=(x,)))
    assert made.left_float["up"] == "conv_transpose2d has no integer form"
    parity(made.program, made.path, x, tolerance=ROUNDING)


class Gate(nn.Module):
    """Channels weighted by what they hold: two readers of one value, one of them behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x)
        return self.head((x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))).mean((2, 3)))


class Product(nn.Module):
    """Pools by windows, then multiplies two images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(3, 4, 1), nn.AvgPool2d(2), nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(self.conv(x)).flatten(2)
        return self.head((x @ x.transpose(1, 2)).flatten(1))


def test_a_value_read_on_both_sides_of_a_gate_stays_on_integers(tmp_path, x):
    made = export(Gate(), tmp_path / "g.pte", "executorch", Job(SHAPE, batches=(x,)))
    assert made.left_float == {"sigmoid": "sigmoid has no integer form"}
    parity(made.program, made.path, x, tolerance=ROUNDING)


def test_what_xnnpack_takes_but_computes_in_float_is_told(tmp_path, x):
    made = export(Product(), tmp_path / "p.pte", "executorch", Job(SHAPE, batches=(x,)))
    reason = "XNNPACK has no integer kernel of it; computes in float"
    assert sorted(name for name, why in made.left_float.items() if why == reason) == [
        "aten::bmm",
        "pool (aten::avg_pool2d)",
    ]


def test_an_operation_without_a_kernel_is_named(tmp_path, capfd):
    with pytest.raises(
        ExportError, match=r"no kernel that runs the operation 'aten::convolution'.*export as onnx"
    ):
        export(Volume(), tmp_path / "v.pte", "executorch", Job((1, 5, 5, 5)))
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("cut", [0, 100, 3000])
def test_a_damaged_file_and_other_shapes_are_refused(tmp_path, cut):
    path = export(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), tmp_path / "m.pte", "executorch", Job(SHAPE)
    ).path
    with pytest.raises(ExportError, match=r"takes float32 \[1, 3, 8, 8\], got \[2, 3, 8, 8\]"):
        open_file(path)(torch.zeros(2, *SHAPE).numpy())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ExportError, match="cannot load"):
        open_file(path)


def test_a_damaged_name_of_a_method_is_told(tmp_path):
    path = export(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), tmp_path / "m.pte", "executorch", Job(SHAPE)
    ).path
    data = path.read_bytes()
    assert data.count(b"forward") == 1
    path.write_bytes(data.replace(b"forward", b"forwarp"))
    with pytest.raises(ExportError, match=r"has no method 'forward'; export it again|cannot load"):
        open_file(path)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_is_as_asked(tmp_path, threads):
    library = pytest.importorskip("executorch.extension.pybindings.portable_lib")
    path = export(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), tmp_path / "m.pte", "executorch", Job(SHAPE)
    ).path
    open_file(path, threads=threads)
    assert library._threadpool_get_thread_count() == threads
