import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.accounting import renyi
from fedpress.privacy.accounting.accountant import GaussianEvent, SkellamEvent, epsilon, merge
from fedpress.privacy.ledger import Ledger, LedgerEntry


def skellam(noise=20.0, steps=1, **more):
    """Noise on a grid so fine that rounding is nothing."""
    return SkellamEvent(
        **{"l2": 1e4, "l1": 1e6, "variance": (1e4 * noise) ** 2, "steps": steps, **more}
    )


@pytest.mark.parametrize(("q", "z", "steps"), [(1.0, 5.0, 50), (0.1, 2.0, 60), (0.02, 1.0, 500)])
def test_renyi_divergences_of_gaussian_steps_are_those_of_dp_accounting(q, z, steps):
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=renyi.ORDERS)
    accountant.compose(dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(z)), steps)
    assert renyi.epsilon([GaussianEvent(q, z, steps)], delta=1e-5) == pytest.approx(
        accountant.get_epsilon(1e-5), rel=1e-6
    )


def test_on_a_fine_grid_skellam_steps_cost_what_gaussian_ones_do():
    for q in (1.0, 0.2):
        gaussian = renyi.epsilon([GaussianEvent(q, 20.0, 50)], delta=1e-5)
        assert epsilon([skellam(20.0, 50, sampling_prob=q)], delta=1e-5) == pytest.approx(
            gaussian, rel=1e-4
        )


def test_sampled_skellam_steps_cost_less_than_whole_ones_and_no_less_than_gaussian_ones():
    sampled = epsilon([skellam(4.0, 100, sampling_prob=0.1)], delta=1e-5)
    gaussian = renyi.epsilon([GaussianEvent(0.1, 4.0, 100)], delta=1e-5)
    assert gaussian <= sampled < 0.5 * epsilon([skellam(4.0, 100)], delta=1e-5)
    assert sampled == pytest.approx(gaussian, rel=1e-3)


def test_the_sampling_bound_is_above_the_true_divergence_in_both_directions():
    from scipy import special

    q, variance = 0.2, 30.0
    k = np.arange(-150, 151)
    p = special.ive(np.abs(k), variance)
    moved = (1 - q) * p + q * special.ive(np.abs(k - 3), variance)
    bound = dict(
        zip(renyi.ORDERS, renyi.divergences(SkellamEvent(3.0, 3.0, variance, 1, q)), strict=True)
    )
    for alpha in (2, 3, 5, 12):
        inside = (p > 1e-280) & (moved > 1e-280)
        for a, b in ((moved, p), (p, moved)):
            true = special.logsumexp(
                alpha * np.log(a[inside]) + (1 - alpha) * np.log(b[inside])
            ) / (alpha - 1)
            assert true <= bound[alpha] * (1 + 1e-9)


@pytest.mark.recipe
@given(
    z=st.floats(1, 8), q=st.sampled_from([0.1, 0.5, 1.0]), steps=st.integers(1, 60), noise=st.floats(2, 30),
    times=st.integers(1, 20),
)  # fmt: skip
@settings(max_examples=5, deadline=None)
def test_a_mixture_costs_at_least_each_part_and_at_most_their_sum(z, q, steps, noise, times):
    gaussian, other = GaussianEvent(q, z, steps), skellam(noise, times)
    both = epsilon([gaussian, other], delta=1e-5)
    parts = [epsilon([gaussian], delta=1e-5), epsilon([other], delta=1e-5)]
    assert max(parts) <= both
    halves = epsilon([gaussian], delta=5e-6) + epsilon([other], delta=5e-6)
    assert both <= halves * (1 + 1e-3)
    assert both <= epsilon([gaussian, other, skellam(noise, times)], delta=1e-5)
    assert both <= epsilon([gaussian, other, gaussian], delta=1e-5) * (1 + 1e-3)


def test_a_mixture_is_never_below_the_gaussian_truth_and_composes_better_than_addition():
    gaussian, other = GaussianEvent(0.1, 1.5, 300), skellam(10.0, 40)
    truth = epsilon(
        [gaussian, GaussianEvent(1.0, 10.0, 40)], delta=1e-5
    )  # what the fine grid is in the limit
    both = epsilon([gaussian, other], delta=1e-5)
    assert truth <= both < 1.2 * truth
    assert both < 0.9 * (epsilon([gaussian], delta=5e-6) + epsilon([other], delta=5e-6))


def test_a_small_skellam_part_costs_a_large_gaussian_one_little():
    gaussian = GaussianEvent(0.1, 1.0, 500)
    alone = epsilon([gaussian], delta=1e-5)
    both = epsilon([gaussian, skellam(2000.0, 1)], delta=1e-5)
    assert alone <= both < alone + 0.05
    assert both < renyi.epsilon(
        [gaussian], delta=1e-5
    )  # by Renyi alone the Gaussian part would cost more


