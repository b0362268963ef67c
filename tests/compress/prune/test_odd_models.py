"""Strangers' models: branches that nobody reads, weights that others make, tensors kept as attributes."""

import warnings
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedpress
from fedpress.compress import check_parity, macs, parameters, plan, remove_, score, trace
from fedpress.compress.prune.plan import make_plan
from fedpress.errors import ModelError
from fedpress.nn.resize import copied


def cut(model, x, seed=0):
    """Cuts random channels and compares; returns the graph and the small network."""
    graph = trace(model, x)
    draw = torch.Generator().manual_seed(seed)
    kept = [int(torch.randint(1, layer.channels, (), generator=draw)) for layer in graph.groups]
    chosen = make_plan(
        model, graph, [torch.rand(n.channels, generator=draw) for n in graph.groups], kept
    )
    small = copied(model)
    remove_(small, chosen)
    assert parameters(small) == chosen.parameters_after
    assert check_parity(model, small, chosen, x) <= 1e-5
    assert macs(small, x[:1]) == graph.macs(kept)
    return graph, small


class Unread(nn.Module):
    """Forward runs an auxiliary head, a statistic and a loop's last gate that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux, self.deep = (
            nn.Conv1d(4, 16, 1),
            nn.Conv1d(16, 16, 1),
            nn.Conv1d(16, 8, 1),
            nn.Linear(8, 5),
        )
        self.o = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        self.deep(torch.relu(self.aux(h)).mean(2))
        spread = h.std(1, keepdim=True)
        h = torch.relu(self.b(h))
        self.aux(h / (1 + spread.mean()))
        torch.einsum("ncl,c->nl", h, self.b.bias)
        return self.o(h.mean(2))


def test_branches_that_no_output_reads_are_cut_along():
    torch.manual_seed(0)
    for seed in range(2):
        graph, small = cut(Unread().eval(), torch.randn(2, 4, 5), seed)
        assert {s.tensor for s in graph.groups[0].slices} >= {"aux.weight", "b.weight", "o.weight"}
        assert small.aux.in_channels == small.a.out_channels == small.b.out_channels


class ByBatchNorm(nn.Conv2d):
    """Weights standardised by a batch norm over the weights themselves (NF-ResNet, BiT in timm)."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(w, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(
            self.weight
        )
        return F.conv2d(x, w, self.bias, padding=self.padding)


class ByStatistics(nn.Conv2d):
    """The same by hand."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(
            x, (self.weight - mean) / torch.sqrt(var + 1e-6), self.bias, padding=self.padding
        )


class ByLayerNorm(nn.Conv2d):
    """The same by a layer norm."""

    def forward(self, x: Tensor) -> Tensor:
        w = F.layer_norm(self.weight, self.weight.shape[1:])
        return F.conv2d(x, w, self.bias, padding=self.padding)


class ByGroupNorm(nn.Conv2d):
    """The same by a group norm of one group for each channel."""

    def forward(self, x: Tensor) -> Tensor:
        w = F.group_norm(self.weight[None].flatten(2), self.out_channels).view_as(self.weight)
        return F.conv2d(x, w, self.bias, padding=self.padding)


@pytest.mark.parametrize("conv", [ByBatchNorm, ByStatistics, ByLayerNorm, ByGroupNorm])
def test_axes_that_a_standardisation_of_weights_averages_over_stay_whole(conv):
    torch.manual_seed(0)
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    model = nn.Sequential(
        conv(3, 16, 3, padding=1), nn.ReLU(), conv(16, 16, 3, padding=1), nn.ReLU(), *pool
    ).eval()
    graph, _ = cut(model, torch.randn(2, 3, 8, 8))
    assert [layer.name for layer in graph.groups] == ["2"]
    assert any(why in graph.unprunable["0"] for why in ("over channels", "an axis is reshaped"))


def test_channels_beside_those_that_a_batch_norm_counts_stay_whole():
    class Rows(nn.Module):
        """A batch norm over the tokens of a sequence takes the mean of its channels while it trains."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b, self.o = (
                nn.Linear(8, 16),
                nn.BatchNorm1d(5),
                nn.Linear(16, 12),
                nn.Linear(12, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.b(self.norm(self.a(x))).relu().mean(1))

    graph, _ = cut(Rows().eval(), torch.randn(4, 5, 8))
    assert [layer.name for layer in graph.groups] == ["b"]
    assert "a mean over channels in aten.batch_norm" in graph.unprunable["a"]


