import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from fedpress.compress.sparse import (
    Pattern,
    Weight,
    apply_masks_,
    density_of,
    find_weights,
    masks_from_scores,
    masks_of,
)
from fedpress.compress.sparse.patterns import n_of_m
from fedpress.errors import FedpressError, ModelError, RecipeError
from tests.chance import generator

PATTERNS = ("unstructured", "2:4", "1:2", "4x1", "1x4", "2x3", "filter", "channel")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def weights(seed=0):
    return find_weights(network(seed), keep_first=False, keep_last=False).chosen


def size_scores(chosen):
    return {w.name: w.value.detach().abs() for w in chosen}


def plain_units(weight, pattern):
    """The sets of entries that go together, found entry by entry."""
    sets = {}
    shape = weight.value.shape
    for index in torch.cartesian_prod(*[torch.arange(n) for n in shape]).tolist():
        first, second, rest = index[0], index[1], tuple(index[2:])
        group = first // (shape[0] // weight.groups)
        other = group * shape[1] + second  # the channel on the side that the groups share out
        out, into = (other, first) if weight.transposed else (first, other)
        row, column = (second, first) if weight.transposed else (first, second)
        key = {
            "unstructured": tuple(index),
            "filter": out,
            "channel": into,
            "block": (row // pattern.a, column // pattern.b, rest),
        }[pattern.kind]
        sets.setdefault(key, set()).add(tuple(index))
    return {frozenset(s) for s in sets.values()}


@pytest.mark.parametrize("text", [p for p in PATTERNS if ":" not in p])
def test_what_goes_together_is_what_a_walk_over_the_entries_finds(text):
    pattern = Pattern.parse(text)
    for w in weights():
        ids = pattern.units(w)
        assert ids.shape == w.value.shape
        found = {}
        for index in torch.cartesian_prod(*[torch.arange(n) for n in w.value.shape]).tolist():
            found.setdefault(int(ids[tuple(index)]), set()).add(tuple(index))
        assert {frozenset(s) for s in found.values()} == plain_units(w, pattern)


@pytest.mark.parametrize("text", ["", "2:2", "4:2", "0:4", "1x1", "0x4", "blocks", "2:4:8", "-1:4"])
def test_a_pattern_that_is_none_says_what_patterns_look_like(text):
    with pytest.raises(RecipeError, match="'2:4'"):
        Pattern.parse(text)


def test_n_of_m_keeps_the_largest_of_every_group_along_the_inputs():
    conv = Weight("w", nn.Parameter(torch.randn(3, 8, 2, 2, generator=generator(0, "w"))))
    kept = n_of_m(conv.value.abs(), conv, 2, 4)
    for out in range(3):
        for at in ((0, 0), (0, 1), (1, 0), (1, 1)):
            for start in (0, 4):
                group = conv.value[out, start : start + 4, *at].abs()
                best = set(group.argsort(descending=True)[:2].tolist())
                assert set(kept[out, start : start + 4, *at].nonzero().flatten().tolist()) == best


def test_n_of_m_of_a_transposed_weight_runs_along_its_inputs():
    weight = Weight(
        "w", nn.Parameter(torch.randn(4, 3, 2, generator=generator(0, "w"))), transposed=True
    )
    assert n_of_m(weight.value.abs(), weight, 1, 4).sum(0).eq(1).all()


def test_a_layer_whose_inputs_do_not_divide_says_so():
    narrow = Weight("w", nn.Parameter(torch.zeros(8, 3, 3, 3)))
    assert "3 inputs" in Pattern.parse("2:4").why_not_applicable(narrow)
    assert Pattern.parse("2x2").why_not_applicable(narrow) is None


@pytest.mark.parametrize("density", [0.5, 0.1, 0.013])
def test_masks_are_those_of_torch_prune(density):
    model = network()
    chosen = find_weights(model, keep_first=False, keep_last=False).chosen
    for w in chosen:  # of one scale, so that no layer would end empty, which only torch allows
        nn.init.normal_(w.value)
    masks = masks_from_scores(
        chosen, size_scores(chosen), Pattern.parse("unstructured"), density=density
    )
    total = sum(w.size for w in chosen)
    pairs = [
        (m, "weight") for m in model if hasattr(m, "weight") and not isinstance(m, nn.BatchNorm2d)
    ]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=total - round(density * total))
    for (module, _), w in zip(pairs, chosen, strict=True):
        assert torch.equal(masks[w.name], module.weight_mask.bool())


