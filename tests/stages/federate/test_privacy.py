"""What a stage plans is what happens: noise of the planned size wherever it is made, and charges that say so."""

import math
import tomllib
from dataclasses import replace

import pytest
import torch

from fedpress.codecs import VALUES, Key
from fedpress.data.population import Population
from fedpress.errors import PrivacyError, RecipeError
from fedpress.federation import Cohort, Guarantee, Payload, SecureSum, Uplink
from fedpress.federation.gatherer import round_mean
from fedpress.federation.schedules import ScheduleContext
from fedpress.privacy.accounting import accountant
from fedpress.stages.federate.privacy import plan_protection
from fedpress.stages.federate.protection import repeated
from fedpress.stages.federate.stage import FederateStage

SIZE = 20_000
SHAPES = ((SIZE,),)
NAMES = tuple(f"c{i}" for i in range(10))
CLIENTS = Population(NAMES, dict.fromkeys(NAMES, 100))
EVERYBODY = Cohort(10, 10)


def stage(**keys):
    return FederateStage.model_validate(
        {"kind": "federate", "num_rounds": 20, "batch_size": 20, **keys}
    )


def private(unit, trust, **more):
    budget = {} if "noise_multiplier" in more else {"epsilon": 8.0}
    return {"unit": unit, "trust": trust, "delta": 1e-4, "clip_norm": 0.5, **budget, **more}


def plan_of(made, cohort=EVERYBODY, shapes=SHAPES, clients=CLIENTS):
    participation = made.schedule.plan_participation(
        ScheduleContext(NAMES, cohort, 5, 5), made.num_rounds
    )
    return plan_protection(made, clients, participation, cohort, shapes)


def planned(cohort=EVERYBODY, **keys):
    return plan_of(stage(**keys), cohort)


def spent(planned, rounds=20):
    phase = max(planned.costs.values(), key=lambda p: p.steps)
    return accountant.epsilon([repeated(phase, rounds)], delta=1e-4)


@pytest.mark.parametrize("unit", ["client", "sample"])
@pytest.mark.parametrize("trust", ["local", "distributed", "central"])
def test_every_kind_of_trust_spends_its_budget_and_no_more(unit, trust):
    plan = planned(privacy=private(unit, trust))
    assert 0.97 * 8.0 <= spent(plan) <= 8.0 * (1 + 1e-9)


def uplink_of(plan, trust, unit="client"):
    grid = plan.grid
    secure = None if grid is None else SecureSum(grid.plan, grid.size, grid.limit, ())
    return Uplink.bind(
        Payload(SIZE, chain=plan.chain, shapes=SHAPES),
        EVERYBODY,
        aggregator=secure,
        weights="equal",
        guarantee=Guarantee(
            plan=next(iter(plan.plans.values())),
            trust=trust,
            noise=plan.noise,
            divisor=plan.divisor,
        ),
    )


def sum_of_sent(uplink, vectors, key_of):
    return sum(
        uplink.decode(uplink.encode({"update": x}, key_of(i)), key_of(i))["update"].double()
        for i, x in enumerate(vectors)
    )


def keys(i, round=1):
    return Key(5, round, f"c{i}")


def test_under_secure_trust_the_guaranteed_survivors_make_the_planned_noise():
    plan = planned(privacy=private("client", "distributed", noise_multiplier=3.0))
    assert plan.grid.plan.survivors == 7
    uplink = uplink_of(plan, "distributed")
    total = sum_of_sent(uplink, [torch.zeros(SIZE)] * 6, keys)  # the seventh knows its own noise
    assert float(total.std()) == pytest.approx(3.0 * 0.5, rel=0.01)


def test_under_local_trust_every_update_carries_all_the_noise():
    plan = planned(privacy=private("client", "local", noise_multiplier=3.0))
    uplink = uplink_of(plan, "local")
    sent = uplink.encode({"update": torch.zeros(SIZE)}, keys(0))[VALUES]
    assert float(sent.std()) == pytest.approx(3.0 * 0.5, rel=0.01)
    assert uplink.vector_codecs[0].bound.l2 == math.inf  # the noise must not be clipped away


def test_under_central_trust_the_server_makes_it_once():
    plan = planned(privacy=private("client", "central", noise_multiplier=3.0))
    mean = round_mean(uplink_of(plan, "central"), [], seed=1, round=1).update
    assert float(mean.std()) == pytest.approx(3.0 * 0.5 / 10, rel=0.01)


