"""Cuts through norms: all but the norms' statistics is exact, and fitted scales bring the outputs nearer."""

import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import ViT

import fedpress
from fedpress.compress import (
    PruningPlan,
    check_parity,
    output_difference,
    parameters,
    refit_norms_,
    remove_,
    score,
    trace,
)
from fedpress.compress.prune.approximate import check_norm_kinds
from fedpress.compress.prune.plan import make_plan
from fedpress.errors import RecipeError
from fedpress.models import ModelSpec, load_model, save_model, what_pruning_changed
from tests.harness import tiered

BOTH = ("layer_norm", "grn")


class GRN(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(0.3 * torch.randn(1, 1, 1, width))
        self.beta = nn.Parameter(0.3 * torch.randn(1, 1, 1, width))

    def forward(self, x):
        lengths = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return (
            self.gamma * (x * (lengths / (lengths.mean(dim=-1, keepdim=True) + 1e-6)))
            + self.beta
            + x
        )


class ChannelsFirst(nn.Module):
    """Layer norm as ConvNeXt writes it for images."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.rand(width) + 0.5),
            nn.Parameter(0.2 * torch.randn(width)),
        )

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        square = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(square + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Functional(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.rand(width) + 0.5),
            nn.Parameter(0.2 * torch.randn(width)),
        )
        self.shape = (width,)

    def forward(self, x):
        return F.layer_norm(x, self.shape, self.weight, self.bias, 1e-6)


class Root(nn.Module):
    """RMS norm as Llama writes it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6))


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.blocks = (
            nn.Conv2d(3, 16, 2, 2),
            ChannelsFirst(16),
            nn.ModuleList(),
        )
        for _ in range(2):
            deep, norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), Functional(16)
            self.blocks.append(
                nn.ModuleList([deep, norm, nn.Linear(16, 32), GRN(32), nn.Linear(32, 16)])
            )
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.first(self.stem(x))
        for deep, norm, up, grn, down in self.blocks:
            y = norm(deep(x).permute(0, 2, 3, 1))
            x = x + down(grn(F.gelu(up(y)))).permute(0, 3, 1, 2)
        return self.head(self.norm(x.mean((2, 3))))


