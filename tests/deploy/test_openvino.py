"""OpenVINO's files run here by OpenVINO: the numbers of torch, any batch, errors with a cure."""

import pytest
import torch
from torch import nn

from fedpress.deploy import ROUNDING, Job, export, file_bytes, open_file, parity
from fedpress.errors import ExportError
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import quantize_layers_
from tests.deploy.qdq.test_program import SHAPE, Residual, trained

pytest.importorskip("openvino")
pytestmark = pytest.mark.deploy


@pytest.fixture(scope="module")
def x():
    return torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_float_files_give_the_logits_of_torch_at_any_batch_size(tmp_path, x, capfd):
    model = trained(Residual())
    made = export(model, tmp_path / "m.xml", "openvino", Job(SHAPE))
    assert {p.name for p in tmp_path.iterdir()} == {"m.xml", "m.bin"}
    assert (
        file_bytes(made.path)
        == made.file_bytes
        == sum(p.stat().st_size for p in tmp_path.iterdir())
    )
    assert parity(model, made.path, x).max_abs_error < 1e-4
    run = open_file(made.path, threads=1)
    assert [run(x[:n].numpy()).shape for n in (1, 5, 1)] == [(1, 5), (5, 5), (1, 5)]
    assert "fedpress_version" in made.path.read_text()
    assert capfd.readouterr() == ("", "")


def test_integer_files_give_the_logits_of_the_rounded_graph(tmp_path, x):
    model = trained(Residual())
    made = export(model, tmp_path / "q.xml", "openvino", Job(SHAPE, batches=(x,), weight_bits=7))
    assert made.left_float == {}
    assert parity(made.program, made.path, x, tolerance=ROUNDING).same_argmax_share > 0.9


def test_no_weights_of_eight_bits_overflow(tmp_path):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 5)),
        torch.ones(8, *SHAPE),
    )
    nn.init.constant_(model[1].weight, 0.01)
    made = export(model, tmp_path / "7.xml", "openvino", Job(SHAPE, batches=(x,)))
    assert made.left_float == {}
    parity(made.program, made.path, x, tolerance=0.01)
    quantize_layers_(
        model,
        {
            name: QuantizationScheme(weights=WeightQuantization(kind="int", bits=8))
            for name in ("1", "3")
        },
    )
    made = export(model, tmp_path / "8.xml", "openvino", Job(SHAPE, batches=(x,)))
    assert list(made.left_float) == ["weights of 8 bits"]
    parity(made.program, made.path, x, tolerance=0.01)


def test_weights_of_four_bits_take_four(tmp_path, x):
    model, sizes = trained(Residual(64)), []
    for bits in (8, 4):
        grid = QuantizationScheme(weights=WeightQuantization(kind="int", bits=bits))
        quantize_layers_(model, dict.fromkeys(("stem", "conv", "head"), grid))
        made = export(model, tmp_path / f"{bits}.xml", "openvino", Job(SHAPE))
        assert parity(model, made.path, x).max_abs_error < 1e-4
        sizes.append(made.file_bytes)
    weights = sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1
    )
    assert sizes[0] - sizes[1] == pytest.approx(weights / 2, rel=0.1)  # the graph grows


def test_a_damaged_file_a_missing_one_and_other_shapes_are_refused(tmp_path):
    path = export(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), tmp_path / "m.xml", "openvino", Job(SHAPE)
    ).path
    with pytest.raises(ExportError, match=r"cannot run .* on \[2, 3, 8, 9\].*the file takes"):
        open_file(path)(torch.zeros(2, 3, 8, 9).numpy())
    whole = path.with_suffix(".bin").read_bytes()
    path.with_suffix(".bin").write_bytes(whole[:500])
    with pytest.raises(ExportError, match="cannot load"):
        open_file(path)
    path.with_suffix(".bin").unlink()
    with pytest.raises(ExportError, match=r"no file .*m\.bin"):
        open_file(path)
    path.with_suffix(".bin").write_bytes(whole)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ExportError, match="cannot load"):
        open_file(path)
    with pytest.raises(ExportError, match="no file"):
        open_file(tmp_path / "none.xml")


class Captioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.words, self.head = nn.Linear(8, 6), nn.Embedding(20, 6), nn.Linear(12, 3)

    def forward(self, image, words):
        seen = self.image(image)
        out = self.head(torch.cat([seen, self.words(words).mean(1)], 1))
        return {"logits": out, "more": (seen, [words.sum(1)])}


@pytest.mark.parametrize("integer", [False, True])
def test_several_inputs_by_name_give_outputs_in_their_places(tmp_path, integer):
    torch.manual_seed(0)
    model, example = (
        Captioned().eval(),
        {"words": torch.randint(0, 20, (4, 5)), "image": torch.randn(4, 8)},
    )
    made = export(
        model,
        tmp_path / "m.xml",
        "openvino",
        Job(example=example, batches=(example,) if integer else ()),
    )
    assert parity(made.program or model, made.path, example, tolerance=made.tolerance).examples == 4
    got = open_file(made.path)(words=example["words"].numpy(), image=example["image"].numpy())
    assert got["logits"].shape == (4, 3)
    assert got["more"][1][0].tolist() == example["words"].sum(1).tolist()