@pytest.mark.parametrize("trust", ["distributed", "central"])
def test_a_joint_step_is_the_mean_gradient_of_the_expected_batch(trust):
    plan = planned(
        privacy=private("sample", trust, noise_multiplier=1e-3 if trust == "central" else 2.0),
        lr=0.1,
    )
    uplink = uplink_of(plan, trust, "sample")
    assert uplink.divisor == pytest.approx(
        0.2 * 1000 / 0.1
    )  # expected batch over the learning rate
    assert uplink.trust.steps == "joint"


def test_a_client_vector_is_longer_than_what_one_example_moves_but_bounded():
    plan = planned(privacy=private("sample", "distributed", noise_multiplier=2.0))
    clip = plan.chain[0]
    assert clip.clip_norm == pytest.approx(0.5 * 20)
    assert plan.grid.noise.task.clip_norm == 0.5
    assert not plan.chain[-2].again  # rounding again would use other coins for neighbours


@pytest.mark.parametrize("trust", ["local", "distributed"])
def test_sampling_is_not_counted_on_where_the_server_knows_who_takes_part(trust):
    plan = planned(Cohort(5, 10), privacy=private("client", trust, noise_multiplier=2.0))
    assert all(phase.sampling_prob == 1 for phase in plan.costs.values())
    assert set(plan.costs) == set(NAMES)


def test_cyclic_cohorts_cost_a_client_only_its_own_rounds():
    all_rounds = planned(privacy=private("client", "central"))
    turns = planned(Cohort(2, 10, "cyclic"), privacy=private("client", "central"))
    noise = [next(iter(p.plans.values())).noise_multiplier for p in (all_rounds, turns)]
    assert noise[1] == pytest.approx(noise[0] / math.sqrt(5), rel=1e-3)


def test_correlated_noise_is_one_charge_and_less_noise_in_the_sum_of_all_rounds():
    cohort = Cohort(1, 10, "cyclic")
    plan = planned(cohort, privacy=private("client", "central", correlated={"bands": 8}))
    assert plan.charged_once
    assert spent(plan, rounds=1) <= 8.0 * (1 + 1e-9)
    fresh = planned(cohort, privacy=private("client", "central"))
    totals = []
    for one in (plan, fresh):
        total, state = torch.zeros(SIZE, dtype=torch.float64), {}
        for round in range(1, 21):
            noised, state = one.noise.add(
                torch.zeros(SIZE, dtype=torch.float64), state, Key(1, round, "server")
            )
            total += noised.double()
        totals.append(float(total.std()))
    assert totals[0] < 0.6 * totals[1]


def test_the_count_of_an_adaptive_clip_is_paid_for_by_more_noise_on_the_update():
    plan = planned(privacy=private("client", "central", adaptive={"initial": 0.1}))
    fixed = planned(privacy=private("client", "central"))
    z = next(iter(fixed.plans.values())).noise_multiplier
    update, count = plan.noise.plan.noise_multiplier, plan.adaptive.count_noise
    assert update > z
    assert update**-2 + (2 * count) ** -2 == pytest.approx(z**-2)


