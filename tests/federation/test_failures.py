import math
from dataclasses import astuple, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedpress.core.examples import Arrays
from fedpress.federation import Cohort, LocalSettings
from fedpress.federation.client_state import InMemoryState
from fedpress.federation.failures import Tally
from fedpress.federation.gatherer import round_mean
from fedpress.federation.servernoise import KEYS, ServerNoise
from fedpress.privacy.noise.factorization import Factorization
from fedpress.privacy.per_example.gradients import METHODS, clipped_gradient_sum
from fedpress.privacy.plan import PrivacyPlan
from fedpress.wire import pack, unpack
from tests.federation.federation import (
    SAMPLE_PLAN,
    Federation,
    client_plan,
    joint_gradient,
    key,
    mlp,
    train_privately,
)
from tests.federation.test_local import task

PLAN = PrivacyPlan("sample", 0.5, 1.0, 2.0)


class Words(nn.Module):
    """Fails on a token beyond its vocabulary of 10."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.embed(x.long()).mean(1))


def words(n=6, seed=0):
    chance = torch.Generator().manual_seed(seed)
    x = torch.randint(10, (n, 5), generator=chance).float()
    return Arrays(x, torch.randint(3, (n,), generator=chance))


@pytest.mark.parametrize("method", METHODS)
def test_an_example_on_which_the_network_fails_gives_nothing_and_is_counted(method):
    model, arrays = Words(), words()
    bad = arrays.x.clone()
    bad[2, 0] = 99
    keep = torch.tensor([0, 1, 3, 4, 5])
    got, raw = clipped_gradient_sum(
        model, F.cross_entropy, bad, arrays.y, clip_norm=0.3, method=method, verify="gradients"
    )
    without, _ = clipped_gradient_sum(
        model, F.cross_entropy, bad[keep], arrays.y[keep], clip_norm=0.3
    )
    assert torch.equal(got, without)
    assert (raw.failed, raw.refused) == (1, 0)
    assert "IndexError" in raw.problem


values = st.sampled_from([0.0, 1.0, 9.0, 99.0, -1.0, math.inf, math.nan])


@pytest.mark.recipe
@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=5, max_size=5), st.integers(0, 3))
def test_one_example_moves_gradients_and_counts_together_by_at_most_the_clip_norm(example, label):
    model, arrays, clip_norm = Words(), words(3), 0.2
    x = torch.cat([arrays.x, torch.tensor([example])])
    y = torch.cat([arrays.y, torch.tensor([label])])  # 3 is no class of the network
    vectors = []
    for n in (3, 4):
        total, raw = clipped_gradient_sum(model, F.cross_entropy, x[:n], y[:n], clip_norm=clip_norm)
        counts = torch.tensor([float(raw.refused), float(raw.failed)])
        vectors.append(torch.cat([total / clip_norm, counts]).double())
    assert float((vectors[1] - vectors[0]).norm()) <= 1 + 1e-6


def test_noise_on_counts_has_the_planned_size_and_grows_with_the_steps():
    for steps in (1, 9):
        drawn = [Tally().noised(PLAN, key(round=r), steps=steps, hidden="") for r in range(1, 400)]
        values = torch.tensor([astuple(one) for one in drawn])
        assert values.std().item() == pytest.approx(2.0 * math.sqrt(steps), rel=0.1)
        assert abs(values.mean().item()) < 0.3 * math.sqrt(steps)


def test_equal_questions_get_equal_noise_and_others_another():
    base = Tally(1, 2).noised(PLAN, key(), steps=1, hidden="a")
    assert base == Tally(1, 2).noised(PLAN, key(), steps=1, hidden="a")
    for other in (
        Tally(1, 2).noised(PLAN, key(), steps=1, hidden="b"),
        Tally(1, 2).noised(PLAN, key(round=2), steps=1, hidden="a"),
        Tally(1, 2).noised(PLAN, key("c1"), steps=1, hidden="a"),
        Tally(1, 2).noised(replace(PLAN, noise_multiplier=2.5), key(), steps=1, hidden="a"),
    ):
        assert other != base
    moved = Tally(1, 3).noised(PLAN, key(), steps=1, hidden="a")
    assert moved.failed - base.failed != pytest.approx(1.0)


def test_a_plan_without_noise_counts_exactly():
    assert Tally(1, 2).noised(
        replace(PLAN, noise_multiplier=0.0), key(), steps=1, hidden=""
    ) == Tally(1, 2)


def test_tallies_add_up():
    assert Tally.sum([Tally(1, 2), Tally(0.5, 3)]) == Tally(1.5, 5)
    assert Tally.sum([]) == Tally()
    assert Tally.of({"failed": 3, "steps": 1}) == Tally(0, 3)


@pytest.mark.parametrize(
    "step", [train_privately, lambda model, work: joint_gradient(model, work)[1]]
)
def test_private_local_updates_count_by_cause(step):
    plan = PrivacyPlan("sample", 0.3, 1.0, 1.0)
    arrays = words()
    arrays.x[0, 0], arrays.x[1, 0] = 99, 77
    model = Words()
    measured = step(model, task(arrays, plan=plan))
    assert measured == {"steps": 1, "failed": 2}
    broken = Arrays(torch.full((4, 6), math.nan), torch.zeros(4, dtype=torch.int64))
    assert step(mlp(), task(broken, plan=plan)) == {"steps": 1, "not_finite": 4}


def failing(x, generator):
    raise ValueError("secret")


@pytest.mark.parametrize("failed", [False, True])
def test_what_a_client_says_of_failures_is_noised_unless_the_server_is_trusted(failed):
    cohort = Cohort(4, 4)
    prepare = {"prepare": failing} if failed else {}
    central = Federation(privacy=client_plan(cohort), weights="equal", **prepare)
    header = unpack(central.clients["c0"].handle(pack(central.fit()))).header
    assert header.get("failures") == ([0.0, 1.0] if failed else None)
    sample = Federation(privacy=SAMPLE_PLAN)
    counts = unpack(sample.clients["c0"].handle(pack(sample.fit()))).header["failures"]
    assert len(counts) == 2
    assert all(count != round(count) for count in counts)


def test_a_trusted_server_adds_the_noise_and_counts_who_does_not_answer():
    cohort = Cohort(4, 4)
    federation = Federation(
        privacy=client_plan(cohort, noise=0.2), weights="equal", prepare=failing
    )
    replies = [
        (name, unpack(client.handle(pack(federation.fit()))))
        for name, client in federation.clients.items()
    ]
    replies[3] = ("c3", None)
    mean = round_mean(federation.uplink, iter(replies), seed=1, round=1)
    assert mean.failures.failed == pytest.approx(4, abs=1)
    assert mean.failures.failed != 4
    assert mean.failures.not_finite == pytest.approx(0, abs=1)


def test_divergence_under_client_privacy_is_counted_as_such():
    settings = LocalSettings(lr=1e30, epochs=5)
    federation = Federation(privacy=client_plan(Cohort(4, 4)), weights="equal", settings=settings)
    reply = unpack(federation.clients["c0"].handle(pack(federation.fit())))
    assert reply.header["failures"] == [1.0, 0.0]
    assert not reply.tensors["values"].any()


def test_counts_under_correlated_noise_are_coordinates_of_the_same_mechanism():
    factors = Factorization.plan(30, participations=30, bands=4)
    noise = ServerNoise(PrivacyPlan("client", 0.5, 1.0, 2.0), factors)
    state, seen, counts = {}, [], torch.zeros(400, dtype=torch.float64)
    for round in range(1, 31):
        noised, state = noise.count(counts, state, key("server", round), "")
        seen.append(noised)
    rounds = torch.stack(seen)
    assert rounds[10:].std().item() == pytest.approx(noise.multiplier, rel=0.05)
    prefix = rounds.cumsum(0).square().mean(1).mean().sqrt().item()
    assert prefix == pytest.approx(2.0 * factors.rmse, rel=0.1)
    plain = ServerNoise(noise.plan)
    assert plain.multiplier == 2.0
    assert plain.count(counts, {}, key("server"), "")[0].std().item() == pytest.approx(2.0, rel=0.1)


def test_noise_on_counts_leaves_the_noise_on_updates_as_it_was():
    for factors in (None, Factorization.plan(5, participations=5, bands=4)):
        noise = ServerNoise(PrivacyPlan("client", 0.5, 1.0, 2.0), factors)
        total, state = torch.arange(6.0), {}
        for round in (1, 2):
            alone, after = noise.add(
                total, {k: v for k, v in state.items() if k == KEYS}, key("server", round)
            )
            _, state = noise.count(torch.ones(2), state, key("server", round), "")
            both, state = noise.add(total, state, key("server", round))
            assert torch.equal(alone, both)
            assert all(torch.equal(state[name], value) for name, value in after.items())


class Notes(Words):
    """Writes into a buffer, a parameter or a new buffer, on rare words alone."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training and bool((x == 9).any()):
            with torch.no_grad():
                if self.how == "in place":
                    self.seen += 1
                elif self.how == "anew":
                    self.seen = self.seen + 1
                elif self.how == "new":
                    self.register_buffer("last", x.clone())
                else:
                    next(self.parameters()).mul_(2)
        return super().forward(x)


