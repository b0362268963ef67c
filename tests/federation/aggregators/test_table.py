"""What holds for every aggregator of the table, through the uplink as a server uses it."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedpress.codecs import VALUES, Bound, Clip, Discretize, Key, Quantize
from fedpress.core.random import secret_key
from fedpress.errors import RecipeError, WireError
from fedpress.federation import (
    AGGREGATORS,
    AnyAggregator,
    Cohort,
    Guarantee,
    Payload,
    SecureSum,
    Uplink,
)
from fedpress.federation.gatherer import round_mean
from fedpress.privacy.plan import PrivacyPlan
from fedpress.secagg import SecAggClient, SecAggMessage, SecurePlan, identity
from fedpress.transport import LocalTransport
from fedpress.wire import Message, pack, unpack
from tests.federation.federation import SAMPLE_PLAN, client_plan

LONGEST = 2.0
"""L2 norm that the list promises."""
SCALE = 1 << 16
"""Steps of the secure grid in one unit: fine enough to compare with floats."""


@dataclass
class Party:
    """A client's part in a secure sum, without a model."""

    member: SecAggClient

    def handle(self, request):
        message = unpack(request)
        part = SecAggMessage(dict(message.header), dict(message.tensors))
        kind, answer = {
            "join": lambda: ("join", self.member.join()),
            "roster": lambda: ("accepted", self.member.accept(part)),
            "unmask": lambda: ("shares", self.member.unmask(part)),
        }[message.kind]()
        return pack(Message(kind, answer.header, answer.tensors))


@dataclass
class Round:
    """One round of `clients` that send vectors of `size` values through an aggregator of the table."""

    kind: str
    clients: int
    size: int
    members: dict = field(default_factory=dict)

    def __post_init__(self):
        self.names = [f"c{i}" for i in range(self.clients)]
        chain, aggregator = (Clip(clip_norm=LONGEST),), None
        if self.kind == "secure":
            keys = {name: secret_key(3, name) for name in self.names}
            plan = SecurePlan(cohort=self.clients, bits=24)
            identities = {name: identity(key) for name, key in keys.items()}
            limit = self.clients * (2 * SCALE + 2)
            aggregator = SecureSum(plan, self.size, limit, tuple(identities.items()))
            chain = (*chain, Discretize(scale=float(SCALE)))
            self.members = {
                name: SecAggClient(name, key, plan, identities, "run") for name, key in keys.items()
            }
        else:
            aggregator = AGGREGATORS[self.kind]()
        cohort = Cohort(self.clients, self.clients)
        self.uplink = Uplink.bind(
            Payload(self.size, chain=chain), cohort, aggregator=aggregator, weights="equal"
        )

    def mean(self, vectors, *, believed=True):
        """Aggregates one vector for each client; one that is not `believed` was not clipped by its client."""
        transport = LocalTransport({n: Party(m).handle for n, m in self.members.items()})
        session = self.uplink.aggregator.open(transport, "run")
        replies = []
        for name, vector in zip(self.names, vectors, strict=True):
            if vector is None:
                replies.append((name, None))
                continue
            tensors = {VALUES: vector}
            if believed:
                tensors = self.uplink.encode({"update": vector}, Key(1, 1, name))
            header = {"round": 1, "examples": 1}
            if name in self.members:
                part = self.members[name].mask(tensors[VALUES], round=1, cohort=self.names)
                header["secure"], tensors = dict(part.header), dict(part.tensors)
            replies.append((name, Message("update", header, tensors)))
        return round_mean(self.uplink, replies, seed=1, round=1, session=session, cohort=self.names)


SEEING = [kind for kind in AGGREGATORS if AGGREGATORS[kind]().sees_updates]
ROOM = {"secure": 2 / SCALE}
"""What a grid may be off."""


