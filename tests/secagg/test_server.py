import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpress.errors import RecipeError, SecureError, WireError
from fedpress.secagg import SecAggClient, SecAggMessage, SecAggServer, SecurePlan, identity
from fedpress.secagg.masks import word_type
from fedpress.secagg.simulated import LEAST_UNMADE
from fedpress.wire.message import Message, deliver, pack, packed_size, unpack
from tests.secagg.people import changed, group, numbers, reported, secret


def opened(secure, members, *, mute=0):
    """Runs the second exchange; the first `mute` of the committee do not answer."""
    requests = secure.requests()
    for name in list(requests)[mute:]:
        secure.share(name, members[name].unmask(requests[name]))
    return secure.sum()


@given(
    n=st.integers(2, 9),
    bits=st.sampled_from([2, 7, 8, 15, 16, 17, 18, 31, 32, 33, 62]),
    size=st.integers(1, 40),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_secure_sum_equals_plain_sum_whoever_vanishes_within_the_plan(n, bits, size, seed, data):
    combiner, members = group(n, bits=bits)
    gone = data.draw(
        st.lists(
            st.sampled_from(sorted(members)),
            unique=True,
            max_size=n - SecurePlan(n, bits).survivors,
        )
    )
    before = data.draw(st.integers(0, len(gone)))
    values = torch.randint(
        -(1 << 62), 1 << 62, (n, size), generator=torch.Generator().manual_seed(seed)
    )
    secure = reported(combiner, members, values, silent=gone[:before])
    requests = secure.requests()
    for name in requests:
        if name not in gone:
            secure.share(name, members[name].unmask(requests[name]))
    kept = [row for row, name in enumerate(members) if name not in gone[:before]]
    half = 1 << (bits - 1)
    plain = [
        (sum(column) + half) % (2 * half) - half
        for column in zip(*values[kept].tolist(), strict=True)
    ]
    assert secure.sum().tolist() == plain
    assert secure.reported == sorted(name for name in members if name not in gone[:before])


def test_a_sparse_graph_and_a_small_committee_give_the_same_sum():
    combiner, members = group(40)
    plan = SecurePlan(40, 18)
    assert plan.edge_prob < 1
    values = numbers(40)
    secure = reported(combiner, members, values, silent=list(members)[:8])
    assert torch.equal(opened(secure, members, mute=5), values[8:].sum(0))


def test_a_committee_may_be_smaller_than_the_cohort():
    plan = SecurePlan(200, 18)
    assert plan.committee == 100
    assert 2 * plan.threshold > plan.committee + 100 * 0.05


def test_a_cohort_may_be_part_of_those_who_joined_and_rounds_follow_each_other():
    combiner, members = group(5, extra=3)
    names = list(members)
    for number, cohort in enumerate((names[:5], names[3:], names[1:6]), start=1):
        values = numbers(5, seed=number)
        secure = reported(combiner, {name: members[name] for name in cohort}, values, round=number)
        assert torch.equal(opened(secure, members), values.sum(0))


def test_too_few_reports_keep_the_sum_closed():
    combiner, members = group(6)
    with pytest.raises(SecureError, match="3 of 6 clients reported, and at least 4 must"):
        reported(combiner, members, numbers(6), silent=list(members)[:3]).requests()
    with pytest.raises(SecureError, match="no client reported"):
        combiner.open(2, list(members), 3).requests()


def test_too_few_answers_keep_the_sum_closed():
    combiner, members = group(6)
    with pytest.raises(SecureError, match="3 of the committee answered, and at least 4 must"):
        opened(reported(combiner, members, numbers(6)), members, mute=3)
    with pytest.raises(SecureError, match="was not asked to unmask"):
        combiner.open(2, list(members), 3).sum()


def test_what_one_client_sends_looks_like_noise_and_differs_in_every_round():
    _, members = group(5, bits=8)
    member, cohort = members["c0"], list(members)
    zeros = torch.zeros(20_000, dtype=torch.int64)
    first, second = (member.mask(zeros, round=r, cohort=cohort).tensors["masked"] for r in (1, 2))
    for masked in (first, second, (first - second) % 256):
        counts = torch.bincount(masked % 256, minlength=256)
        assert len(counts) == 256
        expected = len(zeros) / 256
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi2 - 255) < 4.5 * (2 * 255) ** 0.5  # its mean and spread for uniform bytes


