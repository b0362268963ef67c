"""The exported file: what is in it, what it refuses, and that nothing is lost or printed."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fedpress
from fedpress.core.examples import Preprocess
from fedpress.deploy import Job, export_onnx
from fedpress.deploy.capture import require
from fedpress.deploy.onnx import MAX_IR_VERSION, OPSET
from fedpress.errors import ExportError

SHAPE = (3, 8, 8)
PREPROCESS = Preprocess((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


class Residual(nn.Module):
    """Two convolutions with batch norm, an odd width as pruning leaves it, and a shortcut."""

    def __init__(self, width: int = 13) -> None:
        super().__init__()
        self.conv1, self.norm1 = (
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.conv2, self.norm2 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(x + self.norm2(self.conv2(x)))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


class MatrixExponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(x)


class Words(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x.flatten(1), "fine"


def export(model: nn.Module, path: Path, shape: tuple[int, ...] = SHAPE):
    return export_onnx(model, path, Job(shape, PREPROCESS, {"class_names": '["a", "b"]'}))


@pytest.mark.recipe
def test_the_file_says_how_to_feed_it_and_takes_any_batch(tmp_path):
    onnx = pytest.importorskip("onnx")
    artifact = export(Residual(), tmp_path / "new" / "model.onnx")
    proto = onnx.load(artifact.path)
    onnx.checker.check_model(proto, full_check=True)
    words = {p.key: p.value for p in proto.metadata_props}
    assert words == artifact.metadata
    assert json.loads(words["mean"]) == list(PREPROCESS.mean)
    assert json.loads(words["std"]) == list(PREPROCESS.std)
    assert json.loads(words["input_shape"]) == list(SHAPE)
    assert words["class_names"] == '["a", "b"]'
    assert words["fedpress_version"] == fedpress.__version__
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert proto.opset_import[0].version == OPSET
    assert proto.ir_version <= MAX_IR_VERSION
    assert artifact.file_bytes == artifact.path.stat().st_size


@pytest.mark.recipe
def test_the_file_holds_no_path_of_the_machine_and_is_the_same_twice(tmp_path):
    model = Residual()
    first = export(model, tmp_path / "a.onnx").path.read_bytes()
    assert first == export(model, tmp_path / "b.onnx").path.read_bytes()
    assert b".py" not in first
    assert str(Path(__file__).parent).encode() not in first


@pytest.mark.recipe
def test_export_leaves_the_model_as_it_was_and_prints_nothing(tmp_path, capfd, recwarn):
    model = Residual().train()
    model.norm1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path / "model.onnx")
    assert model.training
    assert model.norm2.training
    assert not model.norm1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1), Branch()), ["'1' (Branch)", "torch.where"]),
        (FixedBatch(), ["FixedBatch", "batch size"]),
        (MatrixExponential(), ["linalg_matrix_exp", "ONNX"]),
        (Words(), ["returns a str", "leave it out"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), ["'1' (Linear)", "[N, 3, 8, 8]"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_exported_is_named_with_a_cure(tmp_path, capfd, model, words):
    with pytest.raises(ExportError) as caught:
        export(model, tmp_path / "model.onnx")
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.recipe
def test_a_path_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match=r"model\.onnx: cannot be written .*another out="):
        export(Residual(), tmp_path / "file" / "model.onnx")


@pytest.mark.recipe
def test_a_full_disk_keeps_the_old_file_and_leaves_no_half_one(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a disk that takes 4 KiB and no more
    try:
        with pytest.raises(ExportError, match="free space"):
            export(Residual(64), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.recipe
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_the_file_is_as_for_any_other(tmp_path, mask):
    before = os.umask(mask)
    try:
        export(Residual(), tmp_path / "model.onnx")
    finally:
        os.umask(before)
    assert (tmp_path / "model.onnx").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_missing_package_comes_with_the_command_that_installs_it():
    with pytest.raises(ExportError, match="pip install json surely_not_installed"):
        require("json", "surely_not_installed")
