from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from torch import nn

import fedpress
from fedpress.compress import check_parity, plan, remove_, score, trace
from fedpress.compress.prune.ignoring import ignored_names
from fedpress.errors import RecipeError


class Nested(nn.Module):
    """Blocks of two layers with norms, a head, and the head's weight under a second name."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        blocks = [
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            for _ in range(4)
        ]
        self.block, self.head = nn.ModuleList(blocks), nn.Linear(16, 5)
        self.same = self.head

    def forward(self, x):
        x = self.stem(x)
        for block in self.block:
            x = block(x)
        return self.head(x.mean((2, 3)))


MODEL = {"input_shape": (3, 8, 8)}


def shapes(model, prefix):
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if n.startswith(prefix)}


def test_a_module_stands_for_all_that_lies_in_it_and_a_star_for_any_name():
    model = Nested()
    assert {"block.3.1.running_mean", "block.3", "block.3.0"} <= ignored_names(model, ["block.3"])
    assert ignored_names(model, ["block.3.*"]) == ignored_names(model, ["block.3"]) - {"block.3"}
    assert {"stem.weight", "head.weight"} <= ignored_names(model, ["*"])
    assert ignored_names(model, ()) == frozenset()


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("haed", "did you mean 'head'"), ("zzzz.*", "names look like stem, block, head"), ("", "")],
)
def test_a_pattern_that_matches_nothing_is_refused(pattern, says):
    with pytest.raises(
        RecipeError, match=f"ignore: no module or weight of the model matches '.*{says}"
    ):
        ignored_names(Nested(), [pattern])
    for command in (fedpress.prune, fedpress.sparsify, fedpress.l0, fedpress.quantize):
        settings = (
            {"keep_params": 0.5} if command is fedpress.prune else {"density": 0.5, "epochs": 1}
        )
        if command is fedpress.quantize:
            settings = {}
        with pytest.raises(RecipeError, match=r"^ignore: no module or weight"):
            command(Nested(), ignore=[pattern], **MODEL, **settings)


@pytest.mark.parametrize("pattern", ["block.3.*", "block.1", "head", "same", "*.weight"])
def test_nothing_of_an_ignored_module_is_cut(pattern):
    model, x = Nested().eval(), torch.randn(2, 3, 8, 8)
    graph = trace(model, x, ignore=[pattern])
    names = ignored_names(model, [pattern])
    touched = {s.tensor for layer in graph.groups for s in layer.slices}
    assert not touched & names
    if not graph.groups:
        return
    small = deepcopy(model)
    cut = plan(model, graph, score(model, graph, "l1"), keep_params=0.7, round_to=1, tolerance=0.2)
    remove_(small, cut)
    assert check_parity(model, small, cut, x) <= 1e-5
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


class Share(nn.Module):
    """Divides by a size that no call shows."""

    def forward(self, x):
        return x / x.shape[1]


@pytest.mark.recipe
def test_a_size_in_code_keeps_its_layer_whole_with_and_without_ignore():
    model = nn.Sequential(nn.Linear(8, 16), Share(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))
    found = fedpress.prune(model, keep_params=0.6, round_to=1, input_shape=(8,))
    assert found.model[0].weight.shape == (16, 8)
    small = fedpress.prune(model, keep_params=0.6, round_to=1, ignore=["1"], input_shape=(8,))
    assert small.model[0].weight.shape == (16, 8)
    assert small.model[4].weight.shape[1] < 12


@pytest.mark.recipe
def test_commands_leave_ignored_modules_as_they_are():
    model = Nested().eval()
    small = fedpress.prune(
        model, keep_params=0.6, round_to=1, ignore=["block.3.*", "stem"], **MODEL
    )
    assert shapes(small.model, "block.3") == shapes(model, "block.3")
    assert shapes(small.model, "stem") == shapes(model, "stem")
    assert shapes(small.model, "block.1") != shapes(model, "block.1")
    sparse = fedpress.sparsify(
        model, density=0.5, ignore=["block.3.*"], keep_first=False, keep_last=False, **MODEL
    )
    assert (sparse.model.block[3][0].weight == model.block[3][0].weight).all()
    assert (sparse.model.block[2][0].weight == 0).any()
    assert sparse.after["dense_weights"]["block.3.0.weight"] == "asked for by `ignore`"
    tiny = fedpress.quantize(
        model, bits=4, rounding="nearest", ignore=["block.3.*", "head"], **MODEL
    )
    assert (tiny.model.block[3][0].weight == model.block[3][0].weight).all()
    assert (tiny.model.head.weight == model.head.weight).all()
    assert tiny.after["left"]["head"] == "asked for by `ignore`"


def test_a_command_without_a_target_asks_for_one():
    with pytest.raises(
        RecipeError, match=r"prune: the amount to keep is not given.*keep_params.*max_bytes"
    ):
        fedpress.prune(Nested(), **MODEL)


def test_the_nearest_width_is_told_in_the_facts_and_refused_where_it_must_be_exact():
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 10))
    facts = fedpress.prune(model, keep_params=0.5, round_to=1, input_shape=(20,)).after
    assert facts["told"] == {"keep_params": "0.5066, the nearest to 0.5 that the widths allow"}
    with pytest.raises(RecipeError, match=r"keep_params: 0\.5 cannot be met.*0\.5066"):
        fedpress.prune(model, keep_params=0.5, round_to=1, exact=True, input_shape=(20,))


@pytest.mark.parametrize("given", ["head", [0]])
def test_what_is_no_list_of_names_is_told_with_one_that_is(given):
    model = nn.Sequential(OrderedDict(head=nn.Linear(2, 2)))
    with pytest.raises(
        RecipeError, match=r'ignore: got .*, expected a list of names; give \["head"\]'
    ):
        ignored_names(model, given)
    assert "head.weight" in ignored_names(model, ["head"])
