import hashlib
import itertools
import math

import numpy as np
import pytest

from fedpress.errors import WireError
from fedpress.secagg import SecurePlan
from fedpress.secagg.graph import MAX_MISS, MAX_RISK, edges, risk, sparsest
from fedpress.secagg.keys import derive


def connected(graph, nodes):
    seen, todo = {nodes[0]}, [nodes[0]]
    while todo:
        new = [int(j) for j in np.flatnonzero(graph[todo.pop()]) if j in set(nodes) - seen]
        seen.update(new)
        todo += new
    return len(seen) == len(nodes)


def test_both_sides_draw_the_same_symmetric_graph_without_loops():
    graph = edges(bytes(32), 50, 0.3)
    assert (graph == graph.T).all()
    assert not graph.diagonal().any()
    assert abs(graph.mean() - 0.3 * 49 / 50) < 0.03
    assert (graph != edges(b"1" * 32, 50, 0.3)).any()
    assert edges(bytes(32), 4, 1.0).sum() == 12


@pytest.mark.parametrize(("cohort", "degree"), [(10, 9), (100, 40), (1000, 110)])
def test_the_degree_grows_slowly_with_the_cohort(cohort, degree):
    assert SecurePlan(cohort, 18).degree <= degree


@pytest.mark.parametrize("cohort", [20, 33, 100, 300, 1000])
def test_the_planned_graph_keeps_its_promise(cohort):
    plan = SecurePlan(cohort, 18)
    assert (
        risk(cohort, plan.dropped, plan.corrupt, plan.edge_prob, plan.least_neighbours) <= MAX_RISK
    )
    assert plan.least_neighbours > plan.corrupt * plan.edge_prob


def test_the_bound_is_no_less_than_what_a_small_cohort_shows():
    """All graphs of five clients, one corrupt, one named a drop-out by a server that has seen the graph."""
    n, least, edge_prob = 5, 2, 0.8
    pairs = list(itertools.combinations(range(n), 2))
    total = 0.0
    for coins in itertools.product([False, True], repeat=len(pairs)):
        graph = np.zeros((n, n), bool)
        for (i, j), coin in zip(pairs, coins, strict=True):
            graph[i, j] = graph[j, i] = coin
        split = False
        for away in ([], [1], [2], [3], [4]):
            left = [i for i in range(n) if i not in away]  # 0 is corrupt and always there
            honest = [i for i in left if i]
            enough = min(graph[i, left].sum() for i in left) >= least
            split |= bool(enough) and not connected(graph, honest)
        total += split * edge_prob ** sum(coins) * (1 - edge_prob) ** (len(pairs) - sum(coins))
    assert 0 < total <= risk(n, 1, 1, edge_prob, least)


@pytest.mark.recipe
def test_survivors_stay_connected_and_have_enough_neighbours_in_simulation():
    plan = SecurePlan(100, 18)
    rng = np.random.default_rng(0)
    closed = 0
    for trial in range(200):
        graph = edges(derive(bytes(32), trial), 100, plan.edge_prob)
        alive = rng.permutation(100)[: plan.survivors]
        closed += graph[alive][:, alive].sum(1).min() < plan.least_neighbours
        honest = alive[plan.corrupt :]
        assert connected(graph, honest.tolist())
    assert closed <= 3  # MAX_MISS is 2^-10
    assert MAX_MISS == 2**-10


def test_more_vanishing_or_corrupt_clients_need_more_neighbours():
    assert sparsest(200, 40, 10)[0] < sparsest(200, 80, 10)[0]
    assert sparsest(200, 40, 10)[0] < sparsest(200, 40, 40)[0]


@pytest.mark.parametrize("cohort", [2, 3, 4, 10, 33, 100, 101, 200, 1000])
def test_as_many_as_planned_may_vanish_from_the_committee(cohort):
    plan = SecurePlan(cohort, 18)
    assert plan.survivors == cohort - math.floor(cohort / 3 + 1e-9)
    assert 2 <= plan.threshold <= plan.committee <= cohort
    assert 2 * plan.threshold > plan.committee + plan.corrupt * plan.committee / cohort
    if plan.committee == cohort:
        assert plan.threshold <= plan.survivors
    else:  # drawn at random: the threshold is reached but for MAX_MISS
        rng = np.random.default_rng(0)
        alive = [
            rng.hypergeometric(plan.survivors, cohort - plan.survivors, plan.committee)
            for _ in range(2000)
        ]
        assert np.mean(np.array(alive) < plan.threshold) < 0.005


def test_names_and_numbers_of_other_kinds_give_other_keys():
    words = ["1", 1, b"1", "", b""]
    assert len({derive(bytes(32), word) for word in words}) == len(words)
    assert len({derive(bytes(32), *pair) for pair in (("a", "bc"), ("ab", "c"), ("abc",))}) == 3
    assert derive(bytes(32), "x") != derive(hashlib.sha256().digest(), "x")
    assert issubclass(WireError, Exception)
