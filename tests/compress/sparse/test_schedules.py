from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedpress.compress.sparse import (
    Pattern,
    Weight,
    cubic_density,
    drop_share,
    iterative_density,
    masks_from_scores,
    regrow,
)
from tests.chance import generator


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1))
def test_the_cubic_density_only_falls(one, two, end):
    first, last = sorted((one, two))
    assert (
        end
        <= cubic_density(last, start=1.0, end=end)
        <= cubic_density(first, start=1.0, end=end)
        <= 1.0
    )


def test_the_cubic_density_is_that_of_the_paper():
    for at in (0.0, 0.25, 0.8):  # s_t = s_f + (s_i - s_f)(1 - t)^3 of the sparsity s
        sparsity = 0.9 + (0.0 - 0.9) * (1 - at) ** 3
        assert cubic_density(at, start=1.0, end=0.1) == pytest.approx(1 - sparsity)


def test_every_cut_to_a_lottery_ticket_keeps_the_same_share():
    path = [iterative_density(r, 4, start=1.0, end=0.1) for r in range(5)]
    shares = [b / a for a, b in pairwise(path)]
    assert path[-1] == 0.1
    assert shares == pytest.approx([0.1**0.25] * 4)


def test_fewer_weights_move_as_training_goes_on():
    shares = [drop_share(t / 10, 0.3) for t in range(11)]
    assert shares[0] == pytest.approx(0.3)
    assert shares[-1] == pytest.approx(0.0, abs=1e-12)
    assert shares == sorted(shares, reverse=True)


def plain_rigl(weight, mask, gradient, share):
    """Algorithm 1 of the paper, entry by entry: what was just dropped may grow again."""
    w, m, g = (t.flatten().tolist() for t in (weight.abs(), mask, gradient.abs()))
    count = int(share * sum(m))
    kept = sorted((i for i in range(len(m)) if m[i]), key=lambda i: (-w[i], i))[: sum(m) - count]
    grown = sorted((i for i in range(len(m)) if i not in kept), key=lambda i: (-g[i], i))[:count]
    return torch.tensor([i in {*kept, *grown} for i in range(len(m))]).view(mask.shape)


@given(st.integers(0, 50), st.floats(0.05, 0.95), st.floats(0.0, 0.9))
def test_regrowth_is_that_of_the_papers_algorithm(seed, density, share):
    chance = generator(seed, "rigl")
    weight = Weight("w", nn.Parameter(torch.randn(5, 7, generator=chance)))
    gradient = torch.randn(5, 7, generator=chance)
    mask = masks_from_scores(
        [weight],
        {"w": torch.rand(5, 7, generator=chance)},
        Pattern.parse("unstructured"),
        density=density,
    )
    with torch.no_grad():
        weight.value.masked_fill_(~mask["w"], 0)
    after = regrow([weight], mask, {"w": gradient}, Pattern.parse("unstructured"), share=share)["w"]
    assert torch.equal(after, plain_rigl(weight.value.detach(), mask["w"], gradient, share))
    assert after.sum() == mask["w"].sum()


def test_a_dropped_weight_of_a_steep_gradient_stays_and_a_grown_one_was_zero():
    weight = Weight("w", nn.Parameter(torch.tensor([[0.1, 0.2, 5.0, 0.0, 0.0, 0.0]])))
    mask = {"w": torch.tensor([[True, True, True, False, False, False]])}
    steep = {"w": torch.tensor([[9.0, 0.1, 0.1, 8.0, 0.2, 0.3]])}
    after = regrow([weight], mask, steep, Pattern.parse("unstructured"), share=0.67)["w"]
    assert after.tolist() == [[True, False, True, True, False, False]]


def test_nothing_regrows_where_an_earlier_stage_has_cut():
    chance = generator(0, "rigl")
    weight = Weight("w", nn.Parameter(torch.randn(8, 8, generator=chance)))
    within = {"w": torch.rand(8, 8, generator=chance) < 0.5}
    mask = masks_from_scores(
        [weight],
        {"w": weight.value.detach().abs()},
        Pattern.parse("unstructured"),
        density=0.2,
        within=within,
    )
    steep = {"w": torch.rand(8, 8, generator=chance)}
    after = regrow([weight], mask, steep, Pattern.parse("unstructured"), share=0.5, within=within)[
        "w"
    ]
    assert not (after & ~within["w"]).any()
    assert after.sum() == mask["w"].sum()
    assert not torch.equal(after, mask["w"])


def test_blocks_move_whole():
    chance = generator(0, "rigl")
    weight, pattern = (
        Weight("w", nn.Parameter(torch.randn(8, 8, generator=chance))),
        Pattern.parse("2x2"),
    )
    mask = masks_from_scores([weight], {"w": weight.value.detach().abs()}, pattern, density=0.5)
    after = regrow([weight], mask, {"w": torch.rand(8, 8, generator=chance)}, pattern, share=0.25)[
        "w"
    ]
    blocks = after.view(4, 2, 4, 2).transpose(1, 2).reshape(16, 4).sum(1)
    assert set(blocks.tolist()) == {0, 4}
    assert after.sum() == mask["w"].sum()
    assert not torch.equal(after, mask["w"])


@pytest.mark.parametrize("density", [1.0, 1 / 16])
def test_a_full_weight_and_a_single_entry_stay_as_they_are(density):
    weight = Weight("w", nn.Parameter(torch.randn(4, 4, generator=generator(0, "w"))))
    mask = masks_from_scores(
        [weight], {"w": weight.value.detach().abs()}, Pattern.parse("unstructured"), density=density
    )
    after = regrow(
        [weight], mask, {"w": torch.ones(4, 4)}, Pattern.parse("unstructured"), share=0.9
    )
    assert torch.equal(after["w"], mask["w"])