class Gated(nn.Module):
    """A gMLP: half of the channels, normed and mixed over the tokens, gate the other half."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.up = nn.Conv2d(3, 16, 2, 2), nn.LayerNorm(16), nn.Linear(16, 48)
        self.inner, self.tokens, self.down = nn.LayerNorm(24), nn.Linear(16, 16), nn.Linear(24, 16)
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, -1)
        x = x + self.down(u * self.tokens(self.inner(v).transpose(1, 2)).transpose(1, 2))
        return self.head(self.last(x).mean(1))


class Rooted(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.stem, self.n, self.m = nn.Conv2d(3, 16, 2, 2), first, second
        self.a, self.b, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.b(F.gelu(self.a(self.n(x))))
        return self.head(self.m(x).mean(1))


class Pooled(nn.Module):
    """One group of all channels is a layer norm too."""

    def __init__(self):
        super().__init__()
        self.stem, self.n = nn.Conv2d(3, 16, 2, 2), nn.GroupNorm(1, 16)
        self.a, self.b, self.head = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.b(F.gelu(self.a(self.n(x))))).mean((2, 3)))


NETS = {
    "convnext": ConvNeXt,
    "vit-fused": lambda: ViT("fused"),
    "vit-torch": lambda: ViT("torch"),
    "vit-products": lambda: ViT("products"),
    "gmlp": Gated,
    "rms": lambda: Rooted(Root(16), Root(16)),
    "rms of torch": lambda: Rooted(nn.RMSNorm(16), nn.LayerNorm(16, elementwise_affine=False)),
    "one group": Pooled,
}


def build(name):
    torch.manual_seed(0)
    return NETS[name]()


def cut(name, share=0.75):
    """Returns the model, its cut copy, the plan, examples, and how many parameters must be left."""
    model, small, plan, x, count = cut_once(name, share)
    return model, deepcopy(small), plan, x, count


@cache
def cut_once(name, share):
    model, x = build(name).eval(), torch.randn(64, 3, 8, 8)
    graph = trace(model, x[:2], approximate=BOTH)
    kept = [max(1, int(layer.channels * share)) for layer in graph.groups]
    plan = make_plan(model, graph, score(model, graph, "l1"), kept)
    small = deepcopy(model)
    remove_(small, plan)
    return model, small, plan, x, graph.parameters(kept)


@pytest.mark.parametrize("name", tiered(NETS, quick=list(NETS)[:4]))
def test_all_but_the_norms_statistics_is_exact_and_the_width_is_cut(name, tmp_path):
    model, small, plan, x, count = cut(name)
    stem = next(n for n, p in model.named_parameters() if p.dim() == 4)
    assert dict(small.named_parameters())[stem].shape[0] == int(
        0.75 * dict(model.named_parameters())[stem].shape[0]
    )
    assert check_parity(model, small, plan, x[:2]) <= 1e-5
    assert parameters(small) == count
    assert plan.approximate
    with torch.no_grad():
        assert not torch.allclose(model(x), small(x), rtol=0.01)
    spec = ModelSpec(
        architecture=f"{__name__}:build", arguments={"name": name}, input_shape=(3, 8, 8)
    )
    save_model(tmp_path, spec.model_copy(update=what_pruning_changed(small, build(name))), small)
    again = load_model(tmp_path, allow_code=[f"{__name__}:build"])[1].eval()
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("name", tiered(NETS, quick=list(NETS)[:4]))
def test_fitted_scales_bring_the_outputs_nearer_and_never_farther(name):
    model, small, plan, x, _ = cut(name)
    before = output_difference(model, small, [x]).relative
    kept = {n: t.clone() for n, t in small.state_dict().items()}
    left = refit_norms_(model, small, plan, [x[:32], x[32:]])
    after = output_difference(model, small, [x]).relative
    assert after <= before
    assert after < before or set(left) == set(plan.approximate)
    changed = {n for n, t in small.state_dict().items() if not torch.equal(t, kept[n])}
    assert {n.rpartition(".")[0] for n in changed} == set(plan.approximate) - set(left)


def test_a_fit_is_the_least_squares_solution():
    model, small, plan, x, _ = cut("rms of torch")
    refit_norms_(model, small, plan, [x])
    with torch.no_grad():
        wanted = model.n(model.stem(x).flatten(2).transpose(1, 2))[
            ..., list(plan.keep["n.weight"][0])
        ]
        seen = F.rms_norm(small.stem(x).flatten(2).transpose(1, 2), (12,)).flatten(0, 1)
        oracle = (seen * wanted.flatten(0, 1)).sum(0) / seen.square().sum(0)
    torch.testing.assert_close(small.n.weight.detach(), oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.recipe
def test_without_the_word_the_stream_stays_whole():
    model, x = build("convnext"), torch.randn(2, 3, 8, 8)
    assert {layer.name for layer in trace(model, x).groups} == set()
    some = trace(model, x, approximate=["layer_norm"])
    assert [layer.name for layer in some.groups] == ["stem"]
    others = trace(model, x, approximate=["grn"])
    assert [layer.name for layer in others.groups] == ["blocks.0.2", "blocks.1.2"]
    assert others.approximate == ("blocks.0.3", "blocks.1.3")
    with pytest.raises(RecipeError, match="did you mean 'layer_norm'"):
        trace(model, x, approximate=["layernorm"])


def test_an_exact_cut_is_checked_with_all_its_statistics():
    model, x = (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.LayerNorm(12)),
        torch.randn(2, 8),
    )
    graph = trace(model, x)
    plan = make_plan(model, graph, [torch.rand(16)], [9])
    assert plan.approximate == ()
    assert PruningPlan.model_validate_json(plan.model_dump_json()) == plan
    small = deepcopy(model)
    remove_(small, plan)
    assert check_parity(model, small, plan, x) <= 1e-5


@pytest.mark.recipe
def test_a_command_tells_how_far_an_approximate_cut_is_off():
    sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
    try:
        from approximate import ConvNeXt as Small
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    how = {"keep_params": 0.6, "round_to": 4, "scope": "layer", "approximate": BOTH}
    with pytest.warns(UserWarning, match="brings its own weights"):
        small = fedpress.prune(Small(16), data="digits", **how)
    off = small.after["parity_error"]
    assert 0.01 < off < 2
    assert small.after["told"]["approximate"].startswith(
        f"outputs differ by {off:.1%} from those before the cut on 512"
    )
    assert small.model.stem.weight.shape[0] < 16
    alone = fedpress.prune(Small(16), input_shape=(1, 8, 8), **how)
    assert "examples of noise" in alone.after["told"]["approximate"]
    assert "there was no data" in alone.after["left"]["norm"]


def test_one_kind_that_is_no_list_is_told_with_the_list():
    with pytest.raises(RecipeError, match=r'expected a list; give \["layer_norm"\]'):
        check_norm_kinds("layer_norm")
    assert check_norm_kinds(["layer_norm"]) == {"layer_norm"}
