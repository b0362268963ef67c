import math
import re
from dataclasses import replace

import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedpress.codecs import Key, Quantize, Sign, Ternary, TopK
from fedpress.errors import RecipeError
from fedpress.federation import Cohort, Guarantee, Payload, Uplink
from fedpress.federation.exchange import error
from fedpress.federation.gatherer import round_mean
from fedpress.privacy.adaptive import AdaptiveClip
from fedpress.privacy.plan import PrivacyPlan
from fedpress.wire import Message
from tests.federation.federation import SAMPLE_PLAN, client_plan, update

C = 0.5


def private(size, cohort, noise=0.0):
    return Uplink.bind(
        Payload(size), cohort, weights="equal", guarantee=Guarantee(client_plan(cohort, noise, C))
    )


def named(updates):
    return [
        (f"c{i}", None if u is None else u if isinstance(u, Message) else update(u))
        for i, u in enumerate(updates)
    ]


def test_the_mean_weighs_by_examples_or_equally():
    a, b = (
        update(torch.tensor([1.0, 0.0]), examples=30),
        update(torch.tensor([0.0, 1.0]), examples=10),
    )
    for weights, expected in [("examples", [0.75, 0.25]), ("equal", [0.5, 0.5])]:
        mean = round_mean(
            Uplink.bind(Payload(2), Cohort(2, 2), weights=weights), named([a, b]), seed=1, round=1
        )
        assert mean.update.tolist() == expected
        assert [row["examples"] for row in mean.rows] == [30, 10]
        assert [row["update_norm"] for row in mean.rows] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (None, "no reply came"),
        (error("TrainingError: the loss is not finite"), "the loss is not finite"),
        (Message("error"), "gave no reason"),
        (Message("fit", {"round": 1}), r"update\.kind: got 'fit'"),
        (update(torch.ones(3), round=2), r"update\.round: got 2, expected 1"),
        (
            Message("update", {"examples": 10}, {"values": torch.ones(3)}),
            r"update\.round: got None",
        ),
        (update(torch.ones(4)), r"update: got torch.float32 \[4\], expected torch.float32 \[3\]"),
        (update(torch.ones(3, 1)), r"update: got torch.float32 \[3, 1\]"),
        (update(torch.ones(())), r"update: got torch.float32 \[\]"),
        (update(torch.ones(3, dtype=torch.float64)), r"update: got torch.float64 \[3\]"),
        (update(torch.tensor([1.0, math.nan, 0.0])), "NaN or infinity"),
        (update(torch.tensor([1.0, math.inf, 0.0])), "NaN or infinity"),
        (update(torch.ones(3), examples=0), r"update\.examples: got 0"),
        (update(torch.ones(3), examples=-5), r"update\.examples: got -5"),
        (update(torch.ones(3), examples=1.5), r"update\.examples: got 1.5"),
        (update(torch.ones(3), examples=True), r"update\.examples: got True"),
        (update(torch.ones(3), examples=1 << 60), r"update\.examples"),
        (Message("update", {"round": 1, "examples": 1}), "'values' is missing"),
        (
            Message(
                "update", {"round": 1, "examples": 1}, {"values": torch.ones(3), "x": torch.ones(1)}
            ),
            "tensors.x",
        ),
    ],
)
def test_a_bad_reply_is_refused_with_its_reason_and_the_rest_counts(reply, reason):
    good = update(torch.tensor([3.0, 4.0, 0.0]))
    mean = round_mean(
        Uplink.bind(Payload(3), Cohort(3, 3)), named([good, reply, good]), seed=1, round=1
    )
    assert list(mean.refused) == ["c1"]
    assert re.search(reason, mean.refused["c1"])
    assert mean.update.tolist() == [3.0, 4.0, 0.0]
    assert [row["client"] for row in mean.rows] == ["c0", "c2"]


def test_a_zero_update_counts_like_any_other():
    mean = round_mean(
        Uplink.bind(Payload(2), Cohort(2, 2)),
        named([torch.zeros(2), torch.ones(2)]),
        seed=1,
        round=1,
    )
    assert mean.update.tolist() == [0.5, 0.5]
    assert not mean.refused
    alone = round_mean(
        Uplink.bind(Payload(2), Cohort(1, 1)), named([torch.zeros(2)]), seed=1, round=1
    )
    assert alone.update.tolist() == [0.0, 0.0]