def test_uniform_masks_are_those_of_torch_prune_in_each_layer():
    model = network()
    chosen = find_weights(model, keep_first=False, keep_last=False).chosen
    masks = masks_from_scores(
        chosen, size_scores(chosen), Pattern.parse("unstructured"), density=0.25, scope="uniform"
    )
    pairs = [m for m in model if hasattr(m, "weight") and not isinstance(m, nn.BatchNorm2d)]
    for module, w in zip(pairs, chosen, strict=True):
        prune.l1_unstructured(module, "weight", w.size - w.size // 4)
        assert torch.equal(masks[w.name], module.weight_mask.bool())


def test_filters_that_stay_are_those_of_torch_prune():
    layer = nn.Conv2d(4, 10, 3)
    weight = Weight("weight", layer.weight)
    masks = masks_from_scores(
        [weight], {"weight": layer.weight.detach().abs()}, Pattern.parse("filter"), density=0.3
    )
    prune.ln_structured(layer, "weight", 7, n=1, dim=0)
    assert torch.equal(masks["weight"], layer.weight_mask.bool())


@given(
    density=st.floats(0.001, 1.0),
    scope=st.sampled_from(["global", "uniform", "erk"]),
    seed=st.integers(0, 3),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
)
@example(density=0.5, scope="global", seed=0, shapes=[(1, 1), (1, 1)])
@example(density=0.01, scope="uniform", seed=0, shapes=[(9, 9), (1, 1), (2, 2)])
def test_the_count_of_kept_weights_is_exact(density, scope, seed, shapes):
    chance = generator(seed, "weights")
    chosen = [
        Weight(f"w{i}", nn.Parameter(torch.randn(s, generator=chance)))
        for i, s in enumerate(shapes)
    ]
    masks = masks_from_scores(
        chosen, size_scores(chosen), Pattern.parse("unstructured"), density=density, scope=scope
    )
    total = sum(w.size for w in chosen)
    assert sum(int(m.sum()) for m in masks.values()) == max(round(density * total), len(chosen))
    assert all(m.any() for m in masks.values())


@pytest.mark.recipe
@given(
    st.sampled_from(PATTERNS),
    st.floats(0.02, 1.0),
    st.sampled_from(["global", "uniform", "erk"]),
    st.integers(0, 3),
)
def test_every_pattern_keeps_whole_units_as_near_as_they_come(text, density, scope, seed):
    pattern, chosen = (
        Pattern.parse(text),
        [w for w in weights(seed) if Pattern.parse(text).why_not_applicable(w) is None],
    )
    density = max(density, pattern.density or 0)
    masks = masks_from_scores(chosen, size_scores(chosen), pattern, density=density, scope=scope)
    for w in chosen:
        if pattern.kind == "n:m":
            groups = (
                masks[w.name].movedim(0 if w.transposed else 1, -1).reshape(-1, pattern.b).sum(1)
            )
            assert groups.eq(groups[0]).all()
            assert pattern.a <= groups[0] <= pattern.b
        else:
            for unit in plain_units(w, pattern):
                assert len({bool(masks[w.name][entry]) for entry in unit}) == 1
    if pattern.kind != "n:m":
        largest = max(len(u) for w in chosen for u in plain_units(w, pattern))
        total, slack = (
            sum(w.size for w in chosen),
            largest * (1 if scope == "global" else len(chosen)),
        )
        least = sum(min(len(u) for u in plain_units(w, pattern)) for w in chosen)
        count = sum(int(m.sum()) for m in masks.values())
        assert abs(count - density * total) <= slack or count <= least + slack


@pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
@pytest.mark.parametrize("text", ["unstructured", "2:4", "4x1", "filter"])
def test_zeros_of_an_earlier_cut_stay(text, scope):
    chosen = [w for w in weights() if Pattern.parse(text).why_not_applicable(w) is None]
    chance = generator(1, "noise")
    scores = {w.name: torch.rand(w.value.shape, generator=chance) for w in chosen}
    first = masks_from_scores(chosen, scores, Pattern.parse("unstructured"), density=0.6)
    again = {name: torch.rand(s.shape, generator=chance) for name, s in scores.items()}
    second = masks_from_scores(
        chosen, again, Pattern.parse(text), density=0.3, scope=scope, within=first
    )
    for name in second:
        assert not (second[name] & ~first[name]).any()
    if text == "unstructured":
        assert density_of(second) == pytest.approx(0.3, abs=1e-3)


def test_erk_keeps_more_of_small_weights_and_never_more_than_all():
    chosen = [
        Weight("small", nn.Parameter(torch.randn(4, 4))),
        Weight("large", nn.Parameter(torch.randn(64, 64))),
    ]
    masks = masks_from_scores(
        chosen, size_scores(chosen), Pattern.parse("unstructured"), density=0.3, scope="erk"
    )
    assert masks["small"].all()
    assert int(masks["large"].sum()) == round(0.3 * (16 + 64 * 64)) - 16


def test_erk_densities_are_proportional_to_sides_over_their_product():
    chosen = [
        Weight("a", nn.Parameter(torch.randn(40, 40))),
        Weight("b", nn.Parameter(torch.randn(80, 80))),
    ]
    masks = masks_from_scores(
        chosen, size_scores(chosen), Pattern.parse("unstructured"), density=0.1, scope="erk"
    )
    assert masks["a"].float().mean() / masks["b"].float().mean() == pytest.approx(2, rel=0.01)


def test_given_densities_are_kept_for_each_weight():
    chosen = weights()
    given_ = {w.name: 0.1 * (i + 1) for i, w in enumerate(chosen)}
    density = sum(given_[w.name] * w.size for w in chosen) / sum(w.size for w in chosen)
    masks = masks_from_scores(
        chosen, size_scores(chosen), Pattern.parse("unstructured"), density=density, scope=given_
    )
    for w in chosen:
        assert abs(int(masks[w.name].sum()) - given_[w.name] * w.size) <= 1


def test_a_density_for_a_weight_that_is_not_given_is_asked_for_by_name():
    chosen = weights()
    with pytest.raises(RecipeError, match=chosen[0].name):
        masks_from_scores(
            chosen,
            size_scores(chosen),
            Pattern.parse("unstructured"),
            density=0.5,
            scope={"x": 0.5},
        )


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan"), float("inf")])
def test_a_density_out_of_range_is_refused(density):
    chosen = weights()
    with pytest.raises(RecipeError, match="density"):
        masks_from_scores(
            chosen, size_scores(chosen), Pattern.parse("unstructured"), density=density
        )


def test_more_than_an_earlier_cut_left_is_refused():
    chosen = weights()
    first = masks_from_scores(
        chosen, size_scores(chosen), Pattern.parse("unstructured"), density=0.2
    )
    with pytest.raises(RecipeError, match=r"only 0\.2"):
        masks_from_scores(
            chosen, size_scores(chosen), Pattern.parse("unstructured"), density=0.5, within=first
        )


def test_scores_that_are_no_numbers_are_refused_by_name():
    chosen = weights()
    scores = size_scores(chosen)
    scores[chosen[1].name][0] = float("nan")
    with pytest.raises(ModelError, match=chosen[1].name):
        masks_from_scores(chosen, scores, Pattern.parse("unstructured"), density=0.5)


def test_of_equal_scores_the_first_stays():
    weight = Weight("w", nn.Parameter(torch.ones(2, 4)))
    masks = masks_from_scores(
        [weight], {"w": torch.ones(2, 4)}, Pattern.parse("unstructured"), density=0.5
    )
    assert masks["w"].tolist() == [[True] * 4, [False] * 4]


def test_infinite_scores_stay_first():
    scores = torch.tensor([[1.0, float("inf"), 2.0, -float("inf")]])
    weight = Weight("w", nn.Parameter(torch.ones(1, 4)))
    masks = masks_from_scores([weight], {"w": scores}, Pattern.parse("unstructured"), density=0.5)
    assert masks["w"].tolist() == [[False, True, True, False]]


def test_after_applying_the_zeros_are_the_mask():
    model = network()
    chosen = find_weights(model).chosen
    masks = masks_from_scores(
        chosen, size_scores(chosen), Pattern.parse("unstructured"), density=0.3
    )
    apply_masks_(chosen, masks)
    read = masks_of(model, list(masks))
    assert all(torch.equal(read[name], masks[name]) for name in masks)


def test_masks_fit_weights_in_the_memory_format_of_images():
    model = network().to(memory_format=torch.channels_last)
    plain = network()
    for one, two in zip(find_weights(model).chosen, find_weights(plain).chosen, strict=True):
        pattern = Pattern.parse("4x1")
        a = masks_from_scores([one], {one.name: one.value.detach().abs()}, pattern, density=0.5)[
            one.name
        ]
        b = masks_from_scores([two], {two.name: two.value.detach().abs()}, pattern, density=0.5)[
            two.name
        ]
        assert torch.equal(a, b)


def test_first_and_last_stay_dense_unless_asked_and_the_reason_is_told():
    model = network()
    found = find_weights(model)
    assert [w.name for w in found.chosen] == ["2.weight", "3.weight"]
    assert "first layer" in found.dense["0.weight"]
    assert "last layer" in found.dense["5.weight"]
    assert len(find_weights(model, keep_first=False, keep_last=False).chosen) == 4


def test_a_weight_kept_by_name_and_layers_that_are_none_are_told():
    model = nn.Sequential(
        nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
    )
    found = find_weights(model, keep=["2.*"])
    assert [w.name for w in found.chosen] == ["3.weight"]
    assert found.dense["2.weight"] == "asked for by `keep`"
    assert "Embedding" in found.dense["0.weight"]
    with pytest.raises(RecipeError, match="no weight matches 'nothing'"):
        find_weights(model, keep=["nothing"])


def test_attention_recurrent_and_shared_weights_are_found_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(7, 8)
            self.attention = nn.MultiheadAttention(8, 2)
            self.memory = nn.GRU(8, 8)
            self.out = nn.Linear(8, 7)
            self.out.weight = self.words.weight

    found = find_weights(Net(), keep_first=False, keep_last=False)
    assert [w.name for w in found.chosen] == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "memory.weight_ih_l0",
        "memory.weight_hh_l0",
        "words.weight",
    ]
    assert not found.dense


def test_a_computed_weight_stays_and_says_why():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)
    )
    found = find_weights(model, keep_first=False)
    assert any("parametrization" in why for why in found.dense.values())


@pytest.mark.parametrize("model", [nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Sequential()])
def test_a_model_without_weights_to_zero_is_refused(model):
    with pytest.raises(FedpressError, match="keep_first = false"):
        find_weights(model)
