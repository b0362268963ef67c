from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn
from zoo import Plain, Residual, make

from fedpress.compress import check_parity, macs, parameters, plan, remove_, score, trace
from fedpress.compress.prune.plan import allowed_widths, make_plan
from fedpress.compress.prune.rules import RULES
from fedpress.errors import ModelError


class Head(nn.Module):
    """A convolution, then whatever a test wants to see refused or kept whole, then a linear layer."""

    def __init__(self, between, width=16):
        super().__init__()
        self.a, self.head, self.between = nn.Conv2d(3, 16, 3), nn.Linear(width, 5), between

    def forward(self, x):
        return self.head(self.between(self.a(x)).mean((2, 3)))


def graph_of(between, width=16):
    return trace(Head(between, width), torch.randn(2, 3, 8, 8))


def by_name(graph, name):
    return next(layer for layer in graph.groups if layer.name == name)


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("residual", "stem"),
        ("residual", "blocks.1.b"),
        ("dense", "a"),
        ("dense", "b"),
        ("plain", "a"),
        ("separable", "p"),
    ],
)
def test_coupled_channels_are_those_of_torch_pruning(traced, name, root):
    model, x, graph = traced(name)
    layer, gone = by_name(graph, root), [1, 4, 5]
    theirs = deepcopy(model).eval()
    dependencies = tp.DependencyGraph().build_dependency(theirs, x)
    dependencies.get_pruning_group(
        theirs.get_submodule(root), tp.prune_conv_out_channels, idxs=gone
    ).prune()
    scores = [
        torch.zeros(each.channels).index_fill_(0, torch.tensor(gone), -1) for each in graph.groups
    ]
    kept = [each.channels - (len(gone) if each is layer else 0) for each in graph.groups]
    ours = deepcopy(model).eval()
    remove_(ours, make_plan(model, graph, scores, kept))
    assert {n: t.shape for n, t in ours.state_dict().items()} == {
        n: t.shape for n, t in theirs.state_dict().items()
    }
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_residual_stream_is_one_layer():
    model, x = make("residual")
    stream = by_name(trace(model, x), "stem")
    assert {s.tensor for s in stream.slices_with_role("write")} == {
        "stem.weight",
        "blocks.0.b.weight",
    }
    assert {s.tensor for s in stream.slices_with_role("read")} == {
        "blocks.0.a.weight",
        "blocks.1.a.weight",
        "blocks.1.project.0.weight",
    }


def test_zero_padded_channels_go_too_with_other_numbers_in_the_code():
    model, x = make("padded")
    graph = trace(model, x)
    before, after = by_name(graph, "blocks.1.b"), by_name(graph, "blocks.1.b#2")
    rows = [
        next(s.index for s in layer.slices if s.tensor == "blocks.1.b.weight")
        for layer in (before, after)
    ]
    assert [index.flatten().tolist() for index in rows] == [list(range(8)), list(range(24, 32))]
    assert [(n.site.module, n.traced_value) for n in graph.sized_numbers] == [
        ("blocks.1", 8),
        ("blocks.1", 8),
    ]


def test_flattening_repeats_the_channel_over_the_image(traced):
    _, _, graph = traced("flat")
    index = next(s for s in by_name(graph, "a").slices if s.tensor == "b.weight").index
    assert index.tolist() == [list(range(36 * c, 36 * c + 36)) for c in range(16)]


def test_a_group_norm_loses_whole_groups(traced):
    model, _, graph = traced("gated")
    layer = by_name(graph, "c")
    assert (layer.channels, layer.unit) == (8, 4)
    small = deepcopy(model)
    remove_(
        small,
        make_plan(model, graph, [torch.arange(each.channels) for each in graph.groups], [3] * 4),
    )
    assert (small.norm.num_groups, small.norm.num_channels) == (3, 12)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.GroupNorm(1, 16), None),
        (nn.LayerNorm([16, 6, 6]), "a mean over channels"),
        (lambda x: x[:, :16:1] + x.mean(1, keepdim=True), "a statistic over channels"),
        (lambda x: torch.softmax(x, 1), "mixed across channels"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 2, -2)), "cut or repeated"),
        (lambda x: torch.cat(x.split(5, 1), 1), "unequal parts"),
        (lambda x: x[:, torch.arange(15, -1, -1)], "taken by index"),
        (
            lambda x: torch.matmul(x.flatten(2).mT, x.flatten(2))[:, :16, :, None],
            "product of activations",
        ),
        (lambda x: x.flatten(1).view(-1, 1, 16, 36).transpose(1, 2), None),
    ],
)
def test_what_cannot_be_removed_exactly_stays_whole_with_a_reason(between, reason):
    graph = graph_of(between)
    if reason is None:
        assert all(layer.channels == 1 or layer.name == "a" for layer in graph.groups)
    else:
        assert not graph.groups
        assert reason in graph.unprunable["a"]


