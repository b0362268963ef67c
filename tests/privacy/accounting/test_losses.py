import json
import math
import random
import subprocess
import sys
import time

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpress.errors import RecipeError
from fedpress.privacy.accounting import accountant, losses, renyi
from fedpress.privacy.accounting.accountant import (
    GaussianEvent,
    SkellamEvent,
    epsilon,
    noise_multiplier,
    spent,
)
from fedpress.privacy.accounting.events import merge, merge_similar
from fedpress.privacy.ledger import Ledger, LedgerEntry

HARD = [
    (1e-9, 0.3, 10**7, 1e-12),
    (1e-9, 1e4, 10**7, 0.1),
    (1e-7, 0.5, 10**5, 1e-7),
    (1e-5, 0.6, 10**4, 1e-7),
    (1e-3, 0.3, 10**7, 1e-9),
    (0.5, 0.3, 10**7, 1e-5),
    (0.1, 1e4, 10**7, 1e-12),
]


def one_step_delta(eps, q, z):
    """The exact delta of one sampled Gaussian step, in 50 digits."""
    with mpmath.workdps(50):
        q, z, ratio = mpmath.mpf(q), mpmath.mpf(z), mpmath.exp(eps)

        def sum_at(likelihood):
            return z * z * mpmath.log((likelihood - (1 - q)) / q) + 0.5

        x = sum_at(ratio)
        removed = (
            (1 - q) * mpmath.ncdf(-x / z)
            + q * mpmath.ncdf((1 - x) / z)
            - ratio * mpmath.ncdf(-x / z)
        )
        if 1 / ratio <= 1 - q:
            return max(removed, mpmath.mpf(0))
        x = sum_at(1 / ratio)
        added = mpmath.ncdf(x / z) - ratio * (
            (1 - q) * mpmath.ncdf(x / z) + q * mpmath.ncdf((x - 1) / z)
        )
        return max(removed, added)


def one_step_epsilon(q, z, delta):
    if one_step_delta(0, q, z) <= delta:
        return 0.0
    low, high = mpmath.mpf(0), mpmath.mpf(1)
    while one_step_delta(high, q, z) > delta:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if one_step_delta(middle, q, z) > delta else (low, middle)
    return float(high)


@pytest.mark.parametrize("q", [1e-9, 1e-6, 1e-3, 0.1, 0.99])
@pytest.mark.parametrize("z", [0.3, 0.8, 4.0, 1e4])
def test_one_step_is_never_below_the_closed_form_and_close_to_it_where_it_says_so(q, z):
    for delta in (1e-12, 1e-7, 1e-2):
        exact = one_step_epsilon(q, z, delta)
        bound = losses.epsilon_bound([GaussianEvent(q, z, 1)], delta=delta, points=1 << 17)
        assert bound.epsilon >= exact * (1 - 1e-9)
        if bound.fine:
            assert bound.epsilon <= exact * 1.01 + 1e-3 * q


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("q", "z", "steps"),
    [(0.0427, 1.0, 500), (0.1, 4.0, 500), (0.5, 0.5, 10), (0.9, 2.0, 300), (0.001, 0.7, 1000)],
)
def test_compositions_are_those_of_dp_accounting(q, z, steps):
    from dp_accounting.pld import privacy_loss_distribution

    step = privacy_loss_distribution.from_gaussian_mechanism(
        z,
        sampling_prob=q,
        value_discretization_interval=0.02
        * accountant.grid_step([GaussianEvent(q, z, steps)])
        / 0.06,
    )
    composed = step.self_compose(steps)
    for delta in (0.1, 1e-3, 1e-6, 1e-9):
        truth = composed.get_epsilon_for_delta(delta)
        found = losses.epsilon_bound([GaussianEvent(q, z, steps)], delta=delta).epsilon
        assert truth * (1 - 1e-4) <= found <= truth * 1.001


def test_phases_compose_like_those_of_dp_accounting():
    events = [
        GaussianEvent(0.1, 2.0, 60),
        GaussianEvent(0.02, 1.0, 200),
        GaussianEvent(1.0, 30.0, 5),
    ]
    assert losses.epsilon_bound(events, delta=1e-5).epsilon == pytest.approx(
        epsilon(events, delta=1e-5), rel=1e-3
    )


@pytest.mark.recipe
@pytest.mark.parametrize(("noise", "steps"), [(1e4, 10**7), (30.0, 1000), (0.3, 3)])
def test_steps_on_everybody_are_those_of_the_closed_form(noise, steps):
    for delta in (1e-12, 1e-5, 1e-2):
        exact = epsilon([GaussianEvent(1.0, noise, steps)], delta=delta)
        bound = losses.epsilon_bound([GaussianEvent(1.0, noise, steps)], delta=delta)
        assert exact <= bound.epsilon <= exact * 1.002
        assert bound.fine