def test_without_a_usable_reply_there_is_no_mean():
    for replies in ([], [None, update(torch.tensor([math.nan, 0]))]):
        assert (
            round_mean(
                Uplink.bind(Payload(2), Cohort(2, 2)), named(replies), seed=1, round=1
            ).update
            is None
        )


def test_under_client_privacy_an_empty_round_is_noise_alone():
    mean = round_mean(private(10_000, Cohort(5, 50, "poisson"), noise=2.0), [], seed=1, round=1)
    assert mean.update.std().item() == pytest.approx(2.0 * C / 5, rel=0.03)


@pytest.mark.parametrize("replies", [10, 3, 0])
def test_noise_on_the_mean_is_that_of_the_public_cohort_however_few_reply(replies):
    sent = named([torch.zeros(300_000) if i < replies else None for i in range(10)])
    mean = round_mean(private(300_000, Cohort(10, 10), noise=1.5), sent, seed=1, round=1)
    assert mean.update.std().item() == pytest.approx(1.5 * C / 10, rel=0.01)
    assert abs(mean.update.mean().item()) < 4 * 1.5 * C / 10 / math.sqrt(300_000)


def test_noise_differs_between_rounds_and_seeds_and_is_the_same_on_repeat():
    uplink = private(100, Cohort(1, 1), noise=1.0)

    def noise(seed, round):
        return round_mean(uplink, [], seed=seed, round=round).update

    assert torch.equal(noise(1, 1), noise(1, 1))
    assert not torch.equal(noise(1, 1), noise(1, 2))
    assert not torch.equal(noise(1, 1), noise(2, 1))


def test_under_client_privacy_the_divisor_is_the_cohort_and_not_the_replies():
    mean = round_mean(
        private(2, Cohort(4, 4)),
        named([torch.tensor([0.3, 0.0]), None, None, None]),
        seed=1,
        round=1,
    )
    assert mean.update.tolist() == pytest.approx([0.3 / 4, 0.0])


def test_under_client_privacy_nothing_about_single_clients_is_recorded():
    reply = update(torch.ones(2), loss=3.0, steps=4)
    assert round_mean(private(2, Cohort(1, 1)), named([reply]), seed=1, round=1).rows == []


def test_under_client_privacy_claimed_examples_have_no_weight():
    replies = named(
        [
            update(torch.tensor([0.4, 0.0]), examples=1 << 39),
            update(torch.tensor([0.0, 0.4]), examples=1),
        ]
    )
    assert round_mean(
        private(2, Cohort(2, 2)), replies, seed=1, round=1
    ).update.tolist() == pytest.approx([0.2, 0.2])


vectors = st.lists(st.floats(width=32), min_size=4, max_size=4).map(torch.tensor)


@pytest.mark.recipe
@settings(max_examples=300, deadline=None)
@given(vectors, vectors, st.booleans())
@example(torch.full((4,), 3.4e38), torch.zeros(4), True)
@example(torch.full((4,), math.nan), torch.zeros(4), True)
@example(torch.full((4,), 1e-45), torch.zeros(4), False)
def test_one_client_moves_the_mean_by_at_most_the_clip_norm_over_the_cohort(mine, other, replaced):
    uplink = private(4, Cohort(3, 3))
    rest = [torch.tensor([0.1, 0.0, -0.2, 0.3]), other]
    with_me = round_mean(uplink, named([*rest, mine]), seed=1, round=1).update.double()
    without = round_mean(
        uplink, named([*rest, None if replaced else torch.zeros(4)]), seed=1, round=1
    ).update.double()
    assert torch.isfinite(with_me).all()
    assert (with_me - without).norm() <= C / 3 + 1e-7


def test_metrics_that_leave_a_client_are_those_that_the_unit_allows():
    measured = {"loss": 1.0, "steps": 4, "batch": 3}
    cohort = Cohort(2, 2)
    said = {
        "open": Uplink.bind(Payload(2), cohort).trust.reported(measured, 9, updates_seen=True),
        "sample": Uplink.bind(Payload(2), cohort, guarantee=Guarantee(SAMPLE_PLAN)).trust.reported(
            measured, 9, updates_seen=True
        ),
        "client": private(2, cohort).trust.reported(measured, 9, updates_seen=True),
        "secure": Uplink.bind(Payload(2), cohort).trust.reported(measured, 9, updates_seen=False),
    }
    assert said == {
        "open": {"loss": 1.0, "steps": 4, "examples": 9},
        "sample": {"steps": 4, "examples": 9},
        "client": {},
        "secure": {},
    }