@pytest.mark.parametrize("how", ["in place", "anew", "new", "parameter"])
@pytest.mark.parametrize("method", METHODS)
def test_an_example_on_which_the_network_writes_into_itself_is_one_that_failed_and_takes_no_other_along(
    how, method
):
    model, arrays = Notes(how), words()
    arrays.x.clamp_(max=8)
    rare = arrays.x.clone()
    rare[2, 0] = 9
    before = {name: value.clone() for name, value in model.state_dict().items()}
    keep = torch.tensor([0, 1, 3, 4, 5])
    without, _ = clipped_gradient_sum(
        model, F.cross_entropy, rare[keep], arrays.y[keep], clip_norm=0.3
    )
    got, raw = clipped_gradient_sum(
        model,
        F.cross_entropy,
        rare,
        arrays.y,
        clip_norm=0.3,
        method=method,
        verify="gradients",
        tolerate_writes=True,
    )
    assert torch.equal(got, without)
    assert (raw.failed, raw.refused) == (1, 0)
    assert "during a private step" in raw.problem
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "step", [train_privately, lambda model, work: joint_gradient(model, work)[1]]
)
def test_one_example_that_makes_the_network_write_does_not_silence_its_client(step):
    model, arrays = Notes("in place"), words(20)
    arrays.x.clamp_(max=8)
    arrays.x[3, 0] = 9
    model.train()
    assert step(model, task(arrays, plan=PrivacyPlan("sample", 0.3, 1.0, 1.0))) == {
        "steps": 1,
        "failed": 1,
    }
    assert not model.seen