def test_a_promise_of_nothing_costs_nothing_and_one_of_much_costs_that():
    events = [GaussianEvent(0.01, 1.0, 1000)]
    alone = losses.epsilon_bound(events, delta=1e-5).epsilon
    assert losses.epsilon_bound(events, delta=1e-5, guarantee=(0.0, 0.0)).epsilon == pytest.approx(
        alone, rel=2e-3
    )
    with_much = losses.epsilon_bound(events, delta=1e-5, guarantee=(5.0, 1e-7)).epsilon
    assert alone < 5 < with_much < 5 + alone * 1.01
    assert losses.epsilon_bound(events, delta=1e-5, guarantee=(1.0, 1e-4)).epsilon == math.inf


@pytest.mark.recipe
@given(
    q=st.floats(-9, 0).map(lambda x: 10**x),
    z=st.floats(math.log10(0.3), 4).map(lambda x: 10**x),
    steps=st.floats(0, 7).map(lambda x: int(10**x)),
    delta=st.floats(-12, -1).map(lambda x: 10**x),
)
@settings(max_examples=8, deadline=None)
def test_every_question_of_the_whole_range_is_answered_below_renyi_and_in_order(q, z, steps, delta):
    def ask(q, z, steps, delta):
        return losses.epsilon_bound([GaussianEvent(q, z, steps)], delta=delta, points=1 << 15)

    at = ask(q, z, steps, delta)
    more = max(1e-9, 0.01 * at.epsilon) if at.fine else math.inf
    assert at.epsilon >= 0
    assert ask(q, 1.5 * z, steps, delta).epsilon <= at.epsilon + more
    assert ask(q, z, steps, min(2 * delta, 0.5)).epsilon <= at.epsilon + more
    assert (
        spent([GaussianEvent(q, z, steps)], delta=delta).epsilon
        <= renyi.epsilon([GaussianEvent(q, z, steps)], delta=delta) * 1.01
    )
    assert (
        spent([GaussianEvent(q, z, 2 * steps)], delta=delta).epsilon
        >= 0.99 * spent([GaussianEvent(q, z, steps)], delta=delta).epsilon
    )


@pytest.mark.recipe
def test_fewer_points_never_answer_less():
    for q, z, steps, delta in HARD[:4]:
        few = losses.epsilon_bound([GaussianEvent(q, z, steps)], delta=delta, points=1 << 13)
        many = losses.epsilon_bound([GaussianEvent(q, z, steps)], delta=delta, points=1 << 18)
        assert few.epsilon >= many.epsilon * (1 - 1e-6)


@pytest.mark.recipe
@pytest.mark.parametrize(("noise", "steps"), [(0.3, 1), (27.0, 1), (1e4, 10**7), (0.85, 10**7)])
@pytest.mark.parametrize("missing", [1e-12, 1e-6])
def test_sampling_never_adds_where_nearly_everybody_takes_part(noise, steps, missing):
    for delta in (1e-12, 0.1):
        sampled = epsilon([GaussianEvent(1 - missing, noise, steps)], delta=delta)
        assert sampled <= epsilon([GaussianEvent(1.0, noise, steps)], delta=delta)


@pytest.mark.recipe
def test_a_coarse_answer_is_said_to_be_an_upper_bound():
    hard = spent([GaussianEvent(1e-9, 0.3, 1)], delta=1e-12)
    assert hard.upper_bound
    assert "upper bound" in hard.note
    easy = spent([GaussianEvent(0.1, 1.0, 100)], delta=1e-5)
    assert (easy.upper_bound, easy.note) == (False, "")
    assert spent(
        [SkellamEvent(10.0, 100.0, 4e4, 5)], delta=1e-5
    ).upper_bound  # Renyi alone knows Skellam noise
    book = Ledger("client").add(
        LedgerEntry("a", "x", 1e-9, 0.3, 1), LedgerEntry("b", "x", 1.0, 1e9, 1)
    )
    assert book.spent(delta=1e-12) == hard