def test_unequal_chunks_stay_whole():
    graph = graph_of(lambda x: torch.cat(x.chunk(3, 1), 1))
    assert "unequal parts" in graph.unprunable["a"]


def test_weight_standardised_convolutions_keep_their_inputs():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
            return F.conv2d(x, (self.weight - mean) / (var + 1e-5).sqrt(), self.bias)

    model = nn.Sequential(Standardised(3, 16, 3), nn.ReLU(), Standardised(16, 16, 3), nn.Flatten(2))
    model.append(nn.AdaptiveAvgPool1d(1)).append(nn.Flatten()).append(nn.Linear(16, 5))
    x = torch.randn(2, 3, 8, 8)
    graph = trace(model, x)
    assert "statistic over channels in aten.var_mean" in graph.unprunable["0"]
    (last,) = graph.groups
    plan = make_plan(model, graph, [torch.rand(16)], [5])
    small = deepcopy(model)
    remove_(small, plan)
    assert last.name == "2"
    assert check_parity(model, small, plan, x) <= 1e-5


@torch.library.custom_op("fedpress_tests::limit", mutates_args=())
def limit(x: torch.Tensor) -> torch.Tensor:
    """Scales each example to a norm of at most 1: an operation of a stranger's library, which nobody has a rule for."""
    return torch.renorm(x, 2.0, 0, 1.0)


@limit.register_fake
def limit_shape(x):
    return torch.empty_like(x)


class Limit(nn.Module):
    def forward(self, x):
        return limit(x)


def test_an_operation_without_a_rule_keeps_what_reaches_it_whole_and_is_listed_with_its_module():
    graph = graph_of(Limit())
    assert not graph.groups
    assert "no rule for it in fedpress_tests.limit" in graph.unprunable["a"]
    assert (
        "no rule for it: fedpress_tests.limit.default of 'between'" in graph.unprunable["between"]
    )
    with pytest.raises(
        ModelError, match=r"no channel.*can be removed.*no rule.*fedpress_tests\.limit"
    ):
        plan(Head(Limit()), graph, [])


def test_an_operation_without_a_rule_leaves_what_does_not_reach_it_free():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head, self.limit = (
                nn.Linear(8, 16),
                nn.Linear(8, 12),
                nn.Linear(16, 5),
                Limit(),
            )
            self.last = nn.Linear(12, 5)

        def forward(self, x):
            places = torch.arange(x.shape[0])
            steps = torch.diff(places, prepend=places[:1] - 1).cumsum(0)  # of no channel
            return self.head(self.a(x).relu()) + self.last(self.limit(self.b(x))) + steps[:, None]

    model, x = Beside(), torch.randn(3, 8)
    graph = trace(model, x)
    assert [layer.name for layer in graph.groups] == ["a"]
    assert set(graph.unprunable) == {"b", "limit", "head", "last"}
    cut = make_plan(model, graph, [torch.rand(16)], [7])
    small = deepcopy(model)
    remove_(small, cut)
    assert check_parity(model, small, cut, x) <= 1e-5
    assert "limit" in cut.unprunable


def test_a_rule_that_fails_on_its_arguments_keeps_what_it_touches_whole(monkeypatch):
    monkeypatch.setitem(
        RULES, torch.ops.aten.glu.default, lambda ids, shape, x: x.axes
    )  # knows no dim
    graph = graph_of(lambda x: F.glu(x, 1), width=8)
    assert not graph.groups
    assert "its rule does not cover this use" in graph.unprunable["a"]


def test_a_model_that_branches_on_data_is_refused_with_the_name_of_the_module():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(
        ModelError, match=r"cannot be captured.*in the forward of 'between'; remove data-dependent"
    ):
        graph_of(Branch())
    with pytest.raises(ModelError, match="in the forward of 'between'"):
        graph_of(nn.Linear(5, 5))


def test_a_plan_that_empties_a_layer_is_refused():
    model, x = make("plain")
    graph = trace(model, x)
    for kept in ([16, 0], [16, 25], [-1, 3]):
        with pytest.raises(
            ModelError, match=r"the plan keeps (0|25|-1) of the (16|24) channels of '[ab]'"
        ):
            make_plan(model, graph, [torch.rand(16), torch.rand(24)], kept)


def test_numbers_that_follow_by_themselves_are_left_to_the_code():
    assert not trace(*make("halves")).sized_numbers
    assert {(n.site.module, n.traced_value) for n in trace(*make("vit-fused")).sized_numbers} == {
        (f"blocks.{i}.1", was) for i in range(2) for was in (4, 24)
    }