def simulated_sum(n, size, *, silent=(), mute=0, by_hand=True):
    """Returns the sum over clients of a simulation; the first `mute` of the committee do not answer."""
    combiner, members = group(n)
    values, cohort = numbers(n, size=size), list(members)
    secure = combiner.open(1, cohort, size)
    if by_hand:
        secure = secure.simulated()
    for row, (name, member) in enumerate(members.items()):
        part = member.mask(values[row], round=1, cohort=cohort, by_hand=by_hand)
        assert bool(part.unmade) == by_hand
        if name not in silent:
            secure.add(name, part)
    requests = secure.requests()
    for name in list(requests)[mute:]:
        secure.share(name, members[name].unmask(requests[name], by_hand=by_hand))
    return secure.sum()


@pytest.mark.parametrize("size", [3, LEAST_UNMADE])
@pytest.mark.parametrize("silent", [(), ("c1", "c4")])
def test_a_simulated_sum_has_the_same_bits(size, silent):
    real = simulated_sum(6, size, silent=silent, by_hand=False)
    assert torch.equal(simulated_sum(6, size, silent=silent), real)


@pytest.mark.parametrize("gone", [{"silent": ("c0", "c1", "c2")}, {"mute": 3}])
def test_a_simulated_sum_stays_closed_for_the_same_reasons(gone):
    reasons = []
    for by_hand in (False, True):
        with pytest.raises(SecureError) as raised:
            simulated_sum(6, 3, by_hand=by_hand, **gone)
        reasons.append(str(raised.value))
    assert reasons[0] == reasons[1]


def messages_of(by_hand, size):
    """Returns all messages of a round of three clients."""
    combiner, members = group(3)
    values, cohort = numbers(3, size=size), list(members)
    secure = combiner.open(1, cohort, size)
    if by_hand:
        secure = secure.simulated()
    parts = [
        member.mask(values[row], round=1, cohort=cohort, by_hand=by_hand)
        for row, member in enumerate(members.values())
    ]
    for name, part in zip(cohort, parts, strict=True):
        secure.add(name, part)
    requests = secure.requests()
    answers = [members[name].unmask(request, by_hand=by_hand) for name, request in requests.items()]
    return [
        Message("update", part.header, part.tensors, unmade=part.unmade)
        for part in (*parts, *requests.values(), *answers)
    ]


@pytest.mark.parametrize("size", [3, LEAST_UNMADE + 9])
def test_simulated_messages_count_the_bytes_of_the_real_ones(size):
    real, simulated = messages_of(False, size), messages_of(True, size)
    assert [packed_size(m) for m in simulated] == [packed_size(m) for m in real]
    assert [packed_size(m) for m in real] == [len(pack(m)) for m in real]


def test_what_is_not_masked_cannot_become_bytes():
    for message in messages_of(True, 3):
        with pytest.raises(WireError, match="mask what leaves this process"):
            pack(message)
        arrived = deliver(message, packed_size(message))
        assert arrived.unmade == message.unmade
        assert arrived.by_hand
    # A receiver of bytes takes nobody's word for it.
    other = Message("update", {"unmade": {"masked": 18}, "by_hand": True}, {})
    arrived = unpack(pack(other))
    assert not arrived.unmade
    assert not arrived.by_hand


def test_masked_and_other_reports_are_not_added():
    combiner, members = group(3)
    values, cohort = numbers(3), list(members)
    real = combiner.open(1, cohort, 7)
    part = members["c0"].mask(values[0], round=1, cohort=cohort)
    other = members["c0"].mask(values[0], round=1, cohort=cohort, by_hand=True)
    for secure, wrong in ((real, other), (real.simulated(), part)):
        with pytest.raises(WireError, match="same engine"):
            secure.add("c0", wrong)
        assert secure.reported == []


def without(part, name):
    kept = {other: tensor for other, tensor in part.tensors.items() if other != name}
    return SecAggMessage(part.header, kept, part.unmade)


def cut(part, name):
    return SecAggMessage(
        part.header, {**part.tensors, name: part.tensors[name][..., :-1]}, part.unmade
    )


