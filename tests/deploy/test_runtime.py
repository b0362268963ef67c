"""onnxruntime against torch on the same examples, and the measurements of a file."""

import pytest
import torch
from torch import Tensor, nn

from fedpress.core.examples import Arrays, Preprocess
from fedpress.deploy import Job, export_onnx, latency, metrics, parity
from fedpress.errors import ExportError
from fedpress.tasks import Classification

SHAPE = (1, 6, 6)
PREPROCESS = Preprocess((0.5,), (0.25,))


def small_net(width: int = 11) -> nn.Module:
    """Returns a net with used batch statistics, so that folding them wrongly shows."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 4),
    )
    net(torch.randn(64, *SHAPE) * 3 + 1)
    return net.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, path = small_net(), tmp_path_factory.mktemp("deploy") / "model.onnx"
    export_onnx(model, path, Job(SHAPE, PREPROCESS))
    return model, path


@pytest.mark.parametrize("n", [1, 7, 300])
def test_the_file_agrees_with_torch_for_every_batch_size(exported, n):
    model, path = exported
    found = parity(model, path, torch.randn(n, *SHAPE))
    assert found.max_abs_error < 1e-5
    assert found.same_argmax_share == 1.0
    assert found.examples == n


def test_parity_leaves_the_mode_of_every_module_alone(exported):
    model, path = exported
    model.train()
    parity(model, path, torch.randn(3, *SHAPE))
    assert all(module.training for module in model.modules())
    model.eval()


def test_another_model_is_not_the_same(exported):
    _, path = exported
    other = small_net()
    with torch.no_grad():
        other[-1].bias[2] += 0.01
    with pytest.raises(ExportError, match=r"differs from the model by 0\.01"):
        parity(other, path, torch.randn(8, *SHAPE))
    with pytest.raises(ExportError, match=r"shape \[8, 4\] but the model's \[8, 2\]"):
        parity(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), path, torch.randn(8, *SHAPE))


def test_examples_without_finite_logits_are_left_out_of_parity(exported):
    model, path = exported
    x = torch.randn(6, *SHAPE)
    x[1], x[4] = torch.nan, torch.inf
    assert parity(model, path, x).examples == 4
    assert parity(model, path, torch.zeros(2, *SHAPE)).examples == 2
    with pytest.raises(ExportError, match="finite logits on none of 3"):
        parity(model, path, torch.full((3, *SHAPE), torch.nan))


def test_large_logits_are_compared_relative_to_their_scale(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with torch.no_grad():
        model[1].weight.mul_(1e5)
    export_onnx(model, tmp_path / "m.onnx", Job(SHAPE, PREPROCESS))
    assert parity(model, tmp_path / "m.onnx", torch.randn(50, *SHAPE)).same_argmax_share == 1.0


def test_the_metrics_of_a_file_are_those_of_torch(exported):
    model, path = exported
    x = torch.randint(0, 256, (517, *SHAPE), dtype=torch.uint8)
    y = torch.randint(0, 4, (517,))
    task = Classification(tuple("abcd"))
    with torch.no_grad():
        expected = (model(PREPROCESS(x)).argmax(1) == y).float().mean().item()
    assert metrics(path, Arrays(x, y), PREPROCESS, task)["accuracy"] == pytest.approx(expected)
    with pytest.raises(ExportError, match="at least one"):
        metrics(path, Arrays(x[:0], y[:0]), PREPROCESS, task)


@pytest.mark.recipe
def test_latency_is_an_ordered_spread_that_grows_with_the_work(exported, tmp_path):
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.expand(-1, 64, -1, -1).flatten(2)
            for _ in range(60):
                x = torch.softmax(x, -1)
            return x.mean(-1)

    export_onnx(Slow(), tmp_path / "slow.onnx", Job(SHAPE, PREPROCESS))
    quick, slow = (
        latency(exported[1], SHAPE, seconds=0.2),
        latency(tmp_path / "slow.onnx", SHAPE, seconds=0.2),
    )
    assert 0 < quick.p10_ms <= quick.median_ms <= quick.p90_ms
    assert quick.runs >= 10
    assert slow.median_ms > 2 * quick.median_ms


def test_a_file_that_is_missing_corrupt_or_wrongly_fed_is_a_clear_error(exported, tmp_path, capfd):
    model, path = exported
    (tmp_path / "corrupt.onnx").write_bytes(path.read_bytes()[:100])
    for bad in (tmp_path / "none.onnx", tmp_path / "corrupt.onnx"):
        with pytest.raises(ExportError, match=r"cannot load|there is no file"):
            parity(model, bad, torch.randn(2, *SHAPE))
    with pytest.raises(
        ExportError, match=r"cannot run .* on \[1, 3, 6, 6\].*takes \['batch', 1, 6, 6\]"
    ):
        latency(path, (3, 6, 6))
    assert capfd.readouterr() == ("", "")