def round_with(federation, change):
    """Returns the mean of a round in which `change` may rewrite the header and tensors of c0's reply."""
    replies = [
        (name, unpack(client.handle(pack(federation.fit()))))
        for name, client in federation.clients.items()
    ]
    reply = replies[0][1]
    header, tensors = change({**reply.header}, {**reply.tensors})
    replies[0] = ("c0", replace(reply, header=header, tensors=tensors))
    return round_mean(federation.uplink, iter(replies), seed=1, round=1)


CLIENTS = client_plan(Cohort(4, 4))
INVENTED = [
    [1e9, 0],
    [0, 40 * 14 + 999],
    [-400, 0],
    [1e308, 1e308],
    [-1e308, 1e308],
    [True, 0],
    ["1", 0],
]


@pytest.mark.parametrize("counts", INVENTED)
@pytest.mark.parametrize("plan", [SAMPLE_PLAN, CLIENTS])
def test_an_invented_count_of_failures_is_refused_and_not_believed(plan, counts):
    federation = Federation(privacy=plan, weights="equal")
    mean = round_with(federation, lambda header, tensors: (header | {"failures": counts}, tensors))
    assert "update.failures" in mean.refused["c0"]
    assert abs(mean.failures.total) < 30


def test_a_client_that_failed_and_is_refused_moves_one_count_by_one():
    without = client_plan(Cohort(4, 4), noise=0.0)
    federation = Federation(privacy=without, weights="equal")
    nan = {"values": torch.full_like(federation.params, math.nan)}
    mean = round_with(federation, lambda header, tensors: (header | {"failures": [1.0, 0.0]}, nan))
    assert list(mean.refused) == ["c0"]
    assert mean.failures == Tally(0.0, 1.0)
    assert round_with(
        federation, lambda header, tensors: (header | {"failures": [1.0, 1.0]}, tensors)
    ).refused


def test_the_noise_on_equal_counts_of_other_examples_is_another():
    answers = []
    for _ in range(2):
        federation = Federation(privacy=SAMPLE_PLAN)
        client = federation.clients["c0"]
        answers.append([unpack(client.handle(pack(federation.fit()))).header["failures"]])
        client.arrays.x[0] += 1e-3
        fresh = replace(client, memory=InMemoryState())
        answers[-1].append(unpack(fresh.handle(pack(federation.fit()))).header["failures"])
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]
    noise = ServerNoise(PrivacyPlan("client", 0.5, 1.0, 2.0))
    one, other = (
        noise.count(torch.zeros(2), {}, key("server"), hidden)[0] for hidden in ("a", "b")
    )
    assert not torch.equal(one, other)
