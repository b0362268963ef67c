from collections import Counter

import pytest
from scipy.stats import binom, chisquare

from fedpress.errors import RecipeError
from fedpress.federation.sampling import Cohort

NAMES = [f"c{i}" for i in range(20)]


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_every_client_joins_equally_often(sampling):
    plan, rounds = Cohort(5, 20, sampling), 2000
    joined = Counter(name for r in range(rounds) for name in plan.draw(NAMES, seed=1, round=r))
    assert sorted(joined) == sorted(NAMES)
    assert chisquare([joined[n] for n in NAMES]).pvalue > 1e-3


def test_fixed_cohorts_have_their_size_and_no_client_twice():
    for r in range(50):
        drawn = Cohort(5, 20).draw(NAMES, seed=1, round=r)
        assert len(set(drawn)) == len(drawn) == 5
        assert drawn == sorted(drawn, key=NAMES.index)


def test_poisson_cohorts_have_binomial_sizes_and_may_be_empty():
    plan, rounds = Cohort(2, 20, "poisson"), 2000
    sizes = Counter(len(plan.draw(NAMES, seed=3, round=r)) for r in range(rounds))
    assert sizes[0] > 0
    expected = [rounds * binom.pmf(k, 20, 0.1) for k in range(5)]
    seen = [sizes[k] for k in range(5)]
    assert chisquare([*seen, rounds - sum(seen)], [*expected, rounds - sum(expected)]).pvalue > 1e-3


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_a_draw_depends_on_seed_and_round_alone(sampling):
    plan = Cohort(5, 20, sampling)
    draws = [tuple(plan.draw(NAMES, seed=1, round=r)) for r in range(10)]
    assert plan.draw(NAMES, seed=1, round=9) == list(draws[9])
    assert len(set(draws)) > 5
    assert draws != [tuple(plan.draw(NAMES, seed=2, round=r)) for r in range(10)]


def test_only_poisson_sampling_is_worth_something_to_the_accountant():
    assert Cohort(5, 20).sampling_prob == 1.0
    assert Cohort(5, 20, "poisson").sampling_prob == 0.25
    assert Cohort(20, 20, "poisson").draw(NAMES, seed=1, round=1) == NAMES


@pytest.mark.parametrize(("size", "population"), [(21, 20), (0, 20), (-1, 20), (1, 0)])
def test_a_cohort_that_cannot_be_drawn_is_refused(size, population):
    with pytest.raises(RecipeError, match=r"^size: got"):
        Cohort(size, population)


def test_an_unknown_sampling_is_refused():
    with pytest.raises(RecipeError, match=r"^sampling: got 'random'"):
        Cohort(1, 2, "random")


def test_another_number_of_clients_than_planned_is_refused():
    with pytest.raises(RecipeError, match=r"planned for 20 clients but there are 3"):
        Cohort(5, 20).draw(NAMES[:3], seed=1, round=1)


def test_a_cyclic_cohort_lets_everybody_take_a_turn_before_anybody_takes_another():
    names = [f"c{i}" for i in range(10)]
    cohort = Cohort(3, 10, "cyclic")
    assert (cohort.period, cohort.sampling_prob) == (4, 1.0)
    drawn = [cohort.draw(names, seed=5, round=r) for r in range(1, 13)]
    for start in (0, 4, 8):
        assert sorted(name for turn in drawn[start : start + 4] for name in turn) == sorted(names)
    assert drawn[:4] == drawn[4:8]
    assert drawn[0] != Cohort(3, 10, "cyclic").draw(names, seed=6, round=1)