def test_failures_are_taken_off_delta():
    plain = epsilon([skellam(5.0, 10)], delta=1e-5 - 10 * 4e-7)
    assert epsilon([skellam(5.0, 10, failure=4e-7)], delta=1e-5) == pytest.approx(plain, rel=1e-9)
    assert epsilon([skellam(5.0, 10, failure=1.01e-6)], delta=1e-5) == math.inf
    assert epsilon(
        [GaussianEvent(1.0, 3.0, 1), skellam(5.0, 10, failure=4e-7)], delta=1e-5
    ) > epsilon([GaussianEvent(1.0, 3.0, 1), skellam(5.0, 10)], delta=1e-5)


def test_phases_of_one_mechanism_are_merged_by_kind():
    parts = [
        skellam(steps=2),
        GaussianEvent(0.5, 1.0, 1),
        skellam(steps=3),
        skellam(steps=1, failure=1e-9),
        skellam(steps=0),
    ]
    assert set(merge(parts)) == {
        GaussianEvent(0.5, 1.0, 1),
        skellam(steps=5),
        skellam(steps=1, failure=1e-9),
    }
    assert merge(parts) == merge(parts[::-1])
    assert epsilon([GaussianEvent(0.5, 0.0, 1), skellam()], delta=1e-5) == math.inf
    assert epsilon([GaussianEvent(0.5, math.inf, 1), skellam()], delta=1e-5) == epsilon(
        [skellam()], delta=1e-5
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"l2": 0.0},
        {"l1": -1.0},
        {"variance": math.nan},
        {"variance": math.inf},
        {"steps": 1.5},
        {"sampling_prob": 0.0},
        {"failure": -1e-9},
        {"failure": 1.0},
    ],
)
def test_a_skellam_phase_refuses_impossible_numbers_by_name(changed):
    with pytest.raises(RecipeError, match=f"^{next(iter(changed))}: got"):
        skellam(**changed)


def test_a_ledger_with_skellam_charges_recomputes_epsilon_from_its_json():
    book = Ledger("client").add(
        LedgerEntry("population", "prune", 1.0, 30.0, 1),
        *[
            LedgerEntry.of("population", "federate", skellam(20.0, 1, failure=1e-9), r, r)
            for r in (1, 2, 3)
        ],
    )
    assert [(c.what, c.steps, c.first_round, c.last_round) for c in book.entries] == [
        ("prune", 1, 0, 0),
        ("federate", 3, 1, 3),
    ]
    again = Ledger.from_json(book.to_json())
    assert again == book
    assert again.epsilon(delta=1e-5) == epsilon(
        [GaussianEvent(1.0, 30.0, 1), skellam(20.0, 3, failure=1e-9)], delta=1e-5
    )
    assert json.loads(book.to_json())["charges"][1]["noise_multiplier"] == pytest.approx(20.0)


def test_a_ledger_of_version_one_is_still_read():
    old = {"who": "a", "what": "b", "sampling_prob": 0.5, "noise_multiplier": 2.0, "steps": 7}
    page = {"version": 1, "unit": "sample", "charges": [old | {"first_round": 1, "last_round": 7}]}
    book = Ledger.from_json(json.dumps(page))
    assert book.epsilon(delta=1e-5) == epsilon([GaussianEvent(0.5, 2.0, 7)], delta=1e-5)
    assert Ledger.from_json(book.to_json()) == book


@pytest.mark.parametrize(
    "wrong", [{"l2": 5.0}, {"variance": 1.0}, {"variance": 100.0, "l2": 5.0, "l1": 5.0}]
)
def test_a_charge_whose_numbers_do_not_belong_together_is_a_damaged_book(wrong):
    charge = {
        "who": "a",
        "what": "b",
        "sampling_prob": 1.0,
        "noise_multiplier": 3.0,
        "steps": 7,
        **wrong,
    }
    with pytest.raises(PrivacyError, match="not a ledger"):
        Ledger.from_json(json.dumps({"version": 2, "unit": "client", "charges": [charge]}))


def test_a_party_covers_another_only_if_both_kinds_of_noise_do():
    book = Ledger("sample").add(
        LedgerEntry.of("a", "x", skellam(20.0, 5)),
        LedgerEntry("b", "x", 1.0, 20.0, 5),
        LedgerEntry("c", "x", 1.0, 20.0, 4),
        LedgerEntry("d", "x", 1.0, 20.0, 5),
        LedgerEntry.of("d", "x", skellam(30.0, 5)),
    )
    parts = [
        epsilon([skellam(20.0, 5)], delta=1e-5),
        epsilon([GaussianEvent(1.0, 20.0, 5), skellam(30.0, 5)], delta=1e-5),
    ]
    assert book.epsilon(delta=1e-5) == max(parts)


def test_a_curve_of_a_mixture_over_rounds_is_cheap():
    book = Ledger("client").add(LedgerEntry("population", "prune", 0.3, 5.0, 10))
    book.epsilon(delta=1e-5)
    start = time.process_time()
    for number in range(20):
        book = book.add(LedgerEntry.of("population", "federate", skellam(20.0, 1), number, number))
        book.epsilon(delta=1e-5)
    assert time.process_time() - start < 6