def test_what_a_client_says_beyond_the_allowed_is_not_recorded():
    reply = update(torch.ones(2), loss=9.0, steps=4, secret=5)
    row = round_mean(
        Uplink.bind(Payload(2), Cohort(1, 1), guarantee=Guarantee(SAMPLE_PLAN)),
        named([reply]),
        seed=1,
        round=1,
    ).rows[0]
    assert row.keys() == {"client", "examples", "steps", "update_norm"}


def test_example_weights_under_client_privacy_are_refused_before_the_run():
    with pytest.raises(RecipeError, match=r'weights = "equal"'):
        Uplink.bind(
            Payload(2),
            Cohort(2, 2),
            weights="examples",
            guarantee=Guarantee(client_plan(Cohort(2, 2))),
        )


def test_unknown_weights_are_refused():
    with pytest.raises(RecipeError, match=r"^weights: got 'size'"):
        Uplink.bind(Payload(2), Cohort(2, 2), weights="size")


def test_client_noise_without_a_clip_bound_cannot_be_planned():
    for bad in (0.0, math.inf, math.nan, -1.0):
        with pytest.raises(RecipeError, match="clip_norm"):
            Uplink.bind(
                Payload(2),
                Cohort(2, 2),
                weights="equal",
                guarantee=Guarantee(PrivacyPlan("client", bad, 1.0, 1.0)),
            )


def test_a_plan_that_counts_on_another_sampler_is_refused():
    plan = PrivacyPlan("client", 1.0, 0.1, 1.0)
    with pytest.raises(RecipeError, match=r"privacy\.sampling_prob: got 0\.1"):
        Uplink.bind(
            Payload(2), Cohort(10, 100, "fixed"), weights="equal", guarantee=Guarantee(plan)
        )
    assert (
        Uplink.bind(
            Payload(2), Cohort(10, 100, "poisson"), weights="equal", guarantee=Guarantee(plan)
        ).trust.unit
        == "client"
    )


def test_client_noise_is_new_for_every_sum_and_plan_and_the_same_on_repeat():
    def noise(total, multiplier=1.0):
        uplink = private(20_000, Cohort(1, 1), noise=multiplier)
        return (round_mean(uplink, named([total]), seed=1, round=1).update - total) / multiplier

    zeros, other = torch.zeros(20_000), torch.zeros(20_000)
    other[0] = 1e-6  # one value of one client differs a little
    base = noise(zeros)
    assert torch.equal(base, noise(zeros))
    for again in (noise(other), noise(zeros, 2.0)):
        assert abs(float(torch.corrcoef(torch.stack([base, again]))[0, 1])) < 0.03


def adaptive(size, cohort, noise=1.0, **how):
    moving = AdaptiveClip(count_noise=0.3, **how)
    plan = replace(client_plan(cohort, noise), clip_norm=1.0)
    return Uplink.bind(
        Payload(size), cohort, weights="equal", guarantee=Guarantee(plan=plan, adaptive=moving)
    )


@pytest.mark.parametrize("initial", [0.02, 200.0])
def test_an_adaptive_clip_finds_the_median_norm_from_far_below_and_above(initial):
    cohort = Cohort(20, 20)
    uplink = adaptive(4, cohort, noise=0.1, initial=initial)
    norms, state = torch.linspace(1.0, 3.0, 20), uplink.init()
    for round in range(1, 151):
        unit = uplink.update_scale(state)
        replies = []
        for at, norm in enumerate(norms):
            x = torch.tensor([float(norm), 0.0, 0.0, 0.0])
            tensors = uplink.encode({"update": x}, Key(1, round, f"c{at}"), scale=unit)
            replies.append(
                (
                    f"c{at}",
                    Message("update", {"round": round, "below": float(norm) <= unit}, tensors),
                )
            )
        state = round_mean(uplink, replies, seed=1, round=round, state=state).state
    assert uplink.update_scale(state) == pytest.approx(2.0, rel=0.2)


