"""The table of formats: unknown names, missing packages and unknown files are told with the cure."""

from dataclasses import replace

import pytest
from torch import nn

from fedpress.deploy import FORMATS, Job, export, open_file
from fedpress.errors import ExportError


def test_an_unknown_format_is_told_with_the_nearest(tmp_path):
    with pytest.raises(ExportError, match="no format 'onxx'; did you mean 'onnx'"):
        export(nn.Linear(2, 2), tmp_path / "m", "onxx", Job((2,)))


def test_a_missing_package_is_told_with_the_command(tmp_path, monkeypatch):
    row = replace(FORMATS["onnx"], packages=("onnx", "no_such_package"), install="no-such-package==1.2")
    monkeypatch.setitem(FORMATS, "onnx", row)
    with pytest.raises(ExportError, match=r"run `pip install no-such-package==1\.2`"):
        export(nn.Linear(2, 2), tmp_path / "m.onnx", "onnx", Job((2,)))
    with pytest.raises(ExportError, match=r"run `pip install no-such-package==1\.2`"):
        open_file(tmp_path / "m.onnx")


def test_a_file_of_no_known_kind_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"give one that ends in .*\.onnx"):
        open_file(tmp_path / "model.h5")