def gauss(n, size, scale=0.1, seed=0):
    return list(scale * torch.randn(n, size, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_a_recipe_names_every_row_alone_or_in_a_table(kind):
    read = TypeAdapter(AnyAggregator).validate_python
    assert read(kind) == read({"kind": kind}) == AGGREGATORS[kind]()
    with pytest.raises(ValidationError, match="mean"):
        read("average")


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("kind", AGGREGATORS)
def test_what_all_send_alike_comes_out(kind, size):
    (vector,) = gauss(1, size)
    mean = Round(kind, 4, size).mean([vector] * 4)
    torch.testing.assert_close(mean.update, vector, rtol=0, atol=ROOM.get(kind, 1e-7))
    assert not mean.refused


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_zeros_come_out_as_zeros(kind):
    assert not Round(kind, 4, 5).mean([torch.zeros(5)] * 4).update.any()


@pytest.mark.parametrize("kind", SEEING)
def test_one_client_alone_is_its_own_aggregate(kind):
    (vector,) = gauss(1, 3)
    assert torch.equal(Round(kind, 1, 3).mean([vector]).update, vector)


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_the_same_replies_give_the_same_bits(kind):
    vectors = gauss(5, 33)
    one, two = (Round(kind, 5, 33).mean(vectors).update for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", SEEING)
def test_what_is_not_finite_is_refused_and_the_rest_counts_as_if_it_had_not_come(kind, bad):
    vectors = gauss(4, 3)
    spoiled = vectors[2].clone()
    spoiled[1] = bad
    mean = Round(kind, 4, 3).mean([*vectors[:2], spoiled, vectors[3]], believed=False)
    assert "NaN or infinity" in mean.refused["c2"]
    without = Round(kind, 4, 3).mean([*vectors[:2], None, vectors[3]])
    assert torch.equal(mean.update, without.update)


@pytest.mark.parametrize("kind", SEEING)
def test_without_a_reply_there_is_no_update(kind):
    mean = Round(kind, 3, 4).mean([None] * 3)
    assert mean.update is None
    assert set(mean.refused) == {"c0", "c1", "c2"}


@pytest.mark.parametrize("factor", [1.0, 1e3, 1e30])
@pytest.mark.parametrize("kind", SEEING)
def test_an_update_that_is_far_too_long_moves_no_aggregate_by_more_than_the_promise(kind, factor):
    for seed in range(20):
        vectors = gauss(5, 6, seed=seed)
        loud = factor * LONGEST * torch.nn.functional.normalize(vectors[0], dim=0)
        with_it = Round(kind, 5, 6).mean([loud, *vectors[1:]], believed=False).update
        without = Round(kind, 5, 6).mean([torch.zeros(6), *vectors[1:]]).update
        moved = float((with_it.double() - without.double()).norm())
        assert moved <= (LONGEST / 5 if kind == "mean" else LONGEST) * (1 + 1e-5)


def test_a_client_that_sends_too_much_into_a_secure_sum_closes_it():
    vectors = gauss(4, 3)
    loud = torch.full((3,), 100 * SCALE)  # whole numbers of the grid, beyond its limit
    going = Round("secure", 4, 3)
    encoded = [going.uplink.encode({"update": v}, Key(1, 1, "c"))[VALUES] for v in vectors[1:]]
    mean = going.mean([loud, *encoded], believed=False)
    assert mean.update is None
    assert "overflowed" in mean.refused["c0"]


FLOATS = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4
).map(torch.tensor)


@pytest.mark.recipe
@settings(max_examples=150, deadline=None)
@given(FLOATS, FLOATS, st.sampled_from(SEEING))
@example(torch.full((4,), 3e38), torch.full((4,), -3e38), "mean")
@example(torch.zeros(4), torch.full((4,), 1e-45), "mean")
def test_one_client_moves_the_sum_by_at_most_the_sensitivity(mine, others, kind):
    aggregator = AGGREGATORS[kind]()
    claim = aggregator.sensitivity(Bound(4, l2=LONGEST), 3)
    if claim is None:  # nothing is claimed, so nothing rests on it
        return
    rest = [others, torch.tensor([0.1, 0.0, -0.2, 0.3])]
    going = Round(kind, 3, 4)
    behind = 3 if aggregator.sums else 1  # a sum is divided by the weight of all three
    sums = [
        behind * going.mean([first, *rest], believed=False).update.double()
        for first in (mine, torch.zeros(4))
    ]
    assert float((sums[0] - sums[1]).norm()) <= claim * (1 + 1e-5)


def secure_sum(size=2):
    return SecureSum(SecurePlan(cohort=4, bits=16), size, 1000, ())


def bind(kind, unit, trust):
    aggregator = secure_sum() if kind == "secure" else AGGREGATORS[kind]()
    privacy = {
        None: None,
        "sample": SAMPLE_PLAN,
        "client": client_plan(Cohort(4, 4)),
    }[unit]
    chain = (Discretize(scale=10.0),) if kind == "secure" else ()
    if kind == "secure" and unit != "client":
        chain = (Clip(clip_norm=1.0), *chain)
    return Uplink.bind(
        Payload(2, chain=chain),
        Cohort(4, 4),
        aggregator=aggregator,
        weights="equal",
        guarantee=Guarantee(plan=privacy, trust=trust),
    )


@pytest.mark.parametrize("trust", ["central", "distributed"])
@pytest.mark.parametrize("unit", ["sample", "client"])
def test_an_aggregator_without_a_promise_is_refused_where_noise_must_hide_a_unit_in_it(unit, trust):
    words = "secure sum" if trust == "distributed" else "can change without limit"
    with pytest.raises(RecipeError, match=words):
        bind("median", unit, trust)


@pytest.mark.parametrize("unit", [None, "sample", "client"])
def test_an_aggregator_without_a_promise_is_allowed_where_every_vector_is_private_before(unit):
    uplink = bind("median", unit, None if unit is None else "local")
    replies = [
        (
            f"c{i}",
            Message(
                "update",
                {"round": 1, "examples": 5},
                {VALUES: torch.tensor([float(i), 10.0 - i])},
            ),
        )
        for i in range(4)
    ]
    mean = round_mean(uplink, replies, seed=1, round=1)
    assert mean.update.tolist() == [1.5, 8.5]


def test_noise_of_all_clients_together_needs_a_secure_sum():
    with pytest.raises(RecipeError, match='set aggregator = "secure"'):
        bind("mean", "client", "distributed")
    assert bind("secure", "client", "distributed").trust.noise == "sum"


@pytest.mark.parametrize("kind", [k for k in AGGREGATORS if k != "mean"])
def test_weights_by_examples_are_refused_where_an_aggregator_cannot_weigh(kind):
    aggregator = secure_sum() if kind == "secure" else AGGREGATORS[kind]()
    chain = (Clip(clip_norm=1.0), Discretize(scale=1.0)) if kind == "secure" else ()
    with pytest.raises(RecipeError, match='set weights = "equal"'):
        Uplink.bind(
            Payload(2, chain=chain), Cohort(4, 4), aggregator=aggregator, weights="examples"
        )


class Wide:
    """A sum in which one unit counts twice, as with a client that is in two cohorts at once."""

    kind = "wide"
    sees_updates = True
    weights = "equal"
    sums = True

    def sensitivity(self, moved, cohort):
        return 2 * moved.l2

    def check(self, vector_codecs):
        pass


def test_the_servers_noise_grows_with_the_sensitivity():
    cohort, plan = Cohort(4, 4), PrivacyPlan("client", 0.5, 1.0, 3.0)
    uplink = Uplink.bind(
        Payload(2), cohort, aggregator=Wide(), weights="equal", guarantee=Guarantee(plan)
    )
    assert uplink.vector_codecs[0].noise.plan.noise_std == 2 * 3.0 * 0.5


def test_a_lossy_codec_cannot_carry_an_update_beyond_the_promise():
    uplink = Uplink.bind(
        Payload(64, chain=(Clip(clip_norm=1.0), Quantize(bits=4))), Cohort(2, 2), weights="equal"
    )
    sent = uplink.encode({"update": torch.ones(64)}, Key(1, 1, "c0"))
    scales = {name: 1e3 * t if t.is_floating_point() else t for name, t in sent.items()}
    received = uplink.receive(scales, Key(1, 1, "c0"))["update"]
    assert float(received.double().norm()) <= 1.0
    with pytest.raises(WireError):
        uplink.receive({VALUES: sent[VALUES]}, Key(1, 1, "c0"))
