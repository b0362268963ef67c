"""Where torch-pruning 1.6 fails or is silently wrong, and the same cut here is exact."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from fedpress.compress import check_parity, parameters, remove_, trace
from fedpress.compress.prune.plan import make_plan


class Chunks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = (
            nn.Conv2d(3, 16, 3),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Linear(8, 5),
        )

    def forward(self, x):
        one, two = F.relu(self.a(x)).chunk(2, 1)
        return self.head((self.b(one) + self.c(two)).mean((2, 3)))


class Parts(Chunks):
    def __init__(self):
        super().__init__()
        self.b, self.c = nn.Conv2d(4, 8, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x):
        one, two = F.relu(self.a(x)).split([4, 12], 1)
        return self.head((self.b(one) + self.c(two)).mean((2, 3)))


class Shuffled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.b(x).mean((2, 3)))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.attend, self.head = (
            nn.Conv1d(3, 16, 3),
            nn.MultiheadAttention(16, 4, batch_first=True),
            nn.Linear(16, 5),
        )

    def forward(self, x):
        x = F.relu(self.a(x)).transpose(1, 2)
        return self.head(self.attend(x, x, x)[0].mean(1))


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.LSTM(3, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.a(x.transpose(1, 2))[0][:, -1])


IMAGE, SERIES = (2, 3, 8, 8), (2, 3, 10)


def theirs(model, x, seed):
    """Removes four channels of `a` with torch-pruning; returns "right", "wrong" or "fails"."""
    small, masked = deepcopy(model), deepcopy(model)
    gone = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:4]
    rows = torch.cat([gone + 16 * i for i in range(4)]) if isinstance(model.a, nn.LSTM) else gone
    for parameter in masked.a.parameters():
        parameter.data[rows] = 0
    cut = (
        tp.pruner.function.prune_lstm_out_channels
        if isinstance(model.a, nn.LSTM)
        else tp.prune_conv_out_channels
    )
    try:
        graph = tp.DependencyGraph().build_dependency(small, example_inputs=x)
        graph.get_pruning_group(small.a, cut, idxs=gone.tolist()).prune()
        return "right" if torch.allclose(small(x), masked(x), atol=1e-5) else "wrong"
    except Exception:  # whatever it meets
        return "fails"


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("build", "shape", "most_right", "verdict"),
    [
        (Chunks, IMAGE, 3, "wrong"),
        (Parts, IMAGE, 0, "fails"),
        (Shuffled, IMAGE, 0, "wrong"),
        (Attending, SERIES, 0, "wrong"),
        (Remembering, SERIES, 0, "fails"),
    ],
)
def test_torch_pruning_is_wrong_in_most_cuts_and_ours_are_all_exact(
    build, shape, most_right, verdict
):
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    seeds = range(10)
    verdicts = [theirs(model, x, seed) for seed in seeds]
    assert verdicts.count("right") <= most_right
    assert verdict in verdicts
    graph = trace(model, x)
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        scores = [torch.rand(layer.channels, generator=draw) for layer in graph.groups]
        choice = make_plan(
            model, graph, scores, [max(1, layer.channels * 5 // 8) for layer in graph.groups]
        )
        small = deepcopy(model)
        remove_(small, choice)
        assert parameters(small) < 0.9 * parameters(model)
        assert check_parity(model, small, choice, x) <= 1e-5