def old_norms(kind: str) -> nn.Module:
    warnings.simplefilter("ignore", FutureWarning)
    norm = {"weight": nn.utils.weight_norm, "spectral": nn.utils.spectral_norm}[kind]
    deep = norm(nn.Conv1d(24, 24, 3, groups=24))
    pool = (nn.AdaptiveAvgPool1d(1), nn.Flatten())
    first = norm(nn.Conv1d(6, 24, 3, padding=1))
    return nn.Sequential(
        first,
        nn.ReLU(),
        deep,
        nn.ReLU(),
        nn.Conv1d(24, 16, 3),
        nn.ReLU(),
        *pool,
        norm(nn.Linear(16, 4)),
    )


@pytest.mark.parametrize("kind", ["weight", "spectral"])
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a call"])
def test_the_old_norms_of_torch_are_cut_as_they_are(kind, ran):
    torch.manual_seed(0)
    model, x = old_norms(kind).eval(), torch.randn(2, 6, 20)
    if ran:
        model(x)  # leaves a computed weight as an attribute, which torch does not copy
        with pytest.raises(RuntimeError, match="deepcopy"):
            deepcopy(model)
    graph, small = cut(model, x)
    if kind == "weight":
        assert [layer.channels for layer in graph.groups] == [24, 16]
        assert small[2].groups == small[0].out_channels < 24
        assert small[2].weight.shape == small[2].weight_v.shape
    else:
        assert 16 in [layer.channels for layer in graph.groups]


def test_the_old_weight_norm_with_a_dead_channel_is_cut_by_the_command():
    torch.manual_seed(0)
    model = old_norms("weight")
    with torch.no_grad():
        model[0].weight_g[3] = 0
    result = fedpress.prune(model, keep_params=0.6, round_to=1, score="l1", input_shape=(6, 20))
    assert result.after["parity_error"] <= 1e-5


