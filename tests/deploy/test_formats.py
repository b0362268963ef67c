"""The table of formats: unknown names, missing packages and unknown files are told with the cure."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fedpress.deploy import FORMATS, Job, export, open_file
from fedpress.deploy.capture import extra, require
from fedpress.errors import ExportError


def test_an_unknown_format_is_told_with_the_nearest(tmp_path):
    with pytest.raises(ExportError, match="no format 'onxx'; did you mean 'onnx'"):
        export(nn.Linear(2, 2), tmp_path / "m", "onxx", Job((2,)))


def test_a_missing_package_is_told_with_the_command(tmp_path, monkeypatch):
    row = replace(
        FORMATS["onnx"], packages=("onnx", "no_such_package"), install="no-such-package==1.2"
    )
    monkeypatch.setitem(FORMATS, "onnx", row)
    with pytest.raises(ExportError, match=r"run `pip install no-such-package==1\.2`"):
        export(nn.Linear(2, 2), tmp_path / "m.onnx", "onnx", Job((2,)))
    with pytest.raises(ExportError, match=r"run `pip install no-such-package==1\.2`"):
        open_file(tmp_path / "m.onnx")


def test_a_file_of_no_known_kind_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"give one that ends in .*\.onnx"):
        open_file(tmp_path / "model.h5")


def test_a_package_that_cannot_be_loaded_is_told_apart_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text(
        "raise ImportError('libgone.so: cannot open', name='broken_package')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ExportError, match=r"cannot be loaded \(libgone\.so.*--force-reinstall"):
        require("broken_package")
    with pytest.raises(
        ExportError, match="'no_such_package': it is missing; run `pip install no_such_package`"
    ):
        require("no_such_package")


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ExportError, match="there is no file"):
        open_file(tmp_path / "none.onnx")


def test_batches_that_are_one_tensor_are_refused():
    with pytest.raises(
        ExportError, match=r"expected a tuple of them; give several, such as x\.split"
    ):
        Job((2,), batches=torch.zeros(4, 2))


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(0, 3, 8, 8),
        torch.zeros(3, 8, 8),
        torch.zeros(2, 3, 8, 9),
        torch.zeros(2, 3, 8, 8).byte(),
    ],
    ids=["none", "one", "size", "bytes"],
)
def test_a_batch_that_is_no_calibration_batch_is_refused(tmp_path, batch):
    with pytest.raises(ExportError, match=r"expected float32 \['n', 3, 8, 8\].*standardised"):
        export(nn.Flatten(), tmp_path / "m.onnx", "onnx", Job((3, 8, 8), batches=(batch,)))


@pytest.mark.parametrize("batches", [(), (torch.ones(2, 3, 4, 4),)], ids=["float", "integers"])
@pytest.mark.parametrize("name", ["0.bias", "1.running_var", "1.weight"])
def test_a_model_with_nan_is_refused_by_name(tmp_path, name, batches):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 2))
    model.state_dict()[name][0] = float("nan")
    with pytest.raises(
        ExportError, match=rf"'{name}' has NaN or infinite values; load a checkpoint"
    ):
        export(model, tmp_path / "m.onnx", "onnx", Job((3, 4, 4), batches=batches))


class Inverse(nn.Module):
    def forward(self, x):
        return 1 / x


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_values_without_a_range_are_refused_where_they_come_from(tmp_path, observer):
    batches = torch.ones(4, 3, 4, 4)
    batches[0, 0, 0, 0] = 0
    job = Job((3, 4, 4), batches=tuple(batches.split(2)), observer=observer)
    with pytest.raises(ExportError, match="NaN or infinite values on the calibration examples"):
        export(nn.Sequential(Inverse(), nn.Conv2d(3, 2, 1)), tmp_path / "m.onnx", "onnx", job)


def test_an_extra_is_installed_from_the_clone_with_its_pinned_versions(tmp_path, monkeypatch):
    monkeypatch.setattr("fedpress.deploy.capture.CLONE", tmp_path / "my clone")
    assert extra("openvino") == "'fedpress[openvino]'"
    (tmp_path / "my clone").mkdir()
    pinned = tmp_path / "my clone" / "pinned.txt"
    pinned.write_text("openvino==2026.4.1\n")
    words = shlex.split(extra("openvino", "pinned.txt"))
    assert words == ["-c", str(pinned), "-e", f"{tmp_path / 'my clone'}[openvino]"]


@pytest.mark.parametrize("name", ["executorch", "litert", "openvino"])
def test_the_extra_and_the_pinned_versions_of_a_runtime_exist(name):
    words = shlex.split(FORMATS[name].install)
    assert words[-1].endswith(f"[{name}]")
    root = Path(__file__).parents[2]
    if (root / "pyproject.toml").is_file():
        assert f"\n{name} = [" in (root / "pyproject.toml").read_text("utf-8")
        assert Path(words[1]).is_file()