def faults_of(by_hand, fault):
    """Returns why a report and an answer are refused that have a fault in each of their tensors."""
    combiner, members = group(3)
    values, cohort = numbers(3), list(members)
    secure = combiner.open(1, cohort, 7)
    if by_hand:
        secure = secure.simulated()
    reasons = []

    def refused(take, name, part):
        for tensor in sorted(part.tensors):
            with pytest.raises(WireError) as raised:
                take(name, fault(part, tensor))
            reasons.append(str(raised.value))
        take(name, part)

    for row, (name, member) in enumerate(members.items()):
        part = member.mask(values[row], round=1, cohort=cohort, by_hand=by_hand)
        refused(secure.add, name, part)
    for name, request in secure.requests().items():
        refused(secure.share, name, members[name].unmask(request, by_hand=by_hand))
    assert torch.equal(secure.sum(), values.sum(0))
    return reasons


@pytest.mark.parametrize("fault", [without, cut])
def test_a_faulty_message_of_a_simulation_is_refused_for_the_same_reason(fault):
    reasons = faults_of(True, fault)
    assert reasons == faults_of(False, fault)
    assert len(reasons) == 3 * 5 + 3 * 4


def test_the_same_question_gets_the_same_bytes_even_after_a_restart():
    combiner, members = group(4)
    values, cohort = numbers(4), list(members)
    secure = combiner.open(1, cohort, 7)
    first = {
        name: m.mask(values[row], round=1, cohort=cohort)
        for row, (name, m) in enumerate(members.items())
    }
    for name, part in first.items():
        secure.add(name, part)
    request = secure.requests()["c1"]
    answer = members["c1"].unmask(request)

    known = {name: identity(secret(name)) for name in members}
    again = SecAggClient("c1", secret("c1"), SecurePlan(4, 18), known, "run")
    again.load_state_(json.loads(json.dumps(members["c1"].state())))
    assert again.state() == members["c1"].state()
    for old, new in (
        (first["c1"], again.mask(values[1], round=1, cohort=cohort)),
        (answer, again.unmask(request)),
        (combiner.roster(), SecAggServer.roster(combiner)),
    ):
        assert old.header == new.header
        assert old.tensors.keys() == new.tensors.keys()
        assert all(torch.equal(old.tensors[name], new.tensors[name]) for name in old.tensors)
    with pytest.raises(SecureError, match="answered another mask question"):
        again.mask(values[2], round=1, cohort=cohort)


def test_a_server_that_was_stopped_goes_on_with_its_roster():
    combiner, members = group(4)
    known = {name: identity(secret(name)) for name in members}
    fresh = SecAggServer(SecurePlan(4, 18), known, "run")
    fresh.load_roster_(combiner.roster())
    for name, member in members.items():
        fresh.accepted(name, member.accept(fresh.roster()))
    values = numbers(4)
    assert torch.equal(opened(reported(fresh, members, values), members), values.sum(0))


@pytest.mark.parametrize(
    "state", [{}, {"roster": 3, "answered": {}}, {"roster": [], "answered": {"1": {}}}]
)
def test_a_broken_state_is_refused(state):
    _, members = group(2)
    with pytest.raises(RecipeError, match=r"^state: "):
        members["c0"].load_state_(state)


def test_the_state_of_another_run_is_refused():
    _, members = group(2)
    _, others = group(2, run="other")
    with pytest.raises(RecipeError, match="not the state of 'c0' in run 'other'"):
        others["c0"].load_state_(members["c0"].state())


def test_under_another_name_of_the_run_the_last_answered_round_stays_answered():
    """The run has another name after an update; a second sum of a round would show single clients."""
    plan, names = SecurePlan(4, 18), [f"c{i}" for i in range(4)]
    _, before = group(4)
    for name, member in before.items():
        member.mask(torch.ones(3, dtype=torch.int64), round=5, cohort=names)
        assert name in names
    known = {name: identity(secret(name)) for name in names}
    after = {name: SecAggClient(name, secret(name), plan, known, "renamed") for name in names}
    for name, member in after.items():
        member.take_over_(json.loads(json.dumps(before[name].state())))
    server = SecAggServer(plan, known, "renamed")
    for name, member in after.items():
        server.join(name, member.join())
    for name, member in after.items():
        server.accepted(name, member.accept(server.roster()))
    for round in (4, 5):
        with pytest.raises(SecureError, match=f"round {round}"):
            after["c1"].mask(torch.ones(3, dtype=torch.int64), round=round, cohort=names)
    values = numbers(4)
    secure = server.open(6, names, 7)
    for row, (name, member) in enumerate(after.items()):
        secure.add(name, member.mask(values[row], round=6, cohort=names))
    for name, request in secure.requests().items():
        secure.share(name, after[name].unmask(request))
    assert torch.equal(secure.sum(), values.sum(0))