def test_fewer_values_need_less_epsilon_at_equal_bits():
    def epsilon(size):
        chain = [{"kind": "rotate"}, {"kind": "discretize", "bits": 14}]
        keys = stage(privacy=private("client", "distributed", noise_multiplier=5.0), uplink=chain)
        return spent(plan_of(keys, shapes=((size,),)))

    assert epsilon(300_000) < 0.8 * epsilon(1_000_000)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"aggregator": "secure", "privacy": private("client", "central")},
            'set trust = "distributed"',
        ),
        (
            {"privacy": private("sample", "central"), "uplink": [{"kind": "topk"}]},
            "one example move",
        ),
        (
            {"privacy": private("sample", "central"), "uplink": [{"kind": "rotate"}]},
            "one example move",
        ),
        ({"privacy": private("sample", "distributed"), "epochs": 2}, "one step together"),
        (
            {"privacy": private("sample", "central"), "optimizer": "adamw"},
            "optimizer: got 'adamw', .* one step together; set",
        ),
        (
            {"privacy": private("client", "distributed"), "uplink": [{"kind": "rotate"}]},
            "end the list with",
        ),
        (
            {"aggregator": "secure", "uplink": [{"kind": "topk"}]},
            "cannot decode a sum of 'topk'; use 'randomk'",
        ),
        ({"aggregator": "secure", "uplink": [{"kind": "discretize"}]}, "put 'clip' before it"),
        (
            {
                "aggregator": "secure",
                "uplink": [{"kind": "clip", "clip_norm": 1}, {"kind": "discretize", "bits": 4}],
            },
            "take 6",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_the_cure(keys, problem):
    with pytest.raises(RecipeError, match=problem):
        planned(**keys)


def test_too_few_bits_for_the_budget_are_refused_with_the_number_that_would_do():
    chain = [{"kind": "rotate"}, {"kind": "discretize", "bits": 8}]
    with pytest.raises(PrivacyError, match="bits"):
        planned(privacy=private("client", "distributed", epsilon=0.5), uplink=chain)


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_samplers_that_a_promise_cannot_rest_on_are_refused(sampling):
    cohort = Cohort(5, 10, sampling)
    trust = "central" if sampling == "fixed" else "distributed"
    with pytest.raises(RecipeError, match=r"^sampling: "):
        planned(cohort, privacy=private("client", trust))


def test_no_two_stages_of_the_same_name_share_noise():
    one = planned(privacy=private("client", "central", noise_multiplier=1.0))
    total = torch.zeros(100, dtype=torch.float64)
    noise = [one.noise.add(total, {}, Key(seed, 1, "server"))[0] for seed in (1, 2)]
    assert not torch.equal(*noise)
    assert torch.equal(noise[0], one.noise.add(total, {}, Key(1, 1, "server"))[0])
    other = replace(one.noise, plan=replace(one.noise.plan, noise_multiplier=2.0))
    ratio = other.add(total, {}, Key(1, 1, "server"))[0] / noise[0]
    assert float(ratio.std()) > 0.1  # not the same draw, only larger


def secure_line(words: str) -> dict:
    """Reads the line that an error says to paste, as a recipe would."""
    return tomllib.loads(words[words.index("uplink = [") :])


def test_a_secure_sum_alone_has_all_that_it_needs():
    assert [one.kind for one in planned(aggregator="secure").chain] == [
        "clip",
        "rotate",
        "discretize",
    ]
    keys = {
        "aggregator": "secure",
        "privacy": private("client", "distributed", noise_multiplier=3.0),
    }
    assert [one.kind for one in planned(**keys).chain][-3:] == ["rotate", "discretize", "noise"]


@pytest.mark.parametrize("privacy", [None, private("client", "distributed", noise_multiplier=3.0)])
@pytest.mark.parametrize(
    "uplink", [[{"kind": "rotate"}], [{"kind": "discretize"}], [{"kind": "clip", "clip_norm": 1}]]
)
def test_the_line_that_an_error_says_to_paste_works(privacy, uplink):
    keys = {"aggregator": "secure"} | ({} if privacy is None else {"privacy": privacy})
    try:
        planned(**keys, uplink=uplink)
    except RecipeError as error:
        line = secure_line(str(error))
        assert planned(**keys, **line).grid is not None
    else:
        assert privacy is not None  # privacy clips by itself, so a list without a clip is whole
        assert uplink == [{"kind": "discretize"}]


@pytest.mark.parametrize("unit", ["client", "sample"])
def test_noise_on_counts_of_failures_costs_no_more_than_the_planned_noise(unit):
    plan = planned(privacy=private(unit, "distributed", noise_multiplier=2.0))
    one = next(iter(plan.plans.values()))
    assert one.epsilon(num_rounds=20, delta=1e-4) <= spent(plan) * (1 + 1e-6)


@pytest.mark.recipe
def test_clients_of_any_size_share_the_noise_of_the_one_that_needs_most():
    sizes = dict(zip(NAMES, (40, 45, 60, 90, 95, 95, 400, 400, 400, 400), strict=True))
    made = stage(batch_size=16, epochs=2, privacy=private("sample", "local", epsilon=4.0))
    plans = set(plan_of(made, clients=Population(NAMES, sizes)).plans.values())
    alone = [plan.calibrate(epsilon=4.0, num_rounds=20).noise_multiplier for plan in plans]
    assert {plan.noise_multiplier for plan in plans} == {max(alone)}
    assert all(plan.epsilon(num_rounds=20) <= 4.0 for plan in plans)
