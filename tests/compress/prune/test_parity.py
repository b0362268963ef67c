"""The comparison of a cut network with the masked one sees other batch sizes, training, and the data's own values."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress.compress import check_parity, remove_, trace
from fedpress.compress.prune.parity import trial_batches
from fedpress.compress.prune.plan import make_plan
from fedpress.errors import ModelError


def halved(model, x):
    """Returns the model, its copy without the first half of each layer's channels, and the plan."""
    graph = trace(model, x)
    scores = [torch.arange(float(layer.channels)) for layer in graph.groups]
    plan = make_plan(model, graph, scores, [(layer.channels + 1) // 2 for layer in graph.groups])
    small = deepcopy(model)
    remove_(small, plan)
    return model, small, plan


class Sized(nn.Module):
    """Its cut copy can be made wrong for one batch size, or while training, by a number that no call shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.wrong = nn.Linear(8, 16), nn.Linear(16, 3), ""
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.a(x)))
        bad = (self.wrong == "batch" and len(x) != 2) or (
            self.wrong == "training" and self.training
        )
        return self.o(h * (2.0 if bad else 1.0))


@pytest.mark.parametrize(
    ("wrong", "when"), [("batch", "on a batch of another size"), ("training", "in training mode")]
)
def test_a_network_that_is_wrong_only_at_times_is_found(wrong, when):
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    model, small, plan = halved(Sized(), x)
    assert check_parity(model, small, plan, x) <= 1e-5
    small.wrong = wrong
    with pytest.raises(
        ModelError, match=f"differs from the masked one by .* {when}.*keep that module as it is"
    ):
        check_parity(model, small, plan, x)


class Auxiliary(nn.Module):
    """A head that runs in training alone: no trace in evaluation mode shows that it reads the channels of `a`."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.o, self.more = (
            nn.Linear(8, 16),
            nn.Linear(16, 12),
            nn.Linear(12, 3),
            nn.Linear(16, 3),
        )
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        y = self.o(self.b(h).relu())
        return y + self.more(h) if self.training and not self.late else y


def test_a_network_that_cannot_run_while_it_trains_is_found():
    x = torch.randn(2, 8)
    model, small, plan = halved(Auxiliary(late=True), x)
    model.late = small.late = False
    with pytest.raises(ModelError, match=r"does not run in training mode.*`ignore`"):
        check_parity(model, small, plan, x)


def test_channels_that_a_head_reads_in_training_alone_stay_whole_and_the_others_go():
    x = torch.randn(2, 8)
    model, small, plan = halved(Auxiliary(), x)
    assert [(layer.name, layer.after) for layer in plan.layers] == [("b", 6)]
    assert "does not run in training mode" in plan.unprunable["a"]
    assert check_parity(model, small, plan, x) <= 1e-5


def test_channels_whose_number_scales_the_values_stay_whole_and_the_others_go():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            return self.o(self.b(h * (h.shape[1] // 4) ** -0.5).relu())

    torch.manual_seed(0)
    x = torch.randn(2, 8)
    model, small, plan = halved(Scaled(), x)
    assert [layer.name for layer in plan.layers] == ["b"]
    assert "differs from the masked one" in plan.unprunable["a"]
    assert check_parity(model, small, plan, x) <= 1e-5


class RandomSource(nn.Module):
    """Everything that is drawn at random while training: dropout of values and channels, noise, stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.o = (
            nn.Conv1d(8, 16, 1),
            nn.Conv1d(16, 16, 1),
            nn.Conv1d(16, 24, 1),
            nn.Linear(24, 3),
        )
        self.heads = nn.MultiheadAttention(24, 4, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout1d(F.selu(self.a(x)), 0.4, self.training)
        if self.training:
            x = x + torch.randn_like(x) * 0.1
            kept = (0.8 + torch.rand(len(x), 1, 1)).floor()
            x = x + self.b(F.alpha_dropout(x, 0.2, True)) * kept / 0.8
            x = x * x.new_empty(x.shape).bernoulli_(0.7)
        else:
            x = x + self.b(x)
        x = F.dropout(self.c(x), 0.3, self.training).mT
        x = x + self.heads(x, x, x, need_weights=False)[0]
        return self.o(x.mean(1))


def test_chance_of_training_is_no_difference_and_leaves_the_generator_alone():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5)
    model, small, plan = halved(RandomSource(), x)
    before = torch.get_rng_state()
    assert check_parity(model, small, plan, x) <= 1e-5
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        small.b.weight.add_(0.1)
    with pytest.raises(ModelError, match="differs"):
        check_parity(model, small, plan, x)


class Table(nn.Module):
    """Words, a number that says which side, and columns of categories that come as floats."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.side, self.kind = (
            nn.Embedding(50, 24),
            nn.Embedding(2, 24),
            nn.Embedding(3, 8),
        )
        self.o = nn.Linear(32, 3)

    def forward(self, words: Tensor, side: Tensor, row: Tensor) -> Tensor:
        x = (self.words(words) + self.side(side)).mean(1)
        return self.o(torch.cat([x, self.kind(row[:, 0].long()) * row[:, 1:]], 1))


def test_words_are_drawn_below_the_size_of_their_own_table():
    example = (
        torch.zeros(4, 9, dtype=torch.long),
        torch.zeros(4, 9, dtype=torch.long),
        torch.tensor([[0.0, 3], [1, 5], [2, 4], [2, 1]]),
    )
    few, more = trial_batches(Table(), example)
    assert [len(x) for x in few] == [4, 4, 4]
    assert [len(x) for x in more] == [5, 5, 5]
    words, side, row = more
    assert 30 < int(words.max()) < 50
    assert set(side.flatten().tolist()) == {0, 1}
    assert set(row[:, 0].tolist()) <= {0.0, 1.0, 2.0}
    assert {x.dtype for x in (words, side)} == {torch.int64}


def test_words_that_come_as_floats_are_words():
    class Floats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.a, self.o = nn.Embedding(50, 16), nn.Linear(16, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.a(self.words(x.long()).mean(1)).relu())

    x = torch.zeros(2, 12)
    (few,), (more,) = trial_batches(Floats(), (x,))
    assert few.dtype == torch.float32
    assert torch.equal(more, more.round())
    assert 30 < float(more.max()) < 50
    assert torch.equal(few, more[:2])
    assert check_parity(*halved(Floats(), x), x) <= 1e-5


def test_images_of_zeros_and_ones_stand_for_noise_and_a_fixed_batch_is_no_fault():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.a(x).view(2, 16).relu())

    ((few,), _) = trial_batches(Fixed(), (torch.zeros(2, 8),))
    assert few.unique().numel() == 16
    x = torch.zeros(2, 8)
    assert check_parity(*halved(Fixed(), x), x) <= 1e-5
