"""Operations between two layers: what a rule or ATen's decomposition knows is cut exactly, and mixing stays whole."""

from copy import deepcopy

import pytest
import torch
from operations import INPUTS, TABLE, Branches
from torch import nn

from fedpress.compress import check_parity, mask_, parameters, remove_, trace
from fedpress.compress.prune.plan import make_plan
from fedpress.compress.prune.rules import RULES, decompose_operation
from fedpress.models import ModelSpec, load_model, save_model, what_pruning_changed


def build():
    torch.manual_seed(0)
    return Branches(list(TABLE))


@pytest.fixture(scope="module")
def everything():
    model = build().eval()
    draw = torch.Generator().manual_seed(0)
    x = tuple(torch.randn(shape, generator=draw) for shape in INPUTS.values())
    return model, x, trace(model, x)


def random_cut(model, graph, seed):
    draw = torch.Generator().manual_seed(seed)
    kept = [int(torch.randint(1, layer.channels + 1, (), generator=draw)) for layer in graph.groups]
    scores = [torch.rand(layer.channels, generator=draw) for layer in graph.groups]
    return make_plan(model, graph, scores, kept), kept


@pytest.mark.parametrize("name", TABLE)
def test_channels_before_an_operation_go_or_stay_as_they_must(everything, name):
    _, _, graph = everything
    touched = {s.tensor for layer in graph.groups for s in layer.slices}
    cut = f"parts.{name}.a.weight" in touched or f"parts.{name}.b.weight" in touched
    assert cut == (TABLE[name][3] == "cut"), graph.unprunable.get(f"parts.{name}.a")


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.recipe)])
def test_any_choice_of_channels_is_exact_through_every_operation(everything, seed):
    model, x, graph = everything
    cut, kept = random_cut(model, graph, seed)
    masked, small = deepcopy(model), deepcopy(model)
    mask_(masked, cut)
    remove_(small, cut)
    with torch.no_grad():
        for name, a, b in zip(TABLE, masked(*x), small(*x), strict=True):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max().clamp_min(1e-2), name
    assert check_parity(model, small, cut, x) <= 1e-4  # an inverse enlarges what rounding leaves
    assert parameters(small) == cut.parameters_after == graph.parameters(kept)
    sum(y.square().sum() for y in small.train()(*x)).backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape, name


def test_a_cut_through_every_operation_comes_back_from_a_file(everything, tmp_path):
    model, x, graph = everything
    cut, _ = random_cut(model, graph, 2)
    small = deepcopy(model)
    remove_(small, cut)
    base = ModelSpec(architecture=f"{__name__}:build", arguments={}, input_shape=(6,))
    save_model(tmp_path, base.model_copy(update=what_pruning_changed(small, build())), small)
    again = load_model(tmp_path, allow_code=[f"{__name__}:build"])[1].eval()
    with torch.no_grad():
        for a, b in zip(small.eval()(*x), again(*x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "norm",
    [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm],
    ids=["parametrized", "old"],
)
def test_spectral_norm_loses_channels_with_its_vectors(norm):
    torch.manual_seed(0)
    layers = [
        norm(nn.Conv2d(3, 16, 3, padding=1)),
        nn.ReLU(),
        norm(nn.Conv2d(16, 12, 3, padding=1)),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm(nn.Linear(12, 5)))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.train()(x)
    graph = trace(model.eval(), x)
    assert [layer.channels for layer in graph.groups] == [16, 12]
    cut, _ = random_cut(model, graph, 0)
    small = deepcopy(model)
    remove_(small, cut)
    masked = deepcopy(model)
    mask_(masked, cut)
    assert (masked(x) - small(x)).abs().max() <= 1e-5 * masked(x).abs().max()


def test_grouped_products_of_experts_lose_widths_that_the_kernel_takes():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 16)
            self.up, self.down = (
                nn.Parameter(torch.randn(3, 16, 32)),
                nn.Parameter(torch.randn(3, 32, 8)),
            )

        def forward(self, x):
            ends = torch.tensor([2, 5, 8], dtype=torch.int32)
            h = torch.relu(torch._grouped_mm(self.a(x).bfloat16(), self.up.bfloat16(), offs=ends))
            return torch._grouped_mm(h, self.down.bfloat16(), offs=ends).float()

    torch.manual_seed(0)
    model, x = Experts().eval(), torch.randn(8, 6)
    graph = trace(model, x)
    assert [(layer.channels, layer.unit) for layer in graph.groups] == [(2, 8), (4, 8)]
    cut = make_plan(model, graph, [torch.rand(2), torch.rand(4)], [1, 3])
    small, masked = deepcopy(model), deepcopy(model)
    remove_(small, cut)
    mask_(masked, cut)
    torch.testing.assert_close(
        small(x), masked(x), rtol=0.02, atol=0.02
    )  # bfloat16 sums in another order


def test_what_atens_decompositions_reach_needs_no_rule():
    aten = torch.ops.aten
    for operation in (aten.hstack.default, aten.moveaxis.int, aten.tile.default, aten.diff.default):
        assert operation not in RULES
    x = torch.empty(2, 8, device="meta")
    graph = decompose_operation(aten.hstack.default, [[x, x]], {})
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == [
        "aten.cat.default"
    ]
    assert decompose_operation(aten.relu.default, [x], {}) is None or aten.relu.default in RULES