class Remembers(nn.Module):
    """Keeps what it computed: tensors with a history, alone, in lists, in dictionaries and in objects."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
        self.twice = self.a.weight * 2  # not a leaf
        self.seen: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        self.seen["last"] = [h]
        self.last = h
        return self.o(h)


def test_a_model_that_keeps_computed_tensors_is_copied_with_their_values_and_cut():
    model, x = Remembers(), torch.randn(2, 8)
    model(x)
    twin = copied(model)
    assert twin.twice is not model.twice
    assert torch.equal(twin.twice, model.twice)
    assert twin.seen["last"][0] is twin.last  # what was one tensor still is
    assert twin.last.grad_fn is None
    assert torch.equal(model(x), twin(x))
    result = fedpress.prune(model, keep_params=0.6, round_to=1, score="l1", input_shape=(8,))
    assert result.after["parity_error"] <= 1e-5


def test_what_forward_keeps_while_a_model_is_captured_does_not_stay_in_it():
    model, x = Remembers(), torch.randn(2, 8)
    model.seen["first"] = [torch.ones(1)]
    trace(model, x)
    assert not hasattr(model, "last")
    assert list(model.seen) == ["first"]
    assert torch.equal(copied(model)(x), model(x))


def test_weights_divided_by_their_own_spread_without_an_epsilon_are_compared_all_the_same():
    class Spread(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(
        Spread(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    graph, small = cut(model, x)
    assert small[0].out_channels < 16
    with torch.no_grad():
        small[0].weight[0] += torch.randn(3, 3, 3)
    kept = [small[0].out_channels]
    chosen = make_plan(
        model, graph, [torch.rand(16, generator=torch.Generator().manual_seed(7))], kept
    )
    with pytest.raises(ModelError, match="differs"):
        check_parity(model, small, chosen, x)


def test_a_split_into_a_number_and_the_rest_is_put_right():
    class Rest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            left, right = h.split([10, h.shape[1] - 10], 1)
            return self.o(torch.cat([right, left], 1))

    for seed in range(4):  # few are left of the one or the other, so that the rest comes out as -1
        cut(Rest(), torch.randn(2, 8), seed)


def test_a_frozen_part_under_no_grad_and_code_under_autocast_are_walked():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.a(x).relu()
                left, right = h.split([4, 12], 1)
            with torch.autocast("cpu", enabled=False):
                h = self.b(torch.cat([right, left], 1))
            return self.o(h.relu())

    graph, _ = cut(Frozen(), torch.randn(2, 8))
    assert sorted(layer.channels for layer in graph.groups) == [4, 12, 24]


@dataclass
class Given:
    """An output that torch knows nothing of, with a list inside, as caches of language models are."""

    logits: Tensor
    kept: list[Tensor]


def test_tensors_in_objects_that_a_model_gives_are_outputs_and_empty_beginnings_are_none():
    class Objects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.o = (
                nn.Linear(8, 16),
                nn.Linear(8, 12),
                nn.Linear(12, 10),
                nn.Linear(26, 3),
            )

        def forward(self, x: Tensor) -> Given:
            a, b = self.a(x), self.b(x)
            grown = torch.cat([torch.tensor([]), self.c(b.relu())], -1)  # a cache begins so
            return Given(self.o(torch.cat([a, grown.relu()], 1)), [a])

    model, x = Objects(), torch.randn(2, 8)
    graph, _ = cut(model, x)
    assert {layer.name for layer in graph.groups} == {"b", "c"}
    assert "it is an output of the model" in graph.unprunable["a"]


@pytest.mark.recipe
def test_what_a_branch_on_data_is_given_stays_whole():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cond(x.sum() > 0, torch.relu, torch.tanh, (self.a(x),))
            return self.o(self.b(h).relu())

    graph, _ = cut(Branch(), torch.randn(2, 8))
    assert [layer.name for layer in graph.groups] == ["b"]
    assert "channels are not followed through it in cond" in graph.unprunable["a"]


def test_scores_plans_and_targets_work_for_a_network_with_an_operation_without_a_rule():
    class Renormed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.b(torch.renorm(self.a(x), 2.0, 0, 1.0)).relu())

    model, x = Renormed().eval(), torch.randn(2, 8)
    graph = trace(model, x)
    chosen = plan(
        model, graph, score(model, graph, "l1"), keep_params=0.7, round_to=1, tolerance=0.05
    )
    assert "in aten.renorm" in chosen.unprunable["a"]
    small = copied(model)
    remove_(small, chosen)
    assert small.a.out_features == 16
    assert small.b.out_features < 24
    assert check_parity(model, small, chosen, x) <= 1e-5


def test_hooks_that_the_first_forward_registers_are_not_left_behind_by_a_trace():
    class Collecting(nn.Module):
        """Keeps what its layers give by hooks that its first forward registers, as language-model libraries do."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(28, 3)

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "seen"):
                self.seen = []
                for layer in (self.a, self.b):
                    layer.register_forward_hook(
                        lambda module, given, output: self.seen.append(output)
                    )
            self.seen.clear()
            self.b(self.a(x).relu())
            return self.o(torch.cat(self.seen, -1).relu())

    torch.manual_seed(0)
    model, x = Collecting(), torch.randn(2, 8)
    graph, _ = cut(model, x)
    assert [layer.name for layer in graph.groups] == ["a", "b"]
    assert not hasattr(model, "seen")
    assert not model.a._forward_hooks
    assert model(x).shape == (2, 3)  # hooks that are there twice would give twice as many values
