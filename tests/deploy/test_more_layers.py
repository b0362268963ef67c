"""What is on a grid beside convolutions and linear layers: the file computes what the network on the grid does."""

import copy

import onnx
import pytest
import torch
from torch import nn

from fedpress import deploy
from fedpress.compress.quantize import quantizable, quantize_
from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization


class Last(nn.Module):
    """A recurrent layer, and a linear one on its last output."""

    def __init__(self, memory):
        super().__init__()
        self.memory, self.head = memory, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.memory(x)[0][:, -1])


class Steps(nn.Module):
    """A cell, called step by step."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(8, 3)

    def forward(self, x):
        state = None
        for at in range(x.shape[1]):
            state = self.cell(x[:, at], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(64, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.words((x * 10).long().clamp(0, 63)).mean(1))


class Same(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


def ups(groups):
    up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=groups)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), up, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )


NETS = {
    "up": (lambda: ups(1), (3, 6, 6)),
    "up in groups": (lambda: ups(2), (3, 6, 6)),
    "padded": (
        lambda: nn.Sequential(Same(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)),
        (3, 5, 5),
    ),
    "lstm": (lambda: Last(nn.LSTM(5, 8, batch_first=True)), (4, 5)),
    "gru": (lambda: Last(nn.GRU(5, 4, batch_first=True, bidirectional=True)), (4, 5)),
    "lstm cell": (lambda: Steps(nn.LSTMCell(5, 8)), (4, 5)),
    "attention": (Attends, (4, 8)),
    "words": (Words, (6,)),
}
GRIDS = {
    "int8": QuantizationScheme(weights=WeightQuantization()),
    "ternary": QuantizationScheme(weights=WeightQuantization(kind="ternary")),
    "one bit": QuantizationScheme(
        weights=WeightQuantization(kind="binary"), inputs=InputQuantization(bits=1)
    ),
}


def pairs():
    """Returns every network with every grid; all in bytes and some of the others for the unit tests."""
    quick = {(net, "int8") for net in NETS if net not in ("gru", "lstm cell")}
    quick |= {("up in groups", "ternary"), ("padded", "one bit"), ("words", "ternary")}
    for pair in ((net, grid) for net in NETS for grid in GRIDS):
        yield pytest.param(*pair, marks=() if pair in quick else pytest.mark.recipe)


@pytest.mark.recipe
@pytest.mark.parametrize(("net", "grid"), list(pairs()))
def test_the_file_computes_what_the_network_on_its_grid_does(net, grid, tmp_path):
    torch.manual_seed(0)
    grids = GRIDS[grid]
    make, shape = NETS[net]
    model, x = make().eval(), torch.randn(32, *shape)
    table, left = quantizable(model, grids)
    assert not left
    quantize_(model, table, [x])
    with torch.no_grad():
        wanted = model(x)
    job = deploy.Job(input_shape=shape)
    artifact = deploy.export(copy.deepcopy(model), tmp_path / "m.onnx", "onnx", job)
    got = torch.as_tensor(deploy.open_file(artifact.path, threads=1)(x.numpy()))
    off = (got - wanted).abs().amax(1) > 1e-4 * float(wanted.abs().max())
    # A value within the last bit of its middle may fall to the other side in another program.
    assert int(off.sum()) <= (grids.weights.kind == "binary")
    if grid == "int8" and net in ("up", "lstm", "attention", "words"):
        assert whole_numbers(artifact.path) == sum(
            p.numel() for p in model.parameters() if p.dim() > 1
        )


def whole_numbers(path):
    """Returns how many numbers lie in a file as bytes with a sign."""
    held = onnx.load(str(path)).graph.initializer
    return sum(
        onnx.numpy_helper.to_array(t).size for t in held if t.data_type == onnx.TensorProto.INT8
    )


UNLIKE = {
    "int8": WeightQuantization(),
    "groups": WeightQuantization(bits=4, group=8),
    "codebook": WeightQuantization(kind="codebook", bits=3),
    "float": None,
}


@pytest.mark.recipe
@pytest.mark.parametrize("weights", UNLIKE.values(), ids=UNLIKE)
def test_a_file_with_rounded_inputs_holds_the_weights_of_the_network(weights, tmp_path):
    """Channels of unlike sizes: onnxruntime would round float weights behind rounded inputs to one scale."""
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(4, 4, 2, stride=2)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), up, nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.ReLU()
    )
    model.append(nn.Linear(6, 3)).eval()
    with torch.no_grad():
        for rows in (model[0].weight, up.weight.transpose(0, 1), model[5].weight):
            rows[0] *= 50
    x = torch.randn(32, 3, 5, 5)
    table, _ = quantizable(model, QuantizationScheme(weights=weights, inputs=InputQuantization()))
    quantize_(model, table, [x])
    with torch.no_grad():
        wanted = model(x)
    deploy.export(model, tmp_path / "m.onnx", "onnx", deploy.Job(input_shape=(3, 5, 5)))
    got = deploy.file_logits(tmp_path / "m.onnx", x)
    assert float((got - wanted).norm() / wanted.norm()) < 5e-3


@pytest.mark.recipe
def test_inputs_rounded_by_each_batch_are_exported(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(16, 6)
    grids = QuantizationScheme(
        weights=WeightQuantization(bits=4), inputs=InputQuantization(dynamic=True)
    )
    quantize_(model, quantizable(model, grids)[0], [x])
    with torch.no_grad():
        wanted = model(x)
    deploy.export(model, tmp_path / "m.onnx", "onnx", deploy.Job(input_shape=(6,)))
    got = torch.as_tensor(deploy.open_file(tmp_path / "m.onnx")(x.numpy()))
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