def test_heads_go_whole_and_the_normalised_stream_stays():
    graph = trace(*make("vit-torch"))
    heads = by_name(graph, "blocks.0.1.inner")
    assert (heads.channels, heads.unit) == (4, 6)
    rows = next(s.index for s in heads.slices if s.tensor.endswith("in_proj_weight"))
    assert rows[1].tolist() == [24 * part + 6 + i for part in range(3) for i in range(6)]
    assert "a mean over channels in aten.layer_norm" in graph.unprunable["patch"]


def test_a_hidden_unit_is_the_same_place_in_all_gates_layers_and_directions():
    (_, units) = trace(*make("lstm-deep")).groups
    index = {s.tensor: s.index[3].tolist() for s in units.slices if s.axis == 0}
    assert len(index) == 16
    assert all(rows == [3, 19, 35, 51] for rows in index.values())


def test_multiply_adds_of_any_widths_are_those_of_the_network():
    model, x = make("unet")
    graph = trace(model, x)
    whole = [layer.channels for layer in graph.groups]
    assert graph.macs(whole) == macs(model, x[:1])
    assert graph.macs([1] * len(whole)) < graph.macs([2] * len(whole)) < graph.macs(whole)


def test_a_module_can_be_kept_whole_by_name_and_its_stream_with_it():
    model, x = make("residual")
    graph = trace(model, x, unprunable=("blocks.0.b",))
    assert "stem" not in {layer.name for layer in graph.groups}
    assert "asked for" in graph.unprunable["stem"]
    with pytest.raises(ModelError, match="no module 'blok'"):
        trace(model, x, unprunable=("blok",))


def test_a_parameter_without_use_is_reported():
    model = Plain()
    model.spare = nn.Parameter(torch.zeros(7))
    graph = trace(model, torch.randn(2, 3, 8, 8))
    assert graph.unprunable["spare"] == "forward does not use it"
    assert graph.parameters([layer.channels for layer in graph.groups]) == parameters(model)


def test_tracing_leaves_modes_and_numbers_alone():
    model = Residual("project").train()
    model.norm.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trace(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_channels_that_an_unsaved_buffer_follows_stay_whole():
    class Scaled(nn.Module):
        def __init__(self, persistent):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)
            self.register_buffer("scale", torch.arange(16.0), persistent=persistent)

        def forward(self, x):
            return self.head(self.b(self.a(x).relu() * self.scale).relu())

    free, bound = (trace(Scaled(persistent), torch.randn(2, 8)) for persistent in (True, False))
    assert [layer.name for layer in free.groups] == ["a", "b"]
    assert [layer.name for layer in bound.groups] == ["b"]
    assert "buffer 'scale'" in bound.unprunable["a"]


def test_products_that_no_input_has_a_part_in_are_counted_once_whatever_the_batch():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(3, 16), nn.Linear(16, 5)
            self.register_buffer("places", torch.randn(7, 3))

        def forward(self, x):
            drawn = self.b(torch.arange(6.0).view(2, 3)).mean(0)
            return self.head(self.a(x).relu() + self.b(self.places).mean(0) + drawn)

    model = Biased().eval()
    for batch in (1, 2, 5):
        graph = trace(model, torch.randn(batch, 8))
        assert graph.macs([layer.channels for layer in graph.groups]) == macs(
            model, torch.randn(1, 8)
        )


class Times(nn.Module):
    """A parametrization that multiplies a weight by something, on either side."""

    def __init__(self, factor, trained, first):
        super().__init__()
        if trained:
            self.factor = nn.Parameter(factor)
        else:
            self.register_buffer("factor", factor)
        self.first = first

    def forward(self, weight):
        return self.factor * weight if self.first else weight * self.factor


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("shape", "trained"), [((16, 1, 1, 1), True), ((16, 3, 3, 3), False)])
def test_a_weight_that_is_multiplied_is_what_writes_the_channels(first, shape, trained):
    torch.manual_seed(0)
    model = Head(nn.ReLU())
    nn.utils.parametrize.register_parametrization(
        model.a, "weight", Times(torch.ones(shape), trained, first)
    )
    graph = trace(model, torch.randn(2, 3, 8, 8))
    (found,) = score(model, graph, "l1")
    wanted = model.a.weight.abs().sum((1, 2, 3))
    torch.testing.assert_close(found / found.mean(), (wanted / wanted.mean()).detach())


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_widths_of_recurrent_layers_become_multiples_too(cell):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = cell(5, 48, batch_first=True), nn.Linear(48, 3)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    graph = trace(Recurrent(), torch.randn(2, 4, 5))
    assert allowed_widths(by_name(graph, "cell"), 8, 0.0) == [8, 16, 24, 32, 40, 48]