def test_under_an_adaptive_clip_updates_travel_in_units_of_it_and_come_back_whole():
    cohort = Cohort(2, 2)
    uplink = adaptive(2, cohort, noise=0.0, initial=10.0)
    sent = [
        uplink.encode({"update": torch.tensor(x)}, Key(1, 1, "c"), scale=10.0)
        for x in ([3.0, 4.0], [30.0, 40.0])
    ]
    assert sent[0]["values"].tolist() == pytest.approx([0.3, 0.4])
    assert sent[1]["values"].tolist() == pytest.approx([0.6, 0.8])  # clipped to one unit
    replies = [
        (f"c{i}", Message("update", {"round": 1, "below": True}, t)) for i, t in enumerate(sent)
    ]
    mean = round_mean(uplink, replies, seed=1, round=1, state=uplink.init())
    assert mean.update.tolist() == pytest.approx([4.5, 6.0])


@pytest.mark.parametrize(
    ("unit", "trust"),
    [("client", "local"), ("sample", "local"), ("sample", "central"), (None, None)],
)
def test_the_bits_of_an_adaptive_clip_go_to_a_trusted_server_alone(unit, trust):
    plan = None if unit is None else PrivacyPlan(unit, 1.0, 1.0, 1.0)
    moving = AdaptiveClip(initial=1.0, count_noise=1.0)
    promise = Guarantee(plan=plan, trust=trust, adaptive=moving)
    with pytest.raises(RecipeError, match="where clients' bits get no noise"):
        Uplink.bind(Payload(3), Cohort(2, 2), weights="equal", guarantee=promise)


def test_a_reply_without_its_bit_is_refused_under_an_adaptive_clip():
    uplink = adaptive(2, Cohort(1, 1), initial=1.0)
    mean = round_mean(uplink, [("c0", update(torch.ones(2)))], seed=1, round=1, state=uplink.init())
    assert "update.below" in mean.refused["c0"]


@pytest.mark.parametrize("secret", [None, 12345])
def test_noise_in_every_mode_has_its_size_and_shape(secret):
    cohort = Cohort(10, 10)
    uplink = private(200_000, cohort, noise=1.5)
    noise = (
        round_mean(uplink, [], seed=1, round=1, secret=secret).update.double().numpy()
        * 10
        / (1.5 * C)
    )
    assert noise.std() == pytest.approx(1.0, rel=0.01)
    assert scipy.stats.kstest(noise, "norm").pvalue > 1e-3
    again = round_mean(uplink, [], seed=1, round=1, secret=secret).update
    assert float((again.double().numpy() * 10 / (1.5 * C) - noise).max()) == 0
    other = round_mean(uplink, [], seed=1, round=1, secret=None if secret else 99).update
    assert abs(float(torch.corrcoef(torch.stack([again, other]))[0, 1])) < 0.01


@pytest.mark.recipe
@pytest.mark.parametrize("kind", ["quantize", "topk", "sign", "ternary"])
def test_with_any_codec_one_client_moves_a_plain_private_sum_by_at_most_the_clip_norm(kind):
    settings_ = {
        "quantize": Quantize(rate=1.0),
        "topk": TopK(density=0.3),
        "sign": Sign(),
        "ternary": Ternary(),
    }[kind]
    cohort = Cohort(3, 3)
    uplink = Uplink.bind(
        Payload(64, chain=(settings_,)),
        cohort,
        weights="equal",
        guarantee=Guarantee(client_plan(cohort, 0.0, C)),
    )
    chance = torch.Generator().manual_seed(2)
    for round in range(1, 200):
        scale = 10 ** float(torch.empty(()).uniform_(-3, 3, generator=chance))
        sent = uplink.encode(
            {"update": scale * torch.randn(64, generator=chance)}, Key(1, round, "c0")
        )
        moved = round_mean(
            uplink, [("c0", Message("update", {"round": round}, sent))], seed=1, round=round
        ).update
        assert float(moved.double().norm()) <= C / 3 * (1 + 1e-6)


def test_only_vectors_with_codecs_have_their_floats_packed():
    plain = Uplink.bind(Payload(64), Cohort(3, 3))
    coded = Uplink.bind(Payload(64, chain=(TopK(density=0.3),)), Cohort(3, 3))
    planned = Uplink.bind(
        Payload(64),
        Cohort(3, 3),
        weights="equal",
        guarantee=Guarantee(client_plan(Cohort(3, 3), 0.0, C)),
    )
    for uplink, names in ((plain, set()), (coded, {"values"}), (planned, set())):
        tensors = uplink.encode({"update": torch.ones(64)}, Key(1, 1, "c0"))
        assert uplink.packed_floats(tensors) == names
