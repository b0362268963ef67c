import pytest
import torch

from fedpress.codecs import Bound, Discretize, LowRank, RandomK, TopK
from tests.federation.federation import key

X = torch.randn(1000, generator=torch.Generator().manual_seed(0))


def test_topk_keeps_exactly_the_largest():
    topk, _ = TopK(density=0.05).bind(Bound(1000))
    kept = topk.encode(X, key()).values
    assert int((kept != 0).sum()) == 50
    assert float(kept[kept != 0].abs().min()) >= float(X[kept == 0].abs().max())
    assert torch.equal(kept[kept != 0], X[kept != 0])


def test_randomk_sends_the_same_places_for_all_clients_and_others_next_round():
    randomk, bound = RandomK(density=0.1).bind(Bound(1000))
    assert bound.size == 100
    sent = [
        randomk.encode(torch.arange(1000.0), k).values for k in (key("a"), key("b"), key("a", 2))
    ]
    assert torch.equal(sent[0], sent[1])
    assert not torch.equal(sent[0], sent[2])


def test_unbiased_randomk_is_right_on_average():
    randomk, _ = RandomK(density=0.25, unbiased=True).bind(Bound(1000))
    rounds = [randomk.decode(randomk.encode(X, key(round=r)), key(round=r)) for r in range(1, 801)]
    error = torch.stack(rounds).mean(0) - X
    assert float(error.norm() / X.norm()) == pytest.approx((3 / 800) ** 0.5, rel=0.15)


def test_low_rank_is_exact_on_a_low_rank_update_and_near_the_best_on_others():
    shapes = ((30, 4, 3, 3), (30,))
    lowrank, bound = LowRank(rank=3).bind(Bound(1110, shapes=shapes))
    assert bound.size == 3 * (30 + 36) + 30
    chance = torch.Generator().manual_seed(1)
    exact = torch.randn(30, 3, generator=chance) @ torch.randn(3, 36, generator=chance)
    x = torch.cat([exact.reshape(-1), torch.ones(30)])
    for number in range(1, 21):  # from another random start each
        at = key(round=number)
        assert torch.allclose(lowrank.decode(lowrank.encode(x, at), at), x, atol=1e-4)
    full = torch.randn(30, 36, generator=chance) * torch.logspace(0, -2, 36)
    update = torch.cat([full.reshape(-1), torch.ones(30)])
    errors = []
    for number in range(1, 21):
        at = key(round=number)
        back = lowrank.decode(lowrank.encode(update, at), at)[:1080]
        errors.append(float((back.view(30, 36) - full).norm()))
    best = float(torch.linalg.svdvals(full)[3:].norm())
    assert best <= min(errors)
    assert sum(errors) / 20 <= 1.15 * best


def test_discretize_is_right_on_average_and_draws_again_what_is_too_long():
    discretize, bound = Discretize(scale=3.0).bind(Bound(50, l2=1.0, linf=1.0))
    x = X[:50] / X[:50].norm()
    rounds = torch.stack(
        [discretize.encode(x, key(round=r)).values.double() for r in range(1, 4001)]
    )
    assert float(rounds.norm(dim=1).max()) <= bound.l2
    # Drawing again shortens a little: the bias stays far below one step of the grid.
    assert float((rounds.mean(0) - 3 * x).abs().max()) < 0.06
