"""OpenVINO's files run here by OpenVINO: the numbers of torch, any batch, errors with a cure."""

import pytest
import torch
from torch import nn

from fedpress.deploy import ROUNDING, Job, export, open_file, parity
from fedpress.errors import ExportError
from tests.deploy.test_qdq import SHAPE, Residual, trained

pytest.importorskip("openvino")
pytestmark = pytest.mark.deploy


@pytest.fixture(scope="module")
def x():
    return torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_float_files_give_the_logits_of_torch_at_any_batch_size(tmp_path, x, capfd):
    model = trained(Residual())
    made = export(model, tmp_path / "m.xml", "openvino", Job(SHAPE))
    assert {p.name for p in tmp_path.iterdir()} == {"m.xml", "m.bin"}
    assert made.file_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert parity(model, made.path, x).max_abs_error < 1e-4
    run = open_file(made.path, threads=1)
    assert [run(x[:n].numpy()).shape for n in (1, 5, 1)] == [(1, 5), (5, 5), (1, 5)]
    assert "fedpress_version" in made.path.read_text()
    assert capfd.readouterr() == ("", "")


def test_integer_files_give_the_logits_of_the_rounded_graph(tmp_path, x):
    model = trained(Residual())
    made = export(model, tmp_path / "q.xml", "openvino", Job(SHAPE, batches=(x,), weight_bits=7))
    assert made.left == {}
    assert parity(made.program, made.path, x, tolerance=ROUNDING).same_argmax_share > 0.9


def test_a_damaged_file_a_missing_one_and_other_shapes_are_refused(tmp_path):
    path = export(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), tmp_path / "m.xml", "openvino", Job(SHAPE)).path
    with pytest.raises(ExportError, match=r"cannot run .* on \[2, 3, 8, 9\].*the file takes"):
        open_file(path)(torch.zeros(2, 3, 8, 9).numpy())
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ExportError, match="cannot load"):
        open_file(path)
    with pytest.raises(ExportError, match="no file"):
        open_file(tmp_path / "none.xml")