@pytest.mark.recipe
def test_many_different_phases_are_joined_to_few_that_spend_no_less():
    chance = random.Random(0)
    many = merge(
        [
            GaussianEvent(10 ** chance.uniform(-3, -2), chance.uniform(0.8, 1.2), 5)
            for _ in range(2000)
        ]
    )
    few = merge_similar(many, 60)
    assert len(few) <= 60
    assert sum(event.steps for event in few) == sum(event.steps for event in many)
    for event in many:
        assert any(one.sampling_prob >= event.sampling_prob and one.noise_multiplier <= event.noise_multiplier
                   for one in few)  # fmt: skip
    assert merge_similar(many[:60], 60) == many[:60]
    together = spent(many, delta=1e-5)
    assert together.upper_bound
    worst = GaussianEvent(
        max(p.sampling_prob for p in many), min(p.noise_multiplier for p in many), 10_000
    )
    best = GaussianEvent(
        min(p.sampling_prob for p in many), max(p.noise_multiplier for p in many), 10_000
    )
    assert epsilon([best], delta=1e-5) < together.epsilon < epsilon([worst], delta=1e-5)
    assert together.epsilon >= spent(many[:60], delta=1e-5).epsilon


@pytest.mark.parametrize("q", [5e-324, 1e-300, 0.5, 1.0])
@pytest.mark.parametrize("noise", [1e-200, 1e-6, 1e12, 1e300])
def test_numbers_that_cannot_be_squared_are_answered_too(q, noise):
    found = epsilon([GaussianEvent(q, noise, 10)], delta=1e-5)
    assert found >= 0
    assert (found == math.inf) == (noise == 1e-200)


def test_numbers_beyond_all_use_are_refused():
    with pytest.raises(RecipeError, match=r"steps: got .*, expected 10,000,000,000 or fewer"):
        GaussianEvent(0.1, 1.0, 10**15)
    with pytest.raises(RecipeError, match="delta: got 5e-324, expected 1e-200 or more"):
        epsilon([GaussianEvent(0.01, 1.0, 10)], delta=5e-324)


@pytest.mark.recipe
def test_of_many_parties_the_one_that_spent_most_is_found_quickly(monkeypatch):
    charges = [
        LedgerEntry(f"c{i}", "x", 0.001 + 0.1 * i / 40, 0.7 + i / 40, 1000) for i in range(40)
    ]
    asked = []
    spending = accountant.spent
    monkeypatch.setattr(
        accountant, "spent", lambda *args, **more: asked.append(args) or spending(*args, **more)
    )
    found = Ledger("client").add(*charges).spent(delta=1e-5)
    assert len(asked) < 25
    assert found.epsilon == max(epsilon([charge.event], delta=1e-5) for charge in charges)


@pytest.mark.parametrize(
    ("q", "steps", "delta", "budget"),
    [
        pytest.param(1e-6, 10**5, 1e-9, 1.0, marks=pytest.mark.recipe),
        (0.02, 10**7, 1e-12, 8.0),
    ],
)
def test_noise_is_found_where_tables_are_long_and_keeps_the_budget(q, steps, delta, budget):
    noise = noise_multiplier(epsilon=budget, delta=delta, sampling_prob=q, steps=steps)
    assert 0.97 * budget < epsilon([GaussianEvent(q, noise, steps)], delta=delta) <= budget


@pytest.mark.recipe
def test_a_mixture_of_a_rare_phase_and_skellam_noise_is_at_least_each_part():
    rare, other = GaussianEvent(1e-5, 0.6, 10**4), SkellamEvent(1e4, 1e6, (1e4 * 20) ** 2, 10)
    both = epsilon([rare, other], delta=1e-7)
    parts = [epsilon([rare], delta=1e-7), epsilon([other], delta=1e-7)]
    assert max(parts) <= both <= 1.2 * sum(parts)


@pytest.mark.recipe
def test_many_phases_and_many_parties_share_the_time_of_a_few():
    events = [GaussianEvent(1e-5 * (1 + 0.01 * i), 0.6 + 0.01 * i, 100 + i) for i in range(60)]
    start = time.process_time()
    together = spent(events, delta=1e-7)
    assert time.process_time() - start < 10
    single = [spent([p], delta=1e-7, points=1 << 12).epsilon for p in events[:3]]
    assert max(single) <= together.epsilon <= renyi.epsilon(events, delta=1e-7) * 1.001
    book = Ledger("client").add(
        *[LedgerEntry(f"c{i}", "x", 1e-5 / (i + 1), 0.6, 1000 * (i + 1)) for i in range(30)]
    )
    start = time.process_time()
    assert book.spent(delta=1e-7).epsilon > 0
    assert time.process_time() - start < 10


@pytest.mark.recipe
def test_hard_questions_take_seconds_and_little_memory():
    code = (
        "import json, resource, sys, time\n"
        "import scipy.fft, scipy.special\n"
        "from fedpress.privacy.accounting.accountant import GaussianEvent, epsilon\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for q, z, steps, delta in json.loads(sys.argv[1]):\n"
        "    began = time.process_time()\n"
        "    assert epsilon([GaussianEvent(q, z, steps)], delta=delta) >= 0\n"
        "    assert time.process_time() - began < 10\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < 2**20\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(HARD[::2])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