def test_only_the_last_two_rounds_are_remembered():
    _, members = group(2)
    for number in range(1, 6):
        members["c0"].mask(torch.ones(1, dtype=torch.int64), round=number, cohort=list(members))
    assert list(members["c0"].state()["answered"]) == ["4", "5"]


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(3),
        torch.zeros(3, dtype=torch.int32),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(1, 1).long(),
    ],
)
def test_values_that_are_no_whole_numbers_are_refused(values):
    _, members = group(2)
    with pytest.raises(RecipeError, match=r"^values: expected an int64 vector"):
        members["c0"].mask(values, round=1, cohort=list(members))


def test_within_the_bound_of_the_plan_no_sum_can_overflow():
    with pytest.raises(RecipeError, match="got 8, but a sum of 4 values up to 32 needs 9"):
        SecurePlan(4, 8, bound=32)
    combiner, members = group(4, bits=8, bound=31)
    values = torch.tensor([[31, -31]] * 4)
    assert torch.equal(opened(reported(combiner, members, values), members), values.sum(0))
    with pytest.raises(RecipeError, match="exceeds the bound of 31"):
        members["c0"].mask(torch.tensor([-32]), round=2, cohort=list(members))


def test_a_round_that_cannot_open_names_its_reason():
    combiner, members = group(3)
    with pytest.raises(RecipeError, match=r"^size: got 0, expected a whole number above 0"):
        combiner.open(1, list(members), 0)
    with pytest.raises(RecipeError, match=r"^cohort: 'x' did not accept the roster"):
        combiner.open(1, ["c0", "c1", "x"], 3)
    early = SecAggServer(SecurePlan(3, 18), {}, "run")
    with pytest.raises(RecipeError, match=r"^roster: there is no roster yet; call `roster`"):
        early.open(1, list(members), 3)


def test_the_server_keeps_one_vector_however_many_report():
    combiner, members = group(6)
    values = numbers(6, size=10_000)
    secure = reported(combiner, members, values)
    assert len(pickle.dumps(secure)) < 2 * 10_000 * word_type(18).itemsize


def test_a_wrong_answer_of_the_committee_is_found_and_left_out():
    combiner, members = group(9)
    values = numbers(9)
    secure = reported(combiner, members, values, silent=["c8"])
    requests = secure.requests()
    for at, name in enumerate(requests):
        part = members[name].unmask(requests[name])
        if at == 2:  # unlocks with rubbish, so that it spoils everybody's keys if it is asked
            part = changed(part, opens=part.tensors["opens"] ^ 1)
        if at == 5:
            part = changed(part, body=part.tensors["body"] ^ 1)
        secure.share(name, part)
    assert torch.equal(secure.sum(), values[:8].sum(0))


def test_too_many_wrong_answers_keep_the_sum_closed():
    combiner, members = group(6)
    secure = reported(combiner, members, numbers(6))
    requests = secure.requests()
    for at, name in enumerate(requests):
        part = members[name].unmask(requests[name])
        secure.share(name, part if at > 2 else changed(part, body=part.tensors["body"] ^ 1))
    with pytest.raises(
        SecureError, match="3 of the committee gave right answers, and at least 4 must"
    ):
        secure.sum()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"cohort": 1}, "cohort"),
        ({"cohort": 10**6}, "cohort"),
        ({"bits": 1}, "bits"),
        ({"bits": 63}, "bits"),
        ({"max_dropout": 0.5}, "max_dropout"),
        ({"max_dropout": float("nan")}, "max_dropout"),
        ({"max_corrupt": -0.1}, "max_corrupt"),
        ({"max_corrupt": 0.4}, "max_corrupt"),
        ({"bound": 0}, "bound"),
        ({"cohort": 3, "max_corrupt": 0.49}, "max_dropout"),
    ],
)
def test_a_plan_that_protects_nobody_is_refused(settings, name):
    with pytest.raises(RecipeError, match=rf"^{name}:"):
        SecurePlan(**{"cohort": 10, "bits": 18, **settings})
